"""Encoding and decoding frames, compared with the products of the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed.machine import PEAK, square_product
from benchmarks.speed.products import Floor, record
from benchmarks.speed.sampling import stable_diffusion
from benchmarks.speed.setup import Setup
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.progress import Progress
from lavita.models.autoencoder import Autoencoder, downsampling, frames_at_once, load_autoencoder
from lavita.models.packaged import autoencoder_source

STABLE_DIFFUSION, PACKAGED = "Stable Diffusion's", "the packaged one"
PACKAGED_SIDE = 64
AT_ONCE = (1, 2, 4, 8, 16)
"""Frames in one call of the packaged autoencoder; Stable Diffusion's is called as `encode` and `decode` call it."""


def run(setup: Setup) -> Section:
    """Measures the time per frame."""
    device = setup.torch_device
    side = setup.sample_size * 8
    networks: list[tuple[str, Autoencoder, int, tuple[int, ...]]] = [
        (STABLE_DIFFUSION, stable_diffusion(setup), side, (frames_at_once(device, side),)),
        (PACKAGED, load_autoencoder(autoencoder_source("builtin", PACKAGED_SIDE), device), PACKAGED_SIDE, AT_ONCE),
    ]
    runs: dict[str, Callable[[], Any]] = {}
    frames: dict[str, int] = {}
    rows: list[tuple[str, int, str | None]] = []
    for title, vae, pixels, counts in networks:
        for count in counts:
            for what, call in _passes(setup, vae, pixels, count).items():
                name = f"{what}, {title}, {count} at once"
                floor = Floor(record(call), setup.dtype)
                runs |= {f"floor of {name}": floor, name: call}
                frames |= {f"floor of {name}": count, name: count}
                macs = floor.macs // count
                rows += [(f"floor of {name}", macs, None), (name, macs, f"floor of {name}")]
    square, square_macs = square_product(device, setup.dtype)
    progress = Progress("autoencoder: run", num_timings(len(runs) + 1, setup.repeats))
    seconds = interleave({**runs, PEAK: square}, setup.repeats, device, progress)
    each = {name: [value / frames[name] for value in seconds[name]] for name in runs}
    result = [Row(name, each[name], macs, floor_name) for name, macs, floor_name in rows]
    result.append(Row(PEAK, seconds[PEAK], square_macs))
    notes = [
        f"{STABLE_DIFFUSION} is its architecture with random weights on frames of {side} pixels, {PACKAGED} runs on "
        f"{PACKAGED_SIDE} pixels, both without the conversion to and from bytes. The floor is the convolutions and "
        "linear layers of the pass, without norms, activations and resizing. A convolution may need fewer "
        "multiply-accumulates than its formula says (Winograd), so that its share of the peak can exceed 100%.",
    ]
    facts = {"sides": {STABLE_DIFFUSION: side, PACKAGED: PACKAGED_SIDE}}
    return Section("autoencoder", "The autoencoder", "one frame", result, facts, notes, PEAK)


def _passes(setup: Setup, vae: Any, side: int, count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Decoding and encoding of random inputs."""
    size, channels = side // downsampling(vae), vae.config["latent_channels"]
    latents = torch.randn(count, channels, size, size, device=vae.device)
    pixels = torch.rand(count, 3, side, side, device=vae.device) * 2 - 1

    def evaluate(network: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), setup.autocast():
            return network()

    return {
        "decode": lambda: evaluate(lambda: vae.decode(latents).sample),
        "encode": lambda: evaluate(lambda: vae.encode(pixels).latent_dist.parameters),
    }
