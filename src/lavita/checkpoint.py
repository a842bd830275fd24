"""Save and resume: one file a checkpoint, written beside and renamed, read with `weights_only`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from lavita.config import ConfigError, StrictConfig, load_config, read_yaml

_NAME = re.compile(r"step-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `step-<step>.pt` in `folder` and deletes all but the last `keep` checkpoints.

    Args:
        folder: made if missing.
        step: optimizer steps done.
        state: tensors, numbers, strings, and lists and dicts of them.
        keep: how many checkpoints stay, this one included.

    Returns:
        The file. It is complete or absent: a kill at any moment leaves the one before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{step:08d}.pt"
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    # A later file is a damaged one that this run resumed before: it must not count as one of those kept.
    for old in [other for other in list_checkpoints(folder) if other <= file][:-keep]:
        old.unlink()
    return file


def fingerprint(model: ModelMixin) -> str:
    """SHA-256 of a diffusers model's configuration and weights: equal where models are interchangeable."""
    digest = hashlib.sha256()
    public = {key: value for key, value in model.config.items() if not key.startswith("_")}
    digest.update(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if _NAME.fullmatch(file.name))


def load_last_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that can be read, as (step, state), or None where there is none.

    A damaged file is named on the console and passed over for the one before it.

    Raises:
        ValueError: where there are checkpoints, and none can be read.
    """
    files = list_checkpoints(folder)
    for file in reversed(files):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            print(f"{file}: damaged, trying the one before it ({type(error).__name__})", file=sys.stderr)
            continue
        match = _NAME.fullmatch(file.name)
        assert match is not None
        return int(match.group(1)), state
    if files:
        raise ValueError(f"{folder}: none of its {len(files)} checkpoints can be read")
    return None


def check_resumable(run_dir: Path, config: StrictConfig, may_differ: Set[str]) -> None:
    """Refuses to resume a run folder under another configuration; one without checkpoints starts anew.

    Args:
        run_dir: the run's folder, with the `config.yaml` that it was started with.
        config: what was asked for now.
        may_differ: dotted names of the fields that change no step.

    Raises:
        ConfigError: naming the first other field that differs.
    """
    file = run_dir / "config.yaml"
    if not file.exists() or not list_checkpoints(run_dir / "checkpoints"):
        return
    # Through the class: a field that is newer than the run has its default, which is what the run did.
    started = load_config(type(config), read_yaml(file), source=str(file))
    before, now = _flat(started.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    for key in sorted(now.keys() - may_differ):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{run_dir} was started with {key}={before.get(key)}, but {now.get(key)} was asked for; "
                "use another run_dir"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
