"""Models of the Hugging Face hub: found in the local cache where the hub cannot be reached, without waiting for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

_TIMEOUT = 5.0  # seconds


def hub_options(source: str) -> dict[str, Any]:
    """Options for `from_pretrained`: whether to look for a hub id in the local cache only.

    The hub is asked once whether it is there. Otherwise each file that is looked for would be asked for six times, and
    a failure would be reported as a file that the model lacks.

    Args:
        source: a folder or a hub id.
    """
    return {} if Path(source).exists() or _is_reachable() else {"local_files_only": True}


def cannot_load(source: str, what: str, error: Exception, options: dict[str, Any]) -> ValueError:
    """The error for a model that could not be loaded, on one line.

    Args:
        source: the folder or hub id.
        what: what was to be loaded, for example `a pipeline`.
        error: the library's error.
        options: the `hub_options` that it was loaded with.
    """
    if options.get("local_files_only"):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return ValueError(
            f"{source}: cannot load {what}: there is no such folder, {why}, and the cache of downloads in "
            f"{constants.HF_HUB_CACHE} lacks it; give a folder, or download it first"
        )
    return ValueError(f"{source}: cannot load {what} ({' '.join(str(error).split())[:200]})")


def _is_reachable() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # each version of the library has its own kinds
        return False
    return True
