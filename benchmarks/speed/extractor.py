"""The offline feature extractor: its network over its floor, and the shares of decoding and resizing in a frame."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.data import PIXELS, make_videos
from benchmarks.speed.machine import PEAK, square_product
from benchmarks.speed.products import Floor, record
from benchmarks.speed.setup import Setup
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.progress import Progress
from lavita.data.clips import center_crop_resize
from lavita.evaluation.features.efficientnet import EfficientNetLite0
from lavita.evaluation.features.networks import LITE0_SIDE, resize_bicubic
from lavita.video.reading import read_clip

FLOOR = "floor: the convolutions alone"
NETWORK = "network"
DECODE = "decoding a video"
CROP = "crop and resize to the protocol's pixels"
RESIZE = "resize to the network's pixels"
COUNT = 16


def run(setup: Setup) -> Section:
    """Measures the time per frame, always in float32, as for scores."""
    device, side = setup.torch_device, setup.sample_size * PIXELS
    network = EfficientNetLite0().eval().requires_grad_(False).to(device)
    images = torch.randint(0, 256, (COUNT, 3, side, side), dtype=torch.uint8, device=device)
    pixels = torch.randn(COUNT, 3, LITE0_SIDE, LITE0_SIDE, device=device)

    def resize() -> Any:
        return (resize_bicubic(images.float(), LITE0_SIDE, LITE0_SIDE).clip(0, 255) - 127) / 128

    def classify() -> Any:
        with torch.no_grad():
            features = network(pixels)
            return torch.cat([features, network.classifier(features)], dim=1)

    floor = Floor(record(classify), torch.float32)
    square, square_macs = square_product(device, torch.float32)
    with tempfile.TemporaryDirectory() as name:
        file = make_videos(Path(name) / "videos", side, COUNT, 1)[0]
        frames = read_clip(file, 0, COUNT)
        runs: dict[str, Callable[[], Any]] = {
            FLOOR: floor,
            NETWORK: classify,
            DECODE: lambda: read_clip(file, 0, COUNT),
            CROP: lambda: center_crop_resize(frames, side),
            RESIZE: resize,
        }
        progress = Progress("extractor: run", num_timings(len(runs) + 1, setup.repeats))
        seconds = interleave({**runs, PEAK: square}, setup.repeats, device, progress)
    each = {name: [value / COUNT for value in seconds[name]] for name in runs}
    median = {name: statistics.median(values) for name, values in each.items()}
    whole = sum(median[name] for name in (NETWORK, DECODE, CROP, RESIZE))
    shares = {name: median[name] / whole for name in (NETWORK, DECODE, CROP, RESIZE)}
    rows = [
        Row(FLOOR, each[FLOOR], floor.macs // COUNT),
        Row(NETWORK, each[NETWORK], floor.macs // COUNT, FLOOR, note=f"{shares[NETWORK]:.0%} of a frame"),
        *(Row(name, each[name], note=f"{shares[name]:.0%} of a frame") for name in (DECODE, CROP, RESIZE)),
        Row(PEAK, seconds[PEAK], square_macs),
    ]
    notes = [
        f"EfficientNet-Lite0 at {LITE0_SIDE} pixels with random weights, which are as fast as trained ones; videos of "
        f"{side} pixels, {COUNT} frames at once, in float32. Shares are those of the four steps per frame."
    ]
    return Section("extractor", "The offline extractor", "one frame", rows, {"shares": shares}, notes, PEAK)
