"""Training by processes that share each clip: losses, memory per process and time, beside one process.

Each number of processes runs in fresh ones, with one thread each, on the CPU (gloo). *Resident* and *allocated* as in
`peaks`, of the process with the most; *activations* is what torch's allocator gives out during a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.speed.machine import describe
from benchmarks.speed.peaks import ChildFailed, highest_allocated, reset_peak, resident, run_job
from lavita.core.files import write_json
from lavita.core.processes import Processes
from lavita.models.presets import preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.live_storages import ACTIVATIONS, GRADIENTS, Peak
from lavita.studies.memory import Setting, training_memory
from lavita.training.batches import random_batch
from lavita.training.config import TrainConfig
from lavita.training.state import TrainState
from lavita.training.step import train_step

MIB = 2**20
WARM_UP = 1
"""Steps that are not timed: they allocate the optimizer's state and DDP's buckets."""


@dataclass(frozen=True)
class Work:
    """What is trained."""

    preset: str = "mini/2"
    variant: int = 2
    num_frames: int = 128
    sample_size: int = 16
    steps: int = 4
    """At least 2."""
    sharded: bool = False
    """FSDP2 instead of DDP."""

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model's constructor."""
        sizes = preset_sizes(self.preset, self.variant)
        shape = {"num_frames": self.num_frames, "sample_size": self.sample_size}
        return {**sizes, **shape, "variant": self.variant, "num_classes": 8}


@dataclass(frozen=True)
class Measured:
    """What a number of processes measured; of the values of several, the largest."""

    losses: list[float]
    grad_norms: list[float]
    """Of each step, before clipping."""
    seconds: float
    """Median of a step."""
    activations: int
    """Bytes that a step allocates at its highest point."""
    resident: int
    """Bytes at the highest point since before the model was built."""


def train(work: Work, team: Processes) -> Measured:
    """Takes some steps on one random clip each, as one of the processes of a group."""
    torch.set_num_threads(1)
    take_steps(Work("tiny/8", work.variant, 4, 8, 2), Processes())
    reset_peak()
    before = resident("VmRSS")
    measured = take_steps(work, team)
    highest = resident("VmHWM")
    if before is None or highest is None:
        raise OSError("this system does not say how much memory is resident; the benchmark needs Linux")
    return replace(measured, resident=highest - before)


def take_steps(work: Work, team: Processes) -> Measured:
    """Takes the steps, the last of them under the profiler; says nothing of resident memory."""
    torch.manual_seed(0)
    model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(work.config).train()
    for parameter in model.parameters():
        if not parameter.any():  # else the first losses would not depend on the blocks
            torch.nn.init.normal_(parameter, std=0.02)
    kind: dict[str, Any] = {"parallel": "fsdp"} if work.sharded and team.everyone.count > 1 else {}
    # Large steps, so that a difference of the gradients would grow.
    settings = TrainConfig(batch_size=1, precision="fp32", learning_rate=1e-3, sequence_parallel=team.members, **kind)
    state = TrainState.build(model, settings, torch.device("cpu"), team)
    losses: list[float] = []
    grad_norms: list[float] = []
    seconds: list[float] = []

    def step(number: int) -> None:
        batch = random_batch(work.config, 1, seed=number)
        start = time.perf_counter()
        result = train_step(state, batch, settings, team)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        seconds.append(time.perf_counter() - start)

    for number in range(work.steps - 1):
        step(number)
    activations = highest_allocated(lambda: step(work.steps - 1))
    return Measured(losses, grad_norms, statistics.median(seconds[WARM_UP:-1] or seconds[:1]), activations, 0)


def predict(work: Work, count: int) -> Peak:
    """What `lavita info` predicts for each of the processes."""
    setting = Setting(processes=count, sequence_parallel=count, sharded=work.sharded and count > 1)
    return training_memory(work.config, setting=setting)


def measure_process(rank: int, job: Mapping[str, Any], folder: str) -> None:
    """Measures as one of several processes; each writes its answer."""
    count = job["processes"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    answer = train(Work(**job["work"]), Processes(rank, count).grouped(count))
    dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(asdict(answer)), encoding="utf-8")
    dist.destroy_process_group()


def measure_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measures with as many processes as the job says."""
    if job["processes"] == 1:
        return asdict(train(Work(**job["work"]), Processes()))
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure_process, (job, folder), nprocs=job["processes"])
        each = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")]
    largest = {name: max(answer[name] for answer in each) for name in ("seconds", "activations", "resident")}
    return {**each[0], **largest}


def largest_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))


def compare_processes(work: Work, counts: Sequence[int], out: Path | None = None) -> None:
    """Trains with one process and with each number of them, prints a table, and writes it as JSON if `out` is given.

    Raises:
        ValueError: if sizes do not fit together, or a process fails.
    """
    if min(counts) < 1:
        raise ValueError(f"processes has {min(counts)}, but must be at least 1")
    rows: list[dict[str, Any]] = []
    print(f"{work.preset}, variant {work.variant}, {work.num_frames} frames of {work.sample_size} x {work.sample_size}")
    print("          largest difference of")
    print("processes  losses  grad. norms  s/step  activations, MiB (predicted)  resident, MiB (predicted)")
    for count in sorted({1, *counts}):
        peak = predict(work, count)
        job = {"work": asdict(work), "processes": count}
        try:
            found = Measured(**run_job("benchmarks.speed.sequence_parallel", job, threads=1))
        except ChildFailed as error:
            raise ValueError(f"{count} processes: {error}") from error
        first = Measured(**rows[0]["measured"]) if rows else found
        differences = {
            "losses": largest_difference(found.losses, first.losses),
            "grad_norms": largest_difference(found.grad_norms, first.grad_norms),
        }
        own = peak.parts[ACTIVATIONS] + peak.parts.get(GRADIENTS, 0)
        fields = {"processes": count, "largest_differences": differences, "predicted": peak.to_json()}
        rows.append({**fields, "measured": asdict(found)})
        print(
            f"{count:9}{differences['losses']:8.0e}{differences['grad_norms']:13.0e}{found.seconds:8.2f}"
            f"{found.activations / MIB:20,.1f} ({own / MIB:,.1f})"
            f"{found.resident / MIB:18,.1f} ({peak.total / MIB:,.1f})",
            flush=True,
        )
    if out is not None:
        machine = describe(torch.device("cpu")).to_json()
        write_json(out, {"machine": machine, "work": asdict(work), "rows": rows})


if __name__ == "__main__":
    print(json.dumps(measure_job(json.loads(sys.argv[1]))))
