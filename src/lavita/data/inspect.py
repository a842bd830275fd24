"""Inspection of a data set before training: what `lavita data inspect` counts and prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lavita.core.files import check_outside
from lavita.core.names import DataSetName
from lavita.core.progress import Progress
from lavita.core.text import normal_name
from lavita.data.captions import find_captions
from lavita.data.catalog import probe_all
from lavita.data.clips import center_crop_resize, clip_span
from lavita.data.config import SPLITS, check_split
from lavita.data.datasets import Listing, Member, guess_dataset, list_dataset
from lavita.video.contact_sheet import contact_sheet
from lavita.video.formats import VideoError, VideoInfo
from lavita.video.reading import read_clip
from lavita.video.tree import VideoTree, find_videos

SHEET_VIDEOS, SHEET_SIDE = 8, 96
NUM_BINS = 8
NUM_SHOWN = 20  # longest list on the console; the JSON has everything
UNKNOWN_RATE = "unknown"


@dataclass(frozen=True)
class CaptionCoverage:
    """How well a table of captions and the videos fit together."""

    num_captions: int
    """Captions of readable videos."""
    num_videos: int
    """Readable videos with a caption."""
    without: tuple[str, ...]
    """Names of the readable videos without a caption."""
    num_rows: int
    """Rows of the table."""
    num_rows_unused: int
    """Rows about files that are not among the videos."""
    unused_example: str
    """A file that is not among the videos; empty if there is none."""
    num_rows_empty: int
    """Rows about readable videos that have no caption."""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_dataset`. From `num_videos` to `too_short`, all numbers are about readable videos."""

    root: str
    dataset: DataSetName
    split: str | None
    looks_like: DataSetName | None
    """The named data set that the names of the videos suggest, if none was given."""
    splits: Mapping[str, int]
    """Videos of each split that the folder defines, if it is a named data set or looks like one."""
    folders: Mapping[str, int]
    """Videos below each folder directly below the root, readable or not."""
    left_out: Mapping[str, int]
    """What belongs to no video: the kinds in `video.tree.KINDS`, and other files by suffix."""
    num_videos: int
    num_frame_folders: int
    classes: Mapping[str, int]
    """Videos of each class; for a plain folder, of each folder that `data.class_folders` would make a class."""
    num_frames: int
    hours: float
    """Total length, with 25 frames per second for frame folders."""
    sizes: Mapping[str, int]
    """Videos of each width x height, most frequent first."""
    rates: Mapping[str, int]
    """Videos of each number of frames per second, most frequent first."""
    shortest: int
    """Frames of the shortest video."""
    median: float
    """Median number of frames."""
    longest: int
    """Frames of the longest video."""
    lengths: tuple[tuple[int, int, int], ...]
    """Histogram of the numbers of frames: (fewest, most, videos) of each bin."""
    clip_frames: int
    frame_interval: int
    num_clips: int
    """Distinct (video, start) pairs that training draws from."""
    too_short: tuple[str, ...]
    """Names of the videos that are shorter than a clip."""
    broken: tuple[str, ...]
    """One message per video that cannot be read; each begins with the video's name."""
    notes: tuple[str, ...]
    """What was left out, one line for each reason."""
    captions: CaptionCoverage | None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
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
    """Counts and measures the videos of a data set.

    Args:
        root: the folder of the data set.
        dataset: a named data set; `folder` or None for any tree of videos, None with a guess at the data set.
        split: part of a named data set; by default what the paper trains on.
        num_frames: frames of a clip.
        frame_interval: step between the frames of a clip.
        captions: table of captions to compare with the videos.
        sheet: PNG file to draw some of the videos into, cropped as in training; outside `root`.

    Raises:
        ValueError: if the folder is missing or holds no videos, if `sheet` is inside it, and for the reasons of
            `list_dataset`, `Listing.choose` and `find_captions`.
    """
    if sheet is not None:
        check_outside("out", sheet.parent, root)
    notes: tuple[str, ...] = ()
    problems: list[str] = []
    looks_like: DataSetName | None = None
    listing: Listing | None = None
    if dataset is None or dataset == "folder":
        if split is not None:
            check_split("folder", split)
        tree, members = _plain_members(root)
        if dataset is None and (looks_like := guess_dataset(member.name for member in members)):
            listing = list_dataset(root, looks_like)
    else:
        split = split or SPLITS[dataset][0]
        listing = list_dataset(root, dataset)
        tree, members, notes = listing.tree, listing.choose(split), listing.notes
        problems += listing.problems

    progress = Progress("reading video", len(members))
    readable: list[tuple[Member, VideoInfo]] = []
    for member, result in zip(members, probe_all(member.path for member in members), strict=True):
        progress.update(progress.done + 1)
        if isinstance(result, VideoInfo):
            readable.append((member, result))
        else:
            problems.append(f"{member.name}: {result.problem}")
    if sheet is not None and readable:
        undecodable = _draw_sheet(sheet, readable, num_frames, frame_interval)
        problems += undecodable.values()
        readable = [pair for pair in readable if pair[0].name not in undecodable]

    infos = [info for _, info in readable]
    lengths = np.array([info.num_frames for info in infos] or [0])
    span = clip_span(num_frames, frame_interval)
    return Inspection(
        root=str(root),
        dataset=dataset or "folder",
        split=split,
        looks_like=looks_like,
        splits={} if listing is None else {name: len(names) for name, names in listing.splits.items()},
        folders=_sorted_counts(member.name.split("/")[0] for member in members if "/" in member.name),
        left_out=tree.counts,
        num_videos=len(readable),
        num_frame_folders=sum(info.path.is_dir() for info in infos),
        classes=_sorted_counts(
            normal_name(member.class_name) for member, _ in readable if member.class_name is not None
        ),
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
        notes=(*tree.notes, *notes),
        captions=None if captions is None else _coverage(captions, [member.name for member, _ in readable]),
    )


def _plain_members(root: Path) -> tuple[VideoTree, tuple[Member, ...]]:
    """Any tree of videos; their folders are their classes if every video is in one."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    tree = find_videos(root)
    if not tree.videos:
        raise ValueError(f"{root}: holds no video files and no frame folders")
    in_folders = all(path.parent != root for path in tree.videos)
    return tree, tuple(
        Member(path, path.relative_to(root).as_posix(), path.parent.name if in_folders else None)
        for path in tree.videos
    )


def _coverage(file: Path, names: Sequence[str]) -> CaptionCoverage:
    table = find_captions(file, set(names))
    return CaptionCoverage(
        num_captions=sum(map(len, table.captions.values())),
        num_videos=len(table.captions),
        without=tuple(name for name in names if name not in table.captions),
        num_rows=table.num_rows,
        num_rows_unused=table.num_unused,
        unused_example=table.example,
        num_rows_empty=table.num_empty,
    )


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Prints an inspection as tables and sentences.

    Args:
        found: the result of `inspect_dataset`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    is_named = found.dataset != "folder"
    title = f"{found.root}: {found.dataset}, split {found.split}" if is_named else found.root
    facts = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")

    def add(name: str, text: str) -> None:
        facts.add_row(name, escape(text))

    kinds = f", {found.num_frame_folders:,} of them frame folders" if found.num_frame_folders else ""
    unreadable = f"; {len(found.broken):,} more cannot be read" if found.broken else ""
    add("videos", f"{found.num_videos:,}{kinds}{unreadable}")
    if found.looks_like:
        add("looks like", f"{found.looks_like}: inspect it with --dataset {found.looks_like}")
    add("splits", _listed(found.splits) or "the folder defines none")
    if found.folders:
        add("folders", _listed(found.folders))
    if found.classes:
        hint = "" if is_named else "  (with data.class_folders=true)"
        add("classes", f"{len(found.classes)}{hint}: {_listed(found.classes)}")
    elif is_named:
        add("classes", "none")
    add("frames", f"{found.num_frames:,} in {found.hours:,.2f} hours")
    add(
        "lengths",
        f"{found.shortest:,} frames each"
        if found.shortest == found.longest
        else f"{found.shortest:,} to {found.longest:,} frames, half of them at most {found.median:,g}",
    )
    for name, counts in (("size", found.sizes), ("rate", found.rates)):
        if len(counts) == 1:
            add(name, f"{next(iter(counts))}{' frames per second' if name == 'rate' else ''}")
    span = clip_span(found.clip_frames, found.frame_interval)
    add(
        "clips",
        f"{found.num_clips:,} of {found.clip_frames} frames at interval {found.frame_interval}; "
        f"{len(found.too_short):,} videos are shorter than the {span} frames of a clip"
        + (f": {_first(found.too_short)}" if found.too_short else ""),
    )
    if (covered := found.captions) is not None:
        add(
            "captions",
            f"{covered.num_captions:,} for {covered.num_videos:,} videos; {len(covered.without):,} videos have none"
            + (f": {_first(covered.without)}" if covered.without else "")
            + f"; {covered.num_rows_unused:,} of {covered.num_rows:,} rows are about files that are not here"
            + (f", such as {covered.unused_example}" if covered.num_rows_unused else "")
            + f"; {covered.num_rows_empty:,} rows are empty",
        )
    add("broken", f"{len(found.broken):,}" + (", listed below" if found.broken else ""))
    console.print(facts)

    bins = {f"{low:,}" if low == high else f"{low:,} to {high:,}": count for low, high, count in found.lengths}
    for heading, counts in (("width x height", found.sizes), ("frames per second", found.rates), ("frames", bins)):
        if len(counts) > 1:
            console.print(_histogram(heading, counts))
    if len(found.sizes) > 1:
        console.print(
            "Sizes differ: training cuts out the middle square of each frame and resizes it.", highlight=False
        )
    if len(found.rates) > 1:
        console.print("Rates differ: the interval of a clip counts frames, not time.", highlight=False)
    for note in found.notes:
        console.print(escape(note), highlight=False)
    for message in found.broken[:NUM_SHOWN]:
        console.print(escape(f"broken: {message}"), highlight=False, soft_wrap=True)
    if len(found.broken) > NUM_SHOWN:
        console.print(f"and {len(found.broken) - NUM_SHOWN:,} more, all in --json", highlight=False)


def _draw_sheet(
    file: Path, readable: Sequence[tuple[Member, VideoInfo]], num_frames: int, frame_interval: int
) -> dict[str, str]:
    """Draws the middle clips of evenly spaced videos.

    Returns:
        The reason for each video, by its name, that cannot be decoded although its header can be read.
    """
    span = clip_span(num_frames, frame_interval)
    videos = [pair for pair in readable if pair[1].num_frames >= span] or list(readable)
    chosen = np.unique(np.linspace(0, len(videos) - 1, SHEET_VIDEOS).round().astype(int))
    rows, labels = [], []
    undecodable: dict[str, str] = {}
    for member, info in (videos[number] for number in chosen):
        # A video that is shorter than a clip is shown with fewer frames.
        count = min(num_frames, (info.num_frames - 1) // frame_interval + 1)
        start = (info.num_frames - clip_span(count, frame_interval)) // 2
        try:
            frames = read_clip(info.path, start, count, frame_interval)
        except VideoError as error:
            undecodable[member.name] = f"{member.name}: {error.problem}"
            continue
        rows.append([center_crop_resize(frames, SHEET_SIDE)])
        name = member.name if len(member.name) <= 60 else f"...{member.name[-57:]}"
        labels.append(f"{name}   {info.num_frames} frames   {info.width}x{info.height}")
    if rows:
        contact_sheet(rows, file, labels)
    return undecodable


def _sorted_counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _most_frequent(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _bins(lengths: npt.NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    """Equal ranges from the shortest to the longest length; those without a video are left out."""
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


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count:,} more" if len(names) > count else "")


def _histogram(heading: str, counts: Mapping[str, int]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(heading, justify="right")
    table.add_column("videos", justify="right")
    table.add_column("")
    most = max(counts.values(), default=1)
    for name, count in list(counts.items())[:NUM_SHOWN]:
        table.add_row(escape(name), f"{count:,}", "█" * max(1, round(30 * count / most)))
    if len(counts) > NUM_SHOWN:
        table.add_row(f"{len(counts) - NUM_SHOWN} more", f"{sum(list(counts.values())[NUM_SHOWN:]):,}", "")
    return table
