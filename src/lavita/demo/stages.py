"""The demo: a series of stages, each of them a command that users would run on their own data.

An interrupted demo continues where it stopped: finished stages are recorded in `stages.json`, and each command resumes
by itself.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lavita.core.commands import run_command
from lavita.core.config import load_config, read_yaml
from lavita.core.files import write_json
from lavita.demo.page import write_page
from lavita.demo.sprites import compare_sprites
from lavita.training.config import RunConfig

SEEDS = "0-5"
SAMPLE_STEPS = "20"
TRAIN_EPISODES, HELDOUT_EPISODES = "12", "4"
PROBE_STEPS = 40
DECAY_SHARE = 0.3  # of the steps: the learning rate falls to 0 over them
NUM_STAGES = 8


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line, as a user would type it."""
        return " ".join(("lavita", *self.arguments))


def first_stages(out: Path) -> list[Stage]:
    """The stages up to the one that measures how fast this computer trains."""
    data = out / "data"
    episodes = ("--train-episodes", TRAIN_EPISODES, "--heldout-episodes", HELDOUT_EPISODES)
    latents = ("--out", f"{out}/latents", "--resolution", "64", "--no-flip", "--autoencoder", "arcade")
    probe = (f"train.steps={PROBE_STEPS}", "train.sample_every=0")
    return [
        Stage("Render an arcade data set", ("data", "arcade", f"{data}", *episodes)),
        Stage(
            "Encode every frame with the arcade model's autoencoder", ("encode", "--data", f"{data}/train", *latents)
        ),
        Stage("Measure how fast this computer trains", (*_train(out, "probe"), *probe)),
    ]


def later_stages(out: Path, steps: int) -> list[Stage]:
    """The remaining stages, from the training of `steps` steps on."""
    data = out / "data"
    sample = ("--seeds", SEEDS, "--steps", SAMPLE_STEPS)
    length = (f"train.steps={steps}", f"train.decay_steps={round(DECAY_SHARE * steps)}")
    evaluate = ("evaluate", "--real", f"{data}/train", "--held-out", f"{data}/heldout", "--cache", f"{out}/classifier")
    return [
        Stage("Train a small LAVITA", (*_train(out, "train"), *length)),
        Stage("Generate videos with it", ("sample", f"{out}/train/pipeline", "--out", f"{out}/samples", *sample)),
        Stage("Generate with the packaged model", ("sample", "--out", f"{out}/samples-shipped", *sample)),
        Stage(
            "Score the model trained here",
            (*evaluate, "--generated", f"{out}/samples", "--out", f"{out}/scores.json"),
        ),
        Stage(
            "Score the packaged model",
            (*evaluate, "--generated", f"{out}/samples-shipped", "--out", f"{out}/scores-shipped.json"),
        ),
    ]


def _train(out: Path, name: str) -> tuple[str, ...]:
    return ("train", "--config", "demo", f"run_dir={out / name}", f"data.latent_cache={out}/latents")


def training_steps(out: Path, minutes: float) -> int:
    """The number of training steps that fit into `minutes`, at the speed measured by the probe."""
    last = json.loads((out / "probe" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    config = load_config(RunConfig, read_yaml(out / "probe" / "config.yaml"))
    steps = int(60 * minutes * last["clips_per_second"] / config.train.batch_size)
    return max(10, round(steps, -1 if steps < 1000 else -2))


def run_demo(out: Path, minutes: float) -> None:
    """Runs all unfinished stages, then writes `summary.json`, the pictures and `index.html`.

    Args:
        out: the demo's folder; created if missing.
        minutes: approximate training time.

    Raises:
        CommandFailed: if a command failed; running the demo again continues with that stage.
    """
    out.mkdir(parents=True, exist_ok=True)
    plan = first_stages(out)
    seconds = [_run_stage(out, number, stage) for number, stage in enumerate(plan, start=1)]
    later = later_stages(out, training_steps(out, minutes))
    seconds += [_run_stage(out, number, stage) for number, stage in enumerate(later, start=len(plan) + 1)]
    summary = summarize(out, list(zip([*plan, *later], seconds, strict=True)))
    write_json(out / "summary.json", summary)
    write_page(out, summary)
    print()
    for name, row in summary["models"].items():
        print(
            f"{name}: {row['training']}; accuracy {row['accuracy']:.1%}, "
            f"motion within a factor of 2 for {row['motion_within_factor_2']} of {row['num_classes']} classes"
        )
    print(f"\nOpen {out / 'index.html'} in a browser, or look at {out / 'contact_sheet.png'}")


def _run_stage(out: Path, number: int, stage: Stage) -> float:
    """Runs a stage unless `stages.json` says that it is finished, and returns the seconds that it took."""
    notes = out / "stages.json"
    seconds: dict[str, float] = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    print(f"\n[{number}/{NUM_STAGES}] {stage.title}\n$ {stage.command}", flush=True)
    if stage.command in seconds:
        print(f"already finished, in {seconds[stage.command]:.0f} s", flush=True)
        return seconds[stage.command]
    start = time.monotonic()
    run_command(stage.arguments)
    seconds[stage.command] = round(time.monotonic() - start, 1)
    write_json(notes, seconds)
    return seconds[stage.command]


def summarize(out: Path, timed: list[tuple[Stage, float]]) -> dict[str, Any]:
    """The content of `summary.json`: the commands with their run times, and the scores of both models."""
    records = [json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batch_size = read_yaml(out / "train" / "config.yaml")["train"]["batch_size"]
    steps = records[-1]["step"]
    # Not the time of the stage: if the demo was interrupted, that covers the last part of the training only.
    training_seconds = sum(
        (record["step"] - before) * batch_size / record["clips_per_second"]
        for before, record in zip([0, *(record["step"] for record in records)], records, strict=False)
    )
    package = Path(str(files("lavita") / "weights" / "arcade"))
    runs = json.loads((package / "training.json").read_text(encoding="utf-8"))
    once = f"{sum(run['steps'] for run in runs):,} steps in {sum(run['minutes'] for run in runs):.0f} minutes"
    sizes = [_parameters(folder) for folder in (out / "train" / "pipeline", package)]
    trained = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    shipped = json.loads((out / "scores-shipped.json").read_text(encoding="utf-8"))
    return {
        "models": {
            "trained here": _model_row(f"{sizes[0]}, {steps:,} steps in {training_seconds / 60:.1f} minutes", trained),
            "shipped": _model_row(f"{sizes[1]}, {once}, once", shipped),
        },
        "sprites": {
            "trained here": compare_sprites(out / "data" / "train", out / "samples"),
            "shipped": compare_sprites(out / "data" / "train", out / "samples-shipped"),
        },
        "classifier": trained["accuracy"]["controls"],
        "commands": [{"command": stage.command, "seconds": taken} for stage, taken in timed],
        "seconds": round(sum(taken for _, taken in timed), 1),
        "python": platform.python_version(),
        "processor": platform.machine(),
    }


def _parameters(pipeline: Path) -> str:
    """The size of a pipeline's transformer, as text."""
    with safe_open(pipeline / "transformer" / "diffusion_pytorch_model.safetensors", framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.endswith("_embed")]  # noqa: SIM118
    return f"{sum(map(math.prod, shapes)) / 1e6:.1f} M parameters"


def _model_row(training: str, scores: dict[str, Any]) -> dict[str, Any]:
    motion = scores["motion"]["per_class"]
    return {
        "training": training,
        "accuracy": scores["accuracy"]["accuracy"],
        "num_clips": scores["accuracy"]["num_clips"],
        "num_classes": len(motion),
        "motion_within_factor_2": sum(row["within_factor_two"] for row in motion.values()),
        "motion": motion,
        "accuracy_per_class": scores["accuracy"]["per_class"],
    }
