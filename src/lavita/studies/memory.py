"""Predicts the peak memory of training and sampling by rehearsing them on tensors without data.

A rehearsal runs the real code, step by step, under `FakeTensorMode`, and tracks which storages are alive. The peak
therefore follows the code as it is: which tensors autograd keeps, which attention kernel is chosen, which temporary
tensors the optimizer makes. A rehearsal takes seconds and hardly any memory, whatever the size of the model. What it
cannot see is the scratch memory of a library within one operation, as of a matrix product in bf16 on a CPU.

Legend: B batch, F frames (a clip's, then images), C channels, H W latent size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lavita.core.precision import store_linear_weights
from lavita.models.autoencoder import AutoencoderKL, autoencoder_class, decoded
from lavita.models.cross_attention import text_shape
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER, model_source
from lavita.models.sequence_parallel import SequenceGroup
from lavita.models.shapes import sample_grid
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.live_storages import (
    AUTOENCODER,
    AVERAGE,
    BATCH,
    EXCHANGE,
    GRADIENTS,
    OPTIMIZER,
    PARTS,
    WEIGHTS,
    LiveStorages,
    Peak,
    tensors_in,
)
from lavita.training.batches import Batch
from lavita.training.config import TrainConfig
from lavita.training.power_ema import PowerEMA
from lavita.training.state import TrainState
from lavita.training.step import train_step, update

Optimizer = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16", "fp16"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


MOST = 2**16
"""Most micro-batches and processes that memory is predicted for."""


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as it matters for memory."""

    optimizer: Optimizer = "adamw"
    gradient_checkpointing: Checkpointing = False
    precision: Precision = "fp32"
    accumulation: int = 1
    """Micro-batches per step."""
    processes: int = 1
    sharded: bool = False
    """Shard the model over the processes (FSDP2) instead of copying it to each (DDP)."""
    sequence_parallel: int = 1
    """Processes that share each clip; divides `processes`."""
    num_averages: int = 1
    """Averages of the weights: `train.ema_decay` keeps one, and each length of `train.power_ema` another."""

    def __post_init__(self) -> None:
        """Refuses what training would refuse; ValueError names the field."""
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, tuple(PRECISIONS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        for name in ("accumulation", "num_averages", "processes", "sequence_parallel"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be in 1..{MOST}")
        if self.sharded and self.processes == 1:
            raise ValueError("sharded is set, but processes is 1: there is nothing to shard over")
        if self.processes % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel is {self.sequence_parallel}, but must divide the processes ({self.processes})"
            )


@contextmanager
def meta_model(
    config: Mapping[str, Any], batch_size: int, num_frames: int | None, num_images: int
) -> Iterator[tuple[LavitaTransformer3DModel, dict[str, Any]]]:
    """A model in training mode and the arguments of its forward pass, as tensors without data within the context.

    Args:
        config: fields of the model's constructor.
        batch_size: B.
        num_frames: frames of the clip; by default those of the configuration.
        num_images: images that follow it.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_frames", num_frames, 1),
        ("num_images", num_images, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}")
    # The positions are real tensors: they come from numpy.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(dict(config)).train()
        channels, grid = model.config["in_channels"], sample_grid(model.config)
        length = (num_frames or model.config["num_frames"]) + num_images
        conditions = (batch_size, 1 + num_images) if num_images else (batch_size,)
        inputs: dict[str, Any] = {
            "latents": torch.zeros(batch_size, length, channels, *grid),
            "timesteps": torch.zeros(batch_size, dtype=torch.long),
            "num_images": num_images,
        }
        if model.config["num_classes"]:
            inputs["class_labels"] = torch.zeros(conditions, dtype=torch.long)
        if model.config["text_dim"]:
            inputs["text_embeds"] = torch.zeros(*conditions, *text_shape(model.config))
        yield model, inputs


def training_memory(
    config: Mapping[str, Any],
    batch_size: int = 1,
    num_frames: int | None = None,
    num_images: int = 0,
    setting: Setting | None = None,
) -> Peak:
    """The peak of a training step after the first one, in one process.

    The weights are fp32 in any precision. Not included are the autoencoder, memory that the allocator and the libraries
    keep for themselves, and what the process uses before a model is built.

    Args:
        config: fields of the model's constructor, for example `model.config`.
        batch_size: B, clips per micro-batch and process, or group of processes that share them.
        num_frames: frames of the clip; by default those of the configuration.
        num_images: images that follow it, each with its own condition in a conditional model.
        setting: how the model is trained; by default `Setting()`.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    setting = setting or Setting()
    # Two micro-batches are enough: the second one finds the gradients of the first.
    clips = batch_size * min(setting.accumulation, 2)
    with meta_model(config, clips, num_frames, num_images) as (model, inputs), LiveStorages() as live:
        peak = _rehearse_training(model, inputs, setting, live)
    if setting.sharded:
        return _share(peak, model, setting.processes)
    if setting.processes > 1:
        # DDP copies the gradients into buckets that are summed over the processes.
        return replace(peak, parts={**peak.parts, EXCHANGE: _bytes_of(model.parameters())})
    return peak


def sampling_memory(
    config: Mapping[str, Any],
    batch_size: int = 1,
    num_frames: int | None = None,
    guidance: bool = False,
    precision: Precision = "fp32",
    autoencoder: Mapping[str, Any] | None = None,
    sequence_parallel: int = 1,
) -> Peak:
    """The peak of sampling a batch of videos and decoding their frames, in one process.

    Args:
        config: as for `training_memory`.
        batch_size: videos sampled at once.
        num_frames: frames of a video; by default those of the configuration.
        guidance: classifier-free guidance, which evaluates every video twice at once.
        precision: precision of the matrix products.
        autoencoder: fields of its configuration; by default those of Stable Diffusion's.
        sequence_parallel: processes that share the videos; each decodes all of them.

    Raises:
        ValueError: for sizes that do not fit together, or fields that describe no autoencoder.
    """
    setting = Setting(precision=precision)
    samples = batch_size * (2 if guidance else 1)
    with meta_model(config, samples, num_frames, 0) as (model, inputs), LiveStorages() as live, torch.no_grad():
        try:
            fields = dict(autoencoder or STABLE_DIFFUSION_AUTOENCODER)
            built: Any = autoencoder_class(fields).from_config(fields)
            vae = built.eval()
        except Exception as error:  # diffusers checks no fields
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"vae/config.json describes no autoencoder ({type(error).__name__}: {why})") from error
        store_linear_weights(model.eval().blocks, PRECISIONS[precision])
        live.name(WEIGHTS, (*model.parameters(), *model.buffers()))
        live.name(AUTOENCODER, (*vae.parameters(), *vae.buffers()))
        model.sequence_group = _group(sequence_parallel)
        # The state, and two earlier steps that the solver remembers.
        state = [torch.zeros_like(inputs["latents"][:batch_size]) for _ in range(3)]
        live.name(BATCH, (*tensors_in(inputs), *state))
        live.restart()
        live.begin("transformer")
        with _autocast(setting.precision):
            output = model(**inputs).sample.float()
        del output, inputs
        live.begin("decoder")
        # The decoder's activations may overflow in fp16: it then computes in float32.
        lower: Precision = "fp32" if setting.precision == "fp16" else setting.precision
        torch.cat(list(map(_to_bytes, decoded(vae, state[0], lambda: _autocast(lower)))))
    return live.peak


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device now; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return pages * size if pages > 0 else None


def autoencoder_config(name: str, latent_channels: int) -> dict[str, Any]:
    """The autoencoder that decodes a model's samples: the one in its folder, or one like Stable Diffusion's.

    Args:
        name: a preset or folder, as for `complexity.model_config`.
        latent_channels: C of the model.

    Returns:
        Fields of its configuration.
    """
    folder = Path(model_source(name))
    for candidate in (folder / "vae", folder.parent / "vae", folder / "pipeline" / "vae"):
        if (candidate / "config.json").is_file():
            return dict(AutoencoderKL.load_config(candidate))
    return {**STABLE_DIFFUSION_AUTOENCODER, "latent_channels": latent_channels}


def print_memory(peaks: Mapping[str, Peak], setting: Setting, console: Console | None = None) -> None:
    """Prints a table of peaks, part by part, and what the numbers mean.

    Args:
        peaks: by what was predicted, for example `training, fp32`.
        setting: the setting of the training peaks.
        console: where to print; by default standard output.
    """
    console = console or Console()
    table = Table("memory at the peak, GiB")
    for heading in peaks:
        table.add_column(heading, justify="right")
    for part in PARTS:
        if any(part in peak.parts for peak in peaks.values()):
            table.add_row(part, *(_gib(peak.parts[part]) if part in peak.parts else "" for peak in peaks.values()))
    table.add_section()
    table.add_row("whole", *(_gib(peak.total) for peak in peaks.values()))
    table.add_row("in the", *(peak.phase for peak in peaks.values()))
    console.print(table)
    checkpointing = {False: "without", True: "with", "cheap": "with cheap"}[setting.gradient_checkpointing]
    accumulation = f", {setting.accumulation} micro-batches of the batch above" if setting.accumulation > 1 else ""
    shared = ""
    if setting.processes > 1:
        groups = f", {setting.sequence_parallel} share a clip" if setting.sequence_parallel > 1 else ""
        shared = f", in each of {setting.processes} processes ({'FSDP2' if setting.sharded else 'DDP'}{groups})"
    console.print(
        f"Training: {setting.optimizer}, {checkpointing} gradient checkpointing{accumulation}{shared}; parts that are "
        "not alive at the peak are left out. Sampling: the same batch, evaluated twice if the model has classes or "
        "texts, then decoded. The numbers are those of torch's CPU kernels, in addition to what a process uses after "
        "its imports; a GPU has the same tensors, but keeps no attention scores, and its libraries take up to a GiB.",
        highlight=False,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"


def _rehearse_training(
    model: LavitaTransformer3DModel, inputs: dict[str, Any], setting: Setting, live: LiveStorages
) -> Peak:
    """The second step of a run: the optimizers have their state."""
    micro_batches = min(setting.accumulation, 2)
    settings = TrainConfig(
        optimizer=setting.optimizer,
        precision=setting.precision,
        batch_size=len(inputs["latents"]),
        accumulation=micro_batches,
    )
    checkpoint_blocks(model, setting.gradient_checkpointing)
    state = TrainState.build(model, settings, torch.device("cpu"))
    model.sequence_group = _group(setting.sequence_parallel)
    state.power = [PowerEMA(model, 0.1) for _ in range(setting.num_averages - 1)]
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    update(state, torch.zeros(len(inputs["latents"])), settings)

    batch = Batch(
        latents=inputs["latents"],
        noise=torch.zeros_like(inputs["latents"]),
        timesteps=inputs["timesteps"],
        class_labels=inputs.get("class_labels"),
        text_embeds=inputs.get("text_embeds"),
        num_images=inputs["num_images"],
    )
    # Clips and noise of the next step, which are read during this one, and of further micro-batches.
    waiting = [torch.zeros_like(batch.latents) for _ in range(2)]
    micro = len(batch.latents) // micro_batches
    waiting += [torch.zeros_like(batch.latents[:micro]) for _ in range(4 * (setting.accumulation - micro_batches))]
    live.name(WEIGHTS, (*model.parameters(), *model.buffers()))
    live.name(AVERAGE, (tensor for average in (state.ema, *state.power) for tensor in average.weights.values()))
    live.name(OPTIMIZER, (leaf for optimizer in state.optimizers for leaf in tensors_in(optimizer.state_dict())))
    live.name(BATCH, (*tensors_in(inputs), batch.noise, *waiting))

    def name_gradient(parameter: torch.Tensor) -> None:
        live.name(GRADIENTS, tensors_in(parameter.grad))
        live.begin("optimizer's step")

    for parameter in state.parameters:
        parameter.register_post_accumulate_grad_hook(name_gradient)
    model.register_forward_pre_hook(lambda *_: live.begin("forward pass"))
    live.restart()
    live.begin("forward pass")
    train_step(state, batch, settings)
    return live.peak


def _group(sequence_parallel: int) -> SequenceGroup | None:
    """The first process of a group that shares clips; nothing is sent in a rehearsal."""
    return SequenceGroup("", 0, sequence_parallel) if sequence_parallel > 1 else None


def _share(peak: Peak, model: LavitaTransformer3DModel, processes: int) -> Peak:
    """The peak of one process under FSDP2: 1/k of the state, and the weights that are gathered for the passes.

    The weights of the root, which are those outside the blocks, stay gathered from the forward to the backward pass. Of
    the blocks, the current one is gathered, and the next one twice: in the communication buffer and copied to its
    parameters; the backward pass adds the gradients of the current block and their copy in the buffer.
    """
    block = max(_bytes_of(block.parameters()) for block in model.blocks)
    root = _bytes_of(model.parameters()) - sum(_bytes_of(block.parameters()) for block in model.blocks)
    parts = dict(peak.parts)
    for part in (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE):
        if part in parts:
            parts[part] = math.ceil(parts[part] / processes)
    return Peak(peak.phase, {**parts, EXCHANGE: root + 5 * block})


def _autocast(precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def _bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Like `autoencoder.to_frames`, which needs tensors with data."""
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous()
