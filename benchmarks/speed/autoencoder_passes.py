"""The autoencoder on a CPU: `lavita.autoencoder_cpu` against diffusers' forward passes, by frames at once.

    python benchmarks/autoencoder.py --out benchmarks/results/autoencoder.json
    python benchmarks/autoencoder.py --sides 64 --repetitions 9

64 pixels: the builtin autoencoder. 256 pixels: Stable Diffusion's architecture with random weights, minutes a row on a
slow core. Each repetition runs all rows of a side in turn, on the same frames; a row's time is the median. Ratios are
diffusers' time, all frames at once as far as the row goes, over the row's; above 1 is faster. `processor` times count
the process's time on all its cores, which other processes' work disturbs less than `wall`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.machine import describe
from lavita.models.autoencoder import AutoencoderKL, latent_size, load_autoencoder
from lavita.models.autoencoder_cpu import decode_pixels, encode_moments
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER, autoencoder_source

AT_ONCE = {64: (1, 2, 4, 8, 16), 256: (1, 2)}
Network = Callable[[AutoencoderKL, torch.Tensor], torch.Tensor]
NETWORKS: dict[tuple[str, str], Network] = {
    ("encode", "diffusers"): lambda vae, pixels: vae.encode(pixels).latent_dist.parameters,
    ("encode", "lavita"): lambda vae, pixels: encode_moments(vae, pixels, "fp32"),
    ("decode", "diffusers"): lambda vae, latents: vae.decode(latents).sample,
    ("decode", "lavita"): lambda vae, latents: decode_pixels(vae, latents, "fp32"),
}


def autoencoder(side: int) -> AutoencoderKL:
    if side <= 128:
        return load_autoencoder(autoencoder_source("builtin", side))
    torch.manual_seed(0)
    return AutoencoderKL(**STABLE_DIFFUSION_AUTOENCODER).eval().requires_grad_(False)


@torch.no_grad()
def measure(side: int, repetitions: int) -> list[dict[str, Any]]:
    vae, most = autoencoder(side), max(AT_ONCE[side])
    size = latent_size(vae, side)
    inputs = {"encode": torch.rand(most, 3, side, side) * 2 - 1, "decode": torch.randn(most, 4, size, size)}
    rows = [(*key, at_once) for key in NETWORKS for at_once in AT_ONCE[side]]
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {row: [] for row in rows}
    outputs: dict[tuple[str, str, int], torch.Tensor] = {}
    for repetition in range(1 + repetitions):  # the first one warms up
        for row in rows:
            what, whose, at_once = row
            start, processor = time.perf_counter(), time.process_time()
            parts = [NETWORKS[what, whose](vae, part) for part in inputs[what].split(at_once)]
            spent = (time.perf_counter() - start) / most, (time.process_time() - processor) / most
            if repetition:
                times[row].append(spent)
            else:
                outputs[row] = torch.cat(parts)
    medians = {row: [statistics.median(column) for column in zip(*spent, strict=True)] for row, spent in times.items()}
    table = []
    for what, whose, at_once in rows:
        wall, processor = medians[what, whose, at_once]
        plain = medians[what, "diffusers", at_once]
        reference = outputs[what, "diffusers", at_once]
        table.append(
            {
                "side": side,
                "what": what,
                "whose": whose,
                "at_once": at_once,
                "wall_ms_a_frame": round(wall * 1e3, 2),
                "processor_ms_a_frame": round(processor * 1e3, 2),
                "wall_ratio": round(plain[0] / wall, 3),
                "processor_ratio": round(plain[1] / processor, 3),
                "largest_difference": float((outputs[what, whose, at_once] - reference).abs().max()),
            }
        )
        print(
            "  ".join(f"{value:>9.4g}" if isinstance(value, float) else f"{value!s:>9}" for value in table[-1].values())
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", choices=AT_ONCE, default=list(AT_ONCE))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    rows = [row for side in arguments.sides for row in measure(side, arguments.repetitions)]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": describe(torch.device("cpu")).to_json(),
            "command": sys.argv,
            "repetitions": arguments.repetitions,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
