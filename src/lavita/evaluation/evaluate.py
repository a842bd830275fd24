"""Evaluation: from a folder of videos, or a model, to scores and a report that says how they were made.

Folders are scanned (`sources`), clips chosen (`clips`), shown to networks (`features`), compared (`distances`,
`feature_metrics`, `classes`), and the result is written (`report`). The protocol decides the numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lavita.core.files import check_outside
from lavita.core.precision import pick_device
from lavita.core.processes import Processes, processes
from lavita.data.catalog import read_generation
from lavita.data.clips import clip_span
from lavita.evaluation.classes.clips import select_videos
from lavita.evaluation.classes.scores import CLASS_METRICS
from lavita.evaluation.clips import Selection, choose_all, complete_protocol, crop_warnings
from lavita.evaluation.enough import check_enough, drop_small_floor
from lavita.evaluation.feature_metrics import (
    FEATURE_METRICS,
    Sample,
    Samples,
    extractors_of,
    score_features,
    score_name,
)
from lavita.evaluation.features.compute import BrokenVideos, compute_outputs
from lavita.evaluation.features.extractors import Extractor
from lavita.evaluation.features.networks import Network, load_network, parse_weights
from lavita.evaluation.manifest import read_manifest, write_manifest
from lavita.evaluation.model_samples import is_model, sample_model
from lavita.evaluation.nearest_clips import Neighbour, neighbour_report
from lavita.evaluation.protocol import NEEDED_BY, Protocol, make_protocol
from lavita.evaluation.report.page import write_page
from lavita.evaluation.report.paper_numbers import quoted_rows
from lavita.evaluation.report.table import print_scores, write_scores
from lavita.evaluation.result import NUM_SHOWN, Evaluation, class_facts, feature_report, versions
from lavita.evaluation.sources import VideoFolder, find_interval
from lavita.sampling.recipes import find_recipe

METRICS = (*CLASS_METRICS, *FEATURE_METRICS)
"""Names of all metrics."""
DEFAULT_METRICS = ("accuracy", "motion")
DEFAULT_SAMPLES = Path("runs/evaluate/samples")


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `lavita evaluate`; None if one is not given."""

    real: Path
    """Folder of the videos that the model was trained on. `accuracy` and `motion` need class folders."""
    generated: str | Path
    """Folder of generated videos, all of one size; or a model to sample: `builtin`, or the folder of a pipeline."""
    held_out: Path | None = None
    """Folder of real videos that the model was not trained on: to check the classifier, and for the floor."""
    metrics: Sequence[str] = DEFAULT_METRICS
    """Names in `METRICS`."""
    preset: str | None = None
    """Name in `protocol.PRESETS`."""
    overrides: Sequence[str] = ()
    """Fields of the protocol, as `field=value`."""
    weights: Sequence[str] = ()
    """Weight files of networks; see `features.networks.parse_weights`."""
    manifest: Path | None = None
    """JSON file of the chosen clips: used if it exists, otherwise written."""
    skip_broken: bool = False
    """Leave out broken and too short videos, and count them, instead of stopping."""
    prompts: Path | None = None
    """Table of the prompts of a model with texts."""
    samples: Path | None = None
    """Folder for the samples of a model."""
    recipe: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    """How to sample a model; see `sampling.recipes.Recipe`."""
    first_seed: int | None = None
    """Seed of the first sample of each class."""
    model_weights: str | None = None
    """Which weights of the model were sampled, `ema` or `raw`: a note for the report."""
    cache: Path | None = None
    """Folder that keeps trained classifiers and the outputs of networks."""
    out: Path | None = None
    """JSON file of the report."""
    page: Path | None = None
    """Folder of the page."""
    device: str = "auto"
    """See `core.precision.pick_device`."""


def run_evaluation(options: EvaluationOptions) -> None:
    """Evaluates, prints the scores, and writes the report and the page.

    Raises:
        ValueError: as `evaluate`.
    """
    with processes() as team:
        evaluation = evaluate(options, team)
        if not team.is_first:
            return
        print_scores(evaluation.report)
        if options.out is not None:
            write_scores(evaluation.report, options.out)
        if options.page is not None:
            print(write_page(evaluation, options.page))


def evaluate(options: EvaluationOptions, team: Processes | None = None) -> Evaluation:
    """Scores generated videos against real ones.

    Args:
        options: what to evaluate, and how.
        team: processes that share the work; the numbers are those of one process.

    Returns:
        The report, with `protocol`; `accuracy` and `motion`; and `scores` by name, `sides` and `neighbours` if there
        are metrics of features. Only the first process computes the scores.

    Raises:
        ValueError: for an unknown metric or field, an option without effect, folders that cannot be compared, too few
            videos, or weights that are missing or wrong. The message is one line.
    """
    protocol = make_protocol(options.preset, options.overrides)
    parse_weights(options.weights)
    _check_options(options)
    _check_targets(options)
    team = team or Processes()
    options, model = _with_samples(replace(options, device=_device(options.device, team)), protocol, team)
    metrics = list(dict.fromkeys(options.metrics))
    class_metrics = [name for name in metrics if name in CLASS_METRICS]
    feature_metrics = [name for name in metrics if name in FEATURE_METRICS]
    folders = {"real": VideoFolder(options.real), "generated": VideoFolder(Path(options.generated))}
    if options.held_out is not None:
        folders["held_out"] = VideoFolder(options.held_out)
    # Both kinds of metrics check their videos before either does its work.
    videos = None
    if class_metrics:
        videos = select_videos(
            folders["real"], folders["generated"], folders.get("held_out"), protocol, options.skip_broken
        )
    evaluation = Evaluation({"protocol": {}})
    if feature_metrics:
        evaluation = _evaluate_features(folders, feature_metrics, protocol, options, team)
    report = evaluation.report
    report["protocol"] = {
        **({} if videos is None else class_facts(videos)),
        **report["protocol"],
        "real": str(options.real),
        "generated": str(options.generated),
        "held_out": None if options.held_out is None else str(options.held_out),
        "metrics": metrics,
        "generation": read_generation(folders["generated"].root),
        "model": model,
        "seed": protocol.seed,
        "versions": versions(),
    }
    comparable: dict[str, Any] = report["protocol"].setdefault("comparable", {})
    if videos is not None and team.is_first:
        for name in class_metrics:
            report[name] = CLASS_METRICS[name](videos, options.cache)
        facts = ("classes", "num_frames", "frame_interval", "resolution", "num_real_videos", "num_generated_clips")
        comparable["classes"] = {key: report["protocol"][key] for key in facts}
        comparable["classes"]["seed"] = protocol.seed
    return evaluation


def _check_options(options: EvaluationOptions) -> None:
    """Refuses unknown metrics and options without effect, before a model is sampled."""
    unknown = [name for name in options.metrics if name not in METRICS]
    if unknown or not options.metrics:
        given = repr(unknown[0]) if unknown else "empty"
        raise ValueError(f"metrics is {given}; allowed: {', '.join(METRICS)}")
    chosen = [FEATURE_METRICS[name] for name in options.metrics if name in FEATURE_METRICS]
    fields = [text.partition("=")[0] for text in options.overrides]
    if not chosen:
        fields += [name for name in ("preset", "page", "weights", "manifest") if getattr(options, name)]
        useless = [name for name in fields if name not in ("frame_interval", "seed")]
        if useless:
            raise ValueError(f"{useless[0]} is set, but has no effect without a metric of features, as kernel-video")
    for name in fields:
        key, value = NEEDED_BY.get(name, ("", ""))
        if key and not any(getattr(metric, key) == value for metric in chosen):
            raise ValueError(f"{name} is set, but has no effect on {', '.join(options.metrics)}")
    if not is_model(str(options.generated)):
        for name in ("prompts", "samples", "recipe", "sampler", "steps", "guidance_scale", "first_seed"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name} is set, but has no effect: {options.generated} is not a model to sample")


def _check_targets(options: EvaluationOptions) -> None:
    """Refuses to write into the folders of videos that are compared."""
    is_sampled = is_model(str(options.generated))
    read = options.real, options.held_out, None if is_sampled else Path(options.generated)
    targets = {field: getattr(options, field) for field in ("out", "page", "cache")}
    if is_sampled:
        targets["samples"] = options.samples or DEFAULT_SAMPLES
    if options.manifest is not None and not options.manifest.exists():
        targets["manifest"] = options.manifest
    for field, target in targets.items():
        if target is not None:
            check_outside(field, target, *read)


def _device(name: str, team: Processes) -> str:
    """The device of this process: if there are several GPUs, each process has its own."""
    device = pick_device(name)
    if str(device) == "cuda" and team.count > 1:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return str(device)


def _with_samples(
    options: EvaluationOptions, protocol: Protocol, team: Processes
) -> tuple[EvaluationOptions, dict[str, Any] | None]:
    """The options with a folder of videos in place of a model, and what is known of the model."""
    stated = options.model_weights
    if not is_model(str(options.generated)):
        return options, None if stated is None else {"weights": stated}
    recipe = find_recipe(options.recipe or ("paper" if options.preset == "paper" else "default")).changed(
        sampler=options.sampler, steps=options.steps, guidance_scale=options.guidance_scale
    )
    folder = options.samples or DEFAULT_SAMPLES
    model = sample_model(
        str(options.generated),
        folder,
        protocol.num_generated_clips,
        protocol.num_frames,
        recipe,
        options.first_seed or 0,
        options.device,
        team,
        options.prompts,
    )
    if stated is not None:
        if model["weights"] not in ("not recorded", stated):
            raise ValueError(f"model_weights is {stated}, but {options.generated} has {model['weights']}")
        model["weights"] = stated
    return replace(options, generated=folder), model


def _evaluate_features(
    folders: Mapping[str, VideoFolder],
    metrics: Sequence[str],
    protocol: Protocol,
    options: EvaluationOptions,
    team: Processes,
) -> Evaluation:
    began = time.monotonic()
    seconds: dict[str, float] = {}
    manifest = _manifest_file(options, team)
    extractors = extractors_of(metrics, protocol)
    networks: dict[str, Network] = {}
    undecodable: dict[str, set[str]] = {name: set() for name in folders}
    while True:
        selection = _select(folders, metrics, protocol, manifest, options.skip_broken, undecodable)
        seconds["find and hash videos"] = time.monotonic() - began - sum(seconds.values())
        if not networks:
            start = time.monotonic()
            weights = parse_weights(options.weights)
            for spec in {extractor.network.name: extractor.network for extractor in extractors.values()}.values():
                networks[spec.name] = load_network(spec, weights, options.device)
            seconds["load networks"] = time.monotonic() - start
        samples: dict[str, Sample] = {}
        try:
            for name, clips in selection.sets.items():
                samples[name] = Sample(
                    clips,
                    compute_outputs(
                        clips,
                        _networks_for(name, selection, extractors, networks),
                        selection.resolution,
                        None if options.cache is None else options.cache / "features",
                        team,
                        seconds,
                    ),
                )
        except BrokenVideos as error:
            if not options.skip_broken:
                raise
            origin = {"floor": "held_out" if "held_out" in folders else "real", "every_frame": "real"}.get(name, name)
            undecodable[origin] |= error.names
            continue
        break
    if manifest is not None and not manifest.exists() and team.is_first:
        write_manifest(manifest, selection.sets, selection.protocol)
    start = time.monotonic()
    scores: dict[str, Any] = {}
    neighbours: dict[str, Any] | None = None
    rows: list[Neighbour] = []
    if team.is_first:
        all_samples = Samples(**samples)
        generation = read_generation(folders["generated"].root)
        scores = _scores(metrics, all_samples, selection.protocol, generation, seconds)
        of_clips = [extractor for extractor in extractors.values() if extractor.level == "clip"]
        if of_clips:
            neighbours, rows = neighbour_report(of_clips[0], all_samples, NUM_SHOWN)
    seconds["scores and neighbours"] = time.monotonic() - start
    seconds["in all"] = time.monotonic() - began
    report = feature_report(selection, extractors, networks, scores, neighbours, seconds)
    return Evaluation(report, selection, rows)


def _manifest_file(options: EvaluationOptions, team: Processes) -> Path | None:
    """The manifest to use or to write; by default a new one next to the report."""
    if options.manifest is not None or options.out is None:
        return options.manifest
    manifest = options.out.with_suffix(".clips.json")
    if team.is_first:
        manifest.unlink(missing_ok=True)
    team.wait()
    return manifest


def _select(
    folders: Mapping[str, VideoFolder],
    metrics: Sequence[str],
    protocol: Protocol,
    manifest: Path | None,
    skip_broken: bool,
    undecodable: Mapping[str, set[str]],
) -> Selection:
    """Chooses the clips, after checking that there are enough for every metric."""
    root = folders["generated"].root
    interval = find_interval(root, protocol.frame_interval)
    if interval is None:
        raise ValueError(
            f"frame_interval is not set, and {root} does not record the interval of its model: add frame_interval=K "
            "(1 for every frame)"
        )
    sources = {
        "generated": folders["generated"].usable(protocol.num_frames or 1, skip_broken, undecodable["generated"])
    }
    protocol = complete_protocol(protocol, sources["generated"], interval)
    assert protocol.num_frames is not None and protocol.resolution is not None
    span = clip_span(protocol.num_frames, interval)
    for name in folders:
        if name != "generated":
            sources[name] = folders[name].usable(span, skip_broken, undecodable[name])
    real = [video.info for video in sources["real"].catalog.videos]
    warnings = crop_warnings(sources["generated"], protocol)
    num_small = sum(min(info.width, info.height) < protocol.resolution for info in real)
    if num_small:
        warnings.append(f"{num_small} of {len(real)} real videos are enlarged to {protocol.resolution} pixels")
    with_every_frame = False
    for name in metrics:
        of_frames = FEATURE_METRICS[name].extractor(protocol, name).level == "frame"
        num_real = protocol.num_real_clips * (protocol.num_frames if of_frames else 1)
        if of_frames and protocol.real_frames == "all":
            with_every_frame = True
            num_real = sum(info.num_frames for info in real)
        warnings += check_enough(name, protocol, num_real)
    known = {}
    if manifest is not None and manifest.exists():
        origins = {"real": sources["real"], "floor": sources.get("held_out", sources["real"])}
        known = read_manifest(manifest, origins, protocol)
    sets, more = choose_all(sources, protocol, known, with_every_frame)
    more += drop_small_floor(metrics, protocol, sets)
    return Selection(protocol, {name: sources[name] for name in folders}, sets, warnings + more)


def _networks_for(
    name: str, selection: Selection, extractors: Mapping[str, Extractor], networks: Mapping[str, Network]
) -> list[Network]:
    """The networks that are run on a set of clips."""
    if name == "every_frame":
        levels = {"frame"}
    elif name == "real" and "every_frame" in selection.sets:
        levels = {"clip", "labels"}  # images are compared with every frame instead
    else:
        levels = {"clip", "labels", "frame"}
    wanted = {extractor.network.name for extractor in extractors.values() if extractor.level in levels}
    return [network for network in networks.values() if network.spec.name in wanted]


def _scores(
    metrics: Sequence[str], samples: Samples, protocol: Protocol, generation: Any, seconds: dict[str, float]
) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name in metrics:
        metric = FEATURE_METRICS[name]
        called = score_name(metric, metric.extractor(protocol, name))
        if called in scores:
            continue
        start = time.monotonic()
        scores[called] = score_features(name, samples, protocol)
        if quoted := quoted_rows(called, protocol.model_dump(), generation):
            scores[called]["quoted"] = [asdict(row) for row in quoted]
        seconds[f"score {called}"] = time.monotonic() - start
    return scores
