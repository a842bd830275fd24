"""What a speed benchmark runs on: the model, its inputs and the precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from lavita.core.precision import autocast, has_bf16, low_precision
from lavita.models.blocks import TransformerBlock
from lavita.models.presets import preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel

BenchPrecision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")
NUM_CLASSES = 101  # as UCF101
IN_CHANNELS = 4
TINY: dict[str, Any] = {"preset": "tiny/8", "num_frames": 2, "sample_size": 8, "batch_size": 1}
"""Fields of a setup that runs in no time."""


@dataclass(frozen=True)
class Setup:
    """Settings that all sections share."""

    preset: str = "S/2"
    num_frames: int = 16
    sample_size: int = 32
    """Height and width of the latents, an eighth of those of the frames."""
    batch_size: int = 1
    precision: BenchPrecision = "fp32"
    repeats: int = 5
    """Rounds in which the candidates take turns."""
    steps: int = 10
    """Sampling steps."""
    compiled: bool = True
    """Whether compiled candidates take part."""
    memory: bool = True
    """Whether peak memory is measured, in fresh processes."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks what the model does not check itself.

        Raises:
            ValueError: for an unknown preset or a number out of range.
        """
        patch = preset_sizes(self.preset)["patch_size"]
        for name, least in (("num_frames", 1), ("sample_size", 1), ("batch_size", 1), ("repeats", 1), ("steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.sample_size % patch:
            raise ValueError(
                f"sample_size is {self.sample_size}, but must be a multiple of the preset's patch size ({patch})"
            )

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model's constructor."""
        return {
            **preset_sizes(self.preset),
            "num_frames": self.num_frames,
            "sample_size": self.sample_size,
            "in_channels": IN_CHANNELS,
            "num_classes": NUM_CLASSES,
        }

    @property
    def torch_device(self) -> torch.device:
        """The device that everything runs on."""
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        return low_precision(self.torch_device, self.precision) or torch.float32

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        grid = self.sample_size // preset_sizes(self.preset)["patch_size"]
        return self.batch_size * self.num_frames * grid * grid

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as training and sampling use it."""
        return autocast(self.torch_device, self.precision)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def resolve_precision(name: str, device: torch.device) -> BenchPrecision:
    """The precision that a name stands for: `auto` is bf16 if the device multiplies it in hardware, else fp32.

    Raises:
        ValueError: for another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; allowed: {', '.join(PRECISIONS)}")
    if name == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return "fp32" if name == "fp32" else "bf16"


def build_model(setup: Setup) -> LavitaTransformer3DModel:
    """Our model with random weights and open gates, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: LavitaTransformer3DModel = LavitaTransformer3DModel.from_config(setup.config)
        for module in (*model.blocks, model.final_layer):
            nn.init.normal_(module.adaLN_modulation[1].weight, std=0.02)
        nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model.eval().requires_grad_(False).to(setup.torch_device)


def model_inputs(setup: Setup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (B, F, C, H, W), timesteps (B,) and class labels (B,)."""
    random = torch.Generator().manual_seed(0)
    shape = (setup.batch_size, setup.num_frames, IN_CHANNELS, setup.sample_size, setup.sample_size)
    latents = torch.randn(shape, generator=random).to(setup.torch_device)
    timesteps = torch.full((setup.batch_size,), 300, device=setup.torch_device)
    return latents, timesteps, torch.arange(setup.batch_size, device=setup.torch_device) % NUM_CLASSES


def set_compiled(model: LavitaTransformer3DModel, compiled: bool) -> None:
    """Switches a model between its compiled and its eager form, after `compile_blocks`."""
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.compiled = compiled
