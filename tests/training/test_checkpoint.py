"""Checkpoints: what is kept, and what kills, full disks and damage leave."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, Run

from lavita.core import files
from lavita.core.seeds import DRAWS
from lavita.training import checkpoint
from lavita.training.checkpoint import Checkpoint, Keep, list_checkpoints, load_last_checkpoint, save_checkpoint
from lavita.training.ema import EMA
from lavita.training.state import restore_training, training_tensors
from lavita.training.train import train


def save(folder: Path, step: int, keep: Keep | None = None, **facts: Any) -> Path:
    tensors = {"weight": torch.full((100,), float(step)), "count": torch.tensor(step)}
    return save_checkpoint(folder, step, tensors, {"name": "x", **facts}, keep or Keep(2))


def last(folder: Path) -> Checkpoint:
    loaded = load_last_checkpoint(folder)
    assert loaded is not None
    return loaded


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


def truncate(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def lose_the_index(path: Path) -> None:
    (path / ".metadata").unlink()


def cut_the_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text()[:50])


def another_version(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": 99}))


def state_of_other_types(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "step": None, "facts": []}))


DAMAGES = (truncate, flip_a_bit, lose_the_index, cut_the_state, another_version, state_of_other_types)


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "checkpoints"
    assert load_last_checkpoint(folder) is None
    assert list_checkpoints(folder) == []
    losses = [0.1, 1 / 3, 1e-30]
    tensors = {
        "a.b": torch.randn(3, 5),
        "half": torch.randn(4).half(),
        "scalar": torch.tensor(2.5),
        "numbers": torch.arange(4),
    }
    path = save_checkpoint(folder, 7, tensors, {"losses": losses, "config": {"x": None}}, Keep(1))
    assert path == folder / "step-00000007"
    loaded = last(folder)
    assert (loaded.step, loaded.facts) == (7, {"losses": losses, "config": {"x": None}})
    read = loaded.read_all()
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with pytest.raises(ValueError, match=r"step-00000007: a\.b has shape \(3, 5\), but must have \(5, 3\)"):
        loaded.read({"a.b": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match=r"step-00000007: c is not in it, but must have \(2,\)"):
        loaded.read({"c": torch.zeros(2)})


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 200, 1000):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [200, 1000]
    save(tmp_path, 1000)
    assert steps_in(tmp_path) == [200, 1000], "the same step again replaces it"


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, Keep(1, every=30))
    assert steps_in(tmp_path) == [30, 60, 70]


def test_the_best_one_is_kept(tmp_path: Path) -> None:
    for step, loss in ((10, 0.5), (20, 0.2), (30, 0.3), (40, None), (50, 0.25)):
        save(tmp_path, step, Keep(1, best=True), validation_loss=loss)
    assert steps_in(tmp_path) == [20, 50]
    save(tmp_path, 60, Keep(1, best=True), validation_loss=0.1)
    assert steps_in(tmp_path) == [60]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    for step in (10, 20):
        newest = save(tmp_path, step)
    damage(newest)
    loaded = last(tmp_path)
    assert loaded.step == 10 and loaded.read_all()["count"] == 10
    assert "step-00000020: damaged, trying the one before it" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_one_does_not_push_out_what_is_saved_after(tmp_path: Path, keep: int) -> None:
    for step in (10, 20):
        newest = save(tmp_path, step)
    truncate(newest)
    save(tmp_path, 15, Keep(keep))
    assert 15 in steps_in(tmp_path)
    assert last(tmp_path).step == 15
    save(tmp_path, 20, Keep(keep))
    assert last(tmp_path).step == 20


def test_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(save(tmp_path, step))
    with pytest.raises(ValueError, match="none of its 2 checkpoints can be read"):
        load_last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("module", "moment", "left"),
    [
        (checkpoint, "save", 10),
        (checkpoint, "_size_and_checksum", 10),
        (checkpoint, "write_text", 10),
        (files, "sync", 10),
        (checkpoint, "_remove_old", 20),
    ],
)
def test_a_kill_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, moment: str, left: int
) -> None:
    save(tmp_path, 10, Keep(1))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 20, Keep(1))
    found = last(tmp_path)
    assert found.step == left and found.read_all()["count"] == left
    save(tmp_path, 20, Keep(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_a_kill_while_deleting_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, Keep(1))

    def killed(path: Path, **_: Any) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 20, Keep(1))
    assert steps_in(tmp_path) == [20]
    save(tmp_path, 30, Keep(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, Keep(1))

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("writing failed") from OSError(errno.ENOSPC, "No space left on device", "some file")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 20, Keep(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "step-best").mkdir()
    for step in (1, 2):
        save(tmp_path, step, Keep(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000002", "step-best"]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the trap has been run",)


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function of a module; the name may lead from module to module, as `os.mkdir`."""

    def text(word: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()

    function = text(module) + text(name) + pickle.STACK_GLOBAL
    return pickle.PROTO + b"\x04" + function + text(argument) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def write_index(path: Path, index: bytes) -> None:
    """Replaces the index of a checkpoint, and its checksum."""
    (path / ".metadata").write_bytes(index)
    state = json.loads((path / "state.json").read_text())
    state["files"][".metadata"] = checkpoint._size_and_checksum(path / ".metadata")
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["os.mkdir", "FileSystemWriter", "FileSystem.mkdir"])
def test_an_index_calls_no_function_by_way_of_its_own_modules(tmp_path: Path, name: str) -> None:
    module = "torch.distributed.checkpoint.filesystem"
    write_index(save(tmp_path, 1), call(module, name, str(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="none of its 1 checkpoints"):
        load_last_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(call(module, "os.mkdir", str(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # it is a trap


@pytest.mark.parametrize("name", ["../../outside", "/dev/zero"])
def test_files_of_a_checkpoint_are_in_its_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside").touch()
    path = save(tmp_path / "checkpoints", 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "files": {name: [0, 0], **state["files"]}}))
    with pytest.raises(ValueError, match="none of its 1 checkpoints"):
        load_last_checkpoint(tmp_path / "checkpoints")
    assert f"the name {name!r} does not stay inside the folder" in capsys.readouterr().err


def test_the_index_names_files_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "checkpoints", 1)
    (file,) = path.glob("*.distcp")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    index = pickle.loads((path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../../{file.name}"
    write_index(path, pickle.dumps(index))
    with pytest.raises(ValueError, match="none of its 1 checkpoints"):
        load_last_checkpoint(tmp_path / "checkpoints")
    assert "does not stay inside the folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", [Trap(), {"a": Trap()}, {"a": 1}])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    write_index(save(tmp_path, 1), pickle.dumps(content))
    with pytest.raises(ValueError, match="none of its 1 checkpoints"):
        load_last_checkpoint(tmp_path)
    assert "the trap" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"", b"no tensors"], ids=["code", "empty", "text"])
def test_tensors_that_pass_the_checksum_and_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = save(tmp_path, 1)
    (file,) = path.glob("*.distcp")
    file.write_bytes(content)
    state = json.loads((path / "state.json").read_text())
    state["files"][file.name] = checkpoint._size_and_checksum(file)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step-00000001: its tensors cannot be read \("):
        last(tmp_path).read_all()
    assert "the trap" not in capsys.readouterr().out


def test_a_whole_run_comes_back(tmp_path: Path) -> None:
    """Weights, averages and moments are restored to the bit into a model that has been trained differently since."""

    def make(seed: int) -> tuple[torch.nn.Module, EMA, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        return model, EMA(model, 0.9), [torch.optim.AdamW(model.parameters(), fused=True)]

    def use(model: torch.nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
        for step in steps:
            model(torch.full((1, 4), float(step))).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.update(step)

    one, other = make(0), make(1)
    use(*one, range(1, 4))
    save_checkpoint(tmp_path, 3, training_tensors(*one), {}, Keep())
    use(*one, range(4, 6))
    use(*other, range(50, 53))
    restore_training(last(tmp_path), *other)
    use(*other, range(4, 6))
    expected, found = training_tensors(*one), training_tensors(*other)
    assert expected.keys() == found.keys() and any(key.startswith("optimizer.0.weight.exp_avg") for key in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("draws", [None, 1, 3])
def test_a_run_does_not_go_on_with_other_random_numbers(
    draws: int | None, make_config: MakeConfig, run: Run, tmp_path: Path
) -> None:
    """Checkpoints from before the version was recorded are of version 1."""
    config = make_config("run", "train.steps=1")
    train(config)
    state = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.json"
    facts = json.loads(state.read_text())
    assert facts.pop("draws") == DRAWS
    state.write_text(json.dumps(facts if draws is None else {**facts, "draws": draws}))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, _, error = run("train", "--config", str(tmp_path / "run" / "config.yaml"), "train.steps=2")
    assert code == 2 and len(error.splitlines()) == 1
    assert "drew other clips or noise from the same seed" in error and "use another run_dir" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
