"""Predicted against measured peak memory of training and sampling on a CPU, configuration by configuration.

    python benchmarks/memory.py --out benchmarks/results/memory.json
    python benchmarks/memory.py --only S/2

Each configuration runs in fresh processes. *Resident*: the highest resident memory of the process (VmHWM, reset before
the model is built) over what it had then, after imports and a step of a tiny model. Blocks over 64 KiB come from the
kernel and go back to it (MALLOC_MMAP_THRESHOLD_), so that free memory is not counted. *Allocated*: the highest total of
torch's allocator in one more step, by its profiler. Ratios are predicted / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.speed.peaks import forget_peak, highest_allocated, resident
from lavita.core.processes import Processes
from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.presets import preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.memory import Peak, Setting, sampling_memory, training_memory
from lavita.training.ema import EMA
from lavita.training.optimizers import make_optimizers
from lavita.training.parallel import ParallelModel

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
    """What is measured."""

    preset: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the model, beside the preset's."""
    batch_size: int = 1
    num_images: int = 0
    setting: dict[str, Any] = field(default_factory=dict)
    """Of `Setting`; for sampling its precision only."""
    sampling: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The model's."""
        sizes = preset_sizes(self.preset, self.fields.get("variant", 2))
        return {**sizes, "num_frames": 16, "sample_size": 32, **self.fields}

    @property
    def title(self) -> str:
        """On one line."""
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
    """By a rehearsal."""
    if case.sampling:
        return sampling_memory(case.config, case.batch_size, autoencoder=SMALL_AUTOENCODER, **case.setting)
    return training_memory(case.config, case.batch_size, None, case.num_images, Setting(**case.setting))


class Training:
    """A run of a model on random latents."""

    def __init__(self, case: Case, team: Processes) -> None:
        self.setting = Setting(**case.setting)
        torch.manual_seed(0)
        self.model = LavitaTransformer3DModel.from_config(case.config).train()
        checkpoint_blocks(self.model, self.setting.gradient_checkpointing)
        kind = "fsdp" if self.setting.sharded else "ddp" if self.setting.processes > 1 else "auto"
        self.parallel = ParallelModel(self.model, kind, team, torch.device("cpu"))
        self.ema = EMA(self.model, 0.9999)
        self.optimizers = make_optimizers(self.model, self.setting.optimizer, 1e-4, 0.0)
        self.diffusion = GaussianDiffusion()
        config, clips = case.config, case.batch_size * self.setting.accumulation
        shape = (clips, config["num_frames"] + case.num_images, 4, config["sample_size"], config["sample_size"])
        self.micro, self.num_images = case.batch_size, case.num_images
        self.latents, self.noise, *self.next = (torch.randn(shape) for _ in range(4))
        rows = (clips, 1 + case.num_images) if case.num_images else (clips,)
        self.labels = torch.zeros(rows, dtype=torch.long) if config.get("num_classes") else None

    def step(self) -> None:
        """One optimizer step."""
        for first in range(0, len(self.latents), self.micro):
            part = slice(first, first + self.micro)
            latents, noise = self.latents[part], self.noise[part]
            timesteps = torch.full((self.micro,), 300)
            labels = None if self.labels is None else self.labels[part]
            noisy = self.diffusion.q_sample(latents, timesteps, noise)
            with self.parallel.gradients_later(first + self.micro < len(self.latents)):
                bf16 = self.setting.precision == "bf16"
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    output = self.parallel(noisy, timesteps, labels, num_images=self.num_images)
                losses = self.diffusion.losses(output, latents, timesteps, noise).total
                losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(1)

    def tensors(self) -> list[torch.Tensor]:
        """What stays between steps."""
        states = [
            tensor for optimizer in self.optimizers for state in optimizer.state.values() for tensor in state.values()
        ]
        model = [*self.model.parameters(), *self.model.buffers()]
        return [*model, *self.ema.weights.values(), *states, self.latents, self.noise, *self.next]


class Sampling:
    """The largest moments of `LavitaPipeline`: an evaluation, and decoding."""

    def __init__(self, case: Case, team: Processes) -> None:
        self.model = LavitaTransformer3DModel.from_config(case.config).eval().requires_grad_(False)
        self.vae = AutoencoderKL.from_config(SMALL_AUTOENCODER).eval().requires_grad_(False)
        size = case.config["sample_size"]
        self.latents = torch.randn(case.batch_size, case.config["num_frames"], 4, size, size)

    @torch.no_grad()
    def step(self) -> None:
        """One of each."""
        self.model(self.latents, torch.full((len(self.latents),), 300)).sample.float()
        decode(self.vae, self.latents, "fp32")

    def tensors(self) -> list[torch.Tensor]:
        """What stays."""
        vae = [*self.vae.parameters(), *self.vae.buffers()]
        return [*self.model.parameters(), *self.model.buffers(), *vae, self.latents]


def measure(number: int, team: Processes) -> dict[str, int]:
    """Runs a case in this process."""
    torch.set_num_threads(1)
    case = CASES[number]
    kind = Sampling if case.sampling else Training
    warm = Case(
        "tiny/8", {"num_frames": 2, "sample_size": 8}, 1, 0, {"precision": case.setting.get("precision", "fp32")}
    )
    kind(warm, Processes()).step()
    forget_peak()
    before = resident("VmRSS")
    run = kind(case, team)
    # The first training step has no optimizer's state in its passes; in the second one DDP makes its buckets anew.
    for _ in range(1 if case.sampling else 1 + team.count):
        run.step()
    peak = resident("VmHWM") - before
    if team.count > 1:
        return {"resident": peak}
    stays = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in run.tensors()}
    return {"resident": peak, "allocated": sum(stays.values()) + highest_allocated(run.step)}


def in_process(rank: int, number: int, count: int, folder: str) -> None:
    """One of several processes; the first one says what it measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    answer = measure(number, Processes(rank, count))
    dist.barrier()
    if rank == 0:
        Path(folder, "answer").write_text(json.dumps(answer))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        count = CASES[arguments.case].setting.get("processes", 1)
        if count == 1:
            print(json.dumps(measure(arguments.case, Processes())))
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(in_process, (arguments.case, count, folder), nprocs=count)
            print(Path(folder, "answer").read_text())
        return
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    rows = []
    print(f"{'MiB':72} predicted  resident ratio  allocated ratio  at")
    for number, case in enumerate(CASES):
        if arguments.only not in case.title:
            continue
        command = [sys.executable, __file__, "--case", str(number)]
        answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=900)
        measured, peak = json.loads(answer.stdout.splitlines()[-1]), predict(case)
        row = {"case": asdict(case), "title": case.title, "predicted": peak.to_json(), "measured": measured}
        row["ratios"] = {name: round(peak.total / value, 3) for name, value in measured.items()}
        rows.append(row)
        columns = "".join(f"{measured[name] / MIB:10,.1f} {row['ratios'][name]:5.2f}" for name in measured)
        print(f"{case.title:72}{peak.total / MIB:10,.1f}{columns}  {peak.phase}", flush=True)
    worst = max((abs(row["ratios"]["resident"] - 1), row["title"]) for row in rows)
    print(f"{len(rows)} configurations; largest error against resident memory {worst[0]:.1%}: {worst[1]}")
    if arguments.out is not None:
        facts = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, "largest_error": worst[0], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
