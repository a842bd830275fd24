"""Encoding and decoding frames, compared with the products of the same pass and with the passes of diffusers."""

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
from lavita.models.autoencoder import AutoencoderKL, downsampling, frames_at_once, load_autoencoder
from lavita.models.autoencoder_cpu import decode_pixels, encode_moments, is_covered
from lavita.models.packaged import autoencoder_source

STABLE_DIFFUSION, PACKAGED = "Stable Diffusion's", "the packaged one"
PACKAGED_SIDE = 64
AT_ONCE = (1, 2, 4, 8, 16)
"""Frames in one call of the packaged autoencoder; Stable Diffusion's is called as `encode` and `decode` call it."""


def run(setup: Setup) -> Section:
    """Measures the time per frame."""
    device = setup.torch_device
    side = setup.sample_size * 8
    networks: list[tuple[str, AutoencoderKL, int, tuple[int, ...]]] = [
        (STABLE_DIFFUSION, stable_diffusion(setup), side, (frames_at_once(device, side),)),
        (PACKAGED, load_autoencoder(autoencoder_source("builtin", PACKAGED_SIDE), device), PACKAGED_SIDE, AT_ONCE),
    ]
    runs: dict[str, Callable[[], Any]] = {}
    frames: dict[str, int] = {}
    rows: list[tuple[str, int, str | None, str | None]] = []
    differences: dict[str, float] = {}
    for title, vae, pixels, counts in networks:
        own = setup.precision == "fp32" and is_covered(vae)  # otherwise both passes are those of diffusers
        for count in counts:
            for what, (ours, theirs) in _passes(setup, vae, pixels, count).items():
                name = f"{what}, {title}, {count} at once"
                floor = Floor(record(ours), setup.dtype)
                macs = floor.macs // count
                candidates: list[tuple[str, Callable[[], Any], str | None, str | None]] = [
                    (f"floor of {name}", floor, None, None),
                    (name, ours, f"floor of {name}", None),
                ]
                if own:
                    candidates.append((f"{name}, diffusers' pass", theirs, None, name))
                    differences[name] = float((ours() - theirs()).abs().max())
                for candidate, call, floor_name, compared in candidates:
                    runs[candidate], frames[candidate] = call, count
                    rows.append((candidate, macs, floor_name, compared))
    square, square_macs = square_product(device, setup.dtype)
    progress = Progress("autoencoder: run", num_timings(len(runs) + 1, setup.repeats))
    seconds = interleave({**runs, PEAK: square}, setup.repeats, device, progress)
    each = {name: [value / frames[name] for value in seconds[name]] for name in runs}
    result = [
        Row(name, each[name], None if compared else macs, floor_name, compared)
        for name, macs, floor_name, compared in rows
    ]
    result.append(Row(PEAK, seconds[PEAK], square_macs))
    notes = [
        f"{STABLE_DIFFUSION} is its architecture with random weights on frames of {side} pixels, {PACKAGED} runs on "
        f"{PACKAGED_SIDE} pixels, both without the conversion to and from bytes. The floor is the convolutions and "
        "linear layers of our pass, without norms, activations and resizing. A convolution may need fewer "
        "multiply-accumulates than its formula says (Winograd), so that its share of the peak can exceed 100%.",
    ]
    if differences:
        notes.append(
            f"The largest difference between our passes and those of diffusers is {max(differences.values()):.1g}."
        )
    facts = {"sides": {STABLE_DIFFUSION: side, PACKAGED: PACKAGED_SIDE}, "largest_difference": differences}
    return Section("autoencoder", "The autoencoder", "one frame", result, facts, notes, PEAK)


def _passes(
    setup: Setup, vae: AutoencoderKL, side: int, count: int
) -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Our pass and that of diffusers on random inputs, for decoding and for encoding."""
    size, channels = side // downsampling(vae), vae.config["latent_channels"]
    latents = torch.randn(count, channels, size, size, device=vae.device)
    pixels = torch.rand(count, 3, side, side, device=vae.device) * 2 - 1

    def call(network: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def evaluate() -> torch.Tensor:
            with torch.no_grad(), setup.autocast():
                return network()

        return evaluate

    return {
        "decode": (
            call(lambda: decode_pixels(vae, latents, setup.precision)),
            call(lambda: vae.decode(latents).sample),
        ),
        "encode": (
            call(lambda: encode_moments(vae, pixels, setup.precision)),
            call(lambda: vae.encode(pixels).latent_dist.parameters),
        ),
    }
