"""What a folder of videos holds, before anything is trained on it: `lavita data inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.core.progress import Progress
from lavita.data.captions import find_captions
from lavita.data.catalog import find_videos, probe_all
from lavita.data.clips import center_crop_resize, clip_span
from lavita.data.config import SPLITS, DataSetName, check_split
from lavita.data.datasets import Member, guess_dataset, list_dataset
from lavita.video.contact_sheet import contact_sheet
from lavita.video.formats import VideoError, VideoInfo
from lavita.video.reading import read_clip

SHEET_VIDEOS, SHEET_SIDE = 8, 96
NUM_BINS = 8
NUM_SHOWN = 20  # of a long list on the console; JSON has all
UNKNOWN_RATE = "unknown"


@dataclass(frozen=True)
class CaptionCoverage:
    """How a table of captions and the videos fit together."""

    num_captions: int
    """Of the videos that can be read."""
    num_videos: int
    """With a caption."""
    without: tuple[str, ...]
    """Names of the videos without."""
    num_rows: int
    """Of the table."""
    num_rows_unused: int
    """Of files that are not among the videos."""
    unused_example: str
    """One of these; empty where there is none."""
    num_rows_empty: int
    """Of videos, without a caption."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_dataset` found."""

    root: str
    dataset: DataSetName
    split: str | None
    looks_like: DataSetName | None
    """The named data set that the videos are called like, where none was asked for."""
    splits: Mapping[str, int]
    """Videos of each split that the folder tells, of a named data set or one that it looks like."""
    folders: Mapping[str, int]
    """Videos below each folder directly below the root."""
    num_videos: int
    """That can be read; all that follows is about these."""
    num_frame_folders: int
    classes: Mapping[str, int]
    """Videos of each class; in a plain folder, of each folder that could be one with `data.class_folders`."""
    num_frames: int
    hours: float
    """At 25 frames a second where a folder of frames does not tell."""
    sizes: Mapping[str, int]
    """Videos of each width x height, most frequent first."""
    rates: Mapping[str, int]
    """Videos of each number of frames a second, most frequent first."""
    shortest: int
    """Frames."""
    median: float
    longest: int
    lengths: tuple[tuple[int, int, int], ...]
    """(fewest frames, most frames, videos) of each bin."""
    clip_frames: int
    frame_interval: int
    num_clips: int
    """Distinct (video, start) pairs that training draws from."""
    too_short: tuple[str, ...]
    """Names of the videos without a clip."""
    broken: tuple[str, ...]
    """One message a video that cannot be read, beginning with its path."""
    notes: tuple[str, ...]
    captions: CaptionCoverage | None

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON types."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def inspect_dataset(
    root: Path,
    dataset: DataSetName | None = None,
    split: str | None = None,
    num_frames: int = 16,
    frame_interval: int = 3,
    captions: Path | None = None,
    sheet: Path | None = None,
) -> Inspection:
    """Reads the headers of all videos of a data set and counts.

    Args:
        root: its folder.
        dataset: a named data set; `None` and `folder` take any tree of videos, `None` with a guess at what it is.
        split: of a named one; by default what the paper trains on.
        num_frames: of a clip.
        frame_interval: of a clip.
        captions: a table of captions to compare with the videos.
        sheet: PNG to draw evenly chosen videos into, cropped as training crops them.

    Raises:
        ValueError: for a folder that is missing or without any videos, and for what `list_dataset`, `Listing.choose`
            and `find_captions` refuse.
    """
    notes: tuple[str, ...] = ()
    problems: list[str] = []
    looks_like: DataSetName | None = None
    if dataset is None or dataset == "folder":
        if split is not None:
            check_split("folder", split)
        members = _plain_members(root)
        names = [member.name for member in members]
        looks_like = guess_dataset(names) if dataset is None else None
        listing = None if looks_like is None else list_dataset(root, looks_like)
    else:
        split = split or SPLITS[dataset][0]
        listing = list_dataset(root, dataset)
        members, notes = listing.choose(split), listing.notes
        problems += listing.problems

    progress = Progress("reading video", len(members))
    readable: list[tuple[Member, VideoInfo]] = []
    probed = probe_all((member.path for member in members), progress.update)
    for member, result in zip(members, probed, strict=True):
        if isinstance(result, VideoInfo):
            readable.append((member, result))
        else:
            problems.append(str(result))
    span = clip_span(num_frames, frame_interval)
    if sheet is not None and readable:
        lost = _draw_sheet(sheet, readable, num_frames, frame_interval)
        problems += lost.values()
        readable = [pair for pair in readable if pair[0].name not in lost]

    infos = [info for _, info in readable]
    lengths = np.array([info.num_frames for info in infos] or [0])
    folders = sum(info.path.is_dir() for info in infos)
    found = Inspection(
        root=str(root),
        dataset=dataset or "folder",
        split=split,
        looks_like=looks_like,
        splits={} if listing is None else {name: len(those) for name, those in listing.splits.items()},
        folders=_count(member.name.split("/")[0] for member in members if "/" in member.name),
        num_videos=len(readable),
        num_frame_folders=folders,
        classes=_count(member.class_name for member, _ in readable if member.class_name is not None),
        num_frames=int(lengths.sum()),
        hours=sum(info.num_frames / info.fps for info in infos) / 3600,
        sizes=_most_frequent(f"{info.width}x{info.height}" for info in infos),
        rates=_most_frequent(UNKNOWN_RATE if info.path.is_dir() else f"{info.fps:.4g}" for info in infos),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        lengths=_bins(lengths) if readable else (),
        clip_frames=num_frames,
        frame_interval=frame_interval,
        num_clips=sum(max(0, info.num_frames - span + 1) for info in infos),
        too_short=tuple(member.name for member, info in readable if info.num_frames < span),
        broken=tuple(problems),
        notes=notes,
        captions=None,
    )
    if captions is None:
        return found
    table = find_captions(captions, {member.name for member, _ in readable})
    return replace(
        found,
        captions=CaptionCoverage(
            num_captions=sum(map(len, table.captions.values())),
            num_videos=len(table.captions),
            without=tuple(member.name for member, _ in readable if member.name not in table.captions),
            num_rows=table.num_rows,
            num_rows_unused=table.num_unused,
            unused_example=table.example,
            num_rows_empty=table.num_empty,
        ),
    )


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Prints what was found as tables and sentences.

    Args:
        found: of `inspect_dataset`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    named = found.dataset != "folder"
    title = f"{found.root}: {found.dataset}, split {found.split}" if named else found.root
    facts = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")

    def add(what: str, text: str) -> None:
        facts.add_row(what, escape(text))

    kinds = f", {found.num_frame_folders:,} of them folders of frames" if found.num_frame_folders else ""
    add("videos", f"{found.num_videos:,}{kinds}")
    if found.looks_like:
        add("looks like", f"{found.looks_like}: inspect it with --dataset {found.looks_like}")
    add("splits", _listed(found.splits) or "none that the folder tells")
    if found.folders:
        add("folders", _listed(found.folders))
    if found.classes:
        hint = "" if named else "  (with data.class_folders=true)"
        add("classes", f"{len(found.classes)}{hint}: {_listed(found.classes)}")
    elif named:
        add("classes", "none")
    add("frames", f"{found.num_frames:,} in {found.hours:,.2f} hours")
    add(
        "lengths",
        f"{found.shortest:,} frames each"
        if found.shortest == found.longest
        else f"{found.shortest:,} to {found.longest:,} frames, half of them at most {found.median:,g}",
    )
    for what, counts in (("size", found.sizes), ("rate", found.rates)):
        if len(counts) == 1:
            add(what, f"{next(iter(counts))}{' frames a second' if what == 'rate' else ''}")
    span = clip_span(found.clip_frames, found.frame_interval)
    add(
        "clips",
        f"{found.num_clips:,} of {found.clip_frames} frames at interval {found.frame_interval}; "
        f"{len(found.too_short):,} videos are shorter than the {span} frames of one"
        + (f": {_some(found.too_short)}" if found.too_short else ""),
    )
    if (covered := found.captions) is not None:
        add(
            "captions",
            f"{covered.num_captions:,} of {covered.num_videos:,} videos; {len(covered.without):,} videos have none"
            + (f": {_some(covered.without)}" if covered.without else "")
            + f"; {covered.num_rows_unused:,} of {covered.num_rows:,} rows are of files that are not here"
            + (f", as {covered.unused_example}" if covered.num_rows_unused else "")
            + f"; {covered.num_rows_empty:,} rows are empty",
        )
    add("broken", f"{len(found.broken):,}" + (", listed below" if found.broken else ""))
    console.print(facts)

    bins = {f"{low:,}" if low == high else f"{low:,} to {high:,}": count for low, high, count in found.lengths}
    for heading, counts in (("width x height", found.sizes), ("frames a second", found.rates), ("frames", bins)):
        if len(counts) > 1:
            console.print(_histogram(heading, counts))
    if len(found.sizes) > 1:
        console.print("Sizes are mixed: the middle square of each frame is cut out and resized.", highlight=False)
    if len(found.rates) > 1:
        console.print(
            "Rates are mixed: a clip takes every so many frames, whatever time passes between them.", highlight=False
        )
    for note in found.notes:
        console.print(escape(note), highlight=False)
    for message in found.broken[:NUM_SHOWN]:
        console.print(escape(f"broken: {message}"), highlight=False, soft_wrap=True)
    if len(found.broken) > NUM_SHOWN:
        console.print(f"and {len(found.broken) - NUM_SHOWN:,} more broken ones, in --json", highlight=False)


def _plain_members(root: Path) -> tuple[Member, ...]:
    """Any tree of videos; their folders are their classes where each lies in one."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    paths = list(find_videos(root))
    if not paths:
        raise ValueError(f"{root}: holds no video files and no folders of frames")
    in_folders = all(path.parent != root for path in paths)
    return tuple(
        Member(path, path.relative_to(root).as_posix(), path.parent.name if in_folders else None) for path in paths
    )


def _draw_sheet(
    file: Path, readable: Sequence[tuple[Member, VideoInfo]], num_frames: int, frame_interval: int
) -> dict[str, str]:
    """Draws the middle clip of evenly chosen videos.

    Returns:
        Names of those that cannot be decoded, though their headers can be read, each with the reason.
    """
    span = clip_span(num_frames, frame_interval)
    videos = [pair for pair in readable if pair[1].num_frames >= span] or list(readable)
    chosen = np.unique(np.linspace(0, len(videos) - 1, SHEET_VIDEOS).round().astype(int))
    rows, labels = [], []
    lost: dict[str, str] = {}
    for member, info in (videos[number] for number in chosen):
        # Videos without a whole clip are shown as far as they go.
        count = min(num_frames, (info.num_frames - 1) // frame_interval + 1)
        start = (info.num_frames - clip_span(count, frame_interval)) // 2
        try:
            frames = read_clip(info.path, start, count, frame_interval)
        except VideoError as error:
            lost[member.name] = str(error)
            continue
        rows.append([center_crop_resize(frames, SHEET_SIDE)])
        name = member.name if len(member.name) <= 60 else f"...{member.name[-57:]}"
        labels.append(f"{name}   {info.num_frames} frames   {info.width}x{info.height}")
    if rows:
        contact_sheet(rows, file, labels)
    return lost


def _count(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _most_frequent(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _bins(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[tuple[int, int, int], ...]:
    """Equal ranges of whole numbers from the shortest to the longest; those without a video are left out."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // NUM_BINS)
    counts = Counter(((lengths - low) // width).tolist())
    return tuple(
        (low + number * width, min(high, low + (number + 1) * width - 1), counts[number]) for number in sorted(counts)
    )


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:NUM_SHOWN]]
    more = f" and {len(counts) - NUM_SHOWN:,} more" if len(counts) > NUM_SHOWN else ""
    return ", ".join(shown) + more


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


def _histogram(heading: str, counts: Mapping[str, int]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(heading, justify="right")
    table.add_column("videos", justify="right")
    table.add_column("")
    most = max(counts.values(), default=1)
    for name, count in list(counts.items())[:NUM_SHOWN]:
        table.add_row(name, f"{count:,}", "█" * max(1, round(30 * count / most)))
    if len(counts) > NUM_SHOWN:
        table.add_row(f"{len(counts) - NUM_SHOWN} more", f"{sum(list(counts.values())[NUM_SHOWN:]):,}", "")
    return table
