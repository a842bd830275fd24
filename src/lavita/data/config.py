"""Configuration of the data: which videos, which frames of them, at what size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lavita.core.config import ConfigError, StrictConfig
from lavita.core.names import DataSetName

SPLITS: Mapping[DataSetName, tuple[str, ...]] = {
    "folder": (),
    "faceforensics": ("train", "val", "test", "all"),
    "sky_timelapse": ("train", "test", "all"),
    "ucf101": ("all", "train", "test", "val", "train01", "test01", "train02", "test02", "train03", "test03"),
    "taichi_hd": ("train", "test", "all"),
}
"""What `split` can be for each data set, first what the paper trains on."""
SETS_WITH_CLASSES = frozenset({"ucf101"})


def check_split(dataset: DataSetName, split: str) -> None:
    """Refuses a split that a data set does not have; ConfigError names those that it has."""
    if dataset == "folder":
        raise ConfigError(f"split is {split!r}, but dataset=folder has no splits: name the subfolder in path instead")
    if split not in SPLITS[dataset]:
        raise ConfigError(f"split is {split!r}; allowed for dataset={dataset}: {', '.join(SPLITS[dataset])}")


class DataConfig(StrictConfig):
    """Which videos, which frames of them, and at what size."""

    path: Path | None = None
    """Folder of videos (any tree of video files or frame folders); not needed beside a `latent_cache`."""
    dataset: DataSetName = "folder"
    """What `path` holds: `folder`, any tree of videos, or one of the paper's data sets, which know their splits and
    classes (docs/data.md)."""
    split: str | None = None
    """Part of a named data set; by default what the paper trains on: `train`, of UCF101 `all`."""
    use_classes: bool = True
    """Train with the classes of a named data set that has some; `false` for a model without classes."""
    class_folders: bool = False
    """Take the name of each video's parent folder as its class; with `dataset=folder`."""
    num_frames: int = Field(16, ge=1)
    """Frames of a clip."""
    frame_interval: int = Field(3, ge=1)
    """Every how many frames of the file one is taken; 3 in the paper."""
    resolution: int = Field(256, ge=8)
    """Side of the square frames in pixels, after a center crop."""
    horizontal_flip: bool = True
    """Mirror each clip with probability 1/2; the paper's only augmentation."""
    latent_cache: Path | None = None
    """Folder that `lavita encode` wrote; without it the videos are read and encoded at every step."""
    workers: int | None = Field(None, ge=1)
    """Threads that decode the videos, or image files, of a step; by default one a core, at most 8."""
    captions: Path | None = None
    """Table of captions, CSV with a header, JSONL or Parquet, of `file` (below the folder of videos) and `caption`, or
    as WebVid's; a file may have several. Makes the model text-conditional; videos without a caption are broken ones."""
    num_images: int = Field(0, ge=0)
    """Image frames that follow every clip in joint training; 8 in the paper. Frames of videos drawn independently, or
    images of `images`."""
    images: Path | None = None
    """Folder of image files for `num_images`, or a cache of one made by `lavita encode --images`."""
    image_captions: Path | None = None
    """Table of captions of `images`, like `captions`."""
    validation: Path | None = None
    """Folder of held-out videos, laid out as the training videos are, or a latent cache of one: the loss on the same
    clips of them is measured every `train.validate_every` steps."""
    validation_captions: Path | None = None
    """Table of captions of `validation`, like `captions`."""
    broken: Literal["skip", "error"] = "skip"
    """What a video that cannot be used does: it is always named, or, where many lack a caption, counted; `error` stops
    the run there."""

    @property
    def has_classes(self) -> bool:
        """Whether the videos have classes."""
        return self.class_folders or (self.dataset in SETS_WITH_CLASSES and self.use_classes)

    @model_validator(mode="after")
    def _data_set_fits(self) -> DataConfig:
        if self.split is not None:
            check_split(self.dataset, self.split)
        if self.class_folders and self.dataset != "folder":
            raise ValueError(f"class_folders is set, but dataset={self.dataset} knows its classes; leave it out")
        if not self.use_classes and self.dataset not in SETS_WITH_CLASSES:
            raise ValueError(f"use_classes is false, but has no effect: dataset={self.dataset} knows no classes")
        if self.captions is not None and self.dataset in SETS_WITH_CLASSES and self.use_classes:
            raise ValueError(
                f"captions and the classes of dataset={self.dataset} are both there, but a model has texts or classes: "
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
        if self.captions is not None and self.class_folders:
            raise ValueError("captions and class_folders are both set, but a model has texts or classes")
        if self.images is not None and not self.num_images:
            raise ValueError("images is set, but num_images is 0: no image would be used")
        decodes = self.latent_cache is None or self.images is not None or self.validation is not None
        if self.workers is not None and not decodes:
            raise ValueError(f"workers is {self.workers}, but has no effect with latent_cache: nothing is decoded")
        if self.image_captions is not None and (self.images is None or self.captions is None):
            raise ValueError("image_captions is set, but they need images and captions")
        if self.images is not None and self.captions is not None and self.image_captions is None:
            raise ValueError("image_captions is missing: with captions, the images need theirs")
        if self.validation_captions is not None and (self.validation is None or self.captions is None):
            raise ValueError("validation_captions is set, but they need validation and captions")
        if self.validation is not None and self.captions is not None and self.validation_captions is None:
            raise ValueError("validation_captions is missing: with captions, the held-out videos need theirs")
        return self
