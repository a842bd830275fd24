"""How much of a picture survives the autoencoder."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from lavita.data.catalog import scan
from lavita.data.clips import center_crop_resize
from lavita.models.autoencoder import AutoencoderKL, decode, encode
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]


def reconstruction_quality(vae: AutoencoderKL, root: Path, resolution: int, frames_a_video: int = 16) -> dict[str, Any]:
    """PSNR of reconstructed frames, of the whole picture and of its moving pixels, a group of videos each.

    Args:
        vae: the autoencoder.
        root: folder of videos; groups are the parent folders of the videos.
        resolution: side of the frames in pixels, after center crop and resize.
        frames_a_video: the first so many frames of each video are scored.

    Returns:
        `{group: {"psnr": dB, "moving_psnr": dB, "frames": n}}` with the group `all` last; a pixel moves where it
        differs from the frame before or after by more than 10% of the range.
    """
    errors: dict[str, list[tuple[float, int, float, int, int]]] = {}
    for video in scan(root).videos:
        real = center_crop_resize(np.stack(list(islice(iter_frames(video.info.path), frames_a_video))), resolution)
        mean, _ = encode(vae, real)
        squared = (decode(vae, mean).astype(np.float64) - real) ** 2
        moving = _moving_pixels(real)
        row = (squared.sum(), squared.size, squared[moving].sum(), squared[moving].size, len(real))
        errors.setdefault(video.info.path.parent.name, []).append(row)
    errors["all"] = [row for rows in list(errors.values()) for row in rows]
    result = {}
    for group, rows in errors.items():
        total, size, moving_total, moving_size, count = (sum(column) for column in zip(*rows, strict=True))
        result[group] = {
            "psnr": _psnr(total, size),
            "moving_psnr": _psnr(moving_total, moving_size),
            "frames": count,
        }
    return result


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
    """Prints a table of `reconstruction_quality` a folder, and writes it as JSON where `out` is given."""
    table = Table("folder", "videos of", "PSNR, dB", "PSNR of moving pixels, dB", "frames")
    for folder, groups in quality.items():
        for group, row in groups.items():
            numbers = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("psnr", "moving_psnr"))
            table.add_row(folder, group, *numbers, str(row["frames"]))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(quality, indent=1))
