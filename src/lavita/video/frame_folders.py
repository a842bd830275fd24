"""Frame folders, folders of image files that stand for one video: which folders they are, and their pixels."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lavita.video.formats import (
    FRAME_SUFFIXES,
    MOST_PIXELS,
    VIDEO_SUFFIXES,
    Frames,
    PathLike,
    VideoError,
    check_same_size,
    composite_on_black,
)


@dataclass(frozen=True)
class VideoTree:
    """The videos below a folder, and the files that belong to none of them. Hidden files and folders do not count."""

    root: Path
    videos: tuple[Path, ...]
    """Video files and frame folders, sorted; the files of a folder come before its subfolders."""
    stray_images: int
    """Number of images that are not frames: their folder holds videos as well, in itself or in subfolders."""
    stray_example: str
    """Path of the first stray image below the root, with forward slashes; empty if there is none."""
    other_files: Mapping[str, int]
    """Number of files that are neither images nor videos, by suffix in lower case (empty for files without one)."""

    @property
    def note(self) -> str | None:
        """One line about the stray images; None if there are none."""
        if not self.stray_images:
            return None
        count, example = f"{self.stray_images:,}", self.stray_example
        return f"{self.root}: images next to videos are left out ({count}, such as {example})"


def find_videos(root: Path) -> VideoTree:
    """Finds every video below a folder.

    A folder of images is a video of its own, a frame folder, if there are no videos next to the images: neither video
    files, nor subfolders with video files or frame folders in them. Otherwise its images are stray ones.
    """
    folders: list[tuple[str, list[str], list[str], Counter[str]]] = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        videos, images, others = [], [], Counter[str]()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in VIDEO_SUFFIXES:
                videos.append(name)
            elif suffix in FRAME_SUFFIXES:
                images.append(name)
            else:
                others[suffix] += 1
        folders.append((folder, videos, images, others))
    holders: set[str] = set()  # folders with videos in their subfolders
    frame_folders: set[str] = set()
    for folder, videos, images, _ in reversed(folders):  # subfolders before the folders that hold them
        if images and not videos and folder not in holders:
            frame_folders.add(folder)
        if images or videos or folder in holders:
            holders.add(os.path.dirname(folder))
    found: list[Path] = []
    strays, example, other_files = 0, "", Counter[str]()
    for folder, videos, images, others in folders:
        other_files += others
        if folder in frame_folders:
            found.append(Path(folder))
            continue
        found += [Path(folder, name) for name in videos]
        if images:
            strays += len(images)
            example = example or Path(folder, images[0]).relative_to(root).as_posix()
    return VideoTree(root, tuple(found), strays, example, dict(sorted(other_files.items())))


def is_frame_folder(path: PathLike) -> bool:
    """Whether `path` is a folder of frames: a folder of images without videos next to them (see `find_videos`)."""
    path = Path(path)
    return path.is_dir() and find_videos(path).videos == (path,)


def list_images(path: PathLike) -> tuple[PathLike, tuple[str, ...]] | None:
    """The folder and the file names of a video's images, in natural order (`frame2` before `frame10`).

    Returns:
        For a folder, itself and its images; for an image, its folder and its name; None for any other file.

    Raises:
        VideoError: The folder holds no images.
    """
    if Path(path).is_dir():
        if not (names := _sorted_images(os.path.abspath(path), os.stat(path).st_mtime_ns)):
            raise VideoError(path, f"is a folder without frames ({', '.join(sorted(FRAME_SUFFIXES))})")
        return path, names
    if Path(path).suffix.lower() in FRAME_SUFFIXES:
        return Path(path).parent, (Path(path).name,)
    return None


@lru_cache(maxsize=4096)
def _sorted_images(folder: str, mtime_ns: int) -> tuple[str, ...]:
    def natural(name: str) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", name.casefold())
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

    with os.scandir(folder) as entries:
        names = [e.name for e in entries if Path(e.name).suffix.lower() in FRAME_SUFFIXES and e.is_file()]
    # Hidden files are left behind by other systems ("._frame1.png") or are being written.
    return tuple(sorted((name for name in names if not name.startswith(".")), key=natural))


def image_size(folder: PathLike, name: str) -> tuple[int, int]:
    """Height and width of an image in pixels, after rotation; reads its header only."""
    with _open_image(folder, name) as image:
        # EXIF orientations 5 to 8 swap the axes.
        return (image.height, image.width) if image.getexif().get(0x0112, 1) < 5 else image.size


@contextlib.contextmanager
def _open_image(folder: PathLike, name: str) -> Iterator[Image.Image]:
    path = os.path.join(folder, name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise VideoError(folder, f"frame {name} is not a file")
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width}x{image.height}"
                raise VideoError(folder, f"frame {name} is {size}; more than {MOST_PIXELS:,} pixels are not read")
            yield image
    except VideoError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(folder, f"frame {name} cannot be read: {error}") from error


def read_images(folder: PathLike, first_name: str, names: Sequence[str]) -> Iterator[Frames]:
    """Reads images of a frame folder.

    Args:
        folder: The folder.
        first_name: The first frame of the video, whose size all of them must have.
        names: The images to read.

    Yields:
        uint8 (H, W, 3), RGB.

    Raises:
        VideoError: An image is broken or has another size than the first one.
    """
    first = image_size(folder, first_name)
    for name in names:
        with _open_image(folder, name) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow clips instead of scaling
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                pixels = composite_on_black(np.asarray(image.convert("RGBA")))
            else:
                pixels = np.array(image.convert("RGB"))
        check_same_size(folder, f"frame {name}", (pixels.shape[0], pixels.shape[1]), first)
        yield pixels
