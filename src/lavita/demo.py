"""The demo: every stage is a command that a user would run on their own data; this strings them together.

A stopped demo goes on where it was: finished stages are noted in `stages.json`, and each command resumes by itself.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lavita.page import write_page

SEEDS = "0-5"
SAMPLE_STEPS = "20"


class StageFailed(Exception):
    """A stage ended with an error, which it has printed itself."""

    def __init__(self, code: int) -> None:
        """Keeps the exit code of the stage."""
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return " ".join(("lavita", *self.arguments))


def stages(out: Path) -> list[Stage]:
    """The demo's commands, in order."""
    data, run = out / "data", out / "train"
    evaluate = (
        "evaluate",
        "--real",
        f"{data}/train",
        "--held-out",
        f"{data}/heldout",
        "--cache",
        f"{out}/classifier",
    )
    sample = ("--seeds", SEEDS, "--steps", SAMPLE_STEPS)
    return [
        Stage("Render an arcade data set", ("data", "arcade", f"{data}")),
        Stage(
            "Encode every frame with the autoencoder of the package",
            (
                "encode",
                "--data",
                f"{data}/train",
                "--out",
                f"{out}/latents",
                "--resolution",
                "64",
                "--no-flip",
            ),
        ),
        Stage(
            "Train a small LAVITA",
            ("train", "--config", "demo", f"run_dir={run}", f"data.latent_cache={out}/latents"),
        ),
        Stage("Generate with it", ("sample", f"{run}/pipeline", "--out", f"{out}/samples", *sample)),
        Stage("Generate with the model of the package", ("sample", "--out", f"{out}/samples-shipped", *sample)),
        Stage(
            "Score the model trained here",
            (*evaluate, "--generated", f"{out}/samples", "--out", f"{out}/scores.json"),
        ),
        Stage(
            "Score the model of the package",
            (*evaluate, "--generated", f"{out}/samples-shipped", "--out", f"{out}/scores-shipped.json"),
        ),
    ]


def run_demo(out: Path) -> None:
    """Runs all stages that are not finished, then writes `summary.json`, the pictures and `index.html`.

    Args:
        out: the demo's folder; made if missing.

    Raises:
        StageFailed: where a command failed; running the demo again goes on with that stage.
    """
    out.mkdir(parents=True, exist_ok=True)
    notes = out / "stages.json"
    seconds: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}
    plan = stages(out)
    for number, stage in enumerate(plan, start=1):
        print(f"\n[{number}/{len(plan)}] {stage.title}\n$ {stage.command}", flush=True)
        if stage.command in seconds:
            print(f"finished before, in {seconds[stage.command]:.0f} s", flush=True)
            continue
        start = time.monotonic()
        code = _run([sys.executable, "-m", "lavita", *stage.arguments])
        if code:
            print("stopped here; the same command goes on with this stage", file=sys.stderr)
            raise StageFailed(code)
        seconds[stage.command] = round(time.monotonic() - start, 1)
        partial = notes.with_suffix(".partial")
        partial.write_text(json.dumps(seconds, indent=1))
        partial.replace(notes)

    summary = summarize(out, [(stage.command, seconds[stage.command]) for stage in plan])
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    write_page(out, summary)
    print()
    for name, row in summary["models"].items():
        print(
            f"{name}: {row['training']}; accuracy {row['accuracy']:.1%}, "
            f"motion within a factor of 2 for {row['motion_within_factor_2']} of {row['num_classes']} classes"
        )
    print(f"\nOpen {out / 'index.html'} in a browser, or look at {out / 'contact_sheet.png'}")


def _run(command: list[str]) -> int:
    # Ctrl-C reaches the command as well, which saves what it has; here it only waits for that.
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def summarize(out: Path, commands: list[tuple[str, float]]) -> dict[str, Any]:
    """All that `summary.json` holds: the commands with their run times, and both models' scores."""
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    steps = json.loads(lines[-1])["step"]
    training_seconds = next(taken for command, taken in commands if command.startswith("lavita train"))
    shipped_card = json.loads((files("lavita") / "weights" / "arcade" / "training.json").read_text())
    trained = json.loads((out / "scores.json").read_text())
    shipped = json.loads((out / "scores-shipped.json").read_text())
    return {
        "models": {
            "trained here": _model_row(f"{steps:,} steps in {training_seconds / 60:.1f} minutes", trained),
            "shipped": _model_row(
                f"{shipped_card['steps']:,} steps in {shipped_card['minutes']:.0f} minutes, once", shipped
            ),
        },
        "classifier": trained["accuracy"]["controls"],
        "commands": [{"command": command, "seconds": taken} for command, taken in commands],
        "seconds": round(sum(taken for _, taken in commands), 1),
        "python": platform.python_version(),
        "processor": platform.machine(),
    }


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
