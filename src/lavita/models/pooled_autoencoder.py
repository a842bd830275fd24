"""The tiny autoencoders of the TAESD family, from the two `.pth` files that they are published as.

`AutoencoderTiny` is that family's network. Its member for the latents of FLUX.2, TAEF2, has a second path in the blocks
next to the latents, whose group normalisation sees the whole frame; `LavitaPooledAutoencoder` has it, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

# mypy knows these classes by their own modules only: diffusers' lazy `__init__` hides them.
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

# A pipeline loads a part of this module if it finds this class here, too.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

ENCODER, DECODER = "*_encoder.pth", "*_decoder.pth"
"""Names of the two files."""
GROWTH = 4
"""Channels of the pool path, in multiples of the block's; also the number of its groups."""


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds the output of its pool path to its input."""

    def __init__(self, channels: int, act_fn: str) -> None:
        """Makes a block of as many channels in as out.

        Args:
            channels: C.
            act_fn: activation of the convolutions, as diffusers names it.
        """
        super().__init__(channels, channels, act_fn)
        self.pool = nn.Sequential(
            nn.Conv2d(channels, GROWTH * channels, 1, bias=False),
            nn.GroupNorm(GROWTH, GROWTH * channels),
            nn.ReLU(),
            nn.Conv2d(GROWTH * channels, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floats (N, C, H, W) to the same shape."""
        return super().forward(x + self.pool(x))


class LavitaPooledAutoencoder(AutoencoderTiny):
    """An `AutoencoderTiny` with a pool path in the last stage of its encoder and the first stage of its decoder."""

    @functools.wraps(AutoencoderTiny.__init__)  # type: ignore[misc]  # keeps the fields' names for `from_config`
    def __init__(self, *args: Any, **fields: Any) -> None:
        """Takes the fields of `AutoencoderTiny`."""
        super().__init__(*args, **fields)
        for layers, last in ((self.encoder.layers, True), (self.decoder.layers, False)):
            for index in _stage(layers, last):
                block: Any = layers[index]
                channels = block.conv[0].in_channels
                layers[index] = PooledBlock(channels, self.config["act_fn"])


def _stage(layers: nn.Sequential, last: bool) -> list[int]:
    """Indices of the blocks of the last or the first stage: those without another layer between them."""
    stages: list[list[int]] = [[]]
    for index, layer in enumerate(layers):
        if isinstance(layer, AutoencoderTinyBlock):
            stages[-1].append(index)
        elif stages[-1]:
            stages.append([])
    found = [stage for stage in stages if stage]
    return found[-1 if last else 0]


def tiny_files(folder: Path) -> tuple[Path, Path] | None:
    """The files of a published autoencoder, encoder and decoder; None unless there is one of each in the folder."""
    found = [sorted(folder.glob(pattern)) for pattern in (ENCODER, DECODER)]
    return (found[0][0], found[1][0]) if all(len(files) == 1 for files in found) else None


def load_tiny_files(encoder: Path, decoder: Path) -> AutoencoderTiny:
    """Reads a published autoencoder of the TAESD family, whose layout follows from the tensors.

    Its latents are taken as they are: scaling_factor 1 and shift_factor 0.

    Args:
        encoder: file of the encoder, tensors by name.
        decoder: file of the decoder.

    Returns:
        The autoencoder in float32; an `AutoencoderTiny`, or with pool paths a `LavitaPooledAutoencoder`.

    Raises:
        ValueError: if a file holds something else; it names the file.
    """
    parts = {"encoder": _tensors(encoder), "decoder": _tensors(decoder)}
    # diffusers counts no layer for the tanh that the decoder begins with.
    state = {
        f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
        for index, _, rest in [name.partition(".")]
    }
    try:
        convolutions, blocks = zip(*(_layers(tensors) for tensors in parts.values()), strict=True)
        width = parts["encoder"]["0.weight"].shape[0]
        kind = LavitaPooledAutoencoder if any(".pool." in name for name in state) else AutoencoderTiny
        vae = kind(
            in_channels=parts["encoder"]["0.weight"].shape[1],
            out_channels=parts["decoder"][f"{convolutions[1][-1]}.weight"].shape[0],
            latent_channels=parts["decoder"]["1.weight"].shape[1],
            encoder_block_out_channels=(width,) * len(blocks[0]),
            decoder_block_out_channels=(width,) * len(blocks[1]),
            num_encoder_blocks=tuple(blocks[0]),
            num_decoder_blocks=tuple(blocks[1]),
        )
        vae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{encoder} and {decoder.name}: not a tiny autoencoder of the TAESD family ({why})") from error
    return vae


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{file}: damaged, or not a file of tensors alone ({type(error).__name__})") from error
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and name.partition(".")[0].isdigit() and isinstance(tensor, torch.Tensor)
        for name, tensor in found.items()
    ):
        raise ValueError(f"{file}: holds no tensors by the number of their layer")
    return dict(found)


def _layers(tensors: Mapping[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """The layers that are convolutions, and the number of blocks in each stage, which follows one or ends with one."""
    convolutions = sorted(int(name.partition(".")[0]) for name in tensors if name.split(".")[1:] == ["weight"])
    blocks = {int(name.partition(".")[0]) for name in tensors if ".conv." in name}
    return convolutions, [sum(first < block < last for block in blocks) for first, last in pairwise(convolutions)]
