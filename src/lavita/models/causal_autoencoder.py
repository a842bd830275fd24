"""A causal autoencoder of clips, made from an autoencoder of frames.

Each convolution of more than one pixel also sees the two frames before; before the first frame there is the first one
again. Everything else, norms and attention among it, sees one frame at a time. Temporal layers merge groups of 2 or 4
frames: the first frame alone, then one latent for each further group, as in MAGVIT-v2 (Yu et al. 2024, Sec. 3.1). So no
latent depends on later frames and no frame on later latents, and a frame alone is a clip of one.

At the start only the last tap of each convolution is not 0, and has the weights of the autoencoder of frames: the
first frame has the same latents and the same reconstruction as there. A further latent is that of its group's last
frame, and the frames of a group move linearly, in the decoder's features, from the last latent to this one.

Legend: B clips, F frames, K latents, 1 + (F - 1) / t of them, C channels, H W pixels, h w latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# mypy knows these classes by their own modules only: diffusers' lazy `__init__` hides them.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.models.pooled_autoencoder import LavitaPooledAutoencoder

FrameAutoencoder = AutoencoderKL | AutoencoderTiny | LavitaPatchAutoencoder
FRAME_AUTOENCODERS: dict[str, type[FrameAutoencoder]] = {
    kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, LavitaPatchAutoencoder, LavitaPooledAutoencoder)
}
"""Classes of autoencoders of frames, by the names that configurations hold."""
FACTORS = (2, 4)
"""Temporal downsampling that there is."""
TAPS = 3
"""Frames that a temporal kernel sees: the current one and those before it."""
Past = dict[nn.Module, torch.Tensor]
"""The frames before a part of a clip that the layers need; empty before the first part."""


class Posterior(NamedTuple):
    """The distribution of latents, neither shifted nor scaled."""

    mean: torch.Tensor
    std: torch.Tensor
    """0 for an autoencoder that gives latents instead of a distribution."""
    logvar: torch.Tensor | None
    """Logarithm of the variance; None where that is 0."""


@dataclass
class _Stream:
    """What the layers of a pass have to know about the frames, which to them are a batch."""

    clips: int
    past: Past | None


_STREAM: ContextVar[_Stream] = ContextVar("_STREAM")  # of its own in each thread: several may use the same network


@contextmanager
def _streaming(clips: int, past: Past | None) -> Iterator[None]:
    token = _STREAM.set(_Stream(clips, past))
    try:
        yield
    finally:
        _STREAM.reset(token)


def _with_past(layer: nn.Module, frames: torch.Tensor, kept: int) -> tuple[torch.Tensor, bool]:
    """Frames of a layer, (B F, C, H, W), after those before them: (B, C, TAPS - 1 + F, H, W), and whether they begin.

    Args:
        layer: which asks.
        frames: the current ones.
        kept: number of frames that the layer needs of this part when the next one comes.
    """
    stream = _STREAM.get()
    clips = frames.unflatten(0, (stream.clips, -1)).transpose(1, 2)
    past = None if stream.past is None else stream.past.get(layer)
    joined = torch.cat([clips[:, :, :1]] * (TAPS - 1) + [clips] if past is None else [past, clips], dim=2)
    if stream.past is not None:
        stream.past[layer] = joined[:, :, -kept:]
    return joined, past is None


def _folded(clips: torch.Tensor) -> torch.Tensor:
    return clips.transpose(1, 2).flatten(0, 1)


class CausalConv(nn.Conv3d):
    """A convolution over the current frame and the two before it, in place of one over the frame."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes the weights for the current frame, and 0 for those before it."""
        kernel, stride, padding = (
            (time, sides[0], sides[1])
            for time, sides in ((TAPS, conv.kernel_size), (1, conv.stride), (0, cast(tuple[int, int], conv.padding)))
        )
        super().__init__(conv.in_channels, conv.out_channels, kernel, stride, padding, bias=conv.bias is not None)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, :, -1].copy_(conv.weight)
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B F, C, H, W) to (B F, C', H', W')."""
        return _folded(super().forward(_with_past(self, frames, TAPS - 1)[0]))


class TemporalDownsample(nn.Conv3d):
    """Merges pairs of frames: 1 + 2 k frames to 1 + k. At the start it takes the last one of each pair."""

    def __init__(self, channels: int) -> None:
        """Makes a layer of as many channels in as out."""
        super().__init__(channels, channels, (TAPS, 1, 1), stride=(2, 1, 1))
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, :, -1, 0, 0].copy_(torch.eye(channels))
            self.bias.zero_()  # type: ignore[union-attr]

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B F, C, H, W) to (B K, C, H, W)."""
        return _folded(super().forward(_with_past(self, frames, 1)[0]))


class TemporalUpsample(nn.Conv3d):
    """Makes two frames of each but the first: 1 + k frames to 1 + 2 k. At the start it interpolates between them."""

    def __init__(self, channels: int) -> None:
        """Makes a layer of as many channels in as out."""
        super().__init__(channels, 2 * channels, (TAPS, 1, 1))
        identity = torch.eye(channels)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:channels, :, -2, 0, 0].copy_(identity / 2)
            self.weight[:channels, :, -1, 0, 0].copy_(identity / 2)
            self.weight[channels:, :, -1, 0, 0].copy_(identity)
            self.bias.zero_()  # type: ignore[union-attr]

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B K, C, H, W) to (B F, C, H, W)."""
        joined, first = _with_past(self, frames, TAPS - 1)
        pairs = super().forward(joined).unflatten(1, (2, -1))  # (B, 2, C, K, H, W)
        made = pairs.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)  # (B, 2 K, C, H, W)
        return (made[:, 1:] if first else made).flatten(0, 1)


class LavitaCausalAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """An autoencoder of clips with the layers of an autoencoder of frames, see the module's description."""

    @register_to_config
    def __init__(
        self,
        frame_autoencoder: dict[str, Any],
        temporal_downsampling: int = 4,
        latent_channels: int = 4,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        """Makes an autoencoder with random weights.

        Args:
            frame_autoencoder: configuration of the autoencoder of frames, with its class as `_class_name`.
            temporal_downsampling: t, one of `FACTORS`.
            latent_channels: C, that of the autoencoder of frames.
            scaling_factor: scaled latents are `(latents - shift_factor) * scaling_factor`.
            shift_factor: see `scaling_factor`.

        Raises:
            ValueError: if a field is none of those allowed, or the autoencoder of frames keeps their size.
        """
        super().__init__()
        if temporal_downsampling not in FACTORS:
            allowed = " or ".join(map(str, FACTORS))
            raise ValueError(f"temporal_downsampling is {temporal_downsampling}, but must be {allowed}")
        name = frame_autoencoder.get("_class_name")
        if name not in FRAME_AUTOENCODERS:
            raise ValueError(f"frame_autoencoder is of the class {name!r}; allowed: {', '.join(FRAME_AUTOENCODERS)}")
        network: Any = FRAME_AUTOENCODERS[name].from_config(dict(frame_autoencoder))
        if latent_channels != network.config["latent_channels"]:
            raise ValueError(
                f"latent_channels is {latent_channels}, but frame_autoencoder has {network.config['latent_channels']}"
            )
        self.network: FrameAutoencoder = _make_causal(network, temporal_downsampling)

    def encode(self, pixels: torch.Tensor, past: Past | None = None) -> Posterior:
        """Encodes clips, or parts of them one after the other.

        Args:
            pixels: floats (B, F, 3, H, W) in [-1, 1]: 1 + (a multiple of t) frames, or for a part that is not the first
                one a multiple of t.
            past: the same dictionary for all parts of a clip, empty at the first; None for whole clips.

        Returns:
            Tensors (B, K, C, h, w): with `past` for the latents of this part.

        Raises:
            ValueError: for another number of frames.
        """
        clips, frames = pixels.shape[:2]
        factor = self.config["temporal_downsampling"]
        if (frames - (not past)) % factor:
            raise ValueError(frames_problem("the number of frames", frames, factor))
        with _streaming(clips, past):
            encoded: Any = self.network.encode(pixels.flatten(0, 1))

        def apart(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (clips, -1))

        if isinstance(self.network, AutoencoderTiny):
            latents = apart(encoded.latents)
            return Posterior(latents, torch.zeros_like(latents), None)
        found = encoded.latent_dist
        return Posterior(apart(found.mean), apart(found.std), apart(found.logvar))

    def decode(self, latents: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """Decodes latents of clips, or of parts of them one after the other.

        Args:
            latents: floats (B, K, C, h, w), neither shifted nor scaled.
            past: as for `encode`.

        Returns:
            Pixels (B, F, 3, H, W) in about [-1, 1].
        """
        with _streaming(len(latents), past):
            pixels = self.network.decode(latents.flatten(0, 1)).sample
        return pixels.unflatten(0, (len(latents), -1))


def frames_problem(name: str, frames: int, factor: int) -> str:
    """What is wrong with a number of frames of a clip, on one line; `name` is what it is called."""
    below = max(0, frames - 1) // factor * factor + 1
    return (
        f"{name} is {frames}, but must be 1 more than a multiple of {factor}, such as {below} or {below + factor}: "
        f"this autoencoder merges groups of {factor} frames after the first one"
    )


def inflate(vae: FrameAutoencoder, temporal_downsampling: int) -> LavitaCausalAutoencoder:
    """Makes an autoencoder of clips from one of frames, whose results it has for the first frame.

    Args:
        vae: the autoencoder of frames; stays as it is.
        temporal_downsampling: t, one of `FACTORS`.

    Returns:
        The autoencoder in training mode, with gradients, on the device of `vae`.

    Raises:
        ValueError: if `temporal_downsampling` is another number, or `vae` keeps the size of frames.
    """
    if type(vae).__name__ not in FRAME_AUTOENCODERS:
        raise ValueError(f"an autoencoder of the class {type(vae).__name__} is not one of frames alone")
    fields = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    causal = LavitaCausalAutoencoder(
        {"_class_name": type(vae).__name__, **fields},
        temporal_downsampling,
        vae.config["latent_channels"],
        float(vae.config["scaling_factor"]),
        float(vae.config["shift_factor"] or 0.0),
    )
    causal.network = _make_causal(copy.deepcopy(vae), temporal_downsampling)
    return causal.train().requires_grad_(True).to(vae.device)


def _make_causal(network: FrameAutoencoder, factor: int) -> FrameAutoencoder:
    """Changes the layers of an autoencoder of frames."""
    made: dict[nn.Module, CausalConv] = {}
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1):
                parent._modules[name] = made.setdefault(child, CausalConv(child))
    for number in range(FACTORS.index(factor) + 1):
        if isinstance(network, AutoencoderTiny):
            _merge_tiny_frames(network, number)
        elif isinstance(network, LavitaPatchAutoencoder):
            _merge_patch_frames(network)
        else:
            _merge_kl_frames(cast(AutoencoderKL, network), number)
    return network


# The temporal layers are in the levels next to the latents: those before see all frames, to tell what the latents must
# hold of them. Of a pair of layers the second one is a level further out, if there is one.


def _merge_kl_frames(network: AutoencoderKL, number: int) -> None:
    inner: list[Any] = [block.downsamplers for block in network.encoder.down_blocks if block.downsamplers is not None]
    outer: list[Any] = [block.upsamplers for block in network.decoder.up_blocks if block.upsamplers is not None]
    _check_levels(len(inner))
    samplers = inner[max(0, len(inner) - 1 - number)]
    samplers.append(TemporalDownsample(samplers[0].out_channels))
    samplers = outer[min(number, len(outer) - 1)]
    samplers.insert(0, TemporalUpsample(samplers[-1].channels))


def _merge_tiny_frames(network: AutoencoderTiny, number: int) -> None:
    encoder: Any = network.encoder.layers
    decoder: Any = network.decoder.layers
    inner = [index for index, layer in enumerate(encoder) if isinstance(layer, CausalConv) and layer.stride[1] > 1]
    outer = [index for index, layer in enumerate(decoder) if isinstance(layer, nn.Upsample)]
    if number == 0:
        _check_levels(len(inner))
    if inner:
        encoder[inner[-1]] = nn.Sequential(encoder[inner[-1]], TemporalDownsample(encoder[inner[-1]].out_channels))
        decoder[outer[0]] = nn.Sequential(TemporalUpsample(decoder[outer[0] + 1].in_channels), decoder[outer[0]])
        return
    # Both are in the only level.
    both: Any = next(layer for layer in encoder if isinstance(layer, nn.Sequential))
    both.append(TemporalDownsample(both[0].out_channels))
    both = next(layer for layer in decoder if isinstance(layer, nn.Sequential))
    both.insert(0, TemporalUpsample(both[0].in_channels))


def _merge_patch_frames(network: LavitaPatchAutoencoder) -> None:
    # The linear map and the network beside it each merge what they compute, the latter before its last layer.
    encoder: Any = network.encoder
    decoder: Any = network.decoder
    width, channels = network.config["width"], network.config["latent_channels"]
    encoder.linear = nn.Sequential(encoder.linear, TemporalDownsample(channels))
    encoder.blocks.append(TemporalDownsample(width))
    decoder.linear = nn.Sequential(TemporalUpsample(channels), decoder.linear)
    decoder.conv_in = nn.Sequential(decoder.conv_in, TemporalUpsample(width))


def _check_levels(count: int) -> None:
    if not count:
        raise ValueError("the autoencoder of frames keeps their size, but has to make them smaller")
