"""Hashes that say whether files have changed."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from lavita.video.formats import FRAME_SUFFIXES


def source_bytes(path: Path) -> int:
    """Size of a video file or image, or of all frames of a folder; OSError where it is missing."""
    return path.stat().st_size if not path.is_dir() else sum(file.stat().st_size for file in _frames(path))


def source_digest(path: Path) -> str:
    """SHA-256 of a video file or image; of a folder of frames, that of their names, sizes and bytes."""
    digest = hashlib.sha256()
    for file in _frames(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            if file != path:
                digest.update(f"{file.name}\0{os.fstat(stream.fileno()).st_size}\0".encode())
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _frames(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return [folder / name for name in sorted(names) if Path(name).suffix.lower() in FRAME_SUFFIXES]


def content_hash(path: Path) -> str:
    """SHA-256 of a video file, or of the names and contents of a folder's frames."""
    if not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(repr((file.name, file_hash(file))).encode())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, which is read again only if its time or size has changed."""
    status = file.stat()
    return _file_hash(str(file.absolute()), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=65536)
def _file_hash(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
