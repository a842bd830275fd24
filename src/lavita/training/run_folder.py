"""The folder of a run: its lock, its metrics, and whether it may be resumed."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavita.core.config import ConfigError, StrictConfig, load_config, read_yaml
from lavita.core.files import remove_partial, write_text
from lavita.training.checkpoint import list_checkpoints

RESUMABLE = {
    "data.workers",
    "train.steps",
    "train.decay_steps",
    "train.accumulation",
    "train.parallel",
    "train.sequence_parallel",
    "train.gradient_checkpointing",
    "train.compile",
    "train.bad_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.sample_every",
    "train.num_samples",
    "train.score_every",
    "train.score_clips",
    "train.validate_every",
    "train.validation_clips",
    "train.trackers",
    "data.validation",
    "data.validation_captions",
    "train.device",
    "run_dir",
}
"""Fields that may differ when a run is resumed: how long it is and how it ends, what is written, and how the work is
shared, but nothing that changes a step before the end by more than rounding."""


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, steps: int, signals: Sequence[int]) -> None:
        """Keeps the exit code of the first signal; without one, another process has received it."""
        super().__init__(f"stopped at step {step:,} of {steps:,}; run the same command again to resume")
        self.exit_code = 128 + next(iter(signals), signal.SIGTERM)


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; a second signal raises KeyboardInterrupt at once.

    The training loop looks at the list between two steps, so that a checkpoint never holds half a step.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Metrics:
    """A file of JSON objects, one per line; a resumed run first drops the lines that it will write again."""

    def __init__(self, path: Path, resume_step: int, active: bool = True) -> None:
        """Opens a file and drops its lines with a `step` above `resume_step`, and those that are damaged.

        Args:
            path: made if missing.
            resume_step: optimizer steps done.
            active: False to write nothing, as in all but the first of several processes.
        """
        self._file = None
        if not active:
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int) and step <= resume_step:
                kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Appends one line."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def __enter__(self) -> Metrics:
        """The file is open already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Locks a run's folder against a second run, and removes what a killed one left half-written.

    The system releases the lock when the process dies.

    Raises:
        ValueError: if another process holds the lock.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{run_dir}: another run is using this folder; use another run_dir") from error
        remove_partial(run_dir)
        try:
            yield
        except BaseException:
            if [path.name for path in run_dir.iterdir()] == [".lock"]:  # a run that could not start leaves nothing
                shutil.rmtree(run_dir)
            raise


def check_resumable(run_dir: Path, config: StrictConfig, may_differ: Set[str]) -> None:
    """Refuses to resume a run under another configuration; a folder without checkpoints is not resumed.

    Args:
        run_dir: the run's folder, with the `config.yaml` that it was started with.
        config: the configuration asked for now.
        may_differ: dotted names of fields that may differ.

    Raises:
        ConfigError: naming the first other field that differs.
    """
    file = run_dir / "config.yaml"
    if not file.exists() or not list_checkpoints(run_dir / "checkpoints"):
        return
    # Validated, so that a field that is newer than the run has its default, which is how the run was trained.
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
