"""A discriminator of patches, and the adversarial term of an autoencoder's loss.

The discriminator is PatchGAN (Isola et al. 2017, App. 6.1.2) with group normalisation, which has no running
statistics: it scores patches of 54 pixels. Both sides have the hinge loss (Lim & Ye 2017). Legend: N images, H W
pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavita.core.precision import Precision, autocast
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.losses import Losses
from lavita.training.checkpoint import Checkpoint
from lavita.training.state import restore_training, training_tensors

WIDTHS = (64, 128, 256, 256)
"""Channels of the layers; the stride of all but the last is 2."""
MOST_ADAPTIVE = 1e4
"""Largest adaptive weight."""
PREFIX = "discriminator."
"""What the names of the discriminator's tensors in a checkpoint begin with."""


class PatchDiscriminator(nn.Module):
    """Images to scores of overlapping patches."""

    def __init__(self) -> None:
        """Makes a network with random weights, normal with standard deviation 0.02 (Isola et al. 2017, App. 6.2)."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(WIDTHS):
            kernel, stride = (4, 2) if number < len(WIDTHS) - 1 else (3, 1)
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding=1))
            if number:
                layers.append(nn.GroupNorm(width // 16, width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        layers.append(nn.Conv2d(channels, 1, 3, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Scores: high for patches of real images.

        Args:
            images: `(N, 3, H, W)` in [-1, 1], H and W at least 8.

        Returns:
            `(N, 1, H / 8, W / 8)`, rounded down.
        """
        scores: Tensor = self.layers(images)
        return scores


class Adversary:
    """The discriminator of a run with its optimizer."""

    def __init__(self, config: AutoencoderConfig, device: torch.device, precision: Precision) -> None:
        """Makes the discriminator before its first step; it changes no random state outside."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = PatchDiscriminator()
        self.network.to(device)
        self.weight, self.adaptive = config.adversarial_weight, config.adversarial_adaptive
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.discriminator_learning_rate,
            betas=(0.5, 0.9),
            weight_decay=0.0,
            fused=True,
        )

    def backward(self, losses: Losses, pixels: Tensor, last_layer: nn.Parameter) -> dict[str, float]:
        """Computes the gradients of both sides: those of the autoencoder's whole loss, and of the discriminator's.

        With the adaptive weight the adversarial term counts `adversarial_weight` times as much as the other terms on
        the output, by the norms of their gradients at the decoder's last layer (Esser et al. 2021, Eq. 7).

        Args:
            losses: the other terms; their graphs are freed.
            pixels: the real frames, `(N, 3, H, W)`.
            last_layer: weight of the decoder's last layer.

        Returns:
            `adversarial` and `discriminator`, the losses of both sides; `discriminator_grad_norm`, which is clipped to
            1; and `adaptive_weight`, if that is used.
        """
        output = losses.output
        adversarial = -self._scores(output).mean()
        (from_terms,) = torch.autograd.grad(losses.on_output, output)
        (from_scores,) = torch.autograd.grad(adversarial, output)
        parts = {"adversarial": adversarial.item()}
        weight = self.weight
        if self.adaptive:
            of_terms, of_scores = (
                torch.autograd.grad(output, last_layer, gradient, retain_graph=True)[0].norm()
                for gradient in (from_terms, from_scores)
            )
            parts["adaptive_weight"] = (of_terms / (of_scores + 1e-6)).clamp(max=MOST_ADAPTIVE).item()
            weight *= parts["adaptive_weight"]
        terms: list[Tensor] = [output]
        gradients: list[Tensor | None] = [from_terms + weight * from_scores]
        if losses.on_latents.requires_grad:
            terms.append(losses.on_latents)
            gradients.append(None)
        torch.autograd.backward(terms, gradients)

        loss = 0.5 * (F.relu(1 - self._scores(pixels)).mean() + F.relu(1 + self._scores(output.detach())).mean())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        return parts | {"discriminator": loss.item(), "discriminator_grad_norm": norm.item()}

    def step(self) -> None:
        """Takes the discriminator's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return training_tensors(self.network, None, [self.optimizer], PREFIX)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; ValueError if it has another discriminator or none."""
        restore_training(checkpoint, self.network, None, [self.optimizer], PREFIX)

    def _scores(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            scores: Tensor = self.network(images)
        return scores.float()


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """The weight of a decoder's last convolution."""
    weight = [layer for layer in decoder.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))][-1].weight
    assert isinstance(weight, nn.Parameter)
    return weight
