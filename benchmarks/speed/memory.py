"""Predicted and measured peak memory of training and sampling on a CPU, configuration by configuration.

Each configuration runs in fresh processes. *Resident*: the highest resident memory of the process (VmHWM, reset before
the model is built) minus what it had then, after imports and a step of a tiny model. *Allocated*: the highest total of
torch's allocator in one more step, by its profiler. Ratios are predicted / measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.speed.machine import describe
from benchmarks.speed.peaks import ChildFailed, highest_allocated, reset_peak, resident, run_job, storage_bytes
from lavita.core.files import write_json
from lavita.core.processes import Processes
from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.presets import preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.live_storages import Peak
from lavita.studies.memory import Setting, sampling_memory, training_memory
from lavita.training.batches import random_batch
from lavita.training.config import TrainConfig
from lavita.training.state import TrainState
from lavita.training.step import train_step

MIB = 2**20
SMALL_AUTOENCODER = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Case:
    """A configuration that is measured."""

    preset: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model in addition to the preset's."""
    batch_size: int = 1
    num_images: int = 0
    setting: dict[str, Any] = field(default_factory=dict)
    """Fields of `Setting`; for sampling only its precision."""
    sampling: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model's constructor."""
        sizes = preset_sizes(self.preset, self.fields.get("variant", 2))
        return {**sizes, "num_frames": 16, "sample_size": 32, **self.fields}

    @property
    def title(self) -> str:
        """The configuration in one line."""
        facts = {**self.fields, "batch": self.batch_size, "images": self.num_images, **self.setting}
        words = " ".join(f"{key}={value}" for key, value in facts.items() if value)
        return f"{self.preset} {'sampling ' if self.sampling else ''}{words}"


CHECKPOINTED = {"gradient_checkpointing": True}
CASES = [
    Case("tiny/2", {}, 4),
    Case("tiny/2", {"variant": 1, "sample_size": 16}, 16, 8),
    Case("mini/2", {"sample_size": 16, "num_classes": 8}, 8, 0, {"optimizer": "muon"}),
    Case("small/2", {"variant": 1}, 1),
    Case("small/2", {"variant": 2}, 1, 8),
    Case("small/2", {"variant": 3, "sample_size": 16}, 4),
    Case("small/2", {"variant": 3, "sample_size": 16}, 4, 0, CHECKPOINTED),
    Case("small/2", {"variant": 4, "sample_size": 16, "num_classes": 101}, 4, 4),
    Case("small/2", {"variant": 4, "sample_size": 16}, 4, 0, CHECKPOINTED),
    Case("small/2", {"sample_size": 16, "conditioning": "all_tokens", "temporal_position": "rope"}, 4),
    Case("small/2", {"patch_embedding": "compression"}, 2),
    Case("small/2", {"sample_size": 16}, 4, 0, {"accumulation": 2}),
    Case("small/4", {"num_frames": 64}, 1),
    Case("small/2", {"sample_size": 16}, 4, 0, {"precision": "bf16"}),
    Case("small/2", {"sample_size": 16}, 4, 0, {"precision": "bf16", **CHECKPOINTED}),
    Case("S/2", {"variant": 2}, 1),
    Case("S/2", {"variant": 1}, 2, 0, CHECKPOINTED),
    Case("S/2", {"variant": 2}, 1, 8, {"optimizer": "muon", **CHECKPOINTED}),
    Case("B/2", {"variant": 2}, 1, 0, CHECKPOINTED),
    Case("B/2", {"variant": 3}, 1),
    Case("B/8", {"variant": 2, "num_frames": 4}, 1, 0, {"optimizer": "muon"}),
    Case("S/2", {"sample_size": 16}, 1, 0, {"processes": 2}),
    Case("S/2", {"sample_size": 16}, 1, 0, {"processes": 2, "sharded": True}),
    Case("B/8", {}, 1, 0, {"processes": 2, "sharded": True, **CHECKPOINTED}),
    Case("small/2", {"sample_size": 16}, 8, sampling=True),
    Case("small/2", {"sample_size": 32}, 2, sampling=True),
    Case("B/2", {"sample_size": 8}, 8, sampling=True),
]


def predict(case: Case) -> Peak:
    """The predicted peak, by a rehearsal on meta tensors."""
    if case.sampling:
        return sampling_memory(case.config, case.batch_size, autoencoder=SMALL_AUTOENCODER, **case.setting)
    return training_memory(case.config, case.batch_size, None, case.num_images, Setting(**case.setting))


class Training:
    """A model in training on random latents."""

    def __init__(self, case: Case, team: Processes) -> None:
        """Builds the model and its training state, and two batches: the current one and the next one, read ahead."""
        setting = Setting(**case.setting)
        torch.manual_seed(0)
        model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(case.config).train()
        checkpoint_blocks(model, setting.gradient_checkpointing)
        clips = case.batch_size * setting.accumulation
        self.settings = TrainConfig(
            batch_size=clips,
            accumulation=setting.accumulation,
            parallel="fsdp" if setting.sharded else "auto",
            optimizer=setting.optimizer,
            precision=setting.precision,
        )
        self.team = team
        self.state = TrainState.build(model, self.settings, torch.device("cpu"), team)
        self.batches = [random_batch(case.config, clips, num_images=case.num_images) for _ in range(2)]

    def step(self) -> None:
        """One optimizer step."""
        train_step(self.state, self.batches[0], self.settings, self.team)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that live between steps."""
        buffers = self.state.model.buffers()
        batches = [tensor for batch in self.batches for tensor in (batch.latents, batch.noise)]
        return [*self.state.tensors().values(), *buffers, *batches]


class Sampling:
    """The largest moments of `LavitaPipeline`: an evaluation, and decoding."""

    def __init__(self, case: Case, team: Processes) -> None:
        """Builds the networks and random latents."""
        self.model = LavitaTransformer3DModel.from_config(case.config).eval().requires_grad_(False)
        self.vae = AutoencoderKL.from_config(SMALL_AUTOENCODER).eval().requires_grad_(False)
        size = case.config["sample_size"]
        self.latents = torch.randn(case.batch_size, case.config["num_frames"], 4, size, size)

    @torch.no_grad()
    def step(self) -> None:
        """Evaluates and decodes once."""
        self.model(self.latents, torch.full((len(self.latents),), 300)).sample.float()
        decode(self.vae, self.latents, "fp32")

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that live between steps."""
        vae = [*self.vae.parameters(), *self.vae.buffers()]
        return [*self.model.parameters(), *self.model.buffers(), *vae, self.latents]


def measure(case: Case, team: Processes) -> dict[str, int]:
    """Measures a case in this process."""
    torch.set_num_threads(1)
    kind = Sampling if case.sampling else Training
    precision = case.setting.get("precision", "fp32")
    kind(Case("tiny/8", {"num_frames": 2, "sample_size": 8}, setting={"precision": precision}), Processes()).step()
    reset_peak()
    before = resident("VmRSS")
    run = kind(case, team)
    # The first training step allocates the optimizer's state at its end; DDP rebuilds its buckets in the second.
    for _ in range(1 if case.sampling else 1 + team.count):
        run.step()
    peak = resident("VmHWM")
    if before is None or peak is None:
        raise OSError("this system does not say how much memory is resident; the benchmark needs Linux")
    if team.count > 1:
        return {"resident": peak - before}
    return {"resident": peak - before, "allocated": storage_bytes(run.tensors()) + highest_allocated(run.step)}


def measure_process(rank: int, number: int, count: int, folder: str) -> None:
    """Measures a case as one of several processes; the first one writes what it measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    answer = measure(CASES[number], Processes(rank, count))
    dist.barrier()
    if rank == 0:
        Path(folder, "answer").write_text(json.dumps(answer), encoding="utf-8")
    dist.destroy_process_group()


def measure_case(number: int) -> dict[str, int]:
    """Measures a case with as many processes as it needs."""
    count = CASES[number].setting.get("processes", 1)
    if count == 1:
        return measure(CASES[number], Processes())
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure_process, (number, count, folder), nprocs=count)
        result: dict[str, int] = json.loads(Path(folder, "answer").read_text(encoding="utf-8"))
        return result


def compare(only: str = "", out: Path | None = None) -> None:
    """Predicts and measures each case in fresh processes, prints a table, and writes it as JSON if `out` is given.

    Args:
        only: leave out cases whose title does not contain this.
        out: JSON file.

    Raises:
        ValueError: if no case is left, or a process fails.
    """
    chosen = [number for number, case in enumerate(CASES) if only in case.title]
    if not chosen:
        raise ValueError(f"only is {only!r}, which is in no title")
    rows = []
    print(f"{'MiB':72} predicted  resident ratio  allocated ratio  at")
    for number in chosen:
        case = CASES[number]
        try:
            measured = run_job("benchmarks.speed.memory", number, threads=1)
        except ChildFailed as error:
            raise ValueError(f"{case.title}: {error}") from error
        peak = predict(case)
        ratios = {name: round(peak.total / value, 3) for name, value in measured.items()}
        fields = {"case": asdict(case), "title": case.title, "predicted": peak.to_json()}
        rows.append({**fields, "measured": measured, "ratios": ratios})
        columns = "".join(f"{measured[name] / MIB:10,.1f} {ratios[name]:5.2f}" for name in measured)
        print(f"{case.title:72}{peak.total / MIB:10,.1f}{columns}  {peak.phase}", flush=True)
    largest, title = max((abs(row["ratios"]["resident"] - 1), row["title"]) for row in rows)
    print(f"{len(rows)} configurations; largest error against resident memory {largest:.1%}: {title}")
    if out is not None:
        facts = {"machine": describe(torch.device("cpu")).to_json(), "largest_error": largest}
        write_json(out, {**facts, "rows": rows})


if __name__ == "__main__":
    print(json.dumps(measure_case(int(sys.argv[1]))))
