"""What a latent cache says of itself: `manifest.json`, and how it knows a source video again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
