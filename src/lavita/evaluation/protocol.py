"""The protocol of an evaluation: everything that decides a score, from the choice of clips to the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from lavita.core.config import ConfigError, StrictConfig, load_config
from lavita.core.names import DataSetName
from lavita.evaluation.distances.inception_score import VARIANTS, Variant

NEEDED_BY: dict[str, tuple[str, str]] = {
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
"""Fields of the protocol that have an effect on some metrics only: the attribute of `FeatureMetric` by which these are
recognised, and its value."""


class Protocol(StrictConfig):
    """The protocol of an evaluation; `PRESETS` has the ones in use in the field."""

    dataset: DataSetName | Literal["webvid"] | None = None
    """Data set of the paper that the real videos are from (`folder`: none of these). The report then quotes the paper's
    scores, if protocol and sampling are the paper's."""
    split: str | None = None
    """Part of the data set that the real videos are, such as `train`; a note for the reader of the report."""
    num_real_clips: int = Field(2048, ge=2)
    """Exact number of real clips."""
    num_generated_clips: int = Field(2048, ge=2)
    """Exact number of generated clips."""
    num_frames: int | None = Field(None, ge=1)
    """Frames of a clip; by default those of the generated videos."""
    frame_interval: int | None = Field(None, ge=1)
    """Step from one frame of a real clip to the next, in frames of the video; by default the model's, if recorded."""
    resolution: int | None = Field(None, ge=8)
    """Side of all clips in pixels, after center crop and resize; by default that of the generated videos."""
    real_videos: Literal["random", "first"] = "random"
    """Which real videos are used if there are more than enough: a seeded choice, or the first by name."""
    max_clips_a_video: int | None = Field(None, ge=1)
    """Most clips of one real video, at different starts; by default as many as needed."""
    real_frames: Literal["clips", "all"] = "clips"
    """Real images that metrics of images compare with: the frames of the real clips, or all frames of all videos."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of videos, of starts and halvings, and of the classifier."""
    video_extractor: str = "i3d"
    """Extractor of clip features; docs/evaluation.md lists them."""
    image_extractor: str = "inception"
    """Extractor of frame features."""
    label_extractor: str = "c3d"
    """Extractor of class probabilities of clips."""
    video_ddof: Literal[0, 1] = 0
    """Covariances of clip features are divided by n - ddof."""
    image_ddof: Literal[0, 1] = 1
    """Covariances of frame features are divided by n - ddof."""
    frames_a_clip: int = Field(1, ge=1)
    """Evenly spaced frames per clip that the kernel distance and prdc use for images."""
    neighbours: int = Field(5, ge=1)
    """Number k of nearest neighbours for precision, recall, density and coverage."""
    inception_score: Literal["tgan", "tganv2", "stylegan-v", "custom"] = "stylegan-v"
    """Variant of the Inception Score: number of clips and splits."""
    inception_splits: int | None = Field(None, ge=1)
    """Number of splits, for `inception_score=custom` only."""
    num_halvings: int = Field(4, ge=0)
    """Random halvings from which the limit for infinitely many samples is estimated; 0 for no limit."""
    floor: bool = True
    """Also score as many other real clips against the real ones."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Protocol:
        if (self.inception_score == "custom") != (self.inception_splits is not None):
            raise ValueError(
                f"inception_splits is {self.inception_splits}; it belongs to inception_score=custom, and only to that"
            )
        return self

    @property
    def inception_variant(self) -> Variant:
        """Number of samples and splits of the Inception Score."""
        if self.inception_splits is not None:
            return Variant(self.num_generated_clips, self.inception_splits)
        return VARIANTS[self.inception_score]


_COMMON: dict[str, Any] = {
    "num_frames": 16,
    "num_real_clips": 2048,
    "num_generated_clips": 2048,
    "max_clips_a_video": 1,
}
OFFLINE = {
    "video_extractor": "efficientnet_lite0_video",
    "image_extractor": "efficientnet_lite0",
    "label_extractor": "efficientnet_lite0_labels",
}
"""Extractors whose weights come with a Python package, so that nothing has to be downloaded by hand."""
_STYLEGAN_FID = {"image_extractor": "inception_stylegan", "image_ddof": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_COMMON, "frame_interval": 3, "resolution": 256, "real_frames": "all"},
    "stylegan-v": {
        **_COMMON,
        "frame_interval": 1,
        "real_videos": "first",
        "real_frames": "all",
        **_STYLEGAN_FID,
    },
    "latte": {**_COMMON, "frame_interval": 3, "resolution": 256, "real_frames": "all", **_STYLEGAN_FID},
    "offline": OFFLINE,
}
"""`paper`: 2,048 real and generated clips of 16 frames, one per video at a random start, real ones at interval 3, 256
pixels; FID as clean-fid computes it, against all frames of the real videos. `stylegan-v`: the first 2,048 videos by
name, interval 1, FID with StyleGAN's own resize against all real frames; only the number of generated images is ours,
all 16 frames of 2,048 clips instead of 50,000 images. `latte`: as Latte's tools, with StyleGAN's resize and interval 3
for real clips (6 for `dataset=taichi_hd`, as its author says), but seeded. `offline`: our defaults, with extractors
that install from the package index."""


def make_protocol(preset: str | None = None, overrides: Sequence[str] = ()) -> Protocol:
    """Builds a protocol from a preset and `field=value` strings, which win.

    Raises:
        ValueError: for an unknown preset or field, or a value that does not fit.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    values = {} if preset is None else PRESETS[preset]
    protocol = load_config(Protocol, values, overrides)
    if preset == "latte" and protocol.dataset == "taichi_hd":
        return load_config(Protocol, {**values, "frame_interval": 6}, overrides)
    return protocol
