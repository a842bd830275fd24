"""Reads the folder of a training run, finished or still running."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lavita.core.config import ConfigError, read_yaml

Record = dict[str, Any]
_CHECKPOINT = re.compile(r"step-(\d+)")
_SHEET = re.compile(r"step-(\d+)\.png")
_SECONDS_OF_SILENCE = 300  # after which a run that has written nothing may be dead


@dataclass(frozen=True)
class Run:
    """The logs and results of one run so far."""

    folder: Path
    name: str
    """Short name, unique among the runs of a report."""
    config: dict[str, Any]
    """Values of all fields by their dotted names."""
    metrics: list[Record]
    """Lines of `metrics.jsonl`, sorted by step, like `validation` and `scores`."""
    validation: list[Record]
    scores: list[Record]
    events: list[Record]
    """Lines of `events.jsonl`, in file order."""
    samples: list[tuple[int, Path]]
    """Step and contact sheet of each set of samples, sorted by step."""
    checkpoint: int | None
    """Step of the last checkpoint."""
    parameters: int | None
    """Number of parameters of the transformer, once it has been saved or logged."""
    damaged: list[str]
    """One sentence for each file with unreadable lines."""
    updated: float | None
    """Time of the newest line, in seconds since the epoch."""

    @property
    def step(self) -> int:
        """Steps done, according to logs and checkpoints."""
        return max(self.metrics[-1]["step"] if self.metrics else 0, self.checkpoint or 0)

    @property
    def total(self) -> int | None:
        """Planned number of steps."""
        total = self.config.get("train.steps", self.config.get("steps"))
        return total if isinstance(total, int) else None

    @property
    def batch_size(self) -> int | None:
        """Clips per step."""
        size = self.config.get("train.batch_size", self.config.get("batch_size"))
        return size if isinstance(size, int) else None

    def state(self, now: float) -> str:
        """Whether the run is finished, stopped or running, as text; `now` in seconds since the epoch."""
        last = self.events[-1] if self.events else {}
        if last.get("event") == "end" or (not self.events and self.total is not None and self.step >= self.total):
            return "finished"
        if last.get("event") == "stop":
            return f"stopped at step {last['step']:,}"
        if last.get("event") == "not-finite" and self.config.get("train.bad_steps") != "skip":
            return f"ended at step {last['step']:,}: the loss is not finite"
        if self.updated is None:
            return "just started"
        silence = max(0.0, now - self.updated)
        if silence < _SECONDS_OF_SILENCE:
            return "running"
        return f"nothing logged for {clock(silence)}: stopped, or a long step"

    def seconds(self) -> float | None:
        """Run time: as logged, otherwise estimated from the logged speed."""
        logged = [row["seconds"] for row in self.metrics if is_number(row.get("seconds"))]
        if logged:
            return float(logged[-1])
        if self.batch_size is None:
            return None
        total, before = 0.0, 0
        for row in self.metrics:
            if is_number(row.get("clips_per_second")) and row["clips_per_second"] > 0:
                total += (row["step"] - before) * self.batch_size / row["clips_per_second"]
            before = row["step"]
        return total or None

    def seconds_left(self) -> float | None:
        """Estimated time for the remaining steps at the latest speed; None if it is unknown."""
        speeds = [row["clips_per_second"] for row in self.metrics[-20:] if is_number(row.get("clips_per_second"))]
        if not speeds or self.total is None or self.batch_size is None or not sum(speeds):
            return None
        return max(0, self.total - self.step) * self.batch_size / (sum(speeds) / len(speeds))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def clock(seconds: float) -> str:
    """A duration as text: 12 s, 3 min, 5 h 07 min, 2 d 3 h."""
    minutes, hours = round(seconds / 60), int(seconds / 3600 + 0.5 / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders.

    Raises:
        ConfigError: if a folder is missing, is not a run, or is given twice.
    """
    resolved = [Path(os.path.realpath(folder)) for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise ConfigError(f"{folders[index]}: is given twice")
    return [_read_run(folder, name) for folder, name in zip(folders, _short_names(resolved), strict=True)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as are needed to tell them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: is not a training run: it has no config.yaml")
    damaged: list[str] = []
    lines = {kind: _read_lines(folder / f"{kind}.jsonl", damaged) for kind in ("metrics", "validation", "scores")}
    events = [row for row in _read_lines(folder / "events.jsonl", damaged) if isinstance(row.get("event"), str)]
    files = [folder / f"{kind}.jsonl" for kind in (*lines, "events")]
    times = [file.stat().st_mtime for file in files if file.exists() and file.stat().st_size]
    logged = [event["parameters"] for event in events if isinstance(event.get("parameters"), int)]
    return Run(
        folder=folder,
        name=name,
        config=flatten(read_yaml(folder / "config.yaml")),
        metrics=_by_step(lines["metrics"]),
        validation=_by_step(lines["validation"]),
        scores=_by_step(lines["scores"]),
        events=events,
        samples=_find_samples(folder / "samples"),
        checkpoint=_last_checkpoint(folder / "checkpoints"),
        parameters=logged[-1] if logged else _count_parameters(folder / "pipeline" / "transformer"),
        damaged=damaged,
        updated=max(times, default=None),
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as a flat mapping of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_lines(file: Path, damaged: list[str]) -> list[Record]:
    """The objects with a step in a JSONL file; other lines are counted as damaged, except a half-written last one."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    records, bad = [], 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif index < len(lines) - 1:
            bad += 1
    if bad:
        damaged.append(f"{file.name}: {bad} damaged {'line is' if bad == 1 else 'lines are'} ignored")
    return records


def _by_step(records: list[Record]) -> list[Record]:
    """Sorted by step; if a step was done twice, its later line."""
    return [record for _, record in sorted({record["step"]: record for record in records}.items())]


def _find_samples(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for file in sorted(folder.glob("step-*.png")):
        match = _SHEET.fullmatch(file.name)
        if match is None:
            continue
        try:
            with Image.open(file) as picture:
                picture.verify()
        except (OSError, SyntaxError):  # Pillow's errors for a file that is still being written
            continue
        found.append((int(match.group(1)), file))
    return sorted(found)


def _last_checkpoint(folder: Path) -> int | None:
    matches = [_CHECKPOINT.fullmatch(path.name) for path in folder.glob("step-*")]
    return max((int(match.group(1)) for match in matches if match), default=None)


def _count_parameters(folder: Path) -> int | None:
    """The number of values in the safetensors files of a folder, from their headers."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                if size > os.fstat(stream.fileno()).st_size:
                    return None
                header = json.loads(stream.read(size))
            total += sum(math.prod(row["shape"]) for name, row in header.items() if name != "__metadata__")
        except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
    return total or None
