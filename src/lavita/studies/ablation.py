"""The paper's ablations (Fig. 5, Table 4) as runnable studies of configurations that differ in one field.

Each arm of a study is a configuration. Everything else is the same for all arms, including the seeds and therefore the
clips, timesteps and noise of every step; where the frame interval differs, the clips have the same first frames. An arm
may be trained with several seeds, which shows how much of a difference is chance. Each training goes through the public
commands: train, sample, evaluate. Finished parts are kept, so an interrupted study goes on when the same command is run
again.
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
STUDY_FIELDS = ("run_dir", "train.steps")
"""Fields that a study sets in every training."""


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


def _recipes() -> Arms:
    """The paper's objective and optimizer against those of `--recipe modern`, on the same model, data and batches.

    `modern` keeps the optimizer, the rate and the schedule of the configuration, which therefore has to be one that
    `lavita train --recipe modern` gives or a like one. `paper` has Eq. 1 and Sec. 4.1: noise and variance, AdamW at a
    constant 1e-4. That rate is for models of XL's width, so `paper-rate-1e-3` has ten times as much. The moving average
    is the configuration's in all arms: one of 0.9999 from the first step would show a short run's random weights.
    """
    modern = (
        "data.normalize_latents=true",
        "model.prediction_type=flow",
        "model.learn_sigma=false",
        "train.timestep_sampling=logit_normal",
        "train.timestep_shift=auto",
    )
    paper = (
        "data.normalize_latents=false",
        "model.prediction_type=epsilon",
        "model.learn_sigma=true",
        "train.timestep_sampling=uniform",
        "train.timestep_shift=1",
        "train.optimizer=adamw",
        "train.warmup_steps=0",
        "train.decay_steps=0",
        "train.clip_grad_norm=null",
    )
    rates = {"paper": "1e-4", "paper-rate-1e-3": "1e-3"}
    return {"modern": modern, **{name: (*paper, f"train.learning_rate={rate}") for name, rate in rates.items()}}


STUDIES: dict[str, Arms] = {
    "temporal-position": _one_field("model.temporal_position", TEMPORAL_POSITIONS),  # Fig. 5 (b)
    "variant": _one_field("model.variant", VARIANTS),  # Fig. 5 (d), Table 4
    "patch-embedding": _one_field("model.patch_embedding", PATCH_EMBEDDINGS),  # Fig. 5 (e)
    "conditioning": _one_field("model.conditioning", CONDITIONINGS),  # Fig. 5 (f)
    "joint-training": _one_field("data.num_images", (0, 8)),  # Tables 1 and 2: LAVITA, LAVITA+IMG
    "combinations": _combinations(),
    "recipe": _recipes(),
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
    data = config.data
    unit = twice * downsampling(load_autoencoder(autoencoder_source(config.autoencoder, data.longest_side)))
    sides = {side for shape in data.shapes for side in (shape.size.height, shape.size.width)}
    if twice not in PATCH_SIZES or any(side % unit for side in sides):
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
    """Fields to change in all arms, as `a.b=c`; an arm that sets a field itself keeps its value."""
    steps: tuple[int, ...] = (1000,)
    """Increasing numbers of training steps at which each arm is sampled and scored; the last one is its length."""
    seeds: str = "0-3"
    """Seeds of the samples, see `jobs.parse_seeds`."""
    sample_steps: int = 20
    """Sampling steps."""
    real: Path | None = None
    """Class folders of real videos to score against; None for no scores."""
    metrics: str = "accuracy,motion"
    """Metrics of `lavita evaluate`, separated by commas."""
    protocol: tuple[str, ...] = ()
    """Fields of the evaluation protocol, as `a=b`."""
    train_seeds: tuple[int, ...] = ()
    """Seeds that each arm is trained with, one training per seed; by default once, with the configuration's seed."""
    prompts: Path | None = None
    """Table of prompts for models of texts, see `lavita sample`."""
    guidance_scale: float | None = None
    """Guidance of the samples; by default that of `lavita sample`."""

    def trainings(self, arm: str, fields: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The fields of each training of an arm, by its folder below `out`."""
        if not self.train_seeds:
            return {arm: tuple(fields)}
        return {f"{arm}/seed-{seed}": (*fields, f"train.seed={seed}") for seed in self.train_seeds}

    def samples(self, name: str, steps: int) -> Path:
        """Folder of the samples of a training after some steps."""
        return self.out / name / f"step-{steps:08d}" / "samples"


def run_study(arms: Arms, plan: StudyPlan) -> list[dict[str, Any]]:
    """Trains, samples and scores all arms, then writes and prints the results.

    Args:
        arms: one of `STUDIES`, or your own.
        plan: everything else.

    Returns:
        One row per training, with several seeds several per arm: see `summarize`.

    Raises:
        ValueError: if the steps do not increase, an override has no effect, or finished parts drew other random numbers
            than this version does.
        CommandFailed: if a command failed; the same call continues from there.
    """
    if not plan.steps or list(plan.steps) != sorted(set(plan.steps)) or plan.steps[0] < 1:
        raise ValueError(f"steps is {plan.steps}, but must be increasing numbers of at least 1")
    for override in plan.overrides:
        key = _key(override)
        if key in STUDY_FIELDS or all(key in map(_key, fields) for fields in arms.values()):
            owner = "the study" if key in STUDY_FIELDS else "every arm"
            raise ValueError(f"{override} has no effect: {owner} sets {key}")
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
    trainings = [(arm, each) for arm, fields in arms.items() for each in plan.trainings(arm, fields).items()]
    for number, (arm, (name, fields)) in enumerate(trainings, start=1):
        print(f"\n[{number}/{len(trainings)}] {name}", flush=True)
        for steps in plan.steps:
            for command, result in commands(name, fields, plan, steps):
                if not result.exists():
                    print(f"$ lavita {' '.join(command)}", flush=True)
                    run_command(command)
                    result.parent.mkdir(parents=True, exist_ok=True)
                    result.touch()
        rows.append({"arm": arm, **summarize(name, plan)})
    write_json(plan.out / "results.json", {"steps": plan.steps, "config": plan.config, "trainings": rows})
    write_curves(rows, plan)
    _write_contact_sheet(rows, plan)
    print_study(rows)
    return rows


def commands(name: str, fields: Sequence[str], plan: StudyPlan, steps: int) -> list[tuple[list[str], Path]]:
    """The `lavita` commands that bring a training to a number of steps, each with the file that marks it as done."""
    folder = plan.out / name
    samples = plan.samples(name, steps)
    run, point = folder / "train", samples.parent
    own = set(map(_key, fields))
    shared = [override for override in plan.overrides if _key(override) not in own]
    settings = [f"run_dir={run}", f"train.steps={steps}", *shared, *fields]
    if not any(override.startswith("train.sample_every=") for override in plan.overrides):
        settings.append("train.sample_every=0")
    sample = ["sample", str(run / "pipeline"), "--out", str(samples)]
    sample += ["--seeds", plan.seeds, "--steps", str(plan.sample_steps)]
    if plan.prompts is not None:
        sample += ["--prompts", str(plan.prompts)]
    if plan.guidance_scale is not None:
        sample += ["--guidance-scale", f"{plan.guidance_scale:g}"]
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


def _key(override: str) -> str:
    """The field that `a.b=c` changes."""
    return override.partition("=")[0]


def summarize(name: str, plan: StudyPlan) -> dict[str, Any]:
    """The results of one training.

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


def by_arm(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each arm, one per seed."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def write_curves(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Writes `curves.png`: the losses over the steps, and the scores if there are several per training.

    With several seeds, a line is their mean, and a band reaches from the smallest to the largest value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0]["scores"][str(plan.steps[0])]) if rows[0]["scores"] and len(plan.steps) > 1 else []
    figure = Figure(figsize=(6 * (1 + len(names)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    arms = by_arm(rows)
    for number, (arm, trainings) in enumerate(arms.items()):
        color = f"C{number % 10}"
        curves = np.array([row["curve"] for row in trainings], dtype=float)  # (seeds, lines, 2)
        width = max(1, curves.shape[1] // 30)  # smoothed, so that a dozen arms can be told apart
        smooth = np.array([np.convolve(curve[:, 1], np.ones(width) / width, mode="valid") for curve in curves])
        lines = [(panels[0], curves[0, width - 1 :, 0], smooth)]
        for axes, metric in zip(panels[1:], names, strict=True):
            scores = [[row["scores"][str(step)].get(metric, np.nan) for step in plan.steps] for row in trainings]
            lines.append((axes, np.array(plan.steps, dtype=float), np.array(scores, dtype=float)))
        for axes, steps, values in lines:
            marker = None if axes is panels[0] else "o"
            axes.plot(steps, values.mean(axis=0), label=arm, linewidth=1, marker=marker, color=color)
            if len(trainings) > 1:
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=color, linewidth=0)
    for axes, title in zip(panels, ("loss", *names), strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    if len(arms) <= 12:
        panels[0].legend(fontsize=8)
    figure.savefig(plan.out / "curves.png", dpi=110)


def _write_contact_sheet(rows: Sequence[Mapping[str, Any]], plan: StudyPlan) -> None:
    """Writes `contact_sheet.png`: final samples of every arm's first training, with the same seeds and conditions."""
    pictures, labels = [], []
    for arm, (row, *_) in by_arm(rows).items():
        samples = sorted(plan.samples(row["name"], plan.steps[-1]).rglob("*.mp4"))
        picked = np.linspace(0, len(samples) - 1, min(8, len(samples))).round().astype(int)
        pictures.append([np.stack(list(iter_frames(samples[index]))) for index in picked])
        labels.append(arm)
    contact_sheet(pictures, plan.out / "contact_sheet.png", labels, num_columns=3)


def print_study(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints one row per arm: losses, speed, and final scores; with several seeds their mean and standard deviation."""

    def last_scores(row: Mapping[str, Any]) -> dict[str, float]:
        return list(row["scores"].values())[-1] if row["scores"] else {}

    metrics = list(last_scores(rows[0]))
    table = Table(Column("arm", no_wrap=True), "loss, first tenth", "loss, last tenth", "clips/s", *metrics)
    for arm, trainings in by_arm(rows).items():
        table.add_row(
            arm,
            _mean([row["loss_first"] for row in trainings]),
            _mean([row["loss_last"] for row in trainings]),
            _mean([row["clips_per_second"] for row in trainings], 1),
            *(_mean([last_scores(row).get(metric) for row in trainings]) for metric in metrics),
        )
    (console or Console()).print(table)


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean, and with several values the standard deviation of one (n - 1); `-` if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{np.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} +- {np.std(known, ddof=1):.{digits}f}"
