"""The emulator study: the game is an honest oracle, its objects are found where they are, and a study goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from lavita.core.commands import CommandFailed
from lavita.demo.emulator import study
from lavita.demo.emulator.episodes import find_games, render
from lavita.demo.emulator.scores import OBJECTS, locate, object_scores, psnr, squared_errors, summarize_clips
from lavita.demo.emulator.study import EmulatorPlan, run_emulator_study
from lavita.demo.games import START, _Console, play_episode, render_episode, replay
from lavita.video.reading import iter_frames

RAM = {"chicken": (14, None), "white boxer": (34, 32), "black boxer": (35, 33)}
"""Addresses of the console's memory that hold the row and the column of an object."""


@pytest.mark.parametrize("name", ["freeway", "boxing"])
def test_the_game_repeats_itself(name: str) -> None:
    """The same actions lead to the same frames, although the player took choices back meanwhile."""
    (game,) = find_games([name])
    episode = play_episode(game, 3, 48)
    assert len(episode.actions) == 48 and set(episode.actions) <= set(game.actions)
    assert np.array_equal(replay(game, episode.warmup, episode.actions), episode.frames)
    assert np.array_equal(render_episode(game, 3, 48), episode.frames)
    other = ("NOOP", *episode.actions[1:])
    assert not np.array_equal(replay(game, episode.warmup, other), episode.frames), "actions matter"


@pytest.mark.parametrize("name", ["freeway", "boxing"])
def test_objects_are_found_where_the_game_has_them(name: str) -> None:
    (game,) = find_games([name])
    episode, console = play_episode(game, 5, 160), _Console(game)
    for action in (*START, *episode.warmup):
        console.play(action)
    memory = []
    for action in episode.actions:
        console.play(action)
        memory.append(console._ale.getRAM().copy())
    ram = np.stack(memory).astype(np.float64)
    for sprite in OBJECTS[name]:
        places = locate(sprite, episode.frames)
        found = ~np.isnan(places[:, 0])
        assert found.mean() > 0.95
        for axis, address in enumerate(RAM[sprite.name]):
            if address is not None:
                known = np.stack([ram[found, address], np.ones(found.sum())], axis=1)
                fit, *_ = np.linalg.lstsq(known, places[found, axis], rcond=None)
                distance = np.abs(known @ fit - places[found, axis])
                assert distance.std() < 2.5 and distance.max() < (5 if name == "freeway" else 12), (
                    "nothing else was taken for it"
                )
                assert 0.4 < abs(fit[0]) < 0.9, "64 pixels show 80 to 112 of the console's"


def test_scores_of_a_moved_object() -> None:
    (sprite,) = OBJECTS["freeway"]
    true = np.full((2, 3, 64, 64, 3), 136, dtype=np.uint8)
    made = true.copy()
    true[:, :, 10:14, 30:34] = (248, 248, 80)
    made[0, :, 13:17, 34:38] = (248, 248, 80)
    made[1, :2, 10:14, 30:34] = (248, 248, 80)
    true[1, 0] = 136  # the chicken is out of sight
    distance, found = object_scores(sprite, made, true)
    np.testing.assert_allclose(distance, np.array([[5, 5, 5], [np.nan, 0, np.nan]]))
    np.testing.assert_allclose(found, np.array([[1, 1, 1], [np.nan, 1, 0]]))
    assert [(row[0], *row[3:]) for row in summarize_clips(found[None])] == [(1, None, 1), (1, None, 2), (0.5, None, 2)]
    assert squared_errors(true, true).max() == 0
    np.testing.assert_allclose(psnr([255.0**2, 1.0]), np.array([0, 10 * np.log10(255**2)]))


def test_seeds_share_their_clips() -> None:
    """Repeating the values of a seed adds no clips, so the interval stays as wide; what differs is the spread."""
    random = np.random.default_rng(0)
    values = random.normal(5, 2, (1, 40, 3))
    values[0, :30, 1] = np.nan
    values[0, :, 2] = np.nan
    once, thrice = summarize_clips(values), summarize_clips(np.repeat(values, 3, axis=0))
    assert [row[:3] + row[4:] for row in once] == [row[:3] + row[4:] for row in thrice]
    assert [row[3] for row in once] == [None] * 3 and [row[3] for row in thrice] == [0, 0, None]
    assert [row[4] for row in once] == [40, 10, 0] and once[2][:3] == [None] * 3
    mean, low, high, *_ = once[0]
    assert mean is not None and low is not None and high is not None
    np.testing.assert_allclose(mean, values[0, :, 0].mean(), atol=1e-4)
    error = values[0, :, 0].std(ddof=1) / np.sqrt(40)  # the normal approximation
    np.testing.assert_allclose([low, high], [mean - 1.96 * error, mean + 1.96 * error], atol=0.15 * error * 1.96)
    shifted = np.concatenate([values, values + 1])
    np.testing.assert_allclose(float(summarize_clips(shifted)[0][3] or 0), np.sqrt(0.5), atol=1e-4)
    decibels = summarize_clips(np.array([[[1.0], [3.0]], [[4.0], [4.0]]]), as_psnr=True)[0]
    np.testing.assert_allclose(float(decibels[0] or 0), 10 * np.log10(255**2 / 3), atol=1e-4)
    np.testing.assert_allclose(float(decibels[3] or 0), 10 * np.log10(2) / np.sqrt(2), atol=1e-4)


def test_rendering_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    games = find_games(["freeway"])
    table = render(tmp_path, "train", games, 1, 20, ".mkv")
    first = (tmp_path / "train" / "freeway" / "000.mkv").read_bytes()
    (tmp_path / "train-actions" / "freeway" / "000.txt").unlink()
    render(tmp_path, "train", games, 2, 20, ".mkv")
    assert (tmp_path / "train" / "freeway" / "000.mkv").read_bytes() == first
    rows = list(csv.DictReader(table.open()))
    assert [row["file"] for row in rows] == ["freeway/000.mkv", "freeway/001.mkv"]
    for row in rows:
        assert len(row["actions"].split()) == len(list(iter_frames(tmp_path / "train" / row["file"]))) == 20
    monkeypatch.setattr("lavita.demo.emulator.episodes.play_episode", lambda *_: pytest.fail("rendered again"))
    render(tmp_path, "train", games, 2, 20, ".mkv")


@pytest.mark.slow
def test_a_study_goes_on_and_shows_what_it_found(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EmulatorPlan(
        tmp_path / "study",
        games=("boxing",),
        train_seeds=(0, 1),
        steps=2,
        preset="tiny/4",
        episodes=1,
        length=20,
        clips=2,
        horizon=14,
        sample_steps=1,
    )
    commands: list[str] = []

    def stops(command: list[str]) -> None:
        commands.append(command[0])
        if len(commands) == 3:
            raise CommandFailed(1)
        assert run(*command)[0] == 0

    monkeypatch.setattr(study, "run_command", stops)
    with pytest.raises(CommandFailed):
        run_emulator_study(plan)
    results = run_emulator_study(plan)
    assert commands == ["encode", "train", "train", "train"], "nothing that was finished came again"
    scores = results["games"]["boxing"]
    assert set(scores["psnr"]) == {"its actions", "other actions", "no actions", "still", "ceiling"}
    for row in scores["psnr"].values():
        assert len(row) == 14 and all(low <= mean <= high and clips == 2 for mean, low, high, _, clips in row)
    assert scores["psnr"]["its actions"][0][3] > 0 and scores["psnr"]["still"][0][3] is None
    assert scores["psnr"]["ceiling"][0][0] > 25 > scores["psnr"]["its actions"][-1][0]
    assert set(scores["objects"]) == {"white boxer", "black boxer"}
    for measures in scores["objects"].values():
        assert measures["error"]["ceiling"][0][0] < 1 and measures["persistence"]["ceiling"][0][0] == 1
        assert set(measures["error"]) == set(measures["persistence"]) == set(scores["psnr"])
    assert json.loads((plan.out / "results.json").read_text()) == results
    page = (plan.out / "index.html").read_text()
    for name in ("curves.png", "videos/boxing-0-the-game.mp4"):
        assert name in page and (plan.out / name).exists()
    assert len((plan.out / "results.csv").read_text().splitlines()) == 1 + 14 * 5 * (1 + 2 * 2)
    with pytest.raises(ValueError, match="its study has steps=2, not 3"):
        run_emulator_study(EmulatorPlan(**{**vars(plan), "steps": 3}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("games=chess",), "games has 'chess', but must name each once; allowed: boxing"),
        (("horizon=0",), "horizon is 0, but must be at least 1"),
        (("colour=red",), "'colour=red' is no field of the study; allowed: games=A,B preset=X"),
        (("--config", "demo"), "config is demo, but has no effect on the study emulator"),
        (("--steps", "1,2"), "steps is '1,2', but the study emulator takes one number"),
    ],
)
def test_a_wrong_command(arguments: tuple[str, ...], words: str, run: Run, tmp_path: Path) -> None:
    code, _, errors = run("study", "emulator", "--out", tmp_path / "study", *arguments)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "study").exists()


def test_other_studies_need_a_configuration(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("study", "variant", "--out", tmp_path / "study")
    assert code == 2 and "config is missing, but the study variant needs one" in errors
