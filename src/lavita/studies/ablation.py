"""The paper's ablations (Fig. 5, Table 4) as runnable studies of configurations that differ in one field.

Each arm of a study is a configuration. Everything else is the same for all arms, including the seeds and therefore the
clips, timesteps and noise of every step; where the frame interval differs, the clips have the same first frames. Each
arm goes through the public commands: train, sample, evaluate. Finished parts are kept, so an interrupted study goes on
when the same command is run again.
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
from lavita.core.files import write_json
from lavita.core.seeds import DRAWS
from lavita.data.clips import clip_span
from lavita.models.autoencoder import downsampling, load_autoencoder
from lavita.models.packaged import autoencoder_source
from lavita.models.presets import PATCH_SIZES
from lavita.training.config import RunConfig
from lavita.video.contact_sheet import contact_sheet
from lavita.video.reading import iter_frames

Arms = Mapping[str, tuple[str, ...]]
"""For the name of each arm, the fields in which it differs, as `a.b=c`."""

INTERVALS = (1, 2, 3, 4)
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
    "temporal-position": _one_field("model.temporal_position", TEMPORAL_POSITIONS),  # Fig. 5 (b)
    "variant": _one_field("model.variant", VARIANTS),  # Fig. 5 (d), Table 4
    "patch-embedding": _one_field("model.patch_embedding", PATCH_EMBEDDINGS),  # Fig. 5 (e)
    "conditioning": _one_field("model.conditioning", CONDITIONINGS),  # Fig. 5 (f)
    "joint-training": _one_field("data.num_images", (0, 8)),  # Tables 1 and 2: LAVITA, LAVITA+IMG
    "combinations": _combinations(),
}
"""Studies whose arms do not depend on the shared configuration. Those that do: `variant_arms` (its four variants are
here, too) and `frame_interval_arms`. Fig. 5 (c), learning from an image model, needs weights: `pretraining_arms`."""


def frame_interval_arms(config: RunConfig) -> Arms:
    """Fig. 5 (a): intervals of 1 to 4 frames, where the clips of all arms start at the same frames of the same videos.

    So only starts are drawn that leave room for the longest clip, with interval 4.
    """
    span = clip_span(config.data.num_frames, max(INTERVALS))
    return {f"frame_interval-{n}": (f"data.frame_interval={n}", f"data.start_span={span}") for n in INTERVALS}


def variant_arms(config: RunConfig) -> Arms:
    """Fig. 5 (d): the four variants at the configuration's patch size, and Variant 4 at twice this size.

    The paper's Variant 4 did worst, and its operations in Table 3 are those of patch size 4, where the other variants
    have 2. The fifth arm tells apart which of the two makes the difference. It is left out, with a line that says so,
    if patches of twice the size do not divide the latents.
    """
    size, _, patch = config.model.preset.partition("/")
    twice = 2 * int(patch)
    unit = twice * downsampling(load_autoencoder(autoencoder_source(config.autoencoder, config.data.resolution)))
    if twice not in PATCH_SIZES or config.data.resolution % unit:
        print(f"Variant 4 is not compared at patch size {twice}: data.resolution is {config.data.resolution}")
        return STUDIES["variant"]
    return {**STUDIES["variant"], f"variant-4-patch-{twice}": ("model.variant=4", f"model.preset={size}/{twice}")}


def pretraining_arms(weights: str) -> Arms:
    """Fig. 5 (c): training from random weights, and from an image model (`train.init_from`).

    From the image model in the paper's way, where only positions and labels are adapted, and in ours, where attention
    in time adds nothing at first.
    """
    given = f"train.init_from={weights}"
    return {"from-scratch": (), "pretrained": (given, "train.init_closed=false"), "pretrained-closed": (given,)}


@dataclass(frozen=True)
class StudyPlan:
    """How the arms of a study are trained, sampled and scored."""

    out: Path
    """Folder of the study: one folder per arm, `study.json`, `results.json`, `curves.png` and `contact_sheet.png`."""
    config: str
    """Configuration shared by all arms: a YAML file, or the name of a packaged one."""
    overrides: tuple[str, ...] = ()
    """Fields to change in all arms, as `a.b=c`."""
    steps: tuple[int, ...] = (1000,)
    """Increasing numbers of training steps at which each arm is sampled and scored; the last one is its length."""
    seeds: str = "0-3"
    """Seeds of the samples, see `generate.parse_seeds`."""
    sample_steps: int = 20
    """Sampling steps."""
    real: Path | None = None
    """Class folders of real videos to score against; None for no scores."""
    metrics: str = "accuracy,motion"
    """Metrics of `lavita evaluate`, separated by commas."""
    protocol: tuple[str, ...] = ()
    """Fields of the evaluation protocol, as `a=b`."""


def run_study(arms: Arms, plan: StudyPlan) -> list[dict[str, Any]]:
    """Trains, samples and scores all arms, then writes and prints the results.

    Args:
        arms: one of `STUDIES`, or your own.
        plan: everything else.

    Returns:
        One row per arm: see `summarize_arm`.

    Raises:
        ValueError: if the steps do not increase, or finished parts drew other random numbers than this version does.
        CommandFailed: if a command failed; the same call continues from there.
    """
    if not plan.steps or list(plan.steps) != sorted(set(plan.steps)) or plan.steps[0] < 1:
        raise ValueError(f"steps is {plan.steps}, but must be increasing numbers of at least 1")
    record = plan.out / "study.json"
    if any((plan.out / name).exists() for name in arms):
        drawn = json.loads(record.read_text(encoding="utf-8"))["draws"] if record.exists() else 1
        if drawn != DRAWS:
            raise ValueError(
                f"{plan.out}: holds arms of a version that drew other clips and noise from the same seed, so that they "
                "cannot be compared with new ones; use another out"
            )
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(record, {"draws": DRAWS})
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
    write_json(plan.out / "results.json", {"steps": plan.steps, "config": plan.config, "arms": rows})
    write_curves(rows, plan)
    _write_contact_sheet(rows, plan)
    print_study(rows)
    return rows


def commands(name: str, fields: Sequence[str], plan: StudyPlan, steps: int) -> list[tuple[list[str], Path]]:
    """The `lavita` commands that bring an arm to a number of steps, each with the file that marks it as done."""
    arm = plan.out / name
    point = arm / f"step-{steps:08d}"
    run, samples = arm / "train", point / "samples"
    own = any(field.startswith("model.preset=") for field in fields)
    shared = [override for override in plan.overrides if not (own and override.startswith("model.preset="))]
    settings = [f"run_dir={run}", f"train.steps={steps}", *shared, *fields]
    if not any(override.startswith("train.sample_every=") for override in plan.overrides):
        settings.append("train.sample_every=0")
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
    """The results of one arm.

    Returns:
        `name`; `loss_first` and `loss_last`, means over the first and the last tenth of its steps; `curve`,
        [[step, loss], ...]; `clips_per_second`, the median; and `scores` {steps: {metric: number}}.
    """
    lines = (plan.out / name / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records]
    tenth = max(1, len(losses) // 10)
    scores = {}
    for steps in plan.steps if plan.real is not None else ():
        report = json.loads((plan.out / name / f"step-{steps:08d}" / "scores.json").read_text(encoding="utf-8"))
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
    """One number per metric in a report of `lavita evaluate`; for the motion ratios it is their geometric mean."""
    numbers = {name: row["value"] for name, row in report.get("scores", {}).items() if "value" in row}
    if "accuracy" in report:
        numbers["accuracy"] = report["accuracy"]["accuracy"]
    if "motion" in report:
        numbers["motion within 2x"] = report["motion"]["num_within_factor_two"] / report["motion"]["num_classes"]
        ratios = [row["ratio"] for row in report["motion"]["per_class"].values() if row["ratio"]]
        if ratios:  # there are none if nothing moves
            numbers["motion ratio"] = float(np.exp(np.mean(np.log(ratios))))
    return numbers


def write_curves(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Writes `curves.png`: the losses, and the scores if there are several per arm, over the steps."""
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


def _write_contact_sheet(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Writes `contact_sheet.png`: final samples of every arm with the same seeds and conditions."""
    pictures, labels = [], []
    for row in rows:
        samples = sorted((plan.out / row["name"] / f"step-{plan.steps[-1]:08d}" / "samples").rglob("*.mp4"))
        picked = np.linspace(0, len(samples) - 1, min(8, len(samples))).round().astype(int)
        pictures.append([np.stack(list(iter_frames(samples[index]))) for index in picked])
        labels.append(row["name"])
    contact_sheet(pictures, plan.out / "contact_sheet.png", labels, num_columns=3)


def print_study(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints one row per arm: losses, speed, and final scores."""
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
