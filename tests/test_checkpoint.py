"""Checkpoints survive kills and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lavita import checkpoint
from lavita.checkpoint import list_checkpoints, load_last_checkpoint, save_checkpoint


def state_of(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((100,), float(step))}, "step": step, "sizes": [1, 2], "name": "x"}


def steps_in(folder: Path) -> list[int]:
    return [int(file.stem.removeprefix("step-")) for file in list_checkpoints(folder)]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "checkpoints"
    assert load_last_checkpoint(folder) is None
    assert list_checkpoints(folder) == []
    file = save_checkpoint(folder, 7, state_of(7), keep=1)
    assert file == folder / "step-00000007.pt"
    loaded = load_last_checkpoint(folder)
    assert loaded is not None
    step, state = loaded
    assert step == 7
    assert torch.equal(state.pop("model")["weight"], torch.full((100,), 7.0))
    assert state == {"step": 7, "sizes": [1, 2], "name": "x"}


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 200, 1000):
        save_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert steps_in(tmp_path) == [200, 1000]
    save_checkpoint(tmp_path, 1000, state_of(1000), keep=2)
    assert steps_in(tmp_path) == [200, 1000], "the same step again replaces its file"


def test_a_truncated_file_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, state_of(step), keep=2)
    truncate(newest)
    loaded = load_last_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == loaded[1]["step"] == 10
    assert "step-00000020.pt: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_file_does_not_push_out_what_is_saved_after(tmp_path: Path, keep: int) -> None:
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, state_of(step), keep=2)
    truncate(newest)
    save_checkpoint(tmp_path, 15, state_of(15), keep=keep)
    assert 15 in steps_in(tmp_path)
    loaded = load_last_checkpoint(tmp_path)
    assert loaded is not None and loaded[0] == 15


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(save_checkpoint(tmp_path, step, state_of(step), keep=2))
    with pytest.raises(ValueError, match="none of its 2 checkpoints can be read"):
        load_last_checkpoint(tmp_path)


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 10, state_of(10), keep=1)

    def half_written(state: dict[str, Any], stream: Any) -> None:
        stream.write(b"PK half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", half_written)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 20, state_of(20), keep=1)
    loaded = load_last_checkpoint(tmp_path)
    assert loaded is not None and loaded[0] == 10
    save_checkpoint(tmp_path, 20, state_of(20), keep=1)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000020.pt"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-best.pt").write_text("mine")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state_of(step), keep=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "step-00000002.pt", "step-best.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"callable": print}, tmp_path / "step-00000001.pt")
    with pytest.raises(ValueError, match="none of its 1 checkpoints"):
        load_last_checkpoint(tmp_path)
