"""Reads the folders of training runs."""

from __future__ import annotations

import json
from typing import Any

from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.checkpoint import Checkpoint, load_last_checkpoint
from lavita.training.config import RunConfig


def lines_of(config: RunConfig | AutoencoderConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of one of a run's logs; none if it does not exist."""
    file = config.run_dir / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_checkpoint(config: RunConfig | AutoencoderConfig) -> Checkpoint:
    """The newest checkpoint of a run, which must have one."""
    checkpoint = load_last_checkpoint(config.run_dir / "checkpoints")
    assert checkpoint is not None
    return checkpoint
