"""Checkpoints: folders that are complete or absent, and that are checked when they are read.

`step-<step>/` holds torch's distributed checkpoint of the run's tensors, with a file for each process that wrote some,
and `state.json` with everything else and the checksums of those files. Any number of processes, sharded or not, can
read a checkpoint that any other number wrote.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lavita.core.files import inside, remove_partial, replacing, write_text
from lavita.core.processes import Processes
from lavita.core.seeds import DRAWS

VERSION = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept."""

    last: int = 2
    """Number of the newest ones."""
    every: int = 0
    """Checkpoints whose step is a multiple of this are kept as well; 0 for none."""
    best: bool = False
    """The checkpoint with the lowest `validation_loss` among its facts is kept as well."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have passed their checks."""

    folder: Path
    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """Everything that is not a tensor: numbers, strings, and lists and dicts of them."""
    outlines: dict[str, torch.Tensor]
    """The tensors by name, on the meta device: shapes and dtypes without values."""

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, plain or sharded in any way, with the values saved under their names.

        Raises:
            ValueError: if the checkpoint lacks one of the tensors, holds it in another shape, or cannot be read.
        """
        for name, tensor in tensors.items():
            outline = self.outlines.get(name)
            if outline is None or outline.shape != tensor.shape:
                found = "is not in it" if outline is None else f"has shape {tuple(outline.shape)}"
                raise ValueError(f"{self.folder}: {name} {found}, but must have {tuple(tensor.shape)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                load(dict(tensors), storage_reader=_Reader(self.folder))
            except (Exception, CheckpointException) as error:  # many kinds, for files that someone has changed
                cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
                why = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
                raise ValueError(f"{self.folder}: its tensors cannot be read ({why[:200]})") from error

    def read_all(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names: unsharded, on the CPU."""
        found = {
            name: torch.empty_like(outline, device="cpu")
            for name, outline in self.outlines.items()
            if name.startswith(prefix)
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

    All processes call this together; each writes its own share.

    Args:
        folder: made if missing.
        step: optimizer steps done.
        tensors: plain ones, equal in all processes, or sharded ones (DTensor).
        facts: values that JSON can hold.
        keep: which checkpoints are kept; the one written always is.
        team: the processes; by default one.

    Returns:
        The checkpoint. It is complete or absent: a kill at any moment leaves the one before it.

    Raises:
        OSError: if it cannot be written, for example because the disk is full; unfinished files are removed.
    """
    team = (team or Processes()).everyone
    target = folder / f"step-{step:08d}"
    with ExitStack() as replacement:
        partial: Path | None = None
        with _raised_everywhere(team):
            if team.is_first:
                remove_partial(folder)
                for left in folder.glob("step-*.deleted"):
                    shutil.rmtree(left, ignore_errors=True)
                partial = replacement.enter_context(replacing(target, durable=True))
                partial.mkdir()
        partial = Path(team.first_says(partial))
        own_files: dict[str, list[int]] = {}
        with _raised_everywhere(team):
            _save_tensors(tensors, partial)
            own_files = {file.name: _size_and_checksum(file) for file in partial.glob(f"__{team.rank}_*.distcp")}
        files = {name: facts for share in team.gather(own_files) for name, facts in sorted(share.items())}
        with _raised_everywhere(team):
            if team.is_first:
                if unseen := [name for name in files if not (partial / name).exists()]:
                    message = (
                        "written by another process, but the first one does not see it: all processes must share the "
                        "run's folder"
                    )
                    raise OSError(errno.ENOENT, message, str(partial / unseen[0]))
                files[".metadata"] = _size_and_checksum(partial / ".metadata")
                state = {"version": VERSION, "draws": DRAWS, "step": step, "files": files, "facts": dict(facts)}
                write_text(partial / STATE, json.dumps(state), durable=True)
                if target.exists():
                    _remove(target)  # a damaged one: this run resumed from one before it
                replacement.close()
                _remove_old(folder, target, keep)
    return target


def load_last_checkpoint(folder: Path, team: Processes | None = None) -> Checkpoint | None:
    """The newest checkpoint that passes its checks; None if the folder has no checkpoints.

    A damaged one is named on the console and skipped in favour of the one before it.

    Raises:
        ValueError: if there are checkpoints and none can be read, or the run would go on with other random numbers.
    """
    team = (team or Processes()).everyone
    found: list[Path] = team.first_says(list_checkpoints(folder))
    for path in reversed(found):
        # Each process checks its share of the files.
        problem = next(filter(None, team.gather(_damage(path, team))), None)
        if problem is None:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state.get("draws", 1) != DRAWS:
                raise ValueError(
                    f"{path}: is of a version that drew other clips or noise from the same seed, so that the run would "
                    "not go on as it began; finish it with that version, or use another run_dir"
                )
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
    """Checkpoints, oldest first; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


class _Reader(FileSystemReader):
    """Torch's reader; its index is a pickle, from which only the classes of an index are built."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("not the index of a checkpoint")
        for file in {info.relative_path for info in metadata.storage_data.values()}:
            inside(Path(self.path), file, follow_links=True)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        # Not all that these modules contain: a name may have dots, and `os.system` is in one of them.
        if name in _INDEX_CLASSES.get(module, ()) or (module, name) in plain or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")


_INDEX_CLASSES: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "StorageMeta", "MetadataIndex", "BytesStorageMetadata"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}


def _damage(path: Path, team: Processes) -> str | None:
    """What is wrong with this process's share of a checkpoint's files; None if they are intact."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            return f"version {state['version']}, not {VERSION}"
        if type(state["step"]) is not int or not isinstance(state["facts"], dict):
            return f"{STATE} has no number of steps, or no facts"
        for name, (size, checksum) in list(state["files"].items())[team.rank :: team.count]:
            if (found := inside(path, name, follow_links=True).stat().st_size) != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if _size_and_checksum(path / name)[1] != checksum:
                return f"{name} has changed"
        _Reader(path).read_metadata()
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _save_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes this process's share; any failure is an OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), storage_writer=FileSystemWriter(folder))
    except OSError:
        raise
    except (Exception, CheckpointException) as error:  # torch wraps the errors of the processes in kinds of its own
        raise _disk_error(error, folder) from error


def _size_and_checksum(file: Path) -> list[int]:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return [file.stat().st_size, value]


def _remove_old(folder: Path, newest: Path, keep: Keep) -> None:
    # Later ones are damaged, because this run resumed from one before them: they must not count as kept.
    past = [path for path in list_checkpoints(folder) if path <= newest]
    kept = set(past[-keep.last :])
    if keep.every:
        kept |= {path for path in past if _step(path) % keep.every == 0}
    if keep.best:
        losses = {path: loss for path in past if (loss := _validation_loss(path)) is not None}
        kept |= set(sorted(losses, key=lambda path: (losses[path], path))[:1])
    for path in past:
        if path not in kept:
            _remove(path)


def _validation_loss(path: Path) -> float | None:
    try:
        loss = json.loads((path / STATE).read_text(encoding="utf-8"))["facts"].get("validation_loss")
    except (OSError, ValueError, KeyError):
        return None
    return None if loss is None else float(loss)


def _remove(path: Path) -> None:
    """Deletes a checkpoint; it is renamed first, so that a kill leaves nothing that looks like one."""
    doomed = path.with_name(f"{path.name}.deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


@contextmanager
def _raised_everywhere(team: Processes) -> Iterator[None]:
    """Raises in every process the first OSError that one of them met within, so that none waits for the others."""
    problem: OSError | None = None
    try:
        yield
    except OSError as error:
        problem = error
    for found in team.gather(problem):
        if found is not None:
            raise found


def _disk_error(error: BaseException, partial: Path) -> OSError:
    """The operating system's error that caused another one, or an OSError that describes that one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    full = "No space left" in str(error) or shutil.disk_usage(partial.parent).free < 1 << 20
    return OSError(
        errno.ENOSPC if full else errno.EIO, f"cannot be written ({' '.join(str(error).split())[:200]})", str(partial)
    )
