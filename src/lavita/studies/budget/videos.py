"""What a folder of videos is good for: classes, length and interval of clips, resolution, and what fits a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lavita.core.config import ConfigError
from lavita.core.progress import clock
from lavita.data.clips import clip_span
from lavita.models.presets import PATCH_SIZES
from lavita.studies.budget.table import CACHE_SHARE, CLIP_FRAMES, CLIP_RATE, LEAST_CACHED, SIDES

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "heldout", "held-out"})
MOST_CLASSES = 1000
KEPT = 0.9
"""Share of the videos that must be long enough for a clip."""


@dataclass(frozen=True)
class Clips:
    """Length and interval of the clips, and why."""

    num_frames: int
    frame_interval: int
    why: str


@dataclass(frozen=True)
class CacheChoice:
    """Which videos are encoded beforehand."""

    videos: tuple[int, ...] | None
    """Their indices; None if clips are encoded while training."""
    flip: bool
    """Also encode mirrored frames."""
    seconds: float
    """Estimated time."""


def are_classes(names: Sequence[str]) -> bool:
    """Whether the folders of videos look like classes: every video is in one, and none is named like a split.

    Args:
        names: paths of the videos below their folder, with forward slashes.
    """
    parents = [PurePosixPath(name).parent for name in names]
    folders = {parent.name for parent in parents}
    return (
        all(parent.name for parent in parents)
        and 2 <= len(folders) <= min(MOST_CLASSES, len(names) // 2)
        and not any(part.lower() in SPLIT_NAMES for parent in parents for part in parent.parts)
    )


def choose_clips(
    lengths: Sequence[int], rates: Sequence[float], num_frames: int | None = None, frame_interval: int | None = None
) -> Clips:
    """Chooses clips that most of the videos are long enough for.

    Args:
        lengths: number of frames of each video.
        rates: frames per second of each video.
        num_frames: frames of a clip, if they are given.
        frame_interval: interval of the frames, if it is given.

    Raises:
        ConfigError: if no video has two frames.
    """
    fps = sorted(rates)[len(rates) // 2]
    wanted = frame_interval or max(1, round(fps / CLIP_RATE))
    intervals = [frame_interval] if frame_interval else list(range(wanted, 0, -1))
    frames = num_frames or CLIP_FRAMES
    for interval in intervals:
        kept = sum(length >= clip_span(frames, interval) for length in lengths) / len(lengths)
        if kept >= KEPT or (kept >= 0.5 and interval == intervals[-1]):
            why = f"{clip_span(frames, interval) / fps:.2g} s of video at {fps:.3g} frames per second"
            if interval < wanted:
                why += f"; an interval of {wanted} would suit the rate, but the videos are too short for it"
            if kept < 1:
                why += f"; {1 - kept:.0%} of the videos are too short and are left out"
            return Clips(frames, interval, why)
    if num_frames:  # training says which videos are too short
        return Clips(num_frames, intervals[-1], "as given; most videos are too short for it")
    interval = intervals[-1]
    typical = sorted(lengths)[int((1 - KEPT) * len(lengths))]
    fitting = (typical - 1) // interval + 1
    if fitting < 2:
        raise ConfigError(f"the videos are too short: most have {typical} frames, and a clip needs at least 2")
    why = f"the videos are too short for {CLIP_FRAMES} frames: most have {typical} or a few more"
    return Clips(min(fitting, CLIP_FRAMES), interval, why)


def choose_patch(latent_side: int, tokens: int) -> int:
    """The patch that gives a frame of the latents the number of tokens closest to `tokens`."""
    fitting = [patch for patch in PATCH_SIZES if latent_side % patch == 0]
    return min(fitting, key=lambda patch: abs(math.log((latent_side // patch) ** 2 / tokens)))


def choose_side(videos_side: int, most: int, unit: int) -> int:
    """The largest resolution that videos and budget allow.

    Args:
        videos_side: the shorter side of the videos in pixels.
        most: the largest that is wanted.
        unit: what the resolution must be a multiple of.

    Raises:
        ConfigError: if there is none.
    """
    fitting = [side for side in SIDES if side <= min(videos_side, most) and side % unit == 0]
    if not fitting:
        raise ConfigError(
            f"the videos are {videos_side} pixels on the shorter side, and no resolution up to that is a multiple of "
            f"{unit}, which autoencoder and model need; give data.resolution"
        )
    return fitting[-1]


def choose_cache(
    lengths: Sequence[int], frame_seconds: float, seconds: float, flip: bool, may_drop: bool
) -> CacheChoice:
    """Chooses which videos are encoded in the share of the budget that this may take.

    Args:
        lengths: number of frames of each video.
        frame_seconds: time of reading and encoding a frame.
        seconds: the budget.
        flip: whether clips are to be mirrored.
        may_drop: whether they may stay as they are instead.
    """
    share = CACHE_SHARE * seconds
    for mirrored in (True, False) if flip and may_drop else (flip,):
        needed = sum(lengths) * frame_seconds * (1 + mirrored)
        if needed <= share:
            return CacheChoice(tuple(range(len(lengths))), mirrored, needed)
    mirrored = flip and not may_drop
    # Evenly spread over the list, which is sorted by folder and name: classes keep their shares.
    count = int(len(lengths) * share / needed)
    while count >= min(LEAST_CACHED, len(lengths)) > 0:
        chosen = tuple((2 * number + 1) * len(lengths) // (2 * count) for number in range(count))
        needed = sum(lengths[index] for index in chosen) * frame_seconds * (1 + mirrored)
        if needed <= share:
            return CacheChoice(chosen, mirrored, needed)
        count -= max(1, count // 20)
    return CacheChoice(None, flip, 0.0)


def length_of(lengths: Sequence[int], rates: Sequence[float]) -> str:
    """The total length of videos as text."""
    return clock(sum(length / rate for length, rate in zip(lengths, rates, strict=True)))


def find_table(root: Path) -> Path | None:
    """A table of captions in or beside the folder of videos."""
    for folder in (root, root.parent):
        if (folder / "captions.csv").is_file():
            return folder / "captions.csv"
    return None
