"""What `lavita evaluate` does, from sampling a model to writing the page, on one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavita.evaluation.distributed import Processes, processes
from lavita.evaluation.gallery import write_gallery
from lavita.evaluation.networks import NETWORKS
from lavita.evaluation.protocol import make_protocol
from lavita.evaluation.report import print_scores, write_scores
from lavita.evaluation.sampling import SamplingOptions, is_model, sample_model
from lavita.evaluation.scores import METRICS, Options, score
from lavita.runtime import pick_device

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
    device = str(pick_device(options.device))
    weights = parse_weights(options.weights)
    _check_metrics(options)
    with processes() as team:
        generated, model = _generated(options, protocol.num_generated_clips, protocol.num_frames, device, team)
        manifest = options.manifest
        if manifest is None and options.out is not None:
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


def parse_weights(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` and folders to what `networks.find_weights` takes.

    Raises:
        ValueError: an unknown name, or a folder that is none.
    """
    result: dict[str, Path] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if separator:
            if name not in NETWORKS:
                raise ValueError(f"weights is {text!r}; allowed names: {', '.join(NETWORKS)}")
            result[name] = Path(file)
        elif not Path(text).is_dir():
            raise ValueError(f"weights is {text!r}; allowed: a folder, or NAME=FILE")
        else:
            result[""] = Path(text)
    return result


def _check_metrics(options: EvaluateOptions) -> None:
    """Refuses early what sampling a model would only delay."""
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics is {unknown[0]!r}; allowed: {', '.join(METRICS)}")
    if all(name in ("accuracy", "motion") for name in options.metrics):
        for field, value in (("page", options.page), ("weights", options.weights), ("manifest", options.manifest)):
            if value:
                raise ValueError(
                    f"{field} is set, but has no effect without a metric of features, such as kernel-video"
                )


def _generated(
    options: EvaluateOptions, num_clips: int, num_frames: int | None, device: str, team: Processes
) -> tuple[Path, dict[str, Any] | None]:
    """The folder of generated videos, and what is known of their model."""
    if not is_model(options.generated):
        fields = ("samples", "sampler", "steps", "guidance_scale", "first_seed")
        useless = [name for name in fields if getattr(options, name) is not None]
        if useless:
            raise ValueError(f"{useless[0]} is set, but has no effect: {options.generated} is not a model to sample")
        stated = options.model_weights
        return Path(options.generated), None if stated is None else {"weights": stated}
    sampling = SamplingOptions(
        steps=options.steps,
        sampler=options.sampler or "unipc",
        guidance_scale=options.guidance_scale,
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
