"""Sizes and SHA-256 digests of the contents of videos, by which caches and protocols recognize them.

The digests of a video file are its plain SHA-256. Frame folders have two digests, because each is stored on users'
disks: `source_digest` in latent caches, `content_hash` in the manifests and caches of evaluations.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from lavita.video.formats import FRAME_SUFFIXES


def source_bytes(path: Path) -> int:
    """Size in bytes of a video file or image, or of all images of a frame folder.

    Raises:
        OSError: if it is missing.
    """
    return sum(file.stat().st_size for file in _images(path)) if path.is_dir() else path.stat().st_size


def source_digest(path: Path) -> str:
    """SHA-256 of a video file or image, or of the names, sizes and contents of the images of a frame folder."""
    digest = hashlib.sha256()
    for file in _images(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            if file != path:
                head = f"{file.name}\0{os.fstat(stream.fileno()).st_size}\0"
                digest.update(head.encode("utf-8", "surrogateescape"))
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a video file, or of the names and digests of all files of a frame folder.

    A file is read again only if its size or time of modification changes.
    """
    if not path.is_dir():
        return file_hash(path)
    names_and_digests = [(file.name, file_hash(file)) for file in _visible_files(path)]
    return hashlib.sha256("".join(map(repr, names_and_digests)).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, which is read again only if its time or size has changed."""
    status = file.stat()
    return _digest_of_version(str(file.absolute()), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=65536)
def _digest_of_version(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _visible_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(e.name for e in entries if e.is_file()) if not name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    return [file for file in _visible_files(folder) if file.suffix.lower() in FRAME_SUFFIXES]
