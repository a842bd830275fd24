"""The demo data set: reproducible play, separate splits, enough motion, renders that go on."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavita.demo import games as demo

pytest.importorskip("ale_py")


def test_there_are_eight_games_of_distinct_names() -> None:
    assert len({game.name for game in demo.GAMES}) == len(demo.GAMES) == 8


@pytest.mark.parametrize("game", demo.GAMES, ids=lambda game: game.name)
def test_an_episode_moves_in_every_window_and_never_flashes(game: demo.Game) -> None:
    frames = demo.render_episode(game, seed=3, num_frames=32)

    assert frames.shape == (32, 64, 64, 3)
    assert frames.dtype == np.uint8
    motion = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    windows = np.lib.stride_tricks.sliding_window_view(motion, 15).mean(axis=1)
    assert windows.min() >= game.min_motion >= 1.0
    assert motion.max() <= game.max_jump


def test_the_seed_decides_the_episode() -> None:
    game = demo.GAMES[0]
    first = demo.render_episode(game, seed=1, num_frames=24)

    np.testing.assert_array_equal(first, demo.render_episode(game, seed=1, num_frames=24))
    assert not np.array_equal(first, demo.render_episode(game, seed=2, num_frames=24))


def test_a_render_splits_resumes_and_refuses_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GAMES", demo.GAMES[:2])
    calls: list[tuple[int, int]] = []
    demo.render_dataset(tmp_path, 1, 1, num_frames=16, progress=lambda *done: calls.append(done))

    files = sorted(tmp_path.glob("*/*/*.mp4"))
    names = {f"{split}/{game.name}/000.mp4" for split in demo.SPLITS for game in demo.GAMES}
    assert {path.relative_to(tmp_path).as_posix() for path in files} == names
    assert calls == [(done, 4) for done in range(5)]
    for game in demo.GAMES:
        train, heldout = (tmp_path / split / game.name / "000.mp4" for split in demo.SPLITS)
        assert train.read_bytes() != heldout.read_bytes()

    contents = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    calls.clear()
    demo.render_dataset(tmp_path, 1, 1, num_frames=16, progress=lambda *done: calls.append(done))
    assert calls == [(3, 4), (4, 4)]
    assert files[1].read_bytes() == contents[files[1]]
    assert all(path.stat().st_mtime_ns == times[path] for path in files if path != files[1])

    with pytest.raises(demo.DemoDataError, match="choose another folder"):
        demo.render_dataset(tmp_path, 1, 1, num_frames=17)


@pytest.mark.parametrize(
    ("name", "value"), [("train_episodes", -1), ("heldout_episodes", -1), ("num_frames", 0), ("seed", -1)]
)
def test_a_number_out_of_range_is_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(demo.DemoDataError, match=f"{name} is {value}"):
        demo.render_dataset(tmp_path, **{name: value})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_impossible_game_is_an_error() -> None:
    game = replace(demo.GAMES[0], min_motion=200.0, warmup=(0, 0))
    with pytest.raises(demo.DemoDataError, match="boxing: no unbroken play of 1 frames"):
        demo.render_episode(game, seed=0, num_frames=1)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = importlib.import_module

    def refuse(name: str, *args: Any) -> Any:
        if name == "ale_py":
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(demo.DemoDataError, match=r'pip install "lavita\[demo\]"'):
        demo.render_dataset(tmp_path)
