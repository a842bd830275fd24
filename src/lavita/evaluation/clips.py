"""The clips of each side: chosen by a seed and the content of the files, written down, and used again.

Videos are told apart by the hash of their content, not by name or place, so that renamed files give the same clips.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from lavita.core.seeds import numpy_generator
from lavita.data.catalog import Catalog, Video, read_generation, scan
from lavita.data.clips import clip_span
from lavita.data.content_hash import content_hash
from lavita.evaluation.protocol import Protocol
from lavita.video.formats import VideoInfo
from lavita.video.frame_folders import is_frame_folder

VERSION = 1


@dataclass(frozen=True)
class ClipRef:
    """One clip."""

    name: str
    """Path of its video below the side's folder."""
    sha256: str
    """Of the video's content."""
    label: str | None
    """Name of the class folder, or None where the video lies in none."""
    start: int
    num_frames: int


@dataclass(frozen=True)
class Side:
    """The clips of one side, in an order that depends on content only."""

    root: Path
    clips: tuple[ClipRef, ...]
    frame_interval: int

    @property
    def labels(self) -> list[str | None]:
        """The class of each clip."""
        return [clip.label for clip in self.clips]

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the frames: equal for equal clips, wherever they lie."""
        rows = [(clip.sha256, clip.start, clip.num_frames) for clip in self.clips]
        return hashlib.sha256(repr((VERSION, self.frame_interval, rows)).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A folder of videos, read once."""

    catalog: Catalog
    hashes: dict[str, str]
    """SHA-256 of each video by its name."""

    def facts(self) -> dict[str, Any]:
        """What was found, for a report."""
        infos = [video.info for video in self.catalog.videos]
        return {
            "folder": str(self.catalog.root),
            "num_videos": len(infos),
            "num_broken": len(self.catalog.broken),
            "broken": list(self.catalog.broken),
            "sizes": dict(Counter(f"{info.width}x{info.height}" for info in infos).most_common(5)),
            "frames": [min(info.num_frames for info in infos), max(info.num_frames for info in infos)],
            "codecs": dict(sorted(Counter(codec(info) for info in infos).items())),
        }


def read_source(root: Path, min_frames: int, skip_broken: bool, without: Collection[str] = ()) -> Source:
    """Reads the headers and hashes the content of all videos below a folder.

    Args:
        root: the folder.
        min_frames: shorter videos count as broken.
        skip_broken: go on without broken videos, which are counted, instead of raising.
        without: names of videos to count as broken, because decoding them failed.

    Raises:
        ValueError: for a folder that is missing or empty, or broken videos.
    """
    catalog = scan(root, min_frames=min_frames)
    if without:
        kept = tuple(video for video in catalog.videos if video.name not in without)
        lost = tuple(f"{video.info.path}: cannot be decoded" for video in catalog.videos if video.name in without)
        catalog = Catalog(root, kept, (), catalog.broken + lost)
    refuse_broken(catalog, skip_broken)
    return Source(catalog, {video.name: content_hash(video.info.path) for video in catalog.videos})


def codec(info: VideoInfo) -> str:
    """What a video is compressed with, as `h264 yuv420p`; for a folder of frames the suffixes of its files."""
    if is_frame_folder(info.path):
        return "frames " + " ".join(sorted({file.suffix.lower() for file in info.path.iterdir() if file.suffix}))
    with av.open(str(info.path.absolute()), metadata_errors="replace") as container:
        context = container.streams.video[0].codec_context
        return f"{context.name} {context.format.name if context.format else ''}".strip()


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
    without: Collection[tuple[str, int]] = (),
    field: str = "num_real_clips",
) -> Side:
    """Chooses exactly `count` clips, spread over as many videos as possible.

    Args:
        source: the videos, each of at least a clip's length.
        count: clips, >= 1.
        num_frames: of a clip, F.
        frame_interval: frames of the video from one frame of a clip to the next.
        seed: of the order of videos and of the starts; each is a function of the seed and the video's content.
        order: `first` takes videos by name.
        max_clips_a_video: by default as many as needed; starts differ.
        random_start: False takes frames from the first on, one clip a video.
        without: (hash of a video, start) of clips that are taken already; -1 as start stands for all of a video.
        field: of the protocol, for the message.

    Raises:
        ValueError: where the folder holds too few clips.
    """
    span = clip_span(num_frames, frame_interval)
    taken: dict[str, set[int]] = {}
    for content, start in without:
        taken.setdefault(content, set()).add(start)
    queue: list[tuple[Video, list[int]]] = []
    copies: Counter[str] = Counter()
    for video in source.catalog.videos:
        content = source.hashes[video.name]
        if -1 in taken.get(content, ()):
            continue
        num_starts = video.info.num_frames - span + 1 if random_start else 1
        free = np.array([start for start in range(num_starts) if start not in taken.get(content, ())], dtype=np.int64)
        # Copies of one file draw differently, by their number, not by their names.
        rng = numpy_generator(seed, "start", content, copies[content])
        copies[content] += 1
        most = len(free) if max_clips_a_video is None else min(len(free), max_clips_a_video)
        queue.append((video, [int(start) for start in rng.permutation(free)[:most]]))
    if order == "random":
        queue.sort(key=lambda row: hashlib.sha256(f"{seed} {source.hashes[row[0].name]} {row[1]}".encode()).digest())
    available = sum(len(starts) for _, starts in queue)
    if available < count:
        limit = "" if max_clips_a_video is None else f" with max_clips_a_video={max_clips_a_video}"
        raise ValueError(
            f"{source.catalog.root}: {field} is {count}, but its {len(queue)} videos give {available} clips of "
            f"{num_frames} frames at interval {frame_interval}{limit}; allowed: at most {available}"
        )
    clips: list[ClipRef] = []
    turn = 0
    while len(clips) < count:
        for video, starts in queue:
            if turn < len(starts) and len(clips) < count:
                clips.append(_clip(source, video, starts[turn], num_frames))
        turn += 1
    return Side(source.catalog.root, tuple(clips), frame_interval)


def all_frames(source: Source, num_frames: int) -> Side:
    """Every frame of every video, once, in clips of at most `num_frames`, by content."""
    clips = [
        _clip(source, video, start, min(num_frames, video.info.num_frames - start))
        for video in sorted(source.catalog.videos, key=lambda video: source.hashes[video.name])
        for start in range(0, video.info.num_frames, num_frames)
    ]
    return Side(source.catalog.root, tuple(clips), 1)


def _clip(source: Source, video: Video, start: int, num_frames: int) -> ClipRef:
    folder = video.info.path.parent
    label = None if folder == source.catalog.root else folder.name
    return ClipRef(video.name, source.hashes[video.name], label, start, num_frames)


def write_manifest(file: Path, sides: dict[str, Side], settings: dict[str, Any]) -> None:
    """Writes the chosen clips as JSON, whole or not at all.

    Args:
        file: where; missing folders are made.
        sides: by name.
        settings: what they were chosen by; `read_manifest` insists on the same.
    """
    content = {
        "version": VERSION,
        "settings": settings,
        "sides": {
            name: {
                "folder": str(side.root),
                "frame_interval": side.frame_interval,
                "digest": side.digest,
                "clips": [asdict(clip) for clip in side.clips],
            }
            for name, side in sides.items()
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def read_manifest(file: Path, sources: dict[str, Source], settings: dict[str, Any]) -> dict[str, Side]:
    """Reads the clips of sides from a manifest, and checks that the videos are those it was written for.

    Args:
        file: see `write_manifest`.
        sources: the videos of each side that is wanted, where the manifest has it; found by content.
        settings: see `write_manifest`.

    Raises:
        ValueError: where the file is damaged, was written for other settings, or names a video that is not there.
    """
    try:
        content = json.loads(file.read_text())
        sides = {
            name: (side["frame_interval"], [ClipRef(**clip) for clip in side["clips"]])
            for name, side in content["sides"].items()
        }
        written = content["settings"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is no manifest of clips ({type(error).__name__})") from error
    for key, value in settings.items():
        if written.get(key) != value:
            raise ValueError(f"{file}: was written with {key}={written.get(key)}, but {value} was asked for")
    result = {}
    for name, source in sources.items():
        if name not in sides:
            continue
        interval, clips = sides[name]
        videos: dict[str, list[Video]] = {}
        for video in source.catalog.videos:
            videos.setdefault(source.hashes[video.name], []).append(video)
        found = []
        for clip in clips:
            if clip.sha256 not in videos:
                raise ValueError(f"{file}: names {clip.name}, but no video below {source.catalog.root} has its content")
            same = next((v for v in videos[clip.sha256] if v.name == clip.name), videos[clip.sha256][0])
            found.append(_clip(source, same, clip.start, clip.num_frames))
        result[name] = Side(source.catalog.root, tuple(found), interval)
    return result


def check_one_size(videos: Sequence[Video]) -> None:
    """Refuses generated videos of several sizes.

    Raises:
        ValueError: naming two that differ.
    """
    first = videos[0].info
    for video in videos:
        if (video.info.width, video.info.height) != (first.width, first.height):
            raise ValueError(
                f"{video.info.path}: is {video.info.width}x{video.info.height}, but {first.path} is "
                f"{first.width}x{first.height}; generated clips must all be of one size"
            )


def _floor(real: Side, sources: Mapping[str, Source], protocol: Protocol, rules: Mapping[str, Any]) -> Side | str:
    """As many other real clips as generated ones, of videos that the real side has none of; or why there are none."""
    assert protocol.num_frames is not None and protocol.frame_interval is not None
    source = sources.get("held_out", sources["real"])
    # Clips of one video are too alike for a floor.
    used = [] if "held_out" in sources else [(clip.sha256, -1) for clip in real.clips]
    count, shape = protocol.num_generated_clips, (protocol.num_frames, protocol.frame_interval)
    try:
        return choose_clips(
            source, count, *shape, protocol.seed, **rules, without=used, field="num_generated_clips of the floor"
        )
    except ValueError as error:
        return f"no floor: {error}; --held-out gives one"


def _manifest_settings(protocol: Protocol) -> dict[str, Any]:
    fields = ("num_real_clips", "num_generated_clips", "num_frames", "frame_interval", "real_videos")
    return {key: getattr(protocol, key) for key in (*fields, "max_clips_a_video", "seed")}


def check_interval(generated: Path, frame_interval: int | None) -> int | None:
    """The frame interval of generated videos.

    Args:
        generated: their folder.
        frame_interval: what was asked for, or None.

    Returns:
        What was asked for, else what is recorded beside the videos, else None.

    Raises:
        ValueError: where the two differ, or it is below 1.
    """
    recorded: int | None = (read_generation(generated) or {}).get("frame_interval")
    if frame_interval is None:
        return recorded
    if frame_interval < 1:
        raise ValueError(f"frame_interval is {frame_interval}; it must be at least 1")
    if recorded not in (None, frame_interval):
        raise ValueError(f"frame_interval is {frame_interval}, but the model of {generated} has {recorded}")
    return frame_interval


def refuse_broken(catalog: Catalog, skip_broken: bool) -> Catalog:
    """The catalog itself, where it may be used.

    Raises:
        ValueError: where it has broken videos and these are not to be skipped.
    """
    if catalog.broken and not skip_broken:
        total = len(catalog.broken) + len(catalog.videos)
        raise ValueError(
            f"{catalog.root}: {len(catalog.broken)} of {total} videos cannot be used, the first: "
            f"{catalog.broken[0]}; --skip-broken goes on without them"
        )
    return catalog
