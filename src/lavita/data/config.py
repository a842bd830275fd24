"""Configuration of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lavita.core.config import ConfigError, StrictConfig
from lavita.core.names import DataSetName
from lavita.core.sizes import Bucket, Size, SizeField, plain_size

SPLITS: Mapping[DataSetName, tuple[str, ...]] = {
    "folder": (),
    "faceforensics": ("train", "val", "test", "all"),
    "sky_timelapse": ("train", "test", "all"),
    "ucf101": ("all", "train", "test", "val", "train01", "test01", "train02", "test02", "train03", "test03"),
    "taichi_hd": ("train", "test", "all"),
}
"""The splits of each data set; the first is what the paper trains on."""
Fit = Literal["crop", "pad", "bucket"]
"""How frames get their size, see `DataConfig.fit`."""
SETS_WITH_CLASSES = frozenset({"ucf101"})


def check_split(dataset: DataSetName, split: str) -> None:
    """Raises a ConfigError if a data set has no such split."""
    if dataset == "folder":
        raise ConfigError(f"split is {split!r}, but dataset=folder has no splits: name the subfolder in path instead")
    if split not in SPLITS[dataset]:
        raise ConfigError(f"split is {split!r}; allowed for dataset={dataset}: {', '.join(SPLITS[dataset])}")


class DataConfig(StrictConfig):
    """The data: which videos, which of their frames, and at what size."""

    path: Path | None = None
    """Folder of the training videos: any tree of video files and frame folders. Required unless `latent_cache` is
    set."""
    dataset: DataSetName = "folder"
    """Layout of `path`: `folder` for any tree of videos, or one of the paper's data sets, whose splits and classes are
    known (docs/data.md)."""
    split: str | None = None
    """Part of a named data set to train on; docs/data.md lists the splits of each. Default: what the paper trains on,
    which is `all` for `ucf101` and `train` for the others."""
    use_classes: bool = True
    """Train with the classes of a named data set that has classes (`ucf101`); `false` trains a model without
    classes."""
    class_folders: bool = False
    """Use the name of each video's parent folder as its class; only with `dataset=folder`."""
    num_frames: int = Field(16, ge=1)
    """Frames of a clip."""
    frame_interval: int = Field(3, ge=1)
    """Step between the frames of a clip, in frames of the file: 1 takes every frame; 3 in the paper."""
    start_span: int | None = Field(None, ge=1)
    """Draw a clip's first frame only from those that have so many frames of the file from there on. Default: as many
    as the clip needs. Runs that differ in `frame_interval` only see clips with the same first frames if all have the
    number that the longest clip needs."""
    resolution: SizeField = 256
    """Size of the frames in pixels: the side of a square, or height x width, as in `96x160`."""
    fit: Fit = "crop"
    """How videos of other sizes get it. `crop`: their middle is cut out in the new shape, and scaled; `pad`: they are
    scaled to fit, and black bars fill the rest; `bucket`: each video gets the shape in `buckets` that is nearest to its
    own, and is cropped to it."""
    buckets: list[Bucket] = Field(default_factory=list)
    """With `fit=bucket`, the shapes of the clips, each as frames x height x width: `[16x64x64, 16x48x80, 1x128x128]`.
    Each step draws one of them, and all clips of its batch have that shape. The first is that of samples, and takes the
    place of `num_frames` and `resolution`."""
    horizontal_flip: bool = True
    """Mirror each clip with probability 1/2, the paper's only augmentation."""
    latent_cache: Path | None = None
    """Folder that `lavita encode` has written, from which latents are read. Default: none; videos are decoded and
    encoded in every step."""
    normalize_latents: bool = False
    """Normalise the latents to mean 0 and variance 1 in each channel. The statistics are those of `latent_cache`, or of
    some frames of the videos; they are saved with the model, and sampling undoes them. Fine-tuning keeps those of
    `train.init_from`."""
    workers: int | None = Field(None, ge=1)
    """Threads that decode videos or image files. Default: one per core, at most 8."""
    captions: Path | None = None
    """Table of captions of the training videos, which makes the model text-conditional: CSV with a header, JSONL or
    Parquet, with the columns `file` (path below the folder of videos) and `caption`, or WebVid's columns
    (docs/data.md). A file may have several captions. Videos without a caption count as broken."""
    actions: Path | None = None
    """Table of the actions of the training videos, which makes the model action-conditional: CSV with a header, JSONL
    or Parquet, with the columns `file` (path below the folder of videos) and `actions` (the action of each of its
    frames, separated by spaces; that of a frame led to it from the one before). Needs `frame_interval=1`. Videos
    without actions count as broken."""
    num_images: int = Field(0, ge=0)
    """Images that follow the frames of every clip in joint training; 0 for training on videos only, 8 in the paper.
    They are frames of independently drawn videos, or image files if `images` is set."""
    images: Path | None = None
    """Folder of image files for `num_images`, or a latent cache of one, written by `lavita encode --images`. Default:
    frames of the training videos."""
    image_captions: Path | None = None
    """Table of captions of `images`, in the format of `captions`; required if both are set."""
    validation: Path | None = None
    """Folder of held-out videos in the layout of the training videos, all of which are used, or a latent cache of one.
    Every `train.validate_every` steps the loss is measured on the same clips of them."""
    validation_captions: Path | None = None
    """Table of captions of `validation`, in the format of `captions`; required if both are set."""
    broken: Literal["skip", "error"] = "skip"
    """Treatment of videos that are broken, too short or without a caption: `skip` reports them and leaves them out;
    `error` stops the run at the first."""

    @property
    def clip_span(self) -> int:
        """Frames of the file that must be left from a clip's first frame on, in the shortest clips."""
        if self.buckets:
            return (min(bucket.num_frames for bucket in self.buckets) - 1) * self.frame_interval + 1
        return self.start_span or self._shortest_span

    @property
    def shapes(self) -> list[Bucket]:
        """The shapes of the clips: the buckets, or the only one."""
        return self.buckets or [Bucket(self.num_frames, Size.of(self.resolution))]

    @property
    def longest_side(self) -> int:
        """The longest side that frames have, in pixels."""
        return max(side for shape in self.shapes for side in (shape.size.height, shape.size.width))

    @property
    def _shortest_span(self) -> int:
        return (self.num_frames - 1) * self.frame_interval + 1

    @property
    def has_classes(self) -> bool:
        """Whether the model is trained with classes."""
        return self.class_folders or (self.dataset in SETS_WITH_CLASSES and self.use_classes)

    @model_validator(mode="before")
    @classmethod
    def _first_bucket(cls, values: Any) -> Any:
        """Fills in `num_frames` and `resolution` from the first bucket, so that they say the shape of samples."""
        if isinstance(values, dict) and isinstance(values.get("buckets"), list) and values["buckets"]:
            first = values["buckets"][0]
            first = first if isinstance(first, Bucket) else Bucket.parse(str(first))
            return {"num_frames": first.num_frames, "resolution": plain_size(first.size), **values}
        return values

    @model_validator(mode="after")
    def _shapes_fit(self) -> DataConfig:
        if (self.fit == "bucket") != bool(self.buckets):
            raise ValueError(
                "fit is bucket, but buckets is empty: name the shapes, such as [16x64x64, 16x48x80]"
                if self.fit == "bucket"
                else f"buckets is set, but has no effect with fit={self.fit}: set fit=bucket"
            )
        if not self.buckets:
            return self
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError(f"buckets is {[*map(str, self.buckets)]}, but must name each shape once")
        first = self.buckets[0]
        if (self.num_frames, Size.of(self.resolution)) != (first.num_frames, first.size):
            raise ValueError(
                f"num_frames is {self.num_frames} and resolution {self.resolution}, but the first of buckets is "
                f"{first}: leave num_frames and resolution out"
            )
        if self.start_span is not None:
            raise ValueError(f"start_span is {self.start_span}, but has no effect with buckets")
        return self

    @model_validator(mode="after")
    def _data_set_fits(self) -> DataConfig:
        if self.split is not None:
            check_split(self.dataset, self.split)
        if self.class_folders and self.dataset != "folder":
            raise ValueError(f"class_folders is set, but dataset={self.dataset} has its own classes; leave it out")
        if not self.use_classes and self.dataset not in SETS_WITH_CLASSES:
            raise ValueError(f"use_classes is false, but has no effect: dataset={self.dataset} has no classes")
        if self.captions is not None and self.dataset in SETS_WITH_CLASSES and self.use_classes:
            raise ValueError(
                f"captions are set and dataset={self.dataset} has classes, but a model has either texts or classes: "
                "set use_classes=false"
            )
        if self.path is None and self.latent_cache is not None:
            if self.split is not None:
                raise ValueError(f"split is {self.split!r}, but has no effect without path: a cache has no splits")
            if self.dataset not in ("folder", *SETS_WITH_CLASSES):
                raise ValueError(f"dataset is {self.dataset!r}, but has no effect without path")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> DataConfig:
        if self.start_span is not None and self.start_span < self._shortest_span:
            raise ValueError(
                f"start_span is {self.start_span}, but must be at least {self._shortest_span}, what a clip of "
                f"{self.num_frames} frames at interval {self.frame_interval} needs"
            )
        if self.captions is not None and self.class_folders:
            raise ValueError("captions and class_folders are both set, but a model has either texts or classes")
        if self.actions is not None:
            for field, value, allowed in (
                ("frame_interval", self.frame_interval, 1),  # frames that are left out have actions, too
                ("horizontal_flip", self.horizontal_flip, False),  # a mirrored player would do something else
                ("validation", self.validation, None),
            ):
                if value != allowed:
                    raise ValueError(f"{field} is {value}, but must be {allowed} with actions")
        if self.images is not None and not self.num_images:
            raise ValueError("images is set, but has no effect with num_images=0")
        decodes = self.latent_cache is None or self.images is not None or self.validation is not None
        if self.workers is not None and not decodes:
            raise ValueError(f"workers is {self.workers}, but has no effect with latent_cache: no video is decoded")
        if self.image_captions is not None and (self.images is None or self.captions is None):
            raise ValueError("image_captions is set, but needs images and captions")
        if self.images is not None and self.captions is not None and self.image_captions is None:
            raise ValueError("image_captions is missing: a run with captions needs captions of the images")
        if self.validation_captions is not None and (self.validation is None or self.captions is None):
            raise ValueError("validation_captions is set, but needs validation and captions")
        if self.validation is not None and self.captions is not None and self.validation_captions is None:
            raise ValueError(
                "validation_captions is missing: a run with captions needs captions of the held-out videos"
            )
        return self
