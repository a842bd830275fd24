"""What `lavita evaluate` does, from sampling a model to writing the page, on one process or several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavita.core.precision import pick_device
from lavita.core.processes import Processes, processes
from lavita.evaluation.evaluate import METRICS, Options, score
from lavita.evaluation.feature_metrics import FEATURE_METRICS
from lavita.evaluation.features.networks import parse_weights
from lavita.evaluation.model_samples import SamplingOptions, is_model, sample_model
from lavita.evaluation.protocol import _NEEDED_BY, make_protocol
from lavita.evaluation.report.page import write_gallery
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.sampling.recipes import find_recipe

DEFAULT_SAMPLES = Path("runs/evaluate/samples")


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of the command; None where one was not given."""

    real: Path
    generated: str
    held_out: Path | None
    metrics: Sequence[str]
    preset: str | None
    overrides: Sequence[str]
    weights: Sequence[str]
    manifest: Path | None
    skip_broken: bool
    samples: Path | None
    recipe: str | None
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    first_seed: int | None
    model_weights: str | None
    cache: Path | None
    out: Path | None
    page: Path | None
    device: str


def run_evaluation(options: EvaluateOptions) -> None:
    """Scores, prints, and writes the report and the page.

    Raises:
        ValueError: for anything that cannot be scored as asked, in one line.
    """
    protocol = make_protocol(options.preset, options.overrides)
    weights = parse_weights(options.weights)
    _check_metrics(options)
    with processes() as team:
        device = _device(options.device, team)
        generated, model = _generated(options, protocol.num_generated_clips, protocol.num_frames, device, team)
        manifest = options.manifest
        if manifest is None and options.out is not None and set(options.metrics) & FEATURE_METRICS.keys():
            # Beside each report its clips; a new evaluation chooses anew.
            manifest = options.out.with_suffix(".clips.json")
            if team.is_first:
                manifest.unlink(missing_ok=True)
            team.gather(None)
        evaluation = score(
            options.real,
            generated,
            options.held_out,
            options.metrics,
            protocol,
            Options(options.cache, weights, options.skip_broken, manifest, device, team, model),
        )
        if not team.is_first:
            return
        print_scores(evaluation.report)
        if options.out is not None:
            write_scores(evaluation.report, options.out)
        if options.page is not None:
            print(write_gallery(evaluation, options.page))


def _check_metrics(options: EvaluateOptions) -> None:
    """Refuses early what sampling a model would only delay."""
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics is {unknown[0]!r}; allowed: {', '.join(METRICS)}")
    chosen = [FEATURE_METRICS[name] for name in options.metrics if name in FEATURE_METRICS]
    given = [text.partition("=")[0] for text in options.overrides]
    if not chosen:
        given += [name for name in ("preset", "page", "weights", "manifest") if getattr(options, name)]
        useless = [name for name in given if name not in ("frame_interval", "seed")]
        if useless:
            raise ValueError(f"{useless[0]} is set, but has no effect without a metric of features: kernel-video ...")
    for name in given:
        key, value = _NEEDED_BY.get(name, ("", ""))
        if key and not any(getattr(metric, key) == value for metric in chosen):
            raise ValueError(f"{name} is set, but has no effect on {', '.join(options.metrics)}")


def _device(name: str, team: Processes) -> str:
    """The device of this process: on several GPUs each has one of its own."""
    device = pick_device(name)
    if str(device) == "cuda" and team.count > 1:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return str(device)


def _generated(
    options: EvaluateOptions, num_clips: int, num_frames: int | None, device: str, team: Processes
) -> tuple[Path, dict[str, Any] | None]:
    """The folder of generated videos, and what is known of their model."""
    if not is_model(options.generated):
        fields = ("samples", "recipe", "sampler", "steps", "guidance_scale", "first_seed")
        useless = [name for name in fields if getattr(options, name) is not None]
        if useless:
            raise ValueError(f"{useless[0]} is set, but has no effect: {options.generated} is not a model to sample")
        stated = options.model_weights
        return Path(options.generated), None if stated is None else {"weights": stated}
    sampling = SamplingOptions(
        recipe=find_recipe(options.recipe or "default").changed(
            sampler=options.sampler, steps=options.steps, guidance_scale=options.guidance_scale
        ),
        first_seed=options.first_seed or 0,
    )
    folder = options.samples or DEFAULT_SAMPLES
    model = sample_model(options.generated, folder, num_clips, num_frames, sampling, device, team)
    if options.model_weights is not None:
        if model["weights"] not in ("not recorded", options.model_weights):
            stated = options.model_weights
            raise ValueError(f"model_weights is {stated}, but {options.generated} has {model['weights']}")
        model["weights"] = options.model_weights
    return folder, model
