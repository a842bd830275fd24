"""What the model card of a run says about its training, read from the files of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lavita
from lavita.core.config import load_config, read_yaml
from lavita.core.text import read_text
from lavita.sampling.model_card import CardFacts
from lavita.training.config import RunConfig
from lavita.training.data_record import RECORD

Row = dict[str, Any]


def run_facts(run_dir: Path) -> CardFacts:
    """The facts of a run: its data, objective, optimizer, steps and hours, and the scores that it measured itself.

    Paths are left out: they say nothing to others, and may say too much.

    Args:
        run_dir: folder with `config.yaml` and the files that training writes.

    Raises:
        ValueError: if the configuration cannot be read.
    """
    config = load_config(RunConfig, read_yaml(run_dir / "config.yaml"), source=str(run_dir / "config.yaml"))
    settings, data = config.train, config.data
    metrics = _rows(run_dir / "metrics.jsonl")
    step = metrics[-1]["step"] if metrics else 0
    hours = _seconds(metrics, settings.batch_size) / 3600
    clips = f"{data.num_frames} frames at interval {data.frame_interval}, {data.resolution} pixels"
    if data.buckets:
        shapes = ", ".join(map(str, data.buckets))
        clips = f"{shapes} (frames x height x width in pixels) at interval {data.frame_interval}"
    mirrored = ", mirrored at random" if data.horizontal_flip else ""
    joint = f", with {data.num_images} images after each clip" if data.num_images else ""
    kind = "" if data.dataset == "folder" else f" of {data.dataset}"
    started = settings.init_from
    training = {
        "Videos": f"{_num_videos(run_dir):,}{kind}{', with captions' if data.captions is not None else ''}",
        "Clips": f"{clips}{mirrored}{joint}",
        "Steps": f"{step:,} of {settings.batch_size} clips",
        "Time": f"{hours:.1f} hours on {_device()}" if hours >= 0.1 else f"{hours * 60:.0f} minutes on {_device()}",
        "Optimizer": f"{settings.optimizer}, peak learning rate {settings.learning_rate:g}",
        "Averaged weights": f"decay {settings.ema_decay:g}",
        "Started from": "random weights" if started is None else f"`{Path(started).name}`",
        "Software": f"lavita {lavita.__version__}, torch {torch.__version__.partition('+')[0]}",
    }
    if validation := _rows(run_dir / "validation.jsonl"):
        training["Validation loss"] = f"{validation[-1]['loss']:.4f} after {validation[-1]['step']:,} steps"
    return CardFacts(training=training, scores=_own_scores(_rows(run_dir / "scores.jsonl")))


def newest_sheet(run_dir: Path) -> Path | None:
    """The run's newest contact sheet of samples; None if there is none."""
    return max((run_dir / "samples").glob("step-*.png"), default=None)


def _rows(file: Path) -> list[Row]:
    """The JSON objects of a file, one per line; damaged lines are left out."""
    rows = []
    for line in read_text(file).splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _seconds(metrics: list[Row], batch_size: int) -> float:
    """Time of the optimizer steps, from the clips per second of each line."""
    before, total = 0, 0.0
    for row in metrics:
        if row.get("clips_per_second"):
            total += (row["step"] - before) * batch_size / row["clips_per_second"]
        before = row["step"]
    return total


def _num_videos(run_dir: Path) -> int:
    file = run_dir / RECORD
    try:
        contents: Mapping[str, Any] = json.loads(read_text(file)) if file.exists() else {}
        return len(contents.get("videos", {}))
    except ValueError:
        return 0


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _own_scores(rows: list[Row]) -> list[dict[str, str]]:
    """The newest score that training measured."""
    if not rows:
        return []
    newest = rows[-1]
    return [
        {
            "metric": name,
            "value": f"{newest[name]:.4g}",
            "standard error": f"{newest[error]:.2g}",
            "protocol": f"during training, after {newest['step']:,} steps",
        }
        for name in newest
        if (error := f"{name}_standard_error") in newest
    ]
