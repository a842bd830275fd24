"""Everything that decides a score: which clips, which pixels, which network, which formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from lavita.core.config import ConfigError, StrictConfig, load_config
from lavita.evaluation.distances.inception_score import VARIANTS, Variant

# Fields of the protocol that only some metrics look at: those with this kind, or this field for their extractor.
_NEEDED_BY: dict[str, tuple[str, str]] = {
    "video_extractor": ("field", "video_extractor"),
    "video_ddof": ("field", "video_extractor"),
    "image_extractor": ("field", "image_extractor"),
    "image_ddof": ("field", "image_extractor"),
    "frames_a_clip": ("field", "image_extractor"),
    "real_frames": ("field", "image_extractor"),
    "label_extractor": ("field", "label_extractor"),
    "inception_score": ("kind", "inception-score"),
    "inception_splits": ("kind", "inception-score"),
    "neighbours": ("kind", "prdc"),
    "num_halvings": ("kind", "frechet"),
}


class Protocol(StrictConfig):
    """The protocol of an evaluation; `PRESETS` holds those of the field."""

    dataset: Literal["faceforensics", "skytimelapse", "ucf101", "taichi"] | None = None
    """The paper's data set that the real videos are, if any: only then are its numbers shown beside ours."""
    split: str | None = None
    """The part of the data set that the real videos are, as `train`; a note for the reader of the report."""
    num_real_clips: int = Field(2048, ge=2)
    """Clips of the real side, exactly."""
    num_generated_clips: int = Field(2048, ge=2)
    """Clips of the generated side, exactly."""
    num_frames: int | None = Field(None, ge=1)
    """Frames of a clip; by default those of the generated videos."""
    frame_interval: int | None = Field(None, ge=1)
    """Frames of a real video from one frame of a clip to the next; by default the model's, where it is recorded."""
    resolution: int | None = Field(None, ge=8)
    """Side of the clips after center crop and resize, both sides alike; by default that of the generated videos."""
    real_videos: Literal["random", "first"] = "random"
    """Which real videos are taken where there are more than enough: seeded ones, or the first by name."""
    max_clips_a_video: int | None = Field(None, ge=1)
    """Clips of one real video; by default as many as are needed, with different starts."""
    real_frames: Literal["clips", "all"] = "clips"
    """What image metrics compare with: the frames of the real clips, or every frame of every real video."""
    seed: int = Field(0, ge=0)
    """Of the choice of videos, starts and halvings, and of the classifier."""
    video_extractor: str = "i3d"
    """Features of clips: see `lavita evaluate --help` or docs/evaluation.md."""
    image_extractor: str = "inception"
    """Features of frames."""
    label_extractor: str = "c3d"
    """Class probabilities of clips."""
    video_ddof: Literal[0, 1] = 0
    """Covariances of clips are divided by n - ddof."""
    image_ddof: Literal[0, 1] = 1
    """Covariances of frames are divided by n - ddof."""
    frames_a_clip: int = Field(1, ge=1)
    """Evenly spaced frames of a clip that the kernel distance and the neighbours of images look at."""
    neighbours: int = Field(5, ge=1)
    """k of precision, recall, density and coverage."""
    inception_score: Literal["tgan", "tganv2", "stylegan-v", "custom"] = "stylegan-v"
    """Which published way to compute it."""
    inception_splits: int | None = Field(None, ge=1)
    """Splits, for `custom` only."""
    num_halvings: int = Field(4, ge=0)
    """Halvings behind the limit for many samples; 0 for none."""
    floor: bool = True
    """Whether other real clips of the same number are scored against the real ones, too."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Protocol:
        if (self.inception_score == "custom") != (self.inception_splits is not None):
            raise ValueError(
                f"inception_splits is {self.inception_splits}; it belongs to inception_score=custom, and only to that"
            )
        return self

    @property
    def inception_variant(self) -> Variant:
        """Samples and splits of the Inception Score."""
        if self.inception_splits is not None:
            return Variant(self.num_generated_clips, self.inception_splits)
        return VARIANTS[self.inception_score]


_FIELD: dict[str, Any] = {"num_frames": 16, "num_real_clips": 2048, "num_generated_clips": 2048, "max_clips_a_video": 1}
OFFLINE = {
    "video_extractor": "efficientnet_lite0_video",
    "image_extractor": "efficientnet_lite0",
    "label_extractor": "efficientnet_lite0_labels",
}
"""Extractors that need no download by hand: their weights are in a package."""
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_FIELD, "frame_interval": 3, "resolution": 256, "real_frames": "all"},
    "stylegan-v": {
        **_FIELD,
        "frame_interval": 1,
        "real_videos": "first",
        "image_extractor": "inception_stylegan",
        "image_ddof": 0,
    },
    "latte": {**_FIELD, "frame_interval": 3, "resolution": 256},
    "offline": OFFLINE,
}
"""`paper`: 2,048 clips of 16 frames a side, one a video at a random start, real ones at interval 3, 256 pixels; FID by
clean-fid against all frames of the real videos. `stylegan-v`: the first 2,048 videos by name, interval 1, FID by
StyleGAN's unresized Inception. `latte`: as Latte's tools, but seeded: interval 3 on the real side. `offline`: our
defaults, with extractors that install from the package index."""


def make_protocol(preset: str | None = None, overrides: Sequence[str] = (), **values: Any) -> Protocol:
    """A protocol from a preset, values, and `field=value` strings, which win.

    Raises:
        ValueError: an unknown preset or field, or a value that does not fit.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset is not None else {}
    given = {key: value for key, value in values.items() if value is not None}
    return load_config(Protocol, {**base, **given}, overrides)
