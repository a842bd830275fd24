"""Encoding and decoding frames, over the convolutions and linear layers of the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.speed.machine import PEAK, square_product
from benchmarks.speed.products import Floor, record
from benchmarks.speed.sampling import stable_diffusion
from benchmarks.speed.setup import Setup
from benchmarks.speed.timing import Row, Section, interleave, timings
from lavita.core.progress import Progress
from lavita.models.autoencoder import AutoencoderKL, decode, downsampling, encode, load_autoencoder
from lavita.models.packaged import autoencoder_source

MOST_FRAMES = 2  # of a call: the costs of frames add up, and Stable Diffusion's are large


def run(setup: Setup) -> Section:
    """Times a frame."""
    device, count = setup.torch_device, min(setup.num_frames, MOST_FRAMES)
    vaes: dict[str, AutoencoderKL] = {
        "Stable Diffusion's": stable_diffusion(setup),
        "the packaged one": load_autoencoder(autoencoder_source("builtin", 64), device),
    }
    runs: dict[str, Callable[[], Any]] = {}
    rows: list[tuple[str, int, str | None]] = []
    for title, vae in vaes.items():
        side = setup.sample_size * downsampling(vae)
        latents = torch.randn(count, vae.config["latent_channels"], setup.sample_size, setup.sample_size)
        frames = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        # Names that are bound now, not when they are called.
        calls: dict[str, Callable[[], Any]] = {
            f"decode, {title}": lambda vae=vae, latents=latents: decode(vae, latents, setup.precision),  # type: ignore[misc]
            f"encode, {title}": lambda vae=vae, frames=frames: encode(vae, frames, setup.precision),  # type: ignore[misc]
        }
        for name, call in calls.items():
            floor = Floor(record(call), setup.dtype)
            floor_name = f"floor of {name}"
            runs |= {floor_name: floor, name: call}
            macs = floor.macs // count
            rows += [(floor_name, macs, None), (name, macs, floor_name)]
    square, square_macs = square_product(device, setup.dtype)
    progress = Progress("autoencoder: run", timings(len(runs) + 1, setup.repeats))
    seconds = interleave({**runs, PEAK: square}, setup.repeats, device, progress)
    each = {name: [value / count for value in seconds[name]] for name in runs}
    result = [Row(name, each[name], macs, floor) for name, macs, floor in rows]
    result.append(Row(PEAK, seconds[PEAK], square_macs))
    sides = {title: setup.sample_size * downsampling(vae) for title, vae in vaes.items()}
    notes = [
        f"{count} frames a call; Stable Diffusion's architecture with random weights; sides of the frames: "
        f"{', '.join(f'{title} {side} pixels' for title, side in sides.items())}. The floor is the convolutions and "
        "linear layers, without norms, activations, resizing and the conversion to bytes. A convolution may need fewer "
        "multiply-accumulates than its formula says (Winograd's), so that its share of the peak can exceed 100%.",
    ]
    return Section(
        "autoencoder", "The autoencoder", "one frame", result, {"frames": count, "sides": sides}, notes, PEAK
    )
