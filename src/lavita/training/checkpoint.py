"""Save and resume: a checkpoint is a folder, written beside and renamed, and checked when it is read.

`step-<step>/` holds torch's distributed checkpoint of the run's tensors, a file for each process that wrote some, and
`state.json` with everything else and the checksums of those files. Any number of processes, sharded or not, can read
what any other number wrote.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lavita.core.processes import Processes

VERSION = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")
_OLD_NAME = re.compile(r"step-\d+\.pt")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    last: int = 2
    """The newest ones."""
    every: int = 0
    """Those of steps that this divides; 0 for none."""
    best: bool = False
    """The one with the lowest `validation_loss` among its facts."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole."""

    folder: Path
    step: int
    facts: dict[str, Any]
    """What is no tensor: numbers, strings, and lists and dicts of them."""
    outlines: dict[str, torch.Tensor]
    """Its tensors by name, without values (on the meta device)."""

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, plain or sharded in any way, with those of the same names.

        Raises:
            ValueError: where the checkpoint has no such tensor, or one of another shape.
        """
        for name, tensor in tensors.items():
            outline = self.outlines.get(name)
            if outline is None or outline.shape != tensor.shape:
                found = "is not in it" if outline is None else f"has shape {tuple(outline.shape)}"
                raise ValueError(f"{self.folder}: {name} {found}, but must have {tuple(tensor.shape)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(tensors), storage_reader=_Reader(self.folder))

    def read_all(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All tensors, or those whose names begin with `prefix`, which is cut off, whole, on the CPU."""
        found = {
            name: torch.empty_like(o, device="cpu") for name, o in self.outlines.items() if name.startswith(prefix)
        }
        self.read(found)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    keep: Keep,
    team: Processes | None = None,
) -> Path:
    """Writes `step-<step>` in `folder` and deletes the checkpoints that `keep` does not name.

    All processes call it together; each writes its own share.

    Args:
        folder: made if missing.
        step: optimizer steps done.
        tensors: plain ones, the same everywhere, or sharded ones (DTensor).
        facts: what JSON can hold.
        keep: which stay; the one written always does.
        team: the processes.

    Returns:
        The checkpoint. It is complete or absent: a kill at any moment leaves the one before it.

    Raises:
        OSError: where the disk is full, say; what was begun is removed.
    """
    team = team or Processes()
    target = folder / f"step-{step:08d}"
    partial = target.with_name(f"{target.name}.partial")
    problem: OSError | None = None
    try:
        if team.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in [*folder.glob("step-*.partial"), *folder.glob("step-*.deleted")]:
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
    except OSError as error:
        problem = error
    _raise_together(problem, team)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), storage_writer=FileSystemWriter(partial))
        mine = {
            file.name: [file.stat().st_size, _checksum(file)]
            for file in sorted(partial.glob(f"__{team.rank}_*.distcp"))
        }
    except OSError as error:
        problem, mine = error, {}
    except Exception as error:  # what a process raised comes back from DCP wrapped in its own kinds
        problem, mine = _disk_error(error, partial), {}
    if (problem := next(filter(None, team.gather(problem)), None)) is None:
        files = {name: facts for share in team.gather(mine) for name, facts in share.items()}
        try:
            if team.is_first:
                if unseen := [name for name in files if not (partial / name).exists()]:
                    raise OSError(
                        errno.ENOENT,
                        "written by another process, but not seen by the first one: all of "
                        "them must share the run's folder",
                        str(partial / unseen[0]),
                    )
                files[".metadata"] = [(partial / ".metadata").stat().st_size, _checksum(partial / ".metadata")]
                state = {"version": VERSION, "step": step, "files": files, "facts": dict(facts)}
                with (partial / STATE).open("w") as stream:
                    json.dump(state, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                if target.exists():
                    _remove(target)  # a damaged one that this run resumed before
                partial.rename(target)
                _sync(folder)
                _remove_old(folder, target, keep)
        except OSError as error:
            problem = error
    if problem is not None and team.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    _raise_together(problem, team)
    return target


def load_last_checkpoint(folder: Path, team: Processes | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    A damaged one is named on the console and passed over for the one before it.

    Raises:
        ValueError: where there are checkpoints, and none can be read.
    """
    team = team or Processes()
    found: list[Path] = team.first_says(list_checkpoints(folder))
    for path in reversed(found):
        # All check a share of the files; all of them must be whole.
        problem = next(filter(None, team.gather(_damage(path, team))), None)
        if problem is None:
            state = json.loads((path / STATE).read_text())
            metadata = _Reader(path).read_metadata()
            outlines = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            return Checkpoint(path, state["step"], state["facts"], outlines)
        if team.is_first:
            print(f"{path}: damaged, trying the one before it ({problem})", file=sys.stderr)
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first.

    Raises:
        ValueError: where there are those of an earlier version only.
    """
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    if not found and any(_OLD_NAME.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder}: holds checkpoints of an earlier version, which cannot go on; use another run_dir")
    return found


class _Reader(FileSystemReader):
    """Torch's reader, whose index is a pickle: only the classes of an index are made from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("not the index of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in _INDEX_MODULES or (module, name) in plain or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


_INDEX_MODULES = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}


def _damage(path: Path, team: Processes) -> str | None:
    """What is wrong with this process's share of a checkpoint's files; None where nothing is."""
    try:
        state = json.loads((path / STATE).read_text())
        if state["version"] != VERSION:
            return f"version {state['version']}, not {VERSION}"
        for name, (size, checksum) in list(state["files"].items())[team.rank :: team.count]:
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if _checksum(path / name) != checksum:
                return f"{name} has changed"
        _Reader(path).read_metadata()
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _remove_old(folder: Path, newest: Path, keep: Keep) -> None:
    # A later one is damaged, as this run resumed before it: it must not count as one of those kept.
    past = [path for path in list_checkpoints(folder) if path <= newest]
    stay = set(past[-keep.last :])
    if keep.every:
        stay |= {path for path in past if _step(path) % keep.every == 0}
    if keep.best:
        losses = {path: loss for path in past if (loss := _validation_loss(path)) is not None}
        stay |= set(sorted(losses, key=lambda path: (losses[path], path))[:1])
    for path in past:
        if path not in stay:
            _remove(path)


def _validation_loss(path: Path) -> float | None:
    try:
        loss = json.loads((path / STATE).read_text())["facts"].get("validation_loss")
    except (OSError, ValueError, KeyError):
        return None
    return None if loss is None else float(loss)


def _remove(path: Path) -> None:
    """Deletes a folder; killed in between, no half of it looks like a checkpoint."""
    doomed = path.with_name(f"{path.name}.deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_together(problem: OSError | None, team: Processes) -> None:
    """Raises in every process what one of them met, so that none waits for the others."""
    for found in team.gather(problem):
        if found is not None:
            raise found


def _disk_error(error: Exception, partial: Path) -> OSError:
    """The system's error inside another one, or that one as such."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    full = "No space left" in str(error) or shutil.disk_usage(partial.parent).free < 1 << 20
    return OSError(
        errno.ENOSPC if full else errno.EIO, f"cannot be written ({' '.join(str(error).split())[:200]})", str(partial)
    )
