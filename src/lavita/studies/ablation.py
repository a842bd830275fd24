"""The paper's ablations (Fig. 5, Table 4) as runnable studies: configurations that differ in one field, trained alike.

An arm of a study is a configuration; everything else, seeds and so the clips and noise of every step included, is
the same for all arms. Each arm goes through the public commands: train, sample, evaluate. What is finished stays, so a
study that was stopped goes on with the same command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from lavita.core.commands import run_command
from lavita.video.contact_sheet import contact_sheet
from lavita.video.reading import iter_frames

Arms = Mapping[str, tuple[str, ...]]
"""Name of an arm to the fields of the configuration in which it differs, as `a.b=c`."""

VARIANTS = (1, 2, 3, 4)
PATCH_EMBEDDINGS = ("uniform", "compression")
CONDITIONINGS = ("s_adaln", "all_tokens")
TEMPORAL_POSITIONS = ("absolute", "rope")


def _one_field(field: str, values: Sequence[object]) -> Arms:
    return {f"{field.rpartition('.')[2]}-{value}": (f"{field}={value}",) for value in values}


def _combinations() -> Arms:
    return {
        f"variant-{variant}-{embedding}-{conditioning}-{position}": (
            f"model.variant={variant}",
            f"model.patch_embedding={embedding}",
            f"model.conditioning={conditioning}",
            f"model.temporal_position={position}",
        )
        for variant, embedding, conditioning, position in product(
            VARIANTS, PATCH_EMBEDDINGS, CONDITIONINGS, TEMPORAL_POSITIONS
        )
    }


STUDIES: dict[str, Arms] = {
    "frame-interval": _one_field("data.frame_interval", (1, 2, 3, 4)),  # Fig. 5 (a)
    "temporal-position": _one_field("model.temporal_position", TEMPORAL_POSITIONS),  # Fig. 5 (b)
    "variant": _one_field("model.variant", VARIANTS),  # Fig. 5 (d), Table 4
    "patch-embedding": _one_field("model.patch_embedding", PATCH_EMBEDDINGS),  # Fig. 5 (e)
    "conditioning": _one_field("model.conditioning", CONDITIONINGS),  # Fig. 5 (f)
    "joint-training": _one_field("data.num_images", (0, 8)),  # Tables 1 and 2: LAVITA, LAVITA+IMG
    "combinations": _combinations(),
}
"""Every study by name. Fig. 5 (c), learning from an image model, needs its weights: see `pretraining_arms`."""


def pretraining_arms(weights: str) -> Arms:
    """Fig. 5 (c): from random weights, and from an image model's (`train.init_from`)."""
    return {"from-scratch": (), "pretrained": (f"train.init_from={weights}",)}


@dataclass(frozen=True)
class StudyPlan:
    """How the arms of a study are trained and looked at."""

    out: Path
    """Folder of the study: a folder an arm, `results.json`, `curves.png` and `contact_sheet.png`."""
    config: str
    """Configuration of all arms: a YAML file, or the name of a packaged one."""
    overrides: tuple[str, ...] = ()
    """Fields of all arms, as `a.b=c`."""
    steps: tuple[int, ...] = (1000,)
    """Rising numbers of steps at which an arm is sampled and scored, the last being its length."""
    seeds: str = "0-3"
    """Of the samples, see `generate.parse_seeds`."""
    sample_steps: int = 20
    """Network evaluations of a sample."""
    real: Path | None = None
    """Class folders of real videos to score against; None scores nothing."""
    metrics: str = "accuracy,motion"
    """Of `lavita evaluate`."""
    protocol: tuple[str, ...] = ()
    """Fields of its protocol, as `a=b`."""


def run_study(arms: Arms, plan: StudyPlan) -> list[dict[str, Any]]:
    """Trains, samples and scores all arms, then writes and prints what came out.

    Args:
        arms: of `STUDIES`, or others.
        plan: the rest.

    Returns:
        A row an arm: see `summarize_arm`.

    Raises:
        ValueError: for steps that do not rise.
        CommandFailed: where a command failed; the same call goes on from there.
    """
    if not plan.steps or list(plan.steps) != sorted(set(plan.steps)) or plan.steps[0] < 1:
        raise ValueError(f"steps is {plan.steps}; they must rise, from 1 at least")
    rows = []
    for number, (name, fields) in enumerate(arms.items(), start=1):
        print(f"\n[{number}/{len(arms)}] {name}", flush=True)
        for steps in plan.steps:
            for command, result in commands(name, fields, plan, steps):
                if not result.exists():
                    print(f"$ lavita {' '.join(command)}", flush=True)
                    run_command(command)
                    result.parent.mkdir(parents=True, exist_ok=True)
                    result.touch()
        rows.append(summarize_arm(name, plan))
    partial = plan.out / "results.json.partial"
    partial.write_text(json.dumps({"steps": plan.steps, "config": plan.config, "arms": rows}, indent=1))
    partial.replace(plan.out / "results.json")
    write_curves(rows, plan)
    _write_sheet(rows, plan)
    print_study(rows)
    return rows


def commands(name: str, fields: Sequence[str], plan: StudyPlan, steps: int) -> list[tuple[list[str], Path]]:
    """What brings an arm to a number of steps: each command of `lavita` with the file that says it is done."""
    arm = plan.out / name
    point = arm / f"step-{steps:08d}"
    run, samples = arm / "train", point / "samples"
    settings = [f"run_dir={run}", f"train.steps={steps}", "train.sample_every=0", *plan.overrides, *fields]
    sample = ["sample", str(run / "pipeline"), "--out", str(samples)]
    sample += ["--seeds", plan.seeds, "--steps", str(plan.sample_steps)]
    found = [
        (["train", "--config", plan.config, *settings], point / "trained"),
        (sample, point / "sampled"),
    ]
    if plan.real is not None:
        scores = point / "scores.json"
        evaluate = ["evaluate", "--real", str(plan.real), "--generated", str(samples), "--metrics", plan.metrics]
        evaluate += ["--cache", str(plan.out / "cache"), "--out", str(scores), *plan.protocol]
        found.append((evaluate, scores))
    return found


def summarize_arm(name: str, plan: StudyPlan) -> dict[str, Any]:
    """What became of an arm.

    Returns:
        `name`; `loss_first` and `loss_last`, means over the first and the last tenth of its steps; `curve`,
        [[step, loss], ...]; `clips_per_second`, the median; and `scores` {steps: {metric: number}}.
    """
    lines = (plan.out / name / "train" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records]
    tenth = max(1, len(losses) // 10)
    scores = {}
    for steps in plan.steps if plan.real is not None else ():
        report = json.loads((plan.out / name / f"step-{steps:08d}" / "scores.json").read_text())
        scores[str(steps)] = headline(report)
    return {
        "name": name,
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "curve": [[record["step"], record["loss"]] for record in records],
        "clips_per_second": float(np.median([record["clips_per_second"] for record in records])),
        "scores": scores,
    }


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that stand for the metrics in a report of `lavita evaluate`; of motion ratios the geometric mean."""
    numbers = {name: row["value"] for name, row in report.get("scores", {}).items() if "value" in row}
    if "accuracy" in report:
        numbers["accuracy"] = report["accuracy"]["accuracy"]
    if "motion" in report:
        numbers["motion within 2x"] = report["motion"]["num_within_factor_two"] / report["motion"]["num_classes"]
        ratios = [row["ratio"] for row in report["motion"]["per_class"].values() if row["ratio"]]
        if ratios:  # there is none where nothing moves
            numbers["motion ratio"] = float(np.exp(np.mean(np.log(ratios))))
    return numbers


def write_curves(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Plots losses, and each score where there are several, over the steps: `curves.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0]["scores"][str(plan.steps[0])]) if rows[0]["scores"] and len(plan.steps) > 1 else []
    figure = Figure(figsize=(6 * (1 + len(names)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        width = max(1, len(losses) // 30)  # smoothed, so that a dozen arms can be told apart
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        panels[0].plot(steps[width - 1 :], smooth, label=row["name"], linewidth=1)
        for axes, metric in zip(panels[1:], names, strict=True):
            axes.plot(plan.steps, [row["scores"][str(step)].get(metric) for step in plan.steps], marker="o")
    for axes, title in zip(panels, ("loss", *names), strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    if len(rows) <= 12:
        panels[0].legend(fontsize=8)
    figure.savefig(plan.out / "curves.png", dpi=110)


def _write_sheet(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Samples of every arm at the end, the same seeds and conditions: `contact_sheet.png`."""
    pictures, labels = [], []
    for row in rows:
        samples = sorted((plan.out / row["name"] / f"step-{plan.steps[-1]:08d}" / "samples").rglob("*.mp4"))
        picked = np.linspace(0, len(samples) - 1, min(8, len(samples))).round().astype(int)
        pictures.append([np.stack(list(iter_frames(samples[index]))) for index in picked])
        labels.append(row["name"])
    contact_sheet(pictures, plan.out / "contact_sheet.png", labels, num_columns=3)


def print_study(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints a row an arm: its losses, its speed and its scores at the end."""
    last = list(rows[0]["scores"].values())[-1] if rows[0]["scores"] else {}
    table = Table(Column("arm", no_wrap=True), "loss, first tenth", "loss, last tenth", "clips/s", *last)
    for row in rows:
        scores = list(row["scores"].values())[-1] if row["scores"] else {}
        table.add_row(
            row["name"],
            f"{row['loss_first']:.3f}",
            f"{row['loss_last']:.3f}",
            f"{row['clips_per_second']:.1f}",
            *(f"{value:.3f}" for value in scores.values()),
        )
    (console or Console()).print(table)
