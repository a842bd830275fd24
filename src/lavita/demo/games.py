"""The arcade data set: eight games played by random scripted players, as 64 x 64 H.264 videos.

The games run in the Arcade Learning Environment (Bellemare et al. 2013), whose wheel includes the cartridges, so
nothing is downloaded. Each video is one uninterrupted stretch of play: no title screens, no lost lives, no flashes, and
motion in every 16-frame window, so any clip of it is worth training on.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lavita.core.files import write_text
from lavita.video.writing import write_video

Frame = npt.NDArray[np.uint8]

FRAME_SIZE = 64
FPS = 15.0
SPLITS = ("train", "heldout")

# The console draws 60 frames a second; four of them make one frame of a 15 fps video.
_CONSOLE_FRAMES = 4
# What every game begins with.
START = ("NOOP",) * 8 + ("FIRE",)
# Frames over which motion is measured. As many frames are played past the end of a video, because a lost life shows on
# screen before the console counts it.
_WINDOW = 16
# An attempt may play this many times its own length, mistakes included, before it starts over with another seed.
_PATIENCE = 6
_ATTEMPTS = 20


class DemoDataError(ValueError):
    """The arcade data set cannot be rendered; the message says why."""


@dataclass(frozen=True)
class Game:
    """How one game is played, and which part of its screen is recorded.

    Attributes:
        name: Name of the class and of its folder.
        rom: Name of the cartridge in ``ale_py.roms``.
        crop: (left, top, right, bottom) in console pixels, out of 160 x 210: the playing field without the score.
        actions: Names of ``ale_py.Action`` that the player draws from uniformly; a name listed twice is drawn twice
            as often.
        hold: Minimum and maximum number of video frames for which an action is held.
        warmup: Minimum and maximum number of video frames played before recording starts.
        min_motion: Minimum mean absolute difference of successive frames over any 16 frames, in 1/255.
        max_jump: Maximum mean absolute difference of two successive frames, in 1/255; anything above is a flash or a
            cut.
        mode: Game mode of the cartridge; None for its default.
    """

    name: str
    rom: str
    crop: tuple[int, int, int, int]
    actions: tuple[str, ...]
    hold: tuple[int, int] = (2, 8)
    warmup: tuple[int, int] = (8, 60)
    min_motion: float = 1.5
    max_jump: float = 30.0
    mode: int | None = None


GAMES: tuple[Game, ...] = (
    Game(
        "boxing",
        "boxing",
        crop=(24, 24, 136, 136),
        actions=("UP", "DOWN", "LEFT", "RIGHT", "RIGHTFIRE", "UPFIRE", "DOWNFIRE"),
        min_motion=2.0,
    ),
    Game(
        "freeway",
        "freeway",
        crop=(12, 55, 76, 135),
        actions=("UP", "UP", "UP", "DOWN"),
        mode=1,
        warmup=(8, 600),
        min_motion=1.5,
    ),
    Game("skiing", "skiing", crop=(40, 36, 120, 116), actions=("LEFT", "RIGHT", "NOOP", "NOOP"), min_motion=1.2),
    # Slow enough to end before the first bridge, whose explosion flashes and recolours the whole screen.
    Game(
        "riverraid",
        "riverraid",
        crop=(20, 30, 148, 160),
        actions=("UP", "LEFT", "RIGHT", "UPLEFT", "UPRIGHT", "NOOP", "FIRE"),
        hold=(2, 6),
        warmup=(20, 32),
        max_jump=16.0,
    ),
    Game(
        "battle_zone",
        "battle_zone",
        crop=(8, 50, 160, 178),
        actions=("UPLEFT", "UPRIGHT", "LEFT", "RIGHT", "UPFIRE"),
        hold=(6, 20),
        max_jump=12.0,
    ),
    Game(
        "time_pilot",
        "time_pilot",
        crop=(48, 70, 112, 134),
        actions=("LEFT", "RIGHT", "UP", "DOWN", "FIRE"),
        hold=(6, 20),
        warmup=(70, 150),
        min_motion=1.2,
    ),
    Game(
        "enduro",
        "enduro",
        crop=(24, 44, 136, 156),
        actions=("FIRE", "FIRE", "RIGHTFIRE", "LEFTFIRE"),
        warmup=(40, 80),
        max_jump=10.0,
    ),
    Game(
        "fishing_derby",
        "fishing_derby",
        crop=(16, 64, 144, 192),
        actions=("LEFT", "RIGHT", "UP", "DOWN", "DOWN", "FIRE"),
        hold=(4, 12),
        min_motion=1.5,
    ),
)


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise DemoDataError(f"{name} is {value}, but must be at least {least}")


def _load_ale() -> Any:
    try:
        ale_py = importlib.import_module("ale_py")
    except ImportError as error:
        raise DemoDataError('the demo data needs the extra "demo": pip install "lavita[demo]"') from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return ale_py


class _Console:
    """A running cartridge: plays actions and records the cropped screen."""

    def __init__(self, game: Game) -> None:
        ale_py = _load_ale()
        self._game = game
        self._actions = {name: action for name, action in ale_py.Action.__members__.items()}
        self._ale = ale_py.ALEInterface()
        self._ale.setInt("random_seed", 0)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.loadROM(str(Path(ale_py.__file__).parent / "roms" / f"{game.rom}.bin"))
        self.reset()

    def reset(self) -> None:
        if self._game.mode is not None:
            self._ale.setMode(self._game.mode)
        self._ale.reset_game()

    def save(self) -> Any:
        return self._ale.cloneState()

    def restore(self, state: Any) -> None:
        self._ale.restoreState(state)

    @property
    def lives(self) -> int:
        return -1 if self._ale.game_over() else int(self._ale.lives())

    def play(self, action: str) -> Frame:
        """Plays and records one video frame: uint8 (64, 64, 3)."""
        for _ in range(_CONSOLE_FRAMES - 1):
            self._ale.act(self._actions[action])
        previous = self._ale.getScreenRGB()
        self._ale.act(self._actions[action])
        # Cartridges draw some sprites only on every other console frame.
        screen = Image.fromarray(np.maximum(previous, self._ale.getScreenRGB()))
        size = (FRAME_SIZE, FRAME_SIZE)
        return np.asarray(screen.resize(size, Image.Resampling.BOX, box=self._game.crop))


@dataclass(frozen=True)
class Episode:
    """A recorded stretch of play."""

    frames: npt.NDArray[np.uint8]
    """uint8 (F, 64, 64, 3), RGB."""
    actions: tuple[str, ...]
    """For each frame the action that led to it from the frame before."""
    warmup: tuple[str, ...]
    """The actions between the start of the game and the first frame."""


def _attempt(console: _Console, game: Game, rng: np.random.Generator, num_frames: int) -> Episode | None:
    """Plays until ``num_frames`` good frames are recorded; None if that takes too long.

    After a mistake (a life lost, a standstill, a flash) the last choices are undone: more of them with each further
    mistake without progress in between.
    """
    console.reset()
    for action in START:
        console.play(action)
    lives = console.lives
    warmup = int(rng.integers(game.warmup[0], game.warmup[1] + 1))
    total = warmup + num_frames + _WINDOW
    frames: list[Frame] = []
    actions: list[str] = []
    motion: list[float] = []
    takes: list[tuple[Any, int]] = []
    furthest = mistakes = played = 0
    while len(frames) < total:
        takes.append((console.save(), len(frames)))
        action = game.actions[rng.integers(len(game.actions))]
        good = True
        for _ in range(rng.integers(game.hold[0], game.hold[1] + 1)):
            frame = console.play(action)
            played += 1
            if frames:
                motion.append(float(np.abs(frame.astype(np.int16) - frames[-1]).mean()))
            frames.append(frame)
            actions.append(action)
            filmed = motion[warmup:]
            still = len(filmed) >= _WINDOW - 1 and np.mean(filmed[1 - _WINDOW :]) < game.min_motion
            flash = bool(filmed) and filmed[-1] > game.max_jump
            good = console.lives >= lives and not still and not flash
            if not good:
                break
        if good:
            if len(frames) > furthest:
                furthest, mistakes = len(frames), 0
            continue
        mistakes += 1
        if played > _PATIENCE * total:
            return None
        for _ in range(min(len(takes) - 1, 1 + mistakes // 2)):
            takes.pop()
        state, num_kept = takes.pop()
        console.restore(state)
        del frames[num_kept:], actions[num_kept:]
        del motion[max(num_kept - 1, 0) :]
    end = warmup + num_frames
    return Episode(np.stack(frames[warmup:end]), tuple(actions[warmup:end]), tuple(actions[:warmup]))


def render_episode(game: Game, seed: int, num_frames: int) -> npt.NDArray[np.uint8]:
    """The frames of `play_episode`: uint8 (F, 64, 64, 3), RGB."""
    return play_episode(game, seed, num_frames).frames


def replay(game: Game, warmup: Sequence[str], actions: Sequence[str]) -> npt.NDArray[np.uint8]:
    """The frames that actions lead to, uint8 (F, 64, 64, 3): those of an episode, if the actions are its own."""
    console = _Console(game)
    for action in (*START, *warmup):
        console.play(action)
    return np.stack([console.play(action) for action in actions])


def play_episode(game: Game, seed: int, num_frames: int) -> Episode:
    """Plays and records one video of a game.

    Args:
        game: One of ``GAMES``.
        seed: Any integer >= 0; the same seed gives the same video.
        num_frames: Length of the video, >= 1, at 15 frames per second.

    Raises:
        DemoDataError: If ``ale_py`` is missing, ``num_frames`` or ``seed`` is out of range, or no attempt gave a video
            without a mistake.
    """
    _require("num_frames", num_frames, 1)
    _require("seed", seed, 0)
    console = _Console(game)
    for attempt in range(_ATTEMPTS):
        episode = _attempt(console, game, np.random.default_rng([seed, attempt]), num_frames)
        if episode is not None:
            return episode
    raise DemoDataError(f"{game.name}: no unbroken play of {num_frames} frames in {_ATTEMPTS} attempts, ask for fewer")


def episode_seed(game: Game, seed: int, split: str, episode: int) -> int:
    """The seed of an episode of a data set with some seed."""
    # From the game's name, so that its videos do not depend on the other games.
    entropy = [seed, zlib.crc32(f"{game.name}/{split}".encode()), episode]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _render_file(path: Path, game: Game, seed: int, num_frames: int) -> None:
    write_video(path, render_episode(game, seed, num_frames), FPS)


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Records the settings in the folder, so that a later call cannot mix videos of different settings."""
    note = out / "demo.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != settings:
            raise DemoDataError(
                f"{out} holds data rendered with {found}, but {settings} was asked for; choose another folder"
            )
        return
    write_text(note, json.dumps(settings))


def render_dataset(
    out: Path,
    train_episodes: int = 24,
    heldout_episodes: int = 6,
    num_frames: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Renders ``out/train/<game>/<episode>.mp4`` and ``out/heldout/<game>/<episode>.mp4`` for every game.

    Existing files are kept, so an interrupted call can be repeated, and a larger number of episodes adds to a smaller
    one. A file depends only on its name, ``num_frames`` and ``seed``. Worker processes are spawned: call this under
    ``if __name__ == "__main__":`` in a script.

    Args:
        out: Folder to write to; created if missing.
        train_episodes: Videos per game in ``train``, >= 0.
        heldout_episodes: Videos per game in ``heldout``, >= 0; different play from ``train``.
        num_frames: Length of every video, >= 1, at 15 frames per second.
        seed: Seed of the whole set, >= 0.
        progress: Called with (finished files, total files), first with the number of files that existed already.

    Raises:
        DemoDataError: If ``ale_py`` is missing, a number is out of range, or ``out`` holds data rendered with another
            ``num_frames`` or ``seed``.
    """
    counts = dict(zip(SPLITS, (train_episodes, heldout_episodes), strict=True))
    _require("train_episodes", train_episodes, 0)
    _require("heldout_episodes", heldout_episodes, 0)
    _require("num_frames", num_frames, 1)
    _require("seed", seed, 0)
    _load_ale()
    out = Path(out)
    _claim(out, {"num_frames": num_frames, "seed": seed})
    files = {
        out / split / game.name / f"{episode:03d}.mp4": (game, episode_seed(game, seed, split, episode))
        for split in SPLITS
        for episode in range(counts[split])
        for game in GAMES
    }
    missing = [path for path in files if not path.exists()]
    finished = len(files) - len(missing)
    if progress is not None:
        progress(finished, len(files))
    if not missing:
        return
    workers = min(os.cpu_count() or 1, len(missing))
    # Spawned, not forked: torch's threads in the calling process do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_render_file, path, *files[path], num_frames) for path in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                finished += 1
                if progress is not None:
                    progress(finished, len(files))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
