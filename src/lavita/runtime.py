"""What a run stands on: device, precision, seeds, a progress line and the metrics file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Item = TypeVar("Item")
_END: Any = object()


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is a GPU if there is one, each process of `torchrun` its own, else the CPU.

    Raises:
        ValueError: for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not available here; allowed: auto, cpu, cuda") from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (AMX or AVX-512 BF16 on a CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def low_precision(device: torch.device, precision: Precision) -> torch.dtype | None:
    """What matrix products are computed in, None for float32; `auto` asks the device.

    `auto` is bf16 where the device has it, else fp16 on a GPU, else float32.
    """
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def without_fp16(device: torch.device, precision: Precision) -> Precision:
    """What an autoencoder computes in where `precision` is asked for: its activations may overflow in fp16."""
    return "bf16" if low_precision(device, precision) == torch.bfloat16 else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Autocast to what `low_precision` says, or nothing."""
    dtype = low_precision(device, precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def store_linear_weights(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Keeps the linear layers of a module in what `autocast` turns their weights into at each evaluation.

    For inference: under autocast to `dtype` the outputs are the same to the bit, the weights take half the memory, and
    no evaluation reads them in float32 and writes them again.

    Args:
        module: changed in place; outside of autocast it works no more.
        dtype: as `low_precision` gives it; None changes nothing.
    """
    if dtype is None:
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A CPU generator that is a pure function of a seed and the stream's names and numbers.

    Nothing random here has any other state, so a resumed run draws what the uninterrupted one would have drawn.
    """
    return torch.Generator().manual_seed(int(numpy_generator(seed, *stream).integers(2**63)))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    """Like `generator`, for numpy."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items in order, each made by a thread while the caller works on the one before it.

    What an item's making raises is raised in its place; to be closed where it is left early.
    """
    with ThreadPoolExecutor(1, "ahead") as reader:
        coming = reader.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = reader.submit(next, items, _END)
            yield item


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint; the same command goes on from there."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        """`number` is the signal that asked; another process may have got it."""
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one stops at once.

    The loop looks at it between two steps, so that a checkpoint never holds half a step.
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
    """Appends one JSON object a line to a file; a resumed run first drops the lines it will write again."""

    def __init__(self, path: Path, resume_step: int, active: bool = True) -> None:
        """Opens `path`; lines with a `step` above `resume_step`, and a half-written last one, are dropped.

        One that is not `active`, as in all but the first of several processes, writes nothing.
        """
        self._file = None
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= resume_step:
                kept.append(line + "\n")
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, **record: Any) -> None:
        """Appends one object."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Holds a run's folder, so that no second run writes into it; the system lets go of it when the process dies.

    Raises:
        ValueError: where another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{run_dir}: another run is going on in this folder; use another run_dir") from error
        try:
            yield
        except BaseException:
            if [path.name for path in run_dir.iterdir()] == [".lock"]:  # a run that could not start leaves nothing
                shutil.rmtree(run_dir)
            raise


class Progress:
    """One live line with an ETA on a terminal; one line every 30 seconds elsewhere, as in a log file."""

    def __init__(self, what: str, total: int, done: int = 0, active: bool = True) -> None:
        """Starts at `done` of `total` units of work called `what`; one that is not `active` prints nothing."""
        self.what, self.total, self.done = what, total, done
        self._first, self._start = done, time.monotonic()
        self._active, self._live = active, sys.stderr.isatty()
        self._printed = float("-inf")
        self._width = 0

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units are finished, and a note such as the loss."""
        self.done = done
        if not self._active:
            return
        now = time.monotonic()
        finished = done >= self.total
        if now - self._printed < (0.1 if self._live else 30) and not finished:
            return
        self._printed = now
        elapsed = now - self._start
        fresh = done - self._first
        left = f"ETA {_clock(elapsed / fresh * (self.total - done))}" if fresh and not finished else ""
        timing = left or f"took {_clock(elapsed)}" if fresh else ""
        line = "  ".join(part for part in (f"{self.what} {done:,}/{self.total:,}", note, timing) if part)
        if self._live:
            end = "\n" if finished else "\r"
            print(line.ljust(self._width), end=end, file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Prints a line of its own without tearing the live one."""
        if not self._active:
            return
        print(f"\r{text.ljust(self._width)}" if self._live else text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
