"""How well an autoencoder reconstructs frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.core.files import write_json
from lavita.core.seeds import DRAWS
from lavita.data.catalog import Video, read_generation, scan
from lavita.data.clips import center_crop_resize
from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.models.autoencoder import (
    Autoencoder,
    decode,
    encode,
    frames_at_once,
    latent_size,
    pixel_frames,
    temporal_downsampling,
    to_pixels,
)
from lavita.models.fingerprint import fingerprint
from lavita.sampling.records import check_generation, write_generation
from lavita.video.reading import iter_frames
from lavita.video.writing import write_video

Frames = npt.NDArray[np.uint8]
Reconstruction = tuple[Video, Frames, Frames]
"""A video, its first frames, uint8 (F, R, R, 3), and what becomes of them."""
Errors = tuple[float, int, float, int, int]
"""Sum of the squared errors and number of values, the same for the moving pixels alone, and number of frames."""
NUM_FRAMES = 16
"""Number of frames that are scored, from the first one of each video on; less if an autoencoder cannot take it."""


def reconstructions(vae: Autoencoder, root: Path, resolution: int, frame_interval: int = 1) -> Iterator[Reconstruction]:
    """Encodes and decodes the first frames of each video, at most `NUM_FRAMES`, after center crop and resize."""
    for video in scan(root).videos:
        frames = islice(iter_frames(video.info.path), 0, NUM_FRAMES * frame_interval, frame_interval)
        real = center_crop_resize(np.stack(list(frames)), resolution)
        real = real[: pixel_frames(vae.config, 1 + (len(real) - 1) // temporal_downsampling(vae.config))]
        mean, _ = encode(vae, real)
        yield video, real, decode(vae, mean)


def reconstruction_quality(
    vae: Autoencoder,
    root: Path,
    resolution: int,
    distance: FeatureDistance | None = None,
    frame_interval: int = 1,
    clips: Path | None = None,
) -> dict[str, Any]:
    """The scores of an autoencoder on a folder of videos, see `score_reconstructions`.

    Args:
        vae: the autoencoder.
        root: folder of videos.
        resolution: side of the frames in pixels, after center crop and resize.
        distance: the perceptual distance.
        frame_interval: step from one frame to the next.
        clips: folder to write the reconstructed clips to.

    Raises:
        ValueError: if `clips` holds something else.
    """
    pairs = reconstructions(vae, root, resolution, frame_interval)
    if clips is not None:
        if clips.exists() and any(clips.iterdir()) and read_generation(clips) is None:
            raise ValueError(f"{clips}: holds files, but not reconstructed clips; use another folder")
        settings = {"reconstructed_by": fingerprint(vae), "frame_interval": frame_interval, "resolution": resolution}
        check_generation(clips, settings | {"draws": DRAWS})
        write_generation(clips, settings | {"draws": DRAWS})
        pairs = _written(pairs, clips, frame_interval)
    return score_reconstructions(pairs, distance)


def _written(pairs: Iterable[Reconstruction], clips: Path, frame_interval: int) -> Iterator[Reconstruction]:
    """Writes reconstructed clips, losslessly, under the names of their videos, as a folder that can be scored."""
    for pair in pairs:
        video, _, made = pair
        write_video(clips / f"{video.name}.mkv", made, video.info.fps / frame_interval)
        yield pair


def score_reconstructions(
    pairs: Iterable[Reconstruction], distance: FeatureDistance | None = None
) -> dict[str, dict[str, Any]]:
    """Scores reconstructed frames, for each group of videos: PSNR, that of moving pixels, and the feature distance.

    Args:
        pairs: as `reconstructions` yields them; groups are the parent folders of the videos.
        distance: the perceptual distance.

    Returns:
        `{group: {"psnr": dB, "moving_psnr": dB, "feature_distance": mean over the frames, "frames": n}}` with the group
        `all` last; None for a PSNR of no pixels or without error, and for a distance that was not asked for. A pixel
        moves if it differs by more than 10% of the range from the frame before or after.
    """
    rows: dict[str, list[tuple[Errors, float]]] = {}
    for video, real, made in pairs:
        far = 0.0 if distance is None else _sum_of_distances(distance, made, real)
        rows.setdefault(video.info.path.parent.name, []).append((reconstruction_errors(real, made), far))
    rows["all"] = [row for group in list(rows.values()) for row in group]
    result = {}
    for group, found in rows.items():
        quality = quality_of([errors for errors, _ in found])
        mean = None if distance is None else round(sum(far for _, far in found) / quality["frames"], 4)
        result[group] = quality | {"feature_distance": mean}
    return result


def reconstruction_errors(real: Frames, reconstructed: Frames) -> Errors:
    """The squared errors of the frames of a clip, uint8 (F, H, W, 3), for `quality_of`."""
    squared = (reconstructed.astype(np.float64) - real) ** 2
    moving = _moving_pixels(real)
    return squared.sum(), squared.size, squared[moving].sum(), squared[moving].size, len(real)


def quality_of(errors: Sequence[Errors]) -> dict[str, Any]:
    """`{"psnr": dB, "moving_psnr": dB, "frames": n}` of some clips, see `score_reconstructions`."""
    total, size, moving_total, moving_size, count = (sum(column) for column in zip(*errors, strict=True))
    return {"psnr": _psnr(total, size), "moving_psnr": _psnr(moving_total, moving_size), "frames": count}


def quality_at(
    vae: Autoencoder,
    roots: Sequence[Path],
    resolutions: Sequence[int],
    distance: FeatureDistance | None,
    frame_interval: int = 1,
    clips: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """`reconstruction_quality` of several folders at several resolutions, for `show_quality`.

    Raises:
        ValueError: if the autoencoder cannot encode frames of one of the resolutions, or clips of several folders or
            resolutions would be in one folder.
    """
    if clips is not None and len(roots) * len(resolutions) > 1:
        raise ValueError(f"clips is {clips}, but takes those of one folder of videos at one resolution")
    for resolution in resolutions:
        latent_size(vae, resolution)  # before minutes of work
    return {
        str(root) if len(resolutions) == 1 else f"{root} at {resolution} px": reconstruction_quality(
            vae, root, resolution, distance, frame_interval, clips
        )
        for root in roots
        for resolution in resolutions
    }


@torch.no_grad()
def _sum_of_distances(distance: FeatureDistance, made: Frames, real: Frames) -> float:
    size = frames_at_once(distance.device, real.shape[1])
    parts = [
        distance(*(to_pixels(frames[start : start + size], distance.device) for frames in (made, real)))
        for start in range(0, len(real), size)
    ]
    return float(torch.cat(parts).double().sum())


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
    numbers = {"psnr": ("PSNR, dB", 2), "moving_psnr": ("PSNR of moving pixels, dB", 2)}
    numbers["feature_distance"] = ("feature distance", 4)
    table = Table("folder", "videos of", *(title for title, _ in numbers.values()), "frames")
    for folder, groups in quality.items():
        for group, row in groups.items():
            texts = ("-" if row[key] is None else f"{row[key]:.{digits}f}" for key, (_, digits) in numbers.items())
            table.add_row(escape(folder), escape(group), *texts, str(row["frames"]))
    Console().print(table)
    if out is not None:
        write_json(out, quality)
