"""`lavita train --minutes`: chooses, encodes, trains and writes the page, all within the time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavita.core.config import ConfigError, combine, load_config, merge, read_yaml, save_config
from lavita.core.files import check_outside, write_json
from lavita.core.precision import pick_device
from lavita.core.progress import clock as as_clock
from lavita.data.datasets import open_dataset
from lavita.data.latent_cache.encode import check_target, encode_dataset
from lavita.models.autoencoder import load_autoencoder
from lavita.models.packaged import autoencoder_source
from lavita.studies.budget import table
from lavita.studies.budget.choose import CACHE, Choice, choose
from lavita.studies.run_report.page import write_report
from lavita.training.budget import Budget
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig
from lavita.training.run_folder import only_run
from lavita.training.train import train

RECORD = "budget.json"
"""File in the run's folder: what was chosen and why, and what was spent before the first checkpoint."""


@dataclass(frozen=True)
class Start:
    """What a run within a budget begins with, or goes on with."""

    choice: Choice
    path: str | None
    """Folder of the videos, from which the cache is made."""
    spent: float
    """Seconds that earlier commands have spent before the first checkpoint."""

    def save(self, spent: float) -> None:
        """Writes the record into the run's folder."""
        choice = self.choice
        record = {
            "spent": spent,
            "path": self.path,
            "lines": choice.lines,
            "videos": choice.videos,
            "step_seconds": choice.step_seconds,
            "output_seconds": choice.output_seconds,
        }
        write_json(choice.config.run_dir / RECORD, record)


def budget_seconds(minutes: float | None, hours: float | None) -> float | None:
    """The budget of the options `--minutes` and `--hours`; None without them.

    Raises:
        ValueError: if both are given, or one is out of range.
    """
    if minutes is not None and hours is not None:
        raise ValueError(f"--minutes is {minutes:g} and --hours is {hours:g}: give one of them")
    if minutes is None and hours is None:
        return None
    seconds = 60 * minutes if minutes is not None else 3600 * (hours or 0.0)
    option = f"--minutes is {minutes:g}" if minutes is not None else f"--hours is {hours:g}"
    if not table.MIN_SECONDS <= seconds <= table.MAX_SECONDS:
        raise ValueError(
            f"{option}, but must be at least {table.MIN_SECONDS / 60:g} minutes, as up to one of them goes into "
            f"looking at the videos, measuring, and the last samples; and at most {table.MAX_SECONDS / 86400:g} days"
        )
    return seconds


def train_within(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    seconds: float,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> Path | None:
    """Trains a model within a time, and prints what it chose and what came of it.

    Called again after an interruption, or with a longer budget, it goes on with the same choices.

    Args:
        values: fields of a `RunConfig` that are given; all others are chosen.
        overrides: `a.b=c` strings, which win over the values.
        seconds: the time for everything.
        dry_run: only print the choices and estimates, and write nothing.
        clock: gives seconds from any moment on.
        started: its value when the command began; by default now.

    Returns:
        The pipeline's folder; None for a dry run.

    Raises:
        ValueError: if the data cannot be used, fields do not fit together, or the budget is spent or too short.
        Stopped: after Ctrl-C or SIGTERM while training, once a checkpoint is saved.
    """
    started = clock() if started is None else started
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--minutes and --hours work in one process; start the command without torchrun")
    given = _check(combine(values, overrides, RunConfig.__name__))
    run_dir = Path(given.get("run_dir", RunConfig.model_fields["run_dir"].default))
    begun = (run_dir / RECORD).exists()
    if not begun and list_checkpoints(run_dir / "checkpoints"):
        raise ConfigError(
            f"{run_dir} holds a run without a budget; leave out --minutes or --hours, or use another run_dir"
        )
    if begun:
        start = _read(run_dir, given)
    else:
        path = given.get("data", {}).get("path")
        start = Start(choose(given, seconds, lambda: clock() - started), path, 0.0)
        check_outside("run_dir", run_dir, None if path is None else Path(path))
    choice = start.choice
    print("\n".join([*choice.lines, *([f"run          {run_dir}: goes on with these choices"] if begun else [])]))
    if dry_run:
        return None

    def spent() -> float:
        return start.spent + clock() - started

    trained = bool(list_checkpoints(run_dir / "checkpoints"))
    if not trained:
        with only_run(run_dir):
            save_config(choice.config, run_dir / "config.yaml")
            start.save(spent())
            if choice.videos is not None:
                with _noting(start, spent):
                    _encode(start)
    budget = Budget(
        seconds,
        choice.step_seconds,
        choice.output_seconds,
        table.PAGE_SECONDS,
        given.get("train", {}).get("decay_steps"),
        start.spent,
        clock,
        started,
    )
    pipeline = train(choice.config, budget)
    page = write_report([run_dir], run_dir / "report")
    print("\n".join(_results(run_dir, budget, page)))
    return pipeline


def _check(given: dict[str, Any]) -> dict[str, Any]:
    for section in ("data", "model", "train"):
        if not isinstance(given.get(section, {}), Mapping):
            load_config(RunConfig, given)  # names what is wrong with it
    if not isinstance(given.get("run_dir", ""), str):
        load_config(RunConfig, given)
    if "steps" in given.get("train", {}):
        raise ConfigError(
            f"train.steps is {given['train']['steps']}, but with --minutes or --hours the time decides the number of "
            "steps; give one of them"
        )
    return given


def _read(run_dir: Path, given: Mapping[str, Any]) -> Start:
    """The choices of a run that has begun, and the fields that are given now; `train` refuses what may not differ."""
    file = run_dir / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        spent, path, lines = float(record["spent"]), record["path"], tuple(map(str, record["lines"]))
        videos = None if record["videos"] is None else tuple(map(str, record["videos"]))
        numbers = float(record["step_seconds"]), float(record["output_seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged; use another run_dir") from error
    values: dict[str, Any] = read_yaml(run_dir / "config.yaml")
    chosen_path = values.get("data", {}).get("path")
    merge(values, given)
    if given.get("data", {}).get("path") == path:  # a cache of some of the videos stands in for their folder
        values["data"]["path"] = chosen_path
    config = load_config(RunConfig, values, source=str(run_dir / "config.yaml"))
    return Start(Choice(config, lines, videos, *numbers, catalog=None), path, spent)


@contextmanager
def _noting(start: Start, spent: Callable[[], float]) -> Iterator[None]:
    """Records what was spent at the end, also of an interruption."""
    try:
        yield
    finally:
        start.save(spent())


def _encode(start: Start) -> None:
    """Writes the cache of the run, or completes it."""
    config, videos = start.choice.config, start.choice.videos
    assert videos is not None and start.path is not None
    data, folder = config.data, config.run_dir / CACHE
    root = Path(start.path)
    check_target(folder, root)
    catalog = open_dataset(
        root, data.dataset, data.split, data.class_folders, 1, data.broken, use_classes=data.use_classes
    )
    vae = load_autoencoder(autoencoder_source(config.autoencoder, data.longest_side), pick_device(config.train.device))
    encode_dataset(
        catalog.only(set(videos)),
        folder,
        vae,
        data.resolution,
        data.horizontal_flip,
        config.train.precision,
        data.broken,
        fit=data.fit,
    )


def _results(run_dir: Path, budget: Budget, page: Path) -> list[str]:
    plan = budget.plan
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-max(1, len(lines) // 20) :]
    loss = sum(line["loss"] for line in last) / max(1, len(last))
    speed = sum(line["clips_per_second"] for line in last) / max(1, len(last))
    sheets = sorted((run_dir / "samples").glob("step-*.png"))
    rows = [
        f"time         {as_clock(budget.spent())} of {as_clock(budget.seconds)}",
        f"trained      {plan.steps:,} steps, {speed:.3g} clips/s, last loss {loss:.4f}"
        if last
        else "trained      0 steps",
        f"pipeline     {run_dir / 'pipeline'}",
        *([f"samples      {sheets[-1]}, videos in {sheets[-1].with_suffix('')}"] if sheets else []),
        f"page         {page}",
        f"next         lavita sample {run_dir / 'pipeline'} --out {run_dir / 'more'}",
    ]
    return ["", *rows]
