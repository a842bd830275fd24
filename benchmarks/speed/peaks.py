"""Peak memory of a candidate, in a process of its own.

*Allocated*: the highest total of torch's allocator, weights and inputs included. *Resident*: the highest resident
memory of the process (VmHWM) over what it had after its imports and a tiny model's pass, on Linux; it holds what
libraries pack for themselves, too, and the compiler's own memory. On a GPU only the former.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed.setup import TINY, Setup
from lavita.core.progress import Progress
from lavita.sampling.int8 import Int8Linear

# Blocks over 64 KiB come from the kernel and go back to it, so that free memory is not counted.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class Case:
    """A candidate, ready to run."""

    run: Callable[[], Any]
    modules: list[nn.Module]
    """What its weights are in."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """What else stays between two calls."""
    warm: bool = False
    """Whether its first call is another one: it compiles, or makes state."""
    states: Callable[[], list[torch.Tensor]] = list
    """State that is made later."""


def measure_peaks(
    section: str, names: Sequence[str], setup: Setup, progress: Progress | None = None
) -> dict[str, dict[str, int]]:
    """Of each candidate of a section, bytes `allocated` and, where the system tells, `resident`.

    Raises:
        ValueError: where a process fails, for want of memory most likely.
    """
    peaks = {}
    threads = str(torch.get_num_threads())
    environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in names:
        job = json.dumps({"section": section, "name": name, "setup": setup.to_json()})
        command = [sys.executable, "-m", "benchmarks.speed.peaks", job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["killed, for want of memory most likely"]
            raise ValueError(f"peak memory of {section}, {name}: its process ended with {done.returncode}: {reason[0]}")
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
        if progress is not None:
            progress.update(progress.done + 1, f"memory: {name}")
    return peaks


def measure_here(section: str, name: str, setup: Setup) -> dict[str, int]:
    """The peak of a candidate in this process."""
    make: Callable[[str, Setup], Case] = import_module(f"benchmarks.speed.{section}").make_case
    tiny = make(name, replace(setup, **TINY))
    tiny.run()
    del tiny
    device = setup.torch_device
    if device.type == "cuda":
        case = make(name, setup)
        case.run()
        torch.cuda.reset_peak_memory_stats(device)
        case.run()
        torch.cuda.synchronize(device)
        return {"allocated": torch.cuda.max_memory_allocated(device)}
    before = resident("VmRSS")
    case = make(name, setup)
    if case.warm:
        case.run()
    forget_peak()
    step = highest_allocated(case.run)
    peaks = {"allocated": _kept(case) + step}
    if before is not None and (highest := resident("VmHWM")) is not None:
        peaks["resident"] = highest - before
    return peaks


def highest_allocated(run: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its highest, over those before it, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _kept(case: Case) -> int:
    from benchmarks.speed.peaks import stored_bytes

    tensors = [*case.tensors, *case.states()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return stored_bytes(*case.modules) + sum(storages.values())


def resident(kind: str) -> int | None:
    """Bytes of this process: VmRSS now, or VmHWM, the highest; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), None)


def forget_peak() -> None:
    """VmHWM starts again from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main() -> None:
    """In the process of its own: prints the peak as JSON."""
    job = json.loads(sys.argv[1])
    print(json.dumps(measure_here(job["section"], job["name"], Setup(**job["setup"]))))


if __name__ == "__main__":
    main()


def stored_bytes(*modules: nn.Module) -> int:
    """Of parameters, buffers and packed 8-bit weights."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Int8Linear)]
    return sum(tensor.nbytes for tensor in tensors) + sum(layer.in_features * layer.out_features for layer in layers)
