"""Models of the Hugging Face hub: found in the local cache where the hub cannot be reached, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, get_token, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

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
    return ValueError(f"{source}: cannot load {what} ({why_refused(error) or ' '.join(str(error).split())[:200]})")


def download(source: str, what: str, patterns: Sequence[str]) -> Path:
    """Downloads files of a repository of the hub into the local cache, unless they are there.

    Args:
        source: hub id.
        what: what it is, for the message of an error.
        patterns: the files, such as `transformer/*`.

    Returns:
        The folder of the files.

    Raises:
        ValueError: if the repository cannot be read, or the download broke off.
    """
    options = hub_options(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns), **options))
    except Exception as error:  # each version of the library has its own kinds
        raise cannot_load(source, what, error, options) from error


def why_refused(error: Exception) -> str | None:
    """What an answer of the hub means for the user; None for other errors."""
    if isinstance(error, GatedRepoError):
        return "its owner has to give your account access first"
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    token = "a token is needed: set HF_TOKEN, or run `hf auth login`" if get_token() is None else "the token is wrong"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return token
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and you may not read it; for a private one, {token}"
    if status == 403:
        return "the token has no right to do that"
    return f"the hub answered {status}" if status >= 500 else None


def _is_reachable() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # each version of the library has its own kinds
        return False
    return True
