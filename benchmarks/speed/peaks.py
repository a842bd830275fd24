"""Peak memory of a candidate, in a process of its own.

*Allocated*: the highest total of torch's allocator, weights and inputs included. *Resident*: the highest resident
memory of the process (VmHWM, Linux only) minus what it had after its imports and a pass of a tiny model; this includes
buffers that libraries keep for themselves and the compiler's own memory. On a GPU only the former is measured.
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

# Blocks above 64 KiB come from the kernel and return to it, so that free memory is not counted.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class Candidate:
    """A candidate that is ready to run."""

    run: Callable[[], Any]
    modules: list[nn.Module]
    """Modules that hold its weights."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Other tensors that live between two calls."""
    warm: bool = False
    """Whether the first call differs from later ones: it compiles or allocates state."""
    states: Callable[[], list[torch.Tensor]] = list
    """State that is allocated later."""


def measure_peaks(
    section: str, names: Sequence[str], setup: Setup, progress: Progress | None = None
) -> dict[str, dict[str, int]]:
    """Bytes `allocated` and, if the system says, `resident`, for each candidate of a section.

    Raises:
        ValueError: if a process fails, most likely for lack of memory.
    """
    peaks = {}
    for name in names:
        job = {"section": section, "name": name, "setup": setup.to_json()}
        threads = torch.get_num_threads()
        try:
            peaks[name] = run_job("benchmarks.speed.peaks", job, threads)
        except ChildFailed as error:
            raise ValueError(f"peak memory of {section}, {name}: {error}") from error
        if progress is not None:
            progress.update(progress.done + 1, f"memory: {name}")
    return peaks


class ChildFailed(Exception):
    """A process of `run_job` failed; the message has its exit code and its last line."""


def run_job(module: str, job: Any, threads: int) -> Any:
    """Runs `python -m MODULE JOB` with threads and allocator set for measurements of memory.

    Args:
        module: name of a module that takes a JSON value as its argument and prints another one last.
        job: the JSON value.
        threads: number of threads of the process.

    Returns:
        The JSON value that it printed.

    Raises:
        ChildFailed: if the process fails.
    """
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["killed, most likely for lack of memory"]
        raise ChildFailed(f"its process ended with {done.returncode}: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(section: str, name: str, setup: Setup) -> dict[str, int]:
    """The peak of a candidate in this process."""
    make: Callable[[str, Setup], Candidate] = import_module(f"benchmarks.speed.{section}").make_candidate
    tiny = make(name, replace(setup, **TINY))
    tiny.run()
    del tiny
    device = setup.torch_device
    if device.type == "cuda":
        candidate = make(name, setup)
        candidate.run()
        torch.cuda.reset_peak_memory_stats(device)
        candidate.run()
        torch.cuda.synchronize(device)
        return {"allocated": torch.cuda.max_memory_allocated(device)}
    before = resident("VmRSS")
    candidate = make(name, setup)
    if candidate.warm:
        candidate.run()
    reset_peak()
    step = highest_allocated(candidate.run)
    kept = stored_bytes(*candidate.modules) + storage_bytes([*candidate.tensors, *candidate.states()])
    peaks = {"allocated": kept + step}
    if before is not None and (highest := resident("VmHWM")) is not None:
        peaks["resident"] = highest - before
    return peaks


def highest_allocated(run: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its highest point, on top of those before it, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def stored_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters, buffers and packed 8-bit weights."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Int8Linear)]
    return sum(tensor.nbytes for tensor in tensors) + sum(layer.in_features * layer.out_features for layer in layers)


def resident(kind: str) -> int | None:
    """Bytes of this process: VmRSS now, or VmHWM at its highest; None if the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), None)


def reset_peak() -> None:
    """Resets VmHWM to the memory of now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(measure_here(job["section"], job["name"], Setup(**job["setup"]))))
