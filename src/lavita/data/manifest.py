"""What a latent cache says of itself: `manifest.json`, and how it knows a source video again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lavita.video import FRAME_SUFFIXES

VERSION = 2
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache: how it was made, `videos` in the order of their data set, and `broken` ones.

    Raises:
        ValueError: for a folder that is no finished cache of this version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no finished latent cache there (no {MANIFEST}); run `lavita encode`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again") from error
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder}: a cache of version {manifest.get('version')}, this is {VERSION}; encode again")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest beside and renames it."""
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / MANIFEST)


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
