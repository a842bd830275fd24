"""The paper's data sets by name: which videos below a folder belong to them, to which split, and of which class.

Each is understood as its authors publish it, and as folders of frames, which is how the public code's copies come. What
the layouts look like: docs/data.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from lavita.core.config import ConfigError
from lavita.data.catalog import Catalog, find_videos, make_catalog, scan
from lavita.data.config import SETS_WITH_CLASSES, SPLITS, DataSetName, check_split
from lavita.data.ucf101 import class_of, read_split_lists
from lavita.video.formats import FRAME_SUFFIXES, VIDEO_SUFFIXES, VideoError

SPLIT_FOLDERS = {"train": "train", "val": "val", "test": "test", "sky_train": "train", "sky_test": "test"}
# Folders that hold a split's videos in some form, below the folder that is named after the split.
CONTENT_FOLDERS = frozenset({"videos", "images", "frames", "original"})
# FaceForensics comes with forged copies of its videos, and with masks of the faces; FaceForensics++ as well.
FORGED_FOLDERS = frozenset({"altered", "mask", "manipulated_sequences"})
LIST_NAME = re.compile(r"(train|val|test)(_\w+)?_list\.txt")

# What was looked for, as one says it where nothing is found.
LAYOUTS: Mapping[DataSetName, str] = {
    "faceforensics": "train/original/*.avi, train/videos/*.mp4, or folders of frames as train/<video>/000001.jpg",
    "sky_timelapse": "sky_train/<video>/<clip>/*.jpg",
    "ucf101": "UCF-101/<Class>/v_<Class>_g01_c01.avi, or folders of frames as v_<Class>_g01_c01/000001.jpg",
    "taichi_hd": "train/<youtube id>#<start>#<end>.mp4, or folders of frames of that name",
}
SPLIT_SOURCES: Mapping[DataSetName, str] = {
    "faceforensics": "folders train, val and test, or train_list.txt",
    "sky_timelapse": "folders sky_train and sky_test, or train_list.txt",
    "ucf101": "ucfTrainTestlist/trainlist01.txt, in the folder or beside it, folders train and test, or train_list.txt",
    "taichi_hd": "folders train and test, or train_list.txt",
}


@dataclass(frozen=True)
class Member:
    """A video of a data set, not opened yet."""

    path: Path
    name: str
    """Path below the data set's folder, with forward slashes."""
    class_name: str | None


@dataclass(frozen=True)
class Listing:
    """What a folder holds of a data set."""

    root: Path
    dataset: DataSetName
    members: tuple[Member, ...]
    splits: Mapping[str, frozenset[str]]
    """Names of the members of each split that the folder tells, without `all`."""
    notes: tuple[str, ...]
    """What was left out, a line each."""
    problems: tuple[str, ...]
    """Videos that are not named as the data set's are, a line each, which begins with the path."""

    def choose(self, split: str | None = None) -> tuple[Member, ...]:
        """The members of a split, by default the one that the paper trains on.

        Raises:
            ValueError: for a split that the data set has not, or that the folder does not tell.
        """
        split = SPLITS[self.dataset][0] if split is None else split
        check_split(self.dataset, split)
        if split == "all":
            return self.members
        names = self.splits.get(split)
        if not names:
            told = ", ".join(f"{name} ({len(those)})" for name, those in self.splits.items()) or "no split"
            raise ValueError(
                f"{self.root}: does not tell which of its {len(self.members)} videos are split {split!r} of "
                f"{self.dataset}: looked for {SPLIT_SOURCES[self.dataset]}; found {told}; split=all takes every video"
            )
        return tuple(member for member in self.members if member.name in names)


def open_dataset(
    root: Path,
    name: DataSetName = "folder",
    split: str | None = None,
    class_folders: bool = False,
    min_frames: int = 1,
    broken: Literal["skip", "error"] = "skip",
    images: bool = False,
    use_classes: bool = True,
) -> Catalog:
    """Opens a data set; the names in the catalog are paths below `root`, whatever the layout.

    Args:
        root: its folder.
        name: `folder`, any tree of videos, or one of the paper's data sets.
        split: of a named one; by default what the paper trains on: `train`, of UCF101 `all`.
        class_folders: as for `catalog.scan`; with `folder` only.
        min_frames: shorter videos are broken ones.
        broken: `skip` names broken videos on the console and goes on; `error` raises at the first.
        images: take image files instead of videos; with `folder` only.
        use_classes: whether a named data set's videos get their classes.

    Raises:
        ValueError: for what `catalog.scan` refuses, a layout that is not the data set's, a split that the folder does
            not tell, or options that do not go together.
    """
    if name not in SPLITS:
        raise ConfigError(f"dataset is {name!r}; allowed: {', '.join(SPLITS)}")
    if name == "folder":
        if split is not None:
            check_split(name, split)
        return scan(root, class_folders, min_frames, broken, images)
    for field, value in (("class_folders", class_folders), ("images", images)):
        if value:
            raise ValueError(f"{field} is set, but goes with dataset=folder only, not with {name}")
    listing = list_dataset(root, name)
    members = listing.choose(split)
    if listing.problems and broken == "error":
        raise ValueError(listing.problems[0])
    for line in (*listing.notes, *(f"skipped: {problem}" for problem in listing.problems)):
        print(line, file=sys.stderr)
    catalog = make_catalog(
        root, [(member.path, member.class_name if use_classes else None) for member in members], min_frames, broken
    )
    return Catalog(root, catalog.videos, catalog.class_names, (*listing.problems, *catalog.broken))


def list_dataset(root: Path, dataset: DataSetName) -> Listing:
    """Finds the videos of a named data set and their splits without opening them.

    Raises:
        ValueError: where the folder is missing or holds no video of the data set, saying what was looked for; or where
            a list of a split names a video that could be several.
    """
    assert dataset != "folder"
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = list(_videos_below(root))
    notes: list[str] = []
    if dataset == "faceforensics":
        genuine = [path for path in found if FORGED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
        if len(genuine) < len(found):
            notes.append(f"{root}: {len(found) - len(genuine)} altered videos and masks of {dataset} are left out")
        found = genuine
    found, twins = _without_twins(root, found)
    if twins:
        notes.append(f"{root}: {twins} videos are there as files and as frames; the files are taken")
    members, problems = [], []
    for path in found:
        class_name = class_of(path) if dataset in SETS_WITH_CLASSES else None
        if class_name is None and dataset in SETS_WITH_CLASSES:
            problems.append(str(VideoError(path, f"is not named as videos of {dataset} are; see docs/data.md")))
            continue
        members.append(Member(path, path.relative_to(root).as_posix(), class_name))
    if not members:
        entries = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
        held = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "") or "nothing"
        raise ValueError(f"{root}: holds no video of {dataset}; looked for {LAYOUTS[dataset]}; found {held}")
    splits = _find_splits(root, dataset, members, notes)
    return Listing(root, dataset, tuple(members), splits, tuple(notes), tuple(problems))


def guess_dataset(names: Iterable[str]) -> DataSetName | None:
    """The named data set that most videos are called like; None where they are like none.

    Args:
        names: paths of videos below a folder, with forward slashes.
    """
    paths = [PurePosixPath(name) for name in names]
    youtube = r"[\w-]{11}"
    patterns: dict[DataSetName, Callable[[PurePosixPath], object]] = {
        "ucf101": lambda path: re.fullmatch(r"v_[A-Za-z]+_g\d+_c\d+", _stem(path)),
        # `#` of the authors' script, `_` where frames were extracted with StyleGAN-V's.
        "taichi_hd": lambda path: re.fullmatch(rf"{youtube}[#_]\d{{6}}[#_]\d{{6}}", _stem(path)),
        "faceforensics": lambda path: re.fullmatch(rf"{youtube}_\d+_{youtube}_\d+", _stem(path)),
        "sky_timelapse": lambda path: (
            re.fullmatch(rf"{youtube}_\d+", path.name) and path.name.startswith(f"{path.parent.name}_")
        ),
    }
    for dataset, matches in patterns.items():
        if sum(bool(matches(path)) for path in paths) > len(paths) / 2:
            return dataset
    return None


def _videos_below(root: Path) -> Iterator[Path]:
    """As `find_videos`, but a picture beside the videos does not make a video of the whole folder."""
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from find_videos(entry)
        elif not entry.name.startswith(".") and entry.suffix.lower() in VIDEO_SUFFIXES:
            yield entry


def _stem(path: PurePosixPath | Path) -> str:
    """The name without the suffix of a video, which folders of frames may have as well; dots in names stay."""
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


def _without_twins(root: Path, found: Sequence[Path]) -> tuple[list[Path], int]:
    """Leaves out folders of frames of videos that are there as files, and says how many."""

    def key(path: Path) -> tuple[str, ...]:
        # Scripts that extract frames replace the # in names, which some shells take for a comment.
        folder_split = _split_folder(path.relative_to(root).parts[:-1])
        return folder_split or "", _stem(path).replace("#", "_").lower()

    files = {key(path) for path in found if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()}
    kept = [path for path in found if path.is_file() or key(path) not in files]
    return kept, len(found) - len(kept)


def _split_folder(parts: Iterable[str]) -> str | None:
    """The split of the first folder that is named after one."""
    return next((SPLIT_FOLDERS[part.lower()] for part in parts if part.lower() in SPLIT_FOLDERS), None)


def _find_splits(
    root: Path, dataset: DataSetName, members: Sequence[Member], notes: list[str]
) -> dict[str, frozenset[str]]:
    """The splits that the folder tells: UCF101's own lists, else names of folders, else lists of one split."""
    splits: dict[str, set[str]] = {}
    if dataset == "ucf101" and (lists := read_split_lists(root)):
        by_stem: dict[str, list[str]] = {}
        for member in members:
            by_stem.setdefault(_stem(member.path).lower(), []).append(member.name)
        for split, stems in lists.items():
            missing = [stem for stem in stems if stem not in by_stem]
            if missing:
                notes.append(f"{root}: {len(missing)} videos of the list of {split} are not there, as {missing[0]}")
            splits[split] = {name for stem in stems for name in by_stem.get(stem, ())}
        return {split: frozenset(names) for split, names in splits.items()}
    here = root.resolve()
    # A folder that is itself a split, or what a split's folder holds: .../sky_train, .../train/videos.
    own = _split_folder([here.name]) or (here.name in CONTENT_FOLDERS and _split_folder([here.parent.name])) or None
    for member in members:
        if told := _split_folder(PurePosixPath(member.name).parts[:-1]) or own:
            splits.setdefault(told, set()).add(member.name)
    if not splits:
        for file in sorted(root.glob("*_list.txt")):
            if match := LIST_NAME.fullmatch(file.name):
                splits.setdefault(match[1], set()).update(_read_list(file, members, notes))
    return {split: frozenset(splits[split]) for split in SPLITS[dataset] if split in splits}


def _read_list(file: Path, members: Sequence[Member], notes: list[str]) -> set[str]:
    """Names of the members that a list names: one a line, or a frame of one, perhaps with a label or count after it."""
    by_ending: dict[str, set[str]] = {}
    for member in members:
        parts = PurePosixPath(member.name).parts
        parts = (*parts[:-1], _stem(member.path))
        for first in range(len(parts)):
            by_ending.setdefault("/".join(parts[first:]), set()).add(member.name)
    names: set[str] = set()
    missing: list[str] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        entry = PurePosixPath(re.sub(r"([\s,]+\d+)+$", "", line.strip().replace("\\", "/")))
        if entry.suffix.lower() in FRAME_SUFFIXES:
            entry = entry.parent
        if not entry.name:
            continue
        matching = by_ending.get(entry.with_name(_stem(entry)).as_posix(), set())
        if len(matching) > 1:
            both = " and ".join(sorted(matching)[:2])
            raise ValueError(f"{file}: line {number} names {entry}, which could be {both}")
        names |= matching
        if not matching:
            missing.append(entry.as_posix())
    if missing:
        count = len(set(missing))
        notes.append(f"{file}: {count} of its videos are not in the folder, as {missing[0]}")
    if not names:
        raise ValueError(f"{file}: names no video that is in the folder; it begins with {''.join(lines[:1])!r}")
    return names
