"""How well an autoencoder reconstructs frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.core.files import write_json
from lavita.data.catalog import scan
from lavita.data.clips import center_crop_resize
from lavita.models.autoencoder import Autoencoder, decode, encode
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]
Errors = tuple[float, int, float, int, int]
"""Sum of the squared errors and number of values, the same for the moving pixels alone, and number of frames."""
NUM_FRAMES = 16
"""Number of frames that are scored, from the first one of each video on."""


def reconstruction_quality(vae: Autoencoder, root: Path, resolution: int) -> dict[str, Any]:
    """Computes the PSNR of reconstructed frames, and that of their moving pixels, for each group of videos.

    Args:
        vae: the autoencoder.
        root: folder of videos; groups are the parent folders of the videos.
        resolution: side of the frames in pixels, after center crop and resize.

    Returns:
        `{group: {"psnr": dB, "moving_psnr": dB, "frames": n}}` with the group `all` last, and None for a PSNR of no
        pixels or without error. A pixel moves if it differs by more than 10% of the range from the frame before or
        after.
    """
    errors: dict[str, list[Errors]] = {}
    for video in scan(root).videos:
        real = center_crop_resize(np.stack(list(islice(iter_frames(video.info.path), NUM_FRAMES))), resolution)
        mean, _ = encode(vae, real)
        errors.setdefault(video.info.path.parent.name, []).append(reconstruction_errors(real, decode(vae, mean)))
    errors["all"] = [row for rows in list(errors.values()) for row in rows]
    return {group: quality_of(rows) for group, rows in errors.items()}


def reconstruction_errors(real: Frames, reconstructed: Frames) -> Errors:
    """The squared errors of the frames of a clip, uint8 (F, H, W, 3), for `quality_of`."""
    squared = (reconstructed.astype(np.float64) - real) ** 2
    moving = _moving_pixels(real)
    return squared.sum(), squared.size, squared[moving].sum(), squared[moving].size, len(real)


def quality_of(errors: Sequence[Errors]) -> dict[str, Any]:
    """`{"psnr": dB, "moving_psnr": dB, "frames": n}` of some clips, see `reconstruction_quality`."""
    total, size, moving_total, moving_size, count = (sum(column) for column in zip(*errors, strict=True))
    return {"psnr": _psnr(total, size), "moving_psnr": _psnr(moving_total, moving_size), "frames": count}


def _moving_pixels(frames: Frames) -> npt.NDArray[np.bool_]:
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).max(axis=-1) > 25
    moving = np.zeros(frames.shape[:3], dtype=bool)
    moving[1:] |= change
    moving[:-1] |= change
    return moving


def _psnr(squared_error: float, count: int) -> float | None:
    if not count or not squared_error:
        return None
    return round(10 * math.log10(255**2 / (squared_error / count)), 2)


def show_quality(quality: dict[str, dict[str, Any]], out: Path | None = None) -> None:
    """Prints the results of `reconstruction_quality` for several folders, and writes them to a JSON file, `out`."""
    table = Table("folder", "videos of", "PSNR, dB", "PSNR of moving pixels, dB", "frames")
    for folder, groups in quality.items():
        for group, row in groups.items():
            numbers = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("psnr", "moving_psnr"))
            table.add_row(escape(folder), escape(group), *numbers, str(row["frames"]))
    Console().print(table)
    if out is not None:
        write_json(out, quality)
