"""What training and sampling occupy at their peak, found by rehearsing them on tensors without numbers.

A rehearsal runs the real code, step by step, under `FakeTensorMode`, and follows which storages are alive. So the
peak is that of the code as it is: which tensors autograd keeps, which kernel of attention is chosen, what the optimizer
makes on the way. It takes seconds and no memory, whatever the size.

Legend: B batch, F frames (a clip's, then images), C channels, H W latent size.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavita.core.precision import store_linear_weights
from lavita.models.autoencoder import AutoencoderKL, downsampling, frames_at_once, pieces
from lavita.models.autoencoder_cpu import decode_pixels
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER, model_source
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.ema import EMA
from lavita.training.optimizers import make_optimizers

Optimizer = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16", "fp16"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer's state"
AVERAGE = "moving average"
BATCH = "batch"
EXCHANGE = "exchange of processes"
AUTOENCODER = "autoencoder"
ACTIVATIONS = "activations and temporaries"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, AUTOENCODER, BATCH, EXCHANGE, ACTIVATIONS)


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory goes."""

    optimizer: Optimizer = "adamw"
    gradient_checkpointing: Checkpointing = False
    precision: Precision = "fp32"
    accumulation: int = 1
    """Micro-batches of a step."""
    processes: int = 1
    sharded: bool = False
    """FSDP2 over the processes; else each has a whole model (DDP)."""

    def __post_init__(self) -> None:
        """Refuses what training would refuse."""
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, tuple(PRECISIONS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        for name in ("accumulation", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.sharded and self.processes == 1:
            raise ValueError("sharded is set, but processes is 1: there is nothing to share with")


@dataclass(frozen=True)
class Peak:
    """The moment of a process's highest memory."""

    phase: str
    """What it was doing."""
    parts: dict[str, int]
    """Bytes that were alive, by what they were for, see `PARTS`."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {**asdict(self), "total": self.total}


class LiveStorages(TorchDispatchMode):
    """Follows which storages the operations within make, and until when they live, and keeps the highest moment."""

    def __init__(self) -> None:
        """Knows of nothing yet: `name` tells it what is alive already."""
        super().__init__()
        self.phase = ""
        self.peak = Peak("", {})
        self._alive: dict[int, tuple[str, int, Any]] = {}  # with a reference that tells when the storage dies
        self._bytes: Counter[str] = Counter()
        self._highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.name(ACTIVATIONS, _tensors(result), keep=True)
        self._look()
        return result

    def name(self, part: str, tensors: Iterable[torch.Tensor], keep: bool = False) -> None:
        """Says what the storages of tensors are for; `keep` leaves those that have a name."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._alive.get(key)
            if known is not None and keep:
                continue
            self._forget(key)
            size = storage.nbytes()
            self._alive[key] = (part, size, weakref.ref(storage, lambda _, key=key: self._forget(key)))  # type: ignore[misc]
            self._bytes[part] += size

    def begin(self, phase: str) -> None:
        """What comes now is a phase of that name."""
        self.phase = phase

    def restart(self) -> None:
        """Forgets the highest moment so far."""
        self._highest, self.peak = 0, Peak("", {})
        self._look()

    def _forget(self, key: int) -> None:
        if (known := self._alive.pop(key, None)) is not None:
            self._bytes[known[0]] -= known[1]

    def _look(self) -> None:
        total = sum(self._bytes.values())
        if total > self._highest:
            self._highest = total
            self.peak = Peak(self.phase, {part: self._bytes[part] for part in PARTS if self._bytes[part]})


@contextmanager
def phantom(
    config: Mapping[str, Any], batch_size: int, num_frames: int | None, num_images: int
) -> Iterator[tuple[LavitaTransformer3DModel, dict[str, Any]]]:
    """A model in training mode and arguments of its forward pass, all without numbers while the context lasts.

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
    # Positions come from numpy, as real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(dict(config)).train()
        channels, size = model.config["in_channels"], model.config["sample_size"]
        length = (num_frames or model.config["num_frames"]) + num_images
        conditions = (batch_size, 1 + num_images) if num_images else (batch_size,)
        inputs: dict[str, Any] = {
            "latents": torch.zeros(batch_size, length, channels, size, size),
            "timesteps": torch.zeros(batch_size, dtype=torch.long),
            "num_images": num_images,
        }
        if model.config["num_classes"]:
            inputs["class_labels"] = torch.zeros(conditions, dtype=torch.long)
        if model.config["text_dim"]:
            inputs["text_embeds"] = torch.zeros(*conditions, model.config["text_dim"])
        yield model, inputs


def training_memory(
    config: Mapping[str, Any],
    batch_size: int = 1,
    num_frames: int | None = None,
    num_images: int = 0,
    setting: Setting | None = None,
) -> Peak:
    """The peak of a training step after the first, in one process.

    The weights are fp32 in any precision. Not in it: the autoencoder, what the allocator and the libraries keep for
    themselves, and what the process occupies before a model is built.

    Args:
        config: fields of the model's constructor, for example `model.config`.
        batch_size: B, clips of one pass in this process: of a step's, the share of a process and micro-batch.
        num_frames: of the clip; the configuration's by default.
        num_images: images that follow it, each with a condition of its own in a conditional model.
        setting: how it is trained; `Setting()` by default.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    setting = setting or Setting()
    with phantom(config, batch_size, num_frames, num_images) as (model, inputs), LiveStorages() as live:
        peak = _rehearse_training(model, inputs, setting, live)
    if setting.sharded:
        return _share(peak, model, setting.processes)
    if setting.processes > 1:
        # DDP copies the gradients into buckets that the processes add up.
        return replace(peak, parts={**peak.parts, EXCHANGE: _bytes_of(model.parameters())})
    return peak


def sampling_memory(
    config: Mapping[str, Any],
    batch_size: int = 1,
    num_frames: int | None = None,
    guidance: bool = False,
    precision: Precision = "fp32",
    autoencoder: Mapping[str, Any] | None = None,
) -> Peak:
    """The peak of sampling a batch of videos and decoding their frames, in one process.

    Args:
        config: as `training_memory` takes it.
        batch_size: videos at once.
        num_frames: of a video; the configuration's by default.
        guidance: classifier-free guidance, which evaluates every video twice at once.
        precision: of the matrix products.
        autoencoder: fields of the `AutoencoderKL`; Stable Diffusion's by default.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    setting = Setting(precision=precision)
    samples = batch_size * (2 if guidance else 1)
    with phantom(config, samples, num_frames, 0) as (model, inputs), LiveStorages() as live, torch.no_grad():
        vae = AutoencoderKL.from_config(dict(autoencoder or STABLE_DIFFUSION_AUTOENCODER)).eval()
        store_linear_weights(model.eval().blocks, PRECISIONS[precision])
        live.name(WEIGHTS, (*model.parameters(), *model.buffers()))
        live.name(AUTOENCODER, (*vae.parameters(), *vae.buffers()))
        # The state, and what the solver remembers of two steps.
        state = [torch.zeros_like(inputs["latents"][:batch_size]) for _ in range(3)]
        live.name(BATCH, (*_tensors(inputs), *state))
        live.restart()
        live.begin("transformer")
        with _autocast(setting.precision):
            output = model(**inputs).sample.float()
        del output, inputs
        live.begin("decoder")
        flat = state[0].flatten(0, 1)
        frames: list[torch.Tensor] = []
        # Its activations may overflow in fp16: it computes in float32 then.
        decoded: Precision = "fp32" if setting.precision == "fp16" else setting.precision
        at_once = frames_at_once(flat.device, flat.shape[-1] * downsampling(vae))
        for numbers in pieces(len(flat), at_once, flat.device):
            with _autocast(decoded):
                frames.append(_to_bytes(decode_pixels(vae, flat[numbers] / 1.0, decoded)))
        torch.cat(frames)
    return live.peak


def autoencoder_config(name: str, latent_channels: int) -> dict[str, Any]:
    """The autoencoder that decodes a model's samples: the one in its folder, else one like Stable Diffusion's.

    Args:
        name: a preset or folder, as `complexity.model_config` takes it.
        latent_channels: C of the model.
    """
    folder = Path(model_source(name))
    for place in (folder / "vae", folder.parent / "vae", folder / "pipeline" / "vae"):
        if (place / "config.json").is_file():
            return dict(AutoencoderKL.load_config(place))
    return {**STABLE_DIFFUSION_AUTOENCODER, "latent_channels": latent_channels}


def print_memory(peaks: Mapping[str, Peak], setting: Setting, console: Console | None = None) -> None:
    """Prints peaks side by side, by what the bytes are for, and what the numbers mean.

    Args:
        peaks: by what was predicted, for example `training, fp32`.
        setting: that of the training ones.
        console: where to print; standard output by default.
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
        shared = f", in each of {setting.processes} processes ({'FSDP2' if setting.sharded else 'DDP'})"
    console.print(
        f"Training: {setting.optimizer}, {checkpointing} gradient checkpointing{accumulation}{shared}; parts that are "
        "not alive at that moment are not in it. Sampling: the same batch, evaluated twice where the model has classes "
        "or texts, then decoded. With torch's CPU kernels, over what a process has after its imports; a GPU has the "
        "same tensors, but keeps no attention scores, and its libraries take up to a GiB for themselves.",
        highlight=False,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"


def _rehearse_training(
    model: LavitaTransformer3DModel, inputs: dict[str, Any], setting: Setting, live: LiveStorages
) -> Peak:
    """One step as `train` does it, after what it finds in place."""
    checkpoint_blocks(model, setting.gradient_checkpointing)
    diffusion, ema = GaussianDiffusion(), EMA(model, 0.9999)
    parameters = list(model.parameters())
    optimizers = make_optimizers(model, setting.optimizer, 1e-4, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda leaf: live.name(GRADIENTS, [leaf.grad]))
    # The clips of all micro-batches, their noise, and those of the next step, which are read meanwhile.
    copies = 2 * 2 * setting.accumulation - 1
    waiting = [torch.zeros_like(inputs["latents"]) for _ in range(copies)]
    live.name(WEIGHTS, (*parameters, *model.buffers()))
    live.name(AVERAGE, ema.weights.values())
    live.name(OPTIMIZER, (leaf for optimizer in optimizers for leaf in _tensors(optimizer.state_dict())))
    live.name(BATCH, (*_tensors(inputs), *waiting))
    live.restart()

    latents, timesteps, noise = inputs["latents"], inputs["timesteps"], waiting[0]
    for _ in range(min(setting.accumulation, 2)):  # the second finds the gradients of the first
        live.begin("forward pass")
        noisy = diffusion.q_sample(latents, timesteps, noise)
        with _autocast(setting.precision):
            output = model(**{**inputs, "latents": noisy}).sample
        loss = diffusion.losses(output, latents, timesteps, noise).total.mean()
        live.begin("backward pass")
        loss.backward()
    live.begin("optimizer's step")
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    ema.update(1)
    return live.peak


def _share(peak: Peak, model: LavitaTransformer3DModel, processes: int) -> Peak:
    """A process's part under FSDP2: 1/k of the state, and what is gathered for the passes.

    The root's weights, those outside of the blocks, stay together from the forward to the backward pass. Of the blocks
    there are the one that works and the next one on its way, which lies in the buffer of the exchange and, copied, in
    its parameters; and in the backward pass the working block's gradients, and their copy in the buffer.
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


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """As `autoencoder.to_frames`, which needs numbers."""
    scaled = pixels.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous()
