"""The manifest of a latent cache: `manifest.json`, which is written last and makes the cache usable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavita.core.files import write_text

VERSION = 2
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished cache: its settings, `videos` in the order of their data set, and `broken`.

    Unless it was written before they were recorded, it also has the `LatentStatistics.fields`.

    Raises:
        ValueError: if the folder holds no finished cache of this version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: holds no finished latent cache (no {MANIFEST}); run `lavita encode`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again") from error
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder}: holds a cache of version {manifest.get('version')}, this is {VERSION}; encode again"
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a cache, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)
