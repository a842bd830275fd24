"""The perceptual distance against float64 arithmetic, finite differences, and what it must rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_data import paint

from lavita.evaluation.features import perceptual
from lavita.evaluation.features.efficientnet import EfficientNetLite0
from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.models.autoencoder import to_pixels

Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def random_network() -> EfficientNetLite0:
    """In float64, with outputs of each layer that are about as large as its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EfficientNetLite0().double().eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(
                parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5 if parameter.ndim > 1 else 0.3
            )
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def published() -> FeatureDistance:
    distance = FeatureDistance.load()
    assert distance is not None
    return distance


def maps_of(network: EfficientNetLite0, frames: npt.NDArray[np.uint8]) -> list[Array]:
    """What the last block of each stride gives out in a pass of the network on bytes."""
    found: list[Array] = []
    hooks = [
        network.blocks[number].register_forward_hook(lambda module, inputs, output: found.append(output.numpy()))
        for number in (0, 2, 4, 10, 15)
    ]
    network(torch.from_numpy((frames.astype(np.float64) - 127) / 128).permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    return found


def test_the_distance_in_float64(random_network: EfficientNetLite0) -> None:
    rng = np.random.default_rng(0)
    frames, others = rng.integers(0, 256, (2, 3, 40, 32, 3), dtype=np.uint8)
    expected = np.zeros(3)
    for a, b in zip(maps_of(random_network, frames), maps_of(random_network, others), strict=True):
        a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (a, b))
        expected += ((a - b) ** 2).sum(axis=1).mean(axis=(1, 2))
    assert [part.shape[1:] for part in maps_of(random_network, frames)] == [
        (16, 20, 16),
        (24, 10, 8),
        (40, 5, 4),
        (112, 3, 2),
        (320, 2, 1),
    ]
    pixels, other_pixels = (torch.from_numpy(part / 127.5 - 1).permute(0, 3, 1, 2) for part in (frames, others))
    distance = FeatureDistance(random_network)(pixels, other_pixels)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-9)
    assert (expected > 0.1).all()


def test_the_gradient_by_finite_differences(random_network: EfficientNetLite0) -> None:
    distance = FeatureDistance(random_network)
    generator = torch.Generator().manual_seed(1)
    images, references, direction = torch.rand(3, 1, 3, 16, 16, dtype=torch.float64, generator=generator) * 2 - 1
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(images, references).sum(), images)
    step = 1e-6
    with torch.no_grad():
        difference = distance(images + step * direction, references) - distance(images - step * direction, references)
    assert (gradient * direction).sum().item() == pytest.approx((difference / (2 * step)).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in random_network.parameters())


def test_equal_images_are_at_distance_0(published: FeatureDistance) -> None:
    pixels = to_pixels(paint(3, height=64, width=64))[:2].requires_grad_()
    distance = published(pixels, pixels.detach())
    assert not distance.any()
    (gradient,) = torch.autograd.grad(distance.sum(), pixels)
    assert not gradient.any()
    black = torch.full((1, 3, 16, 16), -1.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(published(black, torch.ones(1, 3, 16, 16)).sum(), black)
    assert torch.isfinite(gradient).all()


def test_blur_is_further_than_brightness_of_the_same_error(published: FeatureDistance) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1) * 2
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1)
    error = (blurred - pixels).square().mean().sqrt()
    assert (published(blurred, pixels) > 5 * published(pixels + error, pixels)).all()
    more = torch.nn.functional.avg_pool2d(blurred, 3, stride=1, padding=1)
    assert (published(more, pixels) > published(blurred, pixels)).all()


def test_autocast_changes_nothing(published: FeatureDistance) -> None:
    images, others = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = published(images, others)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(published(images, others), expected)


def test_without_the_package_there_is_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ValueError("efficientnet_lite0 needs the file")

    monkeypatch.setattr(perceptual, "find_weights", missing)
    assert FeatureDistance.load() is None
