"""Metrics and samples of a run in TensorBoard and Weights & Biases, in addition to the JSONL files of every run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from lavita.core.config import ConfigError
from lavita.core.files import write_text

WANDB_ID = "wandb-id.txt"


class Tracker(Protocol):
    """A service that shows the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of a step by their names."""
        ...

    def image(self, step: int, name: str, file: Path) -> None:
        """Shows an image file at a step."""
        ...

    def close(self) -> None:
        """Writes pending values."""
        ...


class Trackers:
    """All trackers of a run (`train.trackers`); a library is loaded only if it is used."""

    def __init__(
        self,
        names: Sequence[Literal["tensorboard", "wandb"]],
        run_dir: Path,
        config: Mapping[str, Any],
        resume_step: int,
    ) -> None:
        """Opens the trackers.

        Args:
            names: which ones; none in all but the first of several processes.
            run_dir: the run's folder.
            config: the configuration of the run, as JSON can hold it.
            resume_step: steps done; values of later steps are withdrawn, because the run will log them again.

        Raises:
            ConfigError: if a library is missing or does not start.
        """
        self._trackers: list[Tracker] = []
        for name in names:
            if name == "tensorboard":
                self._trackers.append(_TensorBoard(run_dir, resume_step))
            else:
                self._trackers.append(_WeightsAndBiases(run_dir, config, resume_step))

    def log(self, step: int, values: Mapping[str, float | Sequence[float]], prefix: str = "train") -> None:
        """Shows values as `<prefix>/<name>`, and lists as `<prefix>/<name>/0`, `/1`, ...; `step` is left out."""
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, (int, float)):
                flat[f"{prefix}/{name}"] = value
            else:
                flat.update({f"{prefix}/{name}/{index}": number for index, number in enumerate(value)})
        flat.pop(f"{prefix}/step", None)
        for tracker in self._trackers:
            tracker.log(step, flat)

    def image(self, step: int, file: Path, name: str = "samples") -> None:
        """Shows an image file, such as a contact sheet."""
        for tracker in self._trackers:
            tracker.image(step, name, file)

    def close(self) -> None:
        """Writes pending values; call this at the end of the run, however it ends."""
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    """Event files in `run_dir/tensorboard`, one per start of the run."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        writer = _load("torch.utils.tensorboard", "tensorboard", "track").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run resumes from a checkpoint: everything before it must be on disk

    def image(self, step: int, name: str, file: Path) -> None:
        with Image.open(file) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues.

    The service ignores the steps that a resumed run repeats, because its steps only increase; their values are equal.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int) -> None:
        self._wandb = wandb = _load("wandb", "wandb", "wandb")
        file = run_dir / WANDB_ID
        if not resume_step or not file.exists():
            write_text(file, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_dir),
                project=os.environ.get("WANDB_PROJECT", "lavita"),
                name=run_dir.name,
                config=dict(config),
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
