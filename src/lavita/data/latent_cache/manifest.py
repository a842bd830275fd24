"""The manifest of a latent cache: `manifest.json`, which is written last and makes the cache usable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavita.core.files import inside, write_text
from lavita.core.sizes import Bucket, parse_size

VERSION = 2
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished cache: its settings, `videos` in the order of their data set, and `broken`.

    Unless it was written before they were recorded, it also has the `LatentStatistics.fields`.

    Raises:
        ValueError: if the folder holds no finished cache of this version, or a name in its manifest leads out of it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: holds no finished latent cache (no {MANIFEST}); run `lavita encode`") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again") from error
    if isinstance(manifest, dict) and (version := manifest.get("version")) != VERSION:
        raise ValueError(
            f"{folder}: holds a cache of version {version}, this is {VERSION}; encode again, into another folder"
        )
    if not _is_whole(manifest):
        raise ValueError(f"{folder / MANIFEST}: damaged; run `lavita encode` again")
    for name in {name for row in manifest["videos"] for name in (row["name"], row["shard"])}:
        inside(folder, name, follow_links=True)
    return dict(manifest)


def _is_whole(manifest: Any) -> bool:
    """Whether a manifest has the fields that `encode.encode_dataset` writes, in their types."""
    if not isinstance(manifest, dict):
        return False
    lists = [manifest.get(key) for key in ("videos", "broken")]
    if manifest.get("fit") == "bucket":
        lists.append(buckets := manifest.get("buckets"))
        if not isinstance(buckets, list) or not all(map(_is_bucket, buckets)):
            return False
    elif not _is_size(manifest.get("resolution")):
        return False
    texts, numbers = ("name", "shard", "source_sha256"), ("num_frames", "source_bytes")
    return all(isinstance(each, list) for each in lists) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in texts)
        and all(type(row.get(key)) is int for key in numbers)
        and type(row.get("fps")) in (int, float)
        and _is_size(row.get("size", manifest.get("resolution")))
        and (row.get("class") is None or isinstance(row["class"], str))
        for row in manifest["videos"]
    )


def _is_size(value: Any) -> bool:
    try:
        parse_size(str(value))
    except ValueError:
        return False
    return True


def _is_bucket(value: Any) -> bool:
    try:
        Bucket.parse(str(value))
    except ValueError:
        return False
    return True


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a cache, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)
