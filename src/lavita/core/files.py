"""Files and folders that appear whole or not at all, and names from elsewhere that become paths.

A kill, a crash or a full disk leaves the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavita.core.text import printable

_MARK = ".partial-"
_MOST_BYTES = 180  # of 255, so that a suffix and the mark of a partial file fit
_HASHED = re.compile(r"--[0-9a-f]{12}$")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows, a file of this name is one


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a hidden path beside `path`; what was written there takes its place when the block ends without an error.

    Args:
        path: the file or folder to write; its parent folders are made. An existing file is replaced, an existing
            folder only if it is empty.
        durable: wait until a file is on the disk (`fsync`), so that a power failure cannot undo the replacement.

    Raises:
        FileExistsError: if `path` is a device, a pipe or a socket.

    Yields:
        A path with the same suffix that no other process uses. It is removed if the block raises.
    """
    path = _on_disk(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # with enough rights, /dev/null could be replaced
        raise FileExistsError(errno.EEXIST, "is neither a file nor a folder, and is not replaced", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}{_MARK}{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def inside(folder: Path, name: str, follow_links: bool = False) -> Path:
    """The path of `name` in `folder`. Every name from a model, a table, a manifest or a report becomes a path here.

    Args:
        folder: the folder; need not exist.
        name: a relative path with forward slashes.
        follow_links: let symbolic links lead out of the folder, for files that are only read.

    Returns:
        `folder / name`, which is below `folder`.

    Raises:
        ValueError: if the name is absolute, has `..` or a drive, or leads out of the folder through a link.
    """
    parts = name.replace("\\", "/").split("/")
    leaves = ".." in parts or "\0" in name or not parts[0] or parts[0].endswith(":")
    if leaves or (folder / name) == folder:
        raise ValueError(f"{folder}: the name {name!r} does not stay inside the folder")
    if not follow_links and not _resolved(folder / name).is_relative_to(_resolved(folder)):
        raise ValueError(f"{folder}: the name {name!r} leads out of the folder, through a link")
    return folder / name


def folded(name: str) -> str:
    """What some file systems take for the name: they ignore case, or how letters with accents are composed."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def is_plain_name(name: str) -> bool:
    """Whether a text can be the name of a file or a folder as it is, on every system, and is not a `hashed_name`."""
    return (
        bool(name)
        and name == name.strip(" .")
        and not any(letter in "/\\:" or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)
        and len(name.encode()) <= _MOST_BYTES
        and not _DEVICE.fullmatch(name)
        and not _HASHED.search(name)
    )


def hashed_name(text: str) -> str:
    """A name for any text, `<its words>--<12 hexadecimal digits>`: other texts have other names, in any case."""
    words = "-".join(re.findall(r"\w+", folded(text))).encode("utf-8", "ignore")[:80].decode("utf-8", "ignore")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{words.strip('-') or 'unnamed'}--{digest}"


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes UTF-8 text; see `replacing`. What UTF-8 lacks is written as `core.text.printable` shows it."""
    with replacing(path, durable) as partial:
        partial.write_text(printable(text), encoding="utf-8")


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Writes indented JSON; see `replacing`."""
    write_text(path, json.dumps(value, indent=1) + "\n", durable)


def _on_disk(path: Path) -> Path:
    """The path whose bytes are UTF-8 under any locale: as other programs wrote, and will look for, the same name."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        name = str(path).encode("utf-8", "surrogateescape")
        return Path(name.decode(sys.getfilesystemencoding(), "surrogateescape"))
    return path


def remove_partial(folder: Path, *stems: str) -> None:
    """Removes what a killed process left of files that it was writing into `folder`.

    Args:
        folder: the folder.
        stems: patterns, as for `glob`, of the names without suffix of the files that the caller alone writes; by
            default all, for a folder into which nobody else is writing.
    """
    for left in (left for stem in stems or ("*",) for left in folder.glob(f".{stem}{_MARK}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def check_outside(field: str, out: Path, *read: Path | None) -> None:
    """Refuses to write into a folder of videos that is read: what is written there would count as its content.

    Args:
        field: the option that says where to write, for the message.
        out: the file or folder to write.
        read: the folders that are read; None for none.

    Raises:
        ValueError: if `out` is one of these folders or inside one, by any path.
    """
    for folder in read:
        if folder is not None and (target := _resolved(folder)) in (resolved := _resolved(out), *resolved.parents):
            where = "the folder" if target == resolved else f"inside {folder}, the folder"
            raise ValueError(f"{field} is {out}, {where} of the videos that are read; write outside of it")


def _resolved(path: Path) -> Path:
    """The path without links; `Path.resolve` raises for links in a circle up to Python 3.12."""
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
