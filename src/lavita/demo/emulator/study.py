"""`lavita study emulator`: how far can a model replace the game?

A model is trained to go on from a few frames, told the action of each frame. Then the model and the game start from the
same frames with the same actions, and what the model shows is compared with what the game did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavita.core.commands import run_command
from lavita.core.config import ConfigError
from lavita.core.files import write_json, write_text
from lavita.core.progress import Progress
from lavita.core.seeds import generator
from lavita.demo.emulator.episodes import find_games, render
from lavita.demo.emulator.page import write_page
from lavita.demo.emulator.scores import OBJECTS, object_scores, squared_errors, summarize_clips
from lavita.demo.games import FPS
from lavita.models.autoencoder import decode, encode
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.roll_out import DEFAULT_OVERLAP, Windows, roll_out
from lavita.video.formats import Frames
from lavita.video.reading import iter_frames
from lavita.video.writing import write_video

NUM_GIVEN = DEFAULT_OVERLAP
"""Frames that the model is given at the start."""
CONTROLS = ("its actions", "other actions", "no actions")
"""What the model is told: the clip's own actions; those of another clip; nothing."""
CONFIG = """autoencoder: builtin
data:
  path: {out}/data/train
  latent_cache: {out}/latents
  actions: {out}/data/train.csv
  class_folders: true
  num_frames: 16
  frame_interval: 1
  resolution: 64
  horizontal_flip: false
  normalize_latents: true
model:
  preset: {preset}
  given_frames: [start]
  given_dropout: 0.1
  action_dropout: 0.1
  prediction_type: flow
  learn_sigma: false
train:
  batch_size: 8
  optimizer: muon
  learning_rate: 3.0e-3
  warmup_steps: 50
  timestep_sampling: logit_normal
  ema_decay: 0.995
  log_every: 10
  checkpoint_every: 200
  sample_every: 0
"""


@dataclass(frozen=True)
class EmulatorPlan:
    """What an emulator study does."""

    out: Path
    """Folder of the study."""
    games: tuple[str, ...] = ("freeway", "boxing")
    train_seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    """Optimizer steps of each training."""
    preset: str = "mini/4"
    """Size of the model."""
    episodes: int = 40
    """Training videos of each game."""
    length: int = 128
    """Frames of a training video."""
    clips: int = 16
    """Held-out clips of each game that are predicted."""
    horizon: int = 64
    """Frames that are predicted."""
    sample_steps: int = 20

    def __post_init__(self) -> None:
        """Checks the numbers; ConfigError for one out of range, ValueError for an unknown game."""
        find_games(self.games)
        least = {"steps": 1, "episodes": 1, "length": 16, "clips": 2, "horizon": 1, "sample_steps": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")
        if not self.train_seeds or not self.games:
            raise ConfigError("an emulator study needs at least one game and one training seed")

    @property
    def windows(self) -> Windows:
        """The windows of a prediction."""
        return Windows(NUM_GIVEN + self.horizon, 16, NUM_GIVEN)


def run_emulator_study(plan: EmulatorPlan) -> dict[str, Any]:
    """Renders, encodes, trains, predicts, scores, and writes `results.json`, `results.csv`, plots and a page.

    Finished parts are kept: the same call goes on with a stopped study.

    Returns:
        The results; see `summarize`.

    Raises:
        CommandFailed: if a command failed.
        ValueError: if the folder holds a study with other settings.
    """
    out = plan.out
    out.mkdir(parents=True, exist_ok=True)
    _claim(plan)
    games = find_games(plan.games)
    render(out / "data", "train", games, plan.episodes, plan.length, ".mp4")
    render(out / "data", "heldout", games, plan.clips, plan.windows.length, ".mkv")
    if not (out / "encoded").exists():
        encoding = ("--autoencoder", "builtin", "--resolution", "64", "--no-flip")
        _say_and_run(["encode", "--data", str(out / "data" / "train"), "--out", str(out / "latents"), *encoding])
        (out / "encoded").touch()
    write_text(out / "config.yaml", CONFIG.format(out=out, preset=plan.preset))
    for seed in plan.train_seeds:
        run = out / f"seed-{seed}"
        if not (run / "trained").exists():
            steps = [f"train.steps={plan.steps}", f"train.decay_steps={plan.steps // 3}", f"train.seed={seed}"]
            _say_and_run(["train", "--config", str(out / "config.yaml"), f"run_dir={run / 'train'}", *steps])
            (run / "trained").touch()
        _predict(plan, run)
    results = summarize(plan)
    write_json(out / "results.json", results)
    write_page(out, results)
    return results


def _claim(plan: EmulatorPlan) -> None:
    """Records the settings, so that results of different ones cannot mix; more training seeds may follow later."""
    settings = {name: value for name, value in vars(plan).items() if name not in ("out", "train_seeds")}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    settings["views"] = {game.name: list(game.crop) for game in find_games(plan.games)}
    file = plan.out / "study.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != settings:
            name = next(name for name in settings if found.get(name) != settings[name])
            raise ConfigError(
                f"{plan.out}: its study has {name}={found.get(name)}, not {settings[name]}; use another out"
            )
    write_json(file, settings)


def _say_and_run(command: list[str]) -> None:
    print(f"$ lavita {' '.join(command)}", flush=True)
    run_command(command)


def held_out(plan: EmulatorPlan, game: str) -> tuple[Frames, list[list[str]]]:
    """The held-out clips of a game, uint8 (clips, frames, 64, 64, 3), and their actions."""
    files = sorted((plan.out / "data" / "heldout" / game).glob("*.mkv"))[: plan.clips]
    notes = [plan.out / "data" / "heldout-actions" / game / f"{file.stem}.txt" for file in files]
    return np.stack([_read(file) for file in files]), [note.read_text(encoding="utf-8").split() for note in notes]


def _read(file: Path) -> Frames:
    return np.stack(list(iter_frames(file)))


def _predict(plan: EmulatorPlan, run: Path) -> None:
    """Writes `predicted/<control>/<game>/<clip>.mkv`, with the given frames, unless they are there."""
    todo = [
        (control, game)
        for control in CONTROLS
        for game in plan.games
        if len(list((run / "predicted" / control / game).glob("*.mkv"))) < plan.clips
    ]
    if not todo:
        return
    pipeline = load_pipeline(run / "train" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    progress = Progress(f"{run.name}: window", len(todo) * plan.windows.count)
    for control, game in todo:
        true, actions = held_out(plan, game)

        def finished() -> None:
            progress.update(progress.done + 1)

        told = {"its actions": actions, "other actions": actions[1:] + actions[:1], "no actions": None}[control]
        for number, clip in enumerate(predict(pipeline, plan, game, true, told, finished)):
            write_video(run / "predicted" / control / game / f"{number:03d}.mkv", clip, FPS)


def predict(
    pipeline: LavitaPipeline,
    plan: EmulatorPlan,
    game: str,
    true: Frames,
    actions: Sequence[Sequence[str]] | None,
    on_window: Callable[[], None],
) -> Frames:
    """Goes on from the first frames of clips: uint8 (clips, frames, 64, 64, 3), the given frames decoded."""

    def noise(window: int) -> list[Any]:
        return [generator(number, "emulator", window) for number in range(len(true))]

    def known(action: str) -> str | None:  # a short training set may lack an action
        return action if action in pipeline.transformer.config["action_names"] else None

    parts = roll_out(
        pipeline,
        plan.windows,
        noise,
        on_window=on_window,
        class_labels=[game] * len(true),
        given=[dict(enumerate(clip[:NUM_GIVEN])) for clip in true],
        actions=None if actions is None else [[known(action) for action in row] for row in actions],
        num_inference_steps=plan.sample_steps,
    )
    return np.concatenate([decode(pipeline.vae, latents) for latents in parts], axis=1)


def summarize(plan: EmulatorPlan) -> dict[str, Any]:
    """Scores all predictions.

    Returns:
        `games`: for each game `psnr` and `objects`. `psnr` has a row for each control, for the last given frame
        repeated (`still`), and for the true frames encoded and decoded (`ceiling`); `objects` has by object the rows
        `error`, in pixels, and `persistence`, each for the same five. A row has the numbers of `summarize_clips` at
        each horizon.
    """
    vae = load_pipeline(plan.out / f"seed-{plan.train_seeds[0]}" / "train" / "pipeline").vae
    games = {}
    for game in plan.games:
        whole, _ = held_out(plan, game)
        true = whole[:, NUM_GIVEN:]
        made = {control: _predicted(plan, control, game) for control in CONTROLS}
        made["still"] = [np.repeat(whole[:, NUM_GIVEN - 1 : NUM_GIVEN], plan.horizon, axis=1)]
        # Frame by frame, so clip by clip to bound the memory.
        made["ceiling"] = [np.stack([decode(vae, encode(vae, clip)[0][None])[0] for clip in true])]
        errors = {name: np.stack([squared_errors(clips, true) for clips in seeds]) for name, seeds in made.items()}
        objects: dict[str, dict[str, Any]] = {}
        for sprite in OBJECTS.get(game, ()):
            scores = {name: [object_scores(sprite, clips, true) for clips in seeds] for name, seeds in made.items()}
            objects[sprite.name] = {
                measure: {
                    name: summarize_clips(np.stack([pair[place] for pair in pairs])) for name, pairs in scores.items()
                }
                for place, measure in enumerate(("error", "persistence"))
            }
        games[game] = {
            "psnr": {name: summarize_clips(values, as_psnr=True) for name, values in errors.items()},
            "objects": objects,
        }
    return {"games": games, "train_seeds": list(plan.train_seeds), "given": NUM_GIVEN, **_settings(plan)}


def _predicted(plan: EmulatorPlan, control: str, game: str) -> list[Frames]:
    """For each training seed the predicted frames of all clips, without the given ones."""
    return [
        np.stack([_read(file) for file in sorted((folder / control / game).glob("*.mkv"))])[:, NUM_GIVEN:]
        for folder in (plan.out / f"seed-{seed}" / "predicted" for seed in plan.train_seeds)
    ]


def _settings(plan: EmulatorPlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in ("steps", "preset", "clips", "horizon", "episodes", "sample_steps")}
