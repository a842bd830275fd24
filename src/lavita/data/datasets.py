"""The paper's data sets: which videos below a folder belong to them, their splits and their classes.

Each is read in the layout that its authors publish, and as frame folders, the layout of the public code's copies.
docs/data.md shows the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from lavita.core.config import ConfigError
from lavita.core.names import DataSetName
from lavita.core.progress import say
from lavita.core.text import normal_name, read_text
from lavita.data.catalog import Catalog, make_catalog, scan
from lavita.data.config import SETS_WITH_CLASSES, SPLITS, check_split
from lavita.data.ucf101 import class_of, read_split_lists
from lavita.video.formats import FRAME_SUFFIXES, VIDEO_SUFFIXES
from lavita.video.tree import VideoTree, find_videos

SPLIT_FOLDERS = {"train": "train", "val": "val", "test": "test", "sky_train": "train", "sky_test": "test"}
# Folders below the folder of a split that hold its videos in some form.
CONTENT_FOLDERS = frozenset({"videos", "images", "frames", "original"})
# FaceForensics and FaceForensics++ come with forged copies of their videos and masks of the faces.
FORGED_FOLDERS = frozenset({"altered", "mask", "manipulated_sequences"})
LIST_NAME = re.compile(r"(train|val|test)(_\w+)?_list\.txt")

# For the message if no video is found.
LAYOUTS: Mapping[DataSetName, str] = {
    "faceforensics": "train/original/*.avi, train/videos/*.mp4, or frame folders such as train/<video>/000001.jpg",
    "sky_timelapse": "sky_train/<video>/<clip>/*.jpg",
    "ucf101": "UCF-101/<Class>/v_<Class>_g01_c01.avi, or frame folders such as v_<Class>_g01_c01/000001.jpg",
    "taichi_hd": "train/<youtube id>#<start>#<end>.mp4, or frame folders of that name",
}
# For the message if a split is not found.
SPLIT_SOURCES: Mapping[DataSetName, str] = {
    "faceforensics": "folders train, val and test, or train_list.txt",
    "sky_timelapse": "folders sky_train and sky_test, or train_list.txt",
    "ucf101": "ucfTrainTestlist/trainlist01.txt in or next to the folder, folders train and test, or train_list.txt",
    "taichi_hd": "folders train and test, or train_list.txt",
}


@dataclass(frozen=True)
class Member:
    """A video of a data set, before it is opened."""

    path: Path
    name: str
    """Path below the data set's folder, with forward slashes."""
    class_name: str | None


@dataclass(frozen=True)
class Listing:
    """The videos and splits of a data set below a folder."""

    root: Path
    dataset: DataSetName
    members: tuple[Member, ...]
    splits: Mapping[str, frozenset[str]]
    """Names of the members of each split that the folder defines, without `all`."""
    tree: VideoTree
    """Everything that was found below the folder."""
    notes: tuple[str, ...]
    """What was left out, one line for each reason."""
    problems: tuple[str, ...]
    """One message per video whose name does not fit the data set; each begins with the video's name."""

    def choose(self, split: str | None = None) -> tuple[Member, ...]:
        """Returns the members of a split, by default the one that the paper trains on.

        Raises:
            ValueError: if the data set has no such split, or if the folder does not define it.
        """
        split = SPLITS[self.dataset][0] if split is None else split
        check_split(self.dataset, split)
        if split == "all":
            return self.members
        names = self.splits.get(split)
        if not names:
            found = ", ".join(f"{name} ({len(those)})" for name, those in self.splits.items()) or "no split"
            raise ValueError(
                f"{self.root}: does not show which of its {len(self.members)} videos are in split {split!r} of "
                f"{self.dataset}: looked for {SPLIT_SOURCES[self.dataset]}; found {found}; split=all takes every video"
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
    """Catalogs a data set. The names in the catalog are paths below `root` in every layout.

    Args:
        root: the folder of the data set.
        name: `folder` for any tree of videos, or one of the paper's data sets.
        split: part of a named data set; by default what the paper trains on, `train`, or `all` for UCF101.
        class_folders: see `catalog.scan`; only with `folder`.
        min_frames: shorter videos count as broken.
        broken: `skip` reports broken videos on stderr and leaves them out; `error` raises at the first.
        images: catalog image files instead of videos; only with `folder`.
        use_classes: whether the videos of a named data set get their classes.

    Raises:
        ValueError: for the reasons of `catalog.scan`, if the folder does not have the layout of the data set or does
            not define the split, or if options do not go together.
    """
    if name not in SPLITS:
        raise ConfigError(f"dataset is {name!r}; allowed: {', '.join(SPLITS)}")
    if name == "folder":
        if split is not None:
            check_split(name, split)
        return scan(root, class_folders, min_frames, broken, images)
    for field, value in (("class_folders", class_folders), ("images", images)):
        if value:
            raise ValueError(f"{field} is set, but works only with dataset=folder, not with {name}")
    listing = list_dataset(root, name)
    members = listing.choose(split)
    if listing.problems and broken == "error":
        raise ValueError(f"{root}: {listing.problems[0]}")
    lines = [*listing.tree.notes, *listing.notes, *(f"skipped: {problem}" for problem in listing.problems)]
    if len(members) < len(listing.members):
        own = split or SPLITS[name][0]
        lines.append(f"{root}: {len(members):,} of {len(listing.members):,} videos are in split {own!r}")
    for line in lines:
        say(line)
    catalog = make_catalog(
        root, [(member.path, member.class_name if use_classes else None) for member in members], min_frames, broken
    )
    return Catalog(root, catalog.videos, catalog.class_names, (*listing.problems, *catalog.broken))


def list_dataset(root: Path, dataset: DataSetName) -> Listing:
    """Finds the videos of a named data set and their splits without opening them.

    Raises:
        ValueError: if the folder is missing or holds no video of the data set, or if an entry in the list of a split
            fits several videos.
    """
    assert dataset != "folder"
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    tree = find_videos(root)
    # Sorted by the name directly below the root, as in all catalogs so far: the order decides which clips are drawn.
    found = sorted((path for path in tree.videos if path != root), key=lambda path: path.relative_to(root).parts[0])
    notes: list[str] = []
    if dataset == "faceforensics":
        genuine = [path for path in found if FORGED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
        if len(genuine) < len(found):
            notes.append(f"{root}: {len(found) - len(genuine)} altered videos and masks of {dataset} are left out")
        found = genuine
    found, twins = _without_twins(root, found)
    if twins:
        notes.append(f"{root}: {twins} videos exist both as files and as frames; the files are used")
    members, problems = [], []
    for path in found:
        name = path.relative_to(root).as_posix()
        class_name = class_of(path) if dataset in SETS_WITH_CLASSES else None
        if class_name is None and dataset in SETS_WITH_CLASSES:
            problems.append(f"{name}: is not named like the videos of {dataset}; see docs/data.md")
            continue
        members.append(Member(path, name, class_name))
    if not members:
        entries = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
        held = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "") or "nothing"
        raise ValueError(f"{root}: holds no video of {dataset}; looked for {LAYOUTS[dataset]}; found {held}")
    splits = _find_splits(root, dataset, members, notes)
    return Listing(root, dataset, tuple(members), splits, tree, tuple(notes), tuple(problems))


def guess_dataset(names: Iterable[str]) -> DataSetName | None:
    """Guesses a data set by the names of most videos; None if they fit no data set.

    Args:
        names: paths of videos below a folder, with forward slashes.
    """
    paths = [PurePosixPath(name) for name in names]
    youtube = r"[\w-]{11}"
    patterns: dict[DataSetName, Callable[[PurePosixPath], object]] = {
        "ucf101": lambda path: re.fullmatch(r"v_[A-Za-z]+_g\d+_c\d+", _stem(path)),
        # `#` in the names of the authors' script, `_` if frames were extracted with the script of StyleGAN-V.
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


def _stem(path: PurePosixPath | Path) -> str:
    """The name without the suffix of a video, which frame folders may have as well; other dots stay."""
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


def _without_twins(root: Path, found: Sequence[Path]) -> tuple[list[Path], int]:
    """Leaves out the frame folders of videos that are there as files, and counts them."""

    def key(path: Path) -> tuple[str, ...]:
        # Scripts that extract frames replace the # in names, which starts a comment in some shells.
        folder_split = _split_folder(path.relative_to(root).parts[:-1])
        return folder_split or "", normal_name(_stem(path)).replace("#", "_").lower()

    files = {key(path) for path in found if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()}
    kept = [path for path in found if path.is_file() or key(path) not in files]
    return kept, len(found) - len(kept)


def _split_folder(parts: Iterable[str]) -> str | None:
    """The split of the first folder that is named after a split."""
    return next((SPLIT_FOLDERS[part.lower()] for part in parts if part.lower() in SPLIT_FOLDERS), None)


def _find_splits(
    root: Path, dataset: DataSetName, members: Sequence[Member], notes: list[str]
) -> dict[str, frozenset[str]]:
    """Finds the splits: from UCF101's own lists, else from names of folders, else from lists of one split."""
    splits: dict[str, set[str]] = {}
    if dataset == "ucf101" and (lists := read_split_lists(root)):
        by_stem: dict[str, list[str]] = {}
        for member in members:
            by_stem.setdefault(normal_name(_stem(member.path)).lower(), []).append(member.name)
        for split, stems in lists.items():
            missing = [stem for stem in stems if stem not in by_stem]
            if missing:
                notes.append(f"{root}: {len(missing)} videos in the list of {split} are missing, such as {missing[0]}")
            splits[split] = {name for stem in stems for name in by_stem.get(stem, ())}
        return {split: frozenset(names) for split, names in splits.items()}
    here = root.resolve()
    # The folder may be a split itself, or a content folder of a split: .../sky_train, .../train/videos.
    own = _split_folder([here.name]) or (here.name in CONTENT_FOLDERS and _split_folder([here.parent.name])) or None
    for member in members:
        if found := _split_folder(PurePosixPath(member.name).parts[:-1]) or own:
            splits.setdefault(found, set()).add(member.name)
    if not splits:
        for file in sorted(root.glob("*_list.txt")):
            if match := LIST_NAME.fullmatch(file.name):
                splits.setdefault(match[1], set()).update(_read_list(file, members, notes))
    return {split: frozenset(splits[split]) for split in SPLITS[dataset] if split in splits}


def _read_list(file: Path, members: Sequence[Member], notes: list[str]) -> set[str]:
    """Reads a list of a split: one video or one frame of a video per line, optionally with a label or a count."""
    by_ending: dict[str, set[str]] = {}
    for member in members:
        parts = PurePosixPath(member.name).parts
        parts = (*parts[:-1], _stem(member.path))
        for first in range(len(parts)):
            by_ending.setdefault(normal_name("/".join(parts[first:])), set()).add(member.name)
    names: set[str] = set()
    missing: list[str] = []
    try:
        lines = read_text(file).split("\n")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        text = normal_name(line.strip().replace("\\", "/"))
        if not text:
            continue
        # A number at the end is a label or a count, or else the end of a name: "clip 7" may be the video clip 7.mp4.
        entries = {_listed_video(text), _listed_video(re.sub(r"([\s,]+\d+)+$", "", text))}
        matching = set().union(*(by_ending.get(entry, set()) for entry in entries))
        if len(matching) > 1:
            both = " and ".join(sorted(matching)[:2])
            raise ValueError(f"{file}: line {number} is {text}, which could be {both}")
        names |= matching
        if not matching:
            missing.append(min(entries, key=len) or text)
    if missing:
        count = len(set(missing))
        notes.append(f"{file}: {count} of its videos are not in the folder, such as {missing[0]}")
    if not names:
        raise ValueError(f"{file}: lists no video that is in the folder; it begins with {''.join(lines[:1])!r}")
    return names


def _listed_video(text: str) -> str:
    """The path of the video, without suffix, that a line in the list of a split names by itself or by a frame."""
    path = PurePosixPath(text)
    if path.suffix.lower() in FRAME_SUFFIXES:
        path = path.parent
    return path.with_name(_stem(path)).as_posix() if path.name else ""
