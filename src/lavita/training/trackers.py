"""Metrics and samples of a run in TensorBoard and Weights & Biases, beside the JSONL files that every run has."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lavita.core.config import ConfigError
from lavita.training.config import RunConfig

WANDB_ID = "wandb-id.txt"


class Tracker(Protocol):
    """A place where the numbers of a run are shown."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers of a step by their names."""
        ...

    def image(self, step: int, name: str, file: Path) -> None:
        """Shows a picture of a step."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class Trackers:
    """All trackers of a run (`train.trackers`); none, and no library loaded, where it names none."""

    def __init__(self, config: RunConfig, resume_step: int, active: bool = True) -> None:
        """Opens them.

        Args:
            config: the run.
            resume_step: steps done; what was shown of later ones is taken back, as it comes again.
            active: False in all but the first of several processes.

        Raises:
            ConfigError: where a library is missing or does not start.
        """
        kinds: dict[str, Callable[[RunConfig, int], Tracker]] = {
            "tensorboard": _TensorBoard,
            "wandb": _WeightsAndBiases,
        }
        self._trackers = [kinds[name](config, resume_step) for name in config.train.trackers if active]

    def log(self, step: int, values: Mapping[str, float | Sequence[float]], prefix: str = "train") -> None:
        """Shows numbers as `<prefix>/<name>`, those of a list as `<prefix>/<name>/0`, `/1`, ...; `step` itself not."""
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, (int, float)):
                flat[f"{prefix}/{name}"] = value
            else:
                flat.update({f"{prefix}/{name}/{place}": number for place, number in enumerate(value)})
        flat.pop(f"{prefix}/step", None)
        for tracker in self._trackers:
            tracker.log(step, flat)

    def image(self, step: int, file: Path, name: str = "samples") -> None:
        """Shows a picture, such as a contact sheet."""
        for tracker in self._trackers:
            tracker.image(step, name, file)

    def close(self) -> None:
        """Writes what is left; to be called at the end of the run, however it ends."""
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    """Event files in `run_dir/tensorboard`, one for each start of the run."""

    def __init__(self, config: RunConfig, resume_step: int) -> None:
        writer = _load("torch.utils.tensorboard", "tensorboard", "track").SummaryWriter
        self._writer = writer(str(config.run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run is resumed from a checkpoint: what came before it must be on disk

    def image(self, step: int, name: str, file: Path) -> None:
        with Image.open(file) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of W&B, the same one after a resume.

    Steps that a resumed run repeats are ignored there, as a run's steps only rise; they have the same numbers.
    """

    def __init__(self, config: RunConfig, resume_step: int) -> None:
        self._wandb = wandb = _load("wandb", "wandb", "wandb")
        file = config.run_dir / WANDB_ID
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume_step or not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(secrets.token_hex(4) + "\n")
            partial.replace(file)
        try:
            self._run = wandb.init(
                id=file.read_text().strip(),
                resume="allow",
                dir=str(config.run_dir),
                project=os.environ.get("WANDB_PROJECT", "lavita"),
                name=config.run_dir.name,
                config=config.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"train.trackers names wandb, which does not start: {error}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _load(module: str, name: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'train.trackers names {name}, which is not installed; pip install "lavita[{extra}]"'
        ) from error
