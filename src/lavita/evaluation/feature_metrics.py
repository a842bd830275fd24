"""Metrics of features: their names, the extractors they need, and their scores with floor, limit and classes.

A score is called FVD, FID, KVD, KID or IS only if it is computed on the network that these names stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lavita.evaluation.clips import ClipSet
from lavita.evaluation.distances.frechet import frechet_distance, frechet_score
from lavita.evaluation.distances.inception_score import inception_score
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.distances.precision_recall import neighbour_scores
from lavita.evaluation.features.compute import Outputs
from lavita.evaluation.features.extractors import Extractor, get_extractor
from lavita.evaluation.protocol import Protocol

Features = npt.NDArray[np.float64]
Kind = Literal["frechet", "kernel", "prdc", "inception-score"]

_CHUNK = 64  # clips whose features are read from the outputs at a time, to bound memory


@dataclass(frozen=True)
class FeatureMetric:
    """A metric of features."""

    kind: Kind
    field: str
    """Field of the protocol that names the extractor."""
    needs: tuple[str, ...] = ()
    """Extractors that the metric's name stands for; empty if it may use any."""

    def extractor(self, protocol: Protocol, name: str) -> Extractor:
        """The extractor of the protocol for this metric, which is called `name` in messages.

        Raises:
            ValueError: if the extractor is unknown, or not one that the name stands for.
        """
        chosen = getattr(protocol, self.field)
        level: Literal["clip", "frame", "labels"] = {
            "video_extractor": "clip",
            "image_extractor": "frame",
            "label_extractor": "labels",
        }[self.field]  # type: ignore[assignment]
        extractor = get_extractor(self.field, chosen, level)
        if self.needs and chosen not in self.needs:
            general = next(
                other
                for other, row in FEATURE_METRICS.items()
                if (row.kind, row.field, row.needs) == (self.kind, self.field, ())
            )
            raise ValueError(
                f"metrics has {name!r}, which needs {self.field}={' or '.join(self.needs)} but has {chosen}; "
                f"{general!r} works with any"
            )
        return extractor


_INCEPTIONS = ("inception", "inception_stylegan")
FEATURE_METRICS: dict[str, FeatureMetric] = {
    "fvd": FeatureMetric("frechet", "video_extractor", ("i3d",)),
    "fid": FeatureMetric("frechet", "image_extractor", _INCEPTIONS),
    "is": FeatureMetric("inception-score", "label_extractor", ("c3d",)),
    "kvd": FeatureMetric("kernel", "video_extractor", ("i3d",)),
    "kid": FeatureMetric("kernel", "image_extractor", _INCEPTIONS),
    "prdc": FeatureMetric("prdc", "video_extractor"),
    "prdc-image": FeatureMetric("prdc", "image_extractor"),
    "frechet-video": FeatureMetric("frechet", "video_extractor"),
    "frechet-image": FeatureMetric("frechet", "image_extractor"),
    "kernel-video": FeatureMetric("kernel", "video_extractor"),
    "kernel-image": FeatureMetric("kernel", "image_extractor"),
    "inception-score": FeatureMetric("inception-score", "label_extractor"),
}
"""By name. `fvd`, `fid`, `kvd`, `kid` and `is` insist on the networks that the field uses; the others take any."""

_SHORT = {
    "frechet-video": "fvd",
    "frechet-image": "fid",
    "kernel-video": "kvd",
    "kernel-image": "kid",
    "inception-score": "is",
}


def score_name(metric: FeatureMetric, extractor: Extractor) -> str:
    """The name of a score: `fvd` on I3D, `frechet-video[efficientnet_lite0_video]` on another extractor."""
    suffix = {"video_extractor": "-video", "image_extractor": "-image", "label_extractor": ""}[metric.field]
    general = f"{metric.kind}{suffix}"
    standard = FEATURE_METRICS[_SHORT[general]].needs if general in _SHORT else ()
    if extractor.name not in standard:
        return f"{general}[{extractor.name}]"
    # Inception with StyleGAN's resize gives other numbers than the FID that papers cite.
    return _SHORT[general] if extractor.name == standard[0] else f"{_SHORT[general]}[{extractor.name}]"


@dataclass(frozen=True)
class Sample:
    """Clips with the outputs of networks for them."""

    clips: ClipSet
    outputs: Outputs

    def features(self, extractor: Extractor) -> Features:
        """Features: (clips, D), or (frames of all clips, D) for an extractor of frames."""
        rows = self.outputs[extractor.network.name]
        if extractor.level == "frame":
            # Clip by clip, since they may differ in length.
            return np.concatenate([extractor.read(row[None])[0] for row in rows]).astype(np.float64)
        parts = [np.stack(rows[first : first + _CHUNK]) for first in range(0, len(rows), _CHUNK)]
        return np.concatenate([extractor.read(part) for part in parts]).astype(np.float64)

    def videos(self, extractor: Extractor) -> npt.NDArray[np.int64]:
        """The index of the video of each row of `features`; rows of one video are not independent."""
        indices = {name: index for index, name in enumerate(dict.fromkeys(clip.name for clip in self.clips.clips))}
        return self._per_row(np.array([indices[clip.name] for clip in self.clips.clips]), extractor)

    def labels(self, extractor: Extractor) -> npt.NDArray[np.str_]:
        """The class of each row of `features`, "" without one."""
        return self._per_row(np.array([label or "" for label in self.clips.labels]), extractor)

    def _per_row(self, per_clip: npt.NDArray[Any], extractor: Extractor) -> npt.NDArray[Any]:
        return np.repeat(per_clip, self._lengths) if extractor.level == "frame" else per_clip

    def sparse(self, extractor: Extractor, frames_per_clip: int) -> npt.NDArray[np.int64]:
        """The rows of `features` for costly metrics: all clips, or evenly spaced frames of each."""
        if extractor.level != "frame":
            return np.arange(len(self.clips.clips))
        starts = np.cumsum(self._lengths) - self._lengths
        picked = [
            start + np.unique(((np.arange(frames_per_clip) + 0.5) * length / frames_per_clip).astype(int))
            for start, length in zip(starts, self._lengths, strict=True)
        ]
        return np.concatenate(picked)

    @property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.array([clip.num_frames for clip in self.clips.clips])


@dataclass(frozen=True)
class Samples:
    """The samples that are compared."""

    real: Sample
    generated: Sample
    floor: Sample | None = None
    """Other real clips, as many as generated ones."""
    every_frame: Sample | None = None
    """Every frame of the real videos, if the protocol compares images with these."""

    def reference(self, extractor: Extractor) -> Sample:
        """The real sample that an extractor's features are compared with."""
        return self.every_frame if self.every_frame is not None and extractor.level == "frame" else self.real


def score_features(name: str, samples: Samples, protocol: Protocol) -> dict[str, Any]:
    """Computes one metric.

    Args:
        name: name in `FEATURE_METRICS`.
        samples: the samples to compare.
        protocol: decides the formulas.

    Returns:
        JSON-able: `value`, `num_real`, `num_generated` and `extractor`; depending on the metric also an interval, the
        limit for infinitely many samples, the floor, and the same per class.

    Raises:
        ValueError: if there are too few samples.
    """
    metric = FEATURE_METRICS[name]
    extractor = metric.extractor(protocol, name)
    compute = {"frechet": _frechet, "kernel": _kernel, "prdc": _prdc, "inception-score": _inception_score}[metric.kind]
    return {
        "extractor": extractor.name,
        "num_features": extractor.num_features,
        "sees_order_of_frames": extractor.sees_order,
        **compute(extractor, samples, protocol),
    }


def _frechet(extractor: Extractor, samples: Samples, protocol: Protocol) -> dict[str, Any]:
    ddof = protocol.image_ddof if extractor.level == "frame" else protocol.video_ddof
    reference = samples.reference(extractor)
    real, real_videos = reference.features(extractor), reference.videos(extractor)
    score = frechet_score(
        real,
        samples.generated.features(extractor),
        ddof,
        real_videos,
        samples.generated.videos(extractor),
        protocol.num_halvings,
        protocol.seed,
    )
    floor = None
    if samples.floor is not None:
        floor = frechet_distance(real, samples.floor.features(extractor), ddof)
    by_class = _by_class(
        extractor,
        reference,
        samples.generated,
        lambda x, y, cx, cy: asdict(frechet_score(x, y, ddof, cx, cy, num_halvings=0)),
        extractor.num_features + 1,
    )
    return {
        **asdict(score),
        "num_real": len(real),
        "num_generated": len(samples.generated.videos(extractor)),
        "ddof": ddof,
        "floor": floor,
        "per_class": by_class,
    }


def _kernel(extractor: Extractor, samples: Samples, protocol: Protocol) -> dict[str, Any]:
    reference = samples.reference(extractor)

    def picked(sample: Sample) -> tuple[Features, npt.NDArray[np.int64]]:
        rows = sample.sparse(extractor, protocol.frames_a_clip)
        return sample.features(extractor)[rows], sample.videos(extractor)[rows]

    real, real_videos = picked(reference)

    def compute(sample: Sample) -> dict[str, Any]:
        rows, videos = picked(sample)
        return {
            **asdict(kernel_score(real, rows, real_videos, videos)),
            "num_real": len(real),
            "num_generated": len(rows),
        }

    by_class = _by_class(
        extractor,
        reference,
        samples.generated,
        lambda x, y, cx, cy: asdict(kernel_score(x, y, cx, cy)),
        3,
        protocol.frames_a_clip,
    )
    return {
        **compute(samples.generated),
        "floor": None if samples.floor is None else compute(samples.floor)["value"],
        "per_class": by_class,
    }


def _prdc(extractor: Extractor, samples: Samples, protocol: Protocol) -> dict[str, Any]:
    reference = samples.reference(extractor)

    def rows(sample: Sample) -> Features:
        return sample.features(extractor)[sample.sparse(extractor, protocol.frames_a_clip)]

    real, generated = rows(reference), rows(samples.generated)
    floor = None
    if samples.floor is not None:
        floor = asdict(neighbour_scores(real, rows(samples.floor), protocol.neighbours))
    return {
        **asdict(neighbour_scores(real, generated, protocol.neighbours)),
        "num_real": len(real),
        "num_generated": len(generated),
        "floor": floor,
    }


def _inception_score(extractor: Extractor, samples: Samples, protocol: Protocol) -> dict[str, Any]:
    variant = protocol.inception_variant

    def compute(sample: Sample) -> dict[str, Any]:
        return asdict(inception_score(sample.features(extractor), variant.num_splits))

    return {
        **compute(samples.generated),
        "num_real": 0,
        "num_generated": variant.num_samples,
        "variant": protocol.inception_score,
        # More is better here, so the score of real clips is rather a ceiling.
        "floor": None if samples.floor is None else compute(samples.floor)["value"],
    }


def _by_class(
    extractor: Extractor,
    reference: Sample,
    generated: Sample,
    compute: Callable[..., dict[str, Any]],
    least: int,
    frames_per_clip: int | None = None,
) -> dict[str, dict[str, Any] | None] | None:
    """Computes a score per class.

    Args:
        extractor: the extractor of the features.
        reference: real sample.
        generated: generated sample.
        compute: the score of real and generated features, and the videos that these are from.
        least: fewest rows of features that a class needs.
        frames_per_clip: for `Sample.sparse`; None takes all rows.

    Returns:
        The score of each class that both samples have, None for a class with too few rows or videos; or None if fewer
        than two classes are shared.
    """
    shared = set(reference.clips.labels) & set(generated.clips.labels)
    names = sorted(name for name in shared if name is not None)
    if len(names) < 2:
        return None
    parts = []
    for sample in (reference, generated):
        rows = slice(None) if frames_per_clip is None else sample.sparse(extractor, frames_per_clip)
        parts.append((sample.features(extractor)[rows], sample.videos(extractor)[rows], sample.labels(extractor)[rows]))
    result: dict[str, dict[str, Any] | None] = {}
    for name in names:
        chosen = [(rows[labels == name], videos[labels == name]) for rows, videos, labels in parts]
        enough = all(len(rows) >= least and len(set(videos.tolist())) >= 3 for rows, videos in chosen)
        (x, videos_x), (y, videos_y) = chosen
        result[name] = (
            {**compute(x, y, videos_x, videos_y), "num_real": len(x), "num_generated": len(y)} if enough else None
        )
    return result


def extractors_of(metrics: Sequence[str], protocol: Protocol) -> Mapping[str, Extractor]:
    """The extractors that the metrics need, by name.

    Raises:
        ValueError: if an extractor is unknown, or not one that a metric's name stands for.
    """
    needed = [FEATURE_METRICS[name].extractor(protocol, name) for name in metrics]
    return {extractor.name: extractor for extractor in needed}
