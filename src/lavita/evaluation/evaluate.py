"""The scores of generated videos: one call, one report that says how it was made."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavita.core.processes import Processes
from lavita.data.catalog import read_generation
from lavita.data.clips import clip_span
from lavita.evaluation.classes.clips import compare
from lavita.evaluation.classes.scores import CLASS_METRICS
from lavita.evaluation.clips import (
    Side,
    Source,
    _floor,
    _manifest_settings,
    all_frames,
    check_interval,
    check_one_size,
    choose_clips,
    read_manifest,
    read_source,
    write_manifest,
)
from lavita.evaluation.feature_metrics import (
    FEATURE_METRICS,
    Sample,
    Samples,
    check_enough,
    extractors_of,
    score_features,
    score_name,
)
from lavita.evaluation.features.compute import BrokenVideos, compute_outputs, pixel_facts
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.features.networks import Network, load_network
from lavita.evaluation.nearest_clips import Neighbour, neighbour_report
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.report.paper_numbers import quoted_rows
from lavita.evaluation.result import NUM_SHOWN, Evaluation, _class_facts, _versions

METRICS = (*CLASS_METRICS, *FEATURE_METRICS)
"""What `score` can compute, by name."""
DEFAULT_METRICS = ("accuracy", "motion")


@dataclass(frozen=True)
class Options:
    """What does not change the numbers: where things are and where they go."""

    cache_dir: Path | None = None
    """Trained classifiers and the outputs of networks are kept here."""
    weights: Mapping[str, Path] = field(default_factory=dict)
    """See `networks.find_weights`."""
    skip_broken: bool = False
    """Go on without videos that are broken or too short; the report counts them."""
    manifest: Path | None = None
    """The clips: used where the file exists, written where it does not."""
    device: str = "cpu"
    processes: Processes = field(default_factory=Processes)
    model: Mapping[str, Any] | None = None
    """What is known of the model beside `generation.json`: its weights (`ema` or `raw`), seeds."""


def score(
    real: Path,
    generated: Path,
    held_out: Path | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    protocol: Protocol | None = None,
    options: Options | None = None,
) -> Evaluation:
    """Scores generated videos against real ones.

    Args:
        real: folder of the videos that the model was trained on. `accuracy` and `motion` need class folders.
        generated: folder of generated clips, all of one size; for these two in class folders named as the real ones.
        held_out: real videos that the model was not trained on: they check the classifier, and give the floor.
        metrics: names in `METRICS`.
        protocol: everything that decides the numbers.
        options: everything that does not.

    Returns:
        The report: `protocol`; `accuracy` and `motion` as parts of their own; `scores` by name, `sides` and
        `neighbours` where features were asked for.

    Raises:
        ValueError: an unknown metric or none, folders that cannot be compared, too few videos, weights that are missing
            or wrong.
    """
    settings, chosen = protocol or Protocol(), options or Options()
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        given = repr(unknown[0]) if unknown else "empty"
        raise ValueError(f"metrics is {given}; allowed: {', '.join(METRICS)}")
    metrics = list(dict.fromkeys(metrics))
    class_metrics = [name for name in metrics if name in CLASS_METRICS]
    feature_metrics = [name for name in metrics if name in FEATURE_METRICS]
    # First the quick checks of both kinds, then the work.
    comparison = None
    if class_metrics:
        interval, seed = settings.frame_interval, settings.seed
        comparison = compare(real, generated, held_out, interval, seed, chosen.skip_broken)
    evaluation = Evaluation({"protocol": {}})
    if feature_metrics:
        evaluation = _score_features(real, generated, held_out, feature_metrics, settings, chosen)
    report = evaluation.report
    report["protocol"] = {
        **({} if comparison is None else _class_facts(comparison)),
        **report["protocol"],
        "real": str(real),
        "generated": str(generated),
        "held_out": None if held_out is None else str(held_out),
        "metrics": metrics,
        "generation": read_generation(generated),
        "model": None if chosen.model is None else dict(chosen.model),
        "seed": settings.seed,
        "versions": _versions(),
    }
    comparable: dict[str, Any] = report["protocol"].setdefault("comparable", {})
    if comparison is not None and chosen.processes.is_first:
        for name in class_metrics:
            report[name] = CLASS_METRICS[name](comparison, chosen.cache_dir)
        facts = ("classes", "num_frames", "frame_interval", "resolution", "num_real_videos", "num_generated_clips")
        comparable["classes"] = {key: report["protocol"][key] for key in facts}
        comparable["classes"]["seed"] = settings.seed
    return evaluation


def _score_features(
    real: Path,
    generated: Path,
    held_out: Path | None,
    metrics: list[str],
    protocol: Protocol,
    options: Options,
) -> Evaluation:
    began = time.monotonic()
    seconds: dict[str, float] = {}
    extractors = extractors_of(metrics, protocol)
    without: dict[str, set[str]] = {"real": set(), "generated": set(), "held_out": set()}
    networks: dict[str, Network] = {}
    while True:
        sides, sources, resolved, warnings = _choose(real, generated, held_out, metrics, protocol, options, without)
        seconds["find and hash videos"] = time.monotonic() - began - sum(seconds.values())
        if not networks:
            start = time.monotonic()
            for extractor in extractors.values():
                if extractor.network.name not in networks:
                    network = load_network(extractor.network, options.weights, options.device)
                    networks[extractor.network.name] = network
            seconds["load networks"] = time.monotonic() - start
        assert resolved.resolution is not None
        samples: dict[str, Sample] = {}
        try:
            for name, side in sides.items():
                # Where every frame is compared with, image metrics look at that side instead of the real clips.
                unused = {"every_frame": ("clip", "labels"), "real": ("frame",) if "every_frame" in sides else ()}
                wanted = {
                    extractor.network.name
                    for extractor in extractors.values()
                    if extractor.level not in unused.get(name, ())
                }
                outputs = compute_outputs(
                    side,
                    [network for network in networks.values() if network.spec.name in wanted],
                    resolved.resolution,
                    None if options.cache_dir is None else options.cache_dir / "features",
                    options.processes,
                    seconds,
                )
                samples[name] = Sample(side, outputs)
        except BrokenVideos as error:
            if not options.skip_broken:
                raise
            origin = "generated" if name == "generated" else "held_out" if name == "floor" and held_out else "real"
            without[origin] |= error.names
            continue
        break
    if options.manifest is not None and not options.manifest.exists() and options.processes.is_first:
        write_manifest(options.manifest, sides, _manifest_settings(resolved))
    gathered = Samples(samples["real"], samples["generated"], samples.get("floor"), samples.get("every_frame"))
    scores: dict[str, Any] = {}
    neighbours: dict[str, Any] | None = None
    rows: list[Neighbour] = []
    start = time.monotonic()
    if options.processes.is_first:
        for name in metrics:
            metric = FEATURE_METRICS[name]
            called = score_name(metric, metric.extractor(protocol, name))
            if called in scores:
                continue
            before = time.monotonic()
            scores[called] = score_features(name, gathered, resolved)
            quoted = quoted_rows(called, resolved.model_dump())
            if quoted:
                scores[called]["quoted"] = [asdict(row) for row in quoted]
            seconds[f"score {called}"] = time.monotonic() - before
        of_clips = [extractor for extractor in extractors.values() if extractor.level == "clip"]
        if of_clips:
            neighbours, rows = neighbour_report(of_clips[0], gathered, NUM_SHOWN)
    seconds["scores and neighbours"] = time.monotonic() - start
    seconds["in all"] = time.monotonic() - began
    comparable = {
        **{key: value for key, value in resolved.model_dump().items() if key not in _NOT_COMPARED},
        "metrics": sorted(scores),
        "real_clips": sides["real"].digest,
        "every_frame": sides["every_frame"].digest if "every_frame" in sides else None,
        "pixels": pixel_facts(),
        "networks": {name: network.facts() for name, network in sorted(networks.items())},
    }
    report = {
        "protocol": {
            "settings": resolved.model_dump(),
            "num_frames": resolved.num_frames,
            "frame_interval": resolved.frame_interval,
            "resolution": resolved.resolution,
            "extractors": {name: extractors[name].network.name for name in extractors},
            "comparable": {"features": comparable},
        },
        "scores": scores,
        "neighbours": neighbours,
        "sides": {
            **{name: source.facts() for name, source in sources.items()},
            "clips": {name: {"num_clips": len(side.clips), "digest": side.digest} for name, side in sides.items()},
        },
        "warnings": warnings,
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
    }
    return Evaluation(report, sides["real"], sides["generated"], rows, resolved.resolution or 0)


_NOT_COMPARED = {"split", "seed", "floor"}
"""A note; what the digest of the real clips says better; a row of its own."""


def _choose(
    real: Path,
    generated: Path,
    held_out: Path | None,
    metrics: list[str],
    protocol: Protocol,
    options: Options,
    without: Mapping[str, set[str]],
) -> tuple[dict[str, Side], dict[str, Source], Protocol, list[str]]:
    """The clips of each side, the videos they come from, the protocol without gaps, and warnings."""
    interval = check_interval(generated, protocol.frame_interval)
    if interval is None:
        raise ValueError(
            f"frame_interval is not set, and nothing beside {generated} records that of its model: say "
            "frame_interval=K (1 for every frame)"
        )
    skip = options.skip_broken
    made = read_source(generated, protocol.num_frames or 1, skip, without["generated"])
    check_one_size(made.catalog.videos)
    infos = [video.info for video in made.catalog.videos]
    num_frames = protocol.num_frames or min(info.num_frames for info in infos)
    resolution = protocol.resolution or min(infos[0].width, infos[0].height)
    if resolution > min(infos[0].width, infos[0].height):
        raise ValueError(
            f"resolution is {resolution}, but the videos of {generated} are {infos[0].width}x{infos[0].height}; "
            f"allowed: at most {min(infos[0].width, infos[0].height)}"
        )
    resolved = protocol.model_copy(
        update={"frame_interval": interval, "num_frames": num_frames, "resolution": resolution}
    )
    span = clip_span(num_frames, interval)
    sources = {"real": read_source(real, span, skip, without["real"]), "generated": made}
    real_infos = [video.info for video in sources["real"].catalog.videos]
    num_small = sum(min(info.width, info.height) < resolution for info in real_infos)
    frames_in_all = sum(video.info.num_frames for video in sources["real"].catalog.videos)
    warnings: list[str] = []
    if num_small:
        warnings.append(f"{num_small} of {len(real_infos)} real videos are enlarged to {resolution} pixels")
    for name in metrics:
        extractor = FEATURE_METRICS[name].extractor(protocol, name)
        num_real = protocol.num_real_clips * (num_frames if extractor.level == "frame" else 1)
        if extractor.level == "frame" and protocol.real_frames == "all":
            num_real = frames_in_all
        warnings += check_enough(name, protocol, num_real, num_frames)
    if held_out is not None:
        sources["held_out"] = read_source(held_out, span, skip, without["held_out"])
    settings = _manifest_settings(resolved)
    known: dict[str, Side] = {}
    if options.manifest is not None and options.manifest.exists():
        origins = {"real": sources["real"], "floor": sources.get("held_out", sources["real"])}
        known = read_manifest(options.manifest, origins, settings)
    rules: dict[str, Any] = {"order": protocol.real_videos, "max_clips_a_video": protocol.max_clips_a_video}
    sides = {
        "real": known["real"]
        if "real" in known
        else choose_clips(sources["real"], protocol.num_real_clips, num_frames, interval, protocol.seed, **rules),
        "generated": choose_clips(
            made,
            protocol.num_generated_clips,
            num_frames,
            1,
            protocol.seed,
            max_clips_a_video=1,
            random_start=False,
            field="num_generated_clips",
        ),
    }
    if protocol.real_frames == "all" and any(EXTRACTORS[name].level == "frame" for name in _names(metrics, protocol)):
        sides["every_frame"] = all_frames(sources["real"], num_frames)
    if protocol.floor:
        floor = known.get("floor") or _floor(sides["real"], sources, resolved, rules)
        if isinstance(floor, str):
            warnings.append(floor)
        else:
            sides["floor"] = floor
    return sides, sources, resolved, warnings


def _names(metrics: Sequence[str], protocol: Protocol) -> list[str]:
    return list(extractors_of(metrics, protocol))
