"""Frame folders, folders of image files that stand for one video (`video.tree`): their names, sizes and pixels."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lavita.video.formats import (
    FRAME_SUFFIXES,
    MOST_PIXELS,
    Frames,
    PathLike,
    VideoError,
    check_same_size,
    composite_on_black,
)
from lavita.video.tree import is_content


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
        names = [e.name for e in entries if Path(e.name).suffix.lower() in FRAME_SUFFIXES and is_content(e)]
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
        # Pillow's own message has the whole path in it.
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise VideoError(folder, f"frame {name} cannot be read: {reason or error}") from error


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
