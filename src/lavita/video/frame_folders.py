"""Folders of image files that stand for a video."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lavita.video.formats import FRAME_SUFFIXES, Frames, PathLike, VideoError, _check_shape, _on_black


def is_frame_folder(path: PathLike) -> bool:
    """Whether `path` is a folder that directly holds images with a suffix of `FRAME_SUFFIXES`."""
    return Path(path).is_dir() and bool(_list_frames(path))


def _images(path: PathLike) -> tuple[PathLike, tuple[str, ...]] | None:
    """The folder and the files' names of a folder of frames, or of a lone image; None for a video file."""
    if Path(path).is_dir():
        return path, _frame_names(path)
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
    # Hidden files are what other systems leave behind ("._frame1.png"), or are being written.
    return tuple(sorted((name for name in names if not name.startswith(".")), key=natural))


def _list_frames(folder: PathLike) -> tuple[str, ...]:
    return _sorted_images(os.path.abspath(folder), os.stat(folder).st_mtime_ns)


def _frame_names(folder: PathLike) -> tuple[str, ...]:
    if not (names := _list_frames(folder)):
        raise VideoError(folder, f"is a folder without frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    return names


def _image_shape(folder: PathLike, name: str) -> tuple[int, int]:
    with _open_image(folder, name) as image:
        # EXIF orientations 5 to 8 swap the axes.
        return (image.height, image.width) if image.getexif().get(0x0112, 1) < 5 else image.size


@contextlib.contextmanager
def _open_image(folder: PathLike, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(os.path.join(folder, name)) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(folder, f"frame {name} cannot be read: {error}") from error


def _read_images(folder: PathLike, first_name: str, names: Sequence[str]) -> Iterator[Frames]:
    first = _image_shape(folder, first_name)
    for name in names:
        with _open_image(folder, name) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow clips instead of scaling
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                pixels = _on_black(np.asarray(image.convert("RGBA")))
            else:
                pixels = np.array(image.convert("RGB"))
        _check_shape(folder, f"frame {name}", (pixels.shape[0], pixels.shape[1]), first)
        yield pixels
