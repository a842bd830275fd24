"""Describes the machine and measures its two limits: the rate of matrix products and the bandwidth of its memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.timing import Clock, Spread, default_clock, interleave
from lavita.core.precision import has_bf16

PEAK = "one large square product"
LIBRARIES = ("lavita", "torch", "diffusers", "numpy")
COPY = "a large copy"
SIDES = {"cpu": 2048, "gpu": 8192}  # of the square product
COPIED_BYTES = 2**28  # more than any cache holds


@dataclass(frozen=True)
class Machine:
    """The machine that the measurements are from."""

    processor: str
    cores: int
    """Cores that this process may use."""
    threads: int
    """Threads of torch."""
    clock: Clock
    """The clock that times are measured with, see `timing.default_clock`."""
    instructions: list[str]
    """Instruction sets that matter here."""
    device: str
    gpu: str | None
    fast_bf16: bool
    """Whether the device multiplies bf16 in hardware, which decides what `auto` means."""
    load: float
    """Load average of the minute before the start: 0 on a quiet machine."""
    system: str
    python: str
    libraries: dict[str, str]
    date: str

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        where = f"{self.gpu}, with {self.processor}" if self.gpu else self.processor
        bf16 = "fast" if self.fast_bf16 else "slow"
        return (
            f"{where}; {self.cores} cores, {self.threads} threads, {self.clock} time; "
            f"{', '.join(self.instructions)}; bf16 is {bf16} here; torch {self.libraries['torch']}; {self.date}"
        )


def describe(device: torch.device) -> Machine:
    """Describes the machine as this process sees it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        processor=_processor(),
        cores=cores,
        threads=torch.get_num_threads(),
        clock=default_clock(device),
        instructions=_instructions(),
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        fast_bf16=has_bf16(device),
        load=os.getloadavg()[0],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries={name: version(name) for name in LIBRARIES},
        date=datetime.now().astimezone().isoformat(timespec="minutes"),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _instructions() -> list[str]:
    found = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "VNNI": torch.cpu._is_vnni_supported(),
    }
    capability = torch.backends.cpu.get_cpu_capability()
    return [name for name, present in found.items() if present] + [capability]


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A large square matrix product, and its multiply-accumulates."""
    side = _side(device)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, side**3


def large_copy(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A copy too large for any cache, and the bytes that it reads and writes."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def measure_limits(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """The rate of a large square product in a data type, and the bandwidth of a large copy."""
    (product, macs), (copy, moved) = square_product(device, dtype), large_copy(device)
    seconds = interleave({"product": product, "copy": copy}, repeats, device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": asdict(Spread.of([2 * macs / each / 1e9 for each in seconds["product"]])),
        "copy_gigabytes_per_second": asdict(Spread.of([moved / each / 1e9 for each in seconds["copy"]])),
        "square_side": _side(device),
        "copied_bytes": COPIED_BYTES,
    }


def _side(device: torch.device) -> int:
    return SIDES["cpu" if device.type == "cpu" else "gpu"]
