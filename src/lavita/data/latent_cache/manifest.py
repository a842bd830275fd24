"""The manifest of a latent cache: `manifest.json`, which is written last and makes the cache usable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavita.core.files import inside, write_text

VERSION = 2
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished cache: its settings, `videos` in the order of their data set, and `broken`.

    Raises:
        ValueError: if the folder holds no finished cache of this version, or a name in its manifest leads out of it.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest.get("version")
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: holds no finished latent cache (no {MANIFEST}); run `lavita encode`") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again") from error
    if version != VERSION:
        raise ValueError(f"{folder}: holds a cache of version {version}, this is {VERSION}; encode again")
    try:
        names = {name for row in manifest["videos"] for name in (row["name"], row["shard"])}
        for name in names:
            inside(folder, name, follow_links=True)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again") from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a cache, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)
