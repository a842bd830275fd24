"""Which clips of real and generated videos are compared, and their pixels.

Clips are chosen by a seed and the content of the files. A video is identified by the hash of its content, not by its
name, so renamed or moved files give the same clips.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lavita.core.progress import Progress
from lavita.core.seeds import numpy_generator
from lavita.core.text import normal_name
from lavita.data.catalog import Video
from lavita.data.clips import center_crop_resize, clip_span
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.sources import Source
from lavita.video.reading import iter_frames, read_clip

Frames = npt.NDArray[np.uint8]
VERSION = 1
"""Version of the choice of clips and of manifests; part of every digest."""


@dataclass(frozen=True)
class Clip:
    """Some frames of one video."""

    name: str
    """Path of the video below the folder of its set."""
    sha256: str
    """Hash of the video's content (`data.content_hash`)."""
    label: str | None
    """Name of the class folder; None for a video directly in the root folder."""
    start: int
    """Index of the first frame."""
    num_frames: int


@dataclass(frozen=True)
class ClipSet:
    """Clips of one folder, at one frame interval."""

    root: Path
    clips: tuple[Clip, ...]
    frame_interval: int
    """Step from one frame of a clip to the next, in frames of the video."""

    @property
    def labels(self) -> list[str | None]:
        """The class of each clip."""
        return [clip.label for clip in self.clips]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the frames: equal for equal clips, wherever the files are."""
        rows = [(clip.sha256, clip.start, clip.num_frames) for clip in self.clips]
        return hashlib.sha256(repr((VERSION, self.frame_interval, rows)).encode()).hexdigest()


def read_pixels(clips: ClipSet, clip: Clip, resolution: int) -> Frames:
    """Reads one clip of a set, real or generated.

    Returns:
        uint8 `(F, resolution, resolution, 3)`, after center crop and resize.

    Raises:
        VideoError: if the video cannot be decoded.
    """
    frames = read_clip(clips.root / clip.name, clip.start, clip.num_frames, clips.frame_interval)
    return center_crop_resize(frames, resolution)


def iter_pixels(clips: ClipSet, resolution: int) -> Iterator[tuple[Clip, Frames]]:
    """Reads all clips of a set in order, decoding each video once from its first to its last frame.

    Args:
        clips: those of one video in succession, without overlap.
        resolution: as for `read_pixels`.

    Yields:
        A clip and what `read_pixels` returns for it.

    Raises:
        VideoError: if a video cannot be decoded.
    """
    progress, done = Progress(f"{clips.root}: clip", len(clips.clips)), 0
    for name, group in groupby(clips.clips, key=lambda clip: clip.name):
        pending, kept = list(group), []
        for index, frame in enumerate(iter_frames(clips.root / name)):
            if not pending:
                continue  # to the end of the video, as damage there would otherwise pass unnoticed
            offset = index - pending[0].start
            if offset >= 0 and offset % clips.frame_interval == 0:
                kept.append(frame)
            if len(kept) == pending[0].num_frames:
                yield pending.pop(0), center_crop_resize(np.stack(kept), resolution)
                kept, done = [], done + 1
                progress.update(done)
        assert not pending, f"{name} has fewer frames than its header says"


def choose_clips(
    source: Source,
    count: int,
    num_frames: int,
    frame_interval: int,
    seed: int,
    *,
    order: Literal["random", "first"] = "random",
    max_clips_a_video: int | None = None,
    random_start: bool = True,
    without: Collection[str] = (),
    field: str = "num_real_clips",
) -> ClipSet:
    """Chooses exactly `count` clips, spread over as many videos as possible.

    Args:
        source: videos, each at least as long as a clip.
        count: number of clips, >= 1.
        num_frames: frames of a clip, F.
        frame_interval: step from one frame of a clip to the next, in frames of the video.
        seed: decides the order of the videos and the starts, together with the content of each video.
        order: `first` takes the videos by name instead.
        max_clips_a_video: most clips of one video, at different starts; by default as many as needed.
        random_start: False takes one clip of each video, from its first frame.
        without: hashes of videos that are not to be used.
        field: field of the protocol that gives `count`, for the error message.

    Raises:
        ValueError: if the videos give fewer clips.
    """
    span = clip_span(num_frames, frame_interval)
    queue: list[tuple[Video, list[int]]] = []
    copies: Counter[str] = Counter()
    for video in source.catalog.videos:
        content = source.folder.sha256(video)
        if content in without:
            continue
        num_starts = video.info.num_frames - span + 1 if random_start else 1
        # Copies of one file are numbered, so that they draw different starts whatever their names.
        rng = numpy_generator(seed, "start", content, copies[content])
        copies[content] += 1
        queue.append((video, rng.permutation(np.arange(num_starts))[:max_clips_a_video].tolist()))
    if order == "random":
        queue.sort(key=lambda row: hashlib.sha256(f"{seed} {source.folder.sha256(row[0])} {row[1]}".encode()).digest())
    available = sum(len(starts) for _, starts in queue)
    if available < count:
        limit = "" if max_clips_a_video is None else f" with max_clips_a_video={max_clips_a_video}"
        raise ValueError(
            f"{source.catalog.root}: {field} is {count}, but its {len(queue)} videos give {available} clips of "
            f"{num_frames} frames at interval {frame_interval}{limit}; allowed: at most {available}"
        )
    clips: list[Clip] = []
    turn = 0
    while len(clips) < count:
        for video, starts in queue:
            if turn < len(starts) and len(clips) < count:
                clips.append(make_clip(source, video, starts[turn], num_frames))
        turn += 1
    return ClipSet(source.catalog.root, tuple(clips), frame_interval)


def every_frame(source: Source, num_frames: int) -> ClipSet:
    """Every frame of every video, once, in clips of at most `num_frames`, ordered by content."""
    clips = [
        make_clip(source, video, start, min(num_frames, video.info.num_frames - start))
        for video in sorted(source.catalog.videos, key=source.folder.sha256)
        for start in range(0, video.info.num_frames, num_frames)
    ]
    return ClipSet(source.catalog.root, tuple(clips), 1)


def successive_clips(source: Source, videos: Iterable[Video], num_frames: int, frame_interval: int) -> ClipSet:
    """Cuts videos into clips that do not overlap, from the first frame on; a rest at the end is left out."""
    span = clip_span(num_frames, frame_interval)
    clips = [
        make_clip(source, video, start, num_frames)
        for video in videos
        for start in range(0, video.info.num_frames - span + 1, span)
    ]
    return ClipSet(source.catalog.root, tuple(clips), frame_interval)


def make_clip(source: Source, video: Video, start: int, num_frames: int) -> Clip:
    """Some frames of a video; the folder that it is in is its class."""
    parent = video.info.path.parent
    label = None if parent == source.catalog.root else normal_name(parent.name)
    return Clip(video.name, source.folder.sha256(video), label, start, num_frames)


@dataclass(frozen=True)
class Selection:
    """The clips whose features are compared."""

    protocol: Protocol
    """Without gaps; see `complete_protocol`."""
    sources: Mapping[str, Source]
    """Videos by name: `real`, `generated`, `held_out`."""
    sets: Mapping[str, ClipSet]
    """Clips by name; see `choose_all`."""
    warnings: Sequence[str]

    @property
    def resolution(self) -> int:
        """Side of the clips in pixels."""
        assert self.protocol.resolution is not None
        return self.protocol.resolution


def complete_protocol(protocol: Protocol, generated: Source, frame_interval: int) -> Protocol:
    """Fills in the clip length, frame interval and resolution that a protocol leaves to the generated videos.

    Raises:
        ValueError: if the videos differ in size, or are smaller than the resolution.
    """
    _check_one_size(generated.catalog.videos)
    infos = [video.info for video in generated.catalog.videos]
    side = min(infos[0].width, infos[0].height)
    resolution = protocol.resolution or side
    if resolution > side:
        raise ValueError(
            f"resolution is {resolution}, but the videos of {generated.catalog.root} are "
            f"{infos[0].width}x{infos[0].height}; allowed: at most {side}"
        )
    num_frames = protocol.num_frames or min(info.num_frames for info in infos)
    return protocol.model_copy(
        update={"frame_interval": frame_interval, "num_frames": num_frames, "resolution": resolution}
    )


def crop_warnings(generated: Source, protocol: Protocol) -> list[str]:
    """Says so if only the middle of the generated videos is scored, because they are no squares."""
    info = generated.catalog.videos[0].info
    if info.width == info.height:
        return []
    side = min(info.width, info.height)
    return [
        f"generated videos are {info.width}x{info.height}, but scores compare squares: only their middle, "
        f"{side}x{side}, is scored, at {protocol.resolution} pixels, and so is that of the real videos"
    ]


def _check_one_size(videos: Sequence[Video]) -> None:
    first = videos[0].info
    for video in videos:
        if (video.info.width, video.info.height) != (first.width, first.height):
            raise ValueError(
                f"{video.info.path}: is {video.info.width}x{video.info.height}, but {first.path} is "
                f"{first.width}x{first.height}; generated clips must all be of one size"
            )


def choose_all(
    sources: Mapping[str, Source], protocol: Protocol, known: Mapping[str, ClipSet], with_every_frame: bool
) -> tuple[dict[str, ClipSet], list[str]]:
    """Chooses the clips whose features are compared.

    Args:
        sources: usable videos: `real`, `generated` and, if there are any, `held_out`.
        protocol: as `complete_protocol` returns it.
        known: sets that a manifest gives (`real`, `floor`) and that are not chosen again.
        with_every_frame: also take every frame of the real videos.

    Returns:
        Sets by name: `real`, `generated`, and, if they were asked for, `every_frame` and `floor`: other real clips, as
        many as generated ones. And a warning if there are too few other real clips.

    Raises:
        ValueError: if there are too few videos.
    """
    assert protocol.num_frames is not None and protocol.frame_interval is not None
    shape = protocol.num_frames, protocol.frame_interval
    rules: dict[str, Any] = {"order": protocol.real_videos, "max_clips_a_video": protocol.max_clips_a_video}
    real = known.get("real") or choose_clips(sources["real"], protocol.num_real_clips, *shape, protocol.seed, **rules)
    generated = choose_clips(
        sources["generated"],
        protocol.num_generated_clips,
        protocol.num_frames,
        1,
        protocol.seed,
        max_clips_a_video=1,
        random_start=False,
        field="num_generated_clips",
    )
    sets = {"real": real, "generated": generated}
    if with_every_frame:
        sets["every_frame"] = every_frame(sources["real"], protocol.num_frames)
    if not protocol.floor:
        return sets, []
    if "floor" in known:
        return {**sets, "floor": known["floor"]}, []
    # Without held-out videos, only real videos that no real clip is from: clips of one video are too much alike.
    used = set() if "held_out" in sources else {clip.sha256 for clip in real.clips}
    try:
        sets["floor"] = choose_clips(
            sources.get("held_out", sources["real"]),
            protocol.num_generated_clips,
            *shape,
            protocol.seed,
            **rules,
            without=used,
            field="num_generated_clips of the floor",
        )
    except ValueError as error:
        return sets, [f"no floor: {error}; --held-out gives one"]
    return sets, []
