"""What runs are configured by: their fields, defaults, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from lavita.strict_config import ConfigError, StrictConfig

DEFAULT_TUBE_SIZE = 2
VALIDATION_CLIPS = 64

DataSetName = Literal["folder", "faceforensics", "sky_timelapse", "ucf101", "taichi_hd"]
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


class ModelConfig(StrictConfig):
    """The transformer; fields left out come from the preset."""

    preset: str = "S/2"
    """Size and patch: one of S, B, L, XL, or `tiny`, `mini`, `small` for laptops, then /2, /4 or /8."""
    variant: Literal[1, 2, 3, 4] = 2
    """1: all spatial blocks, then all temporal ones; 2: alternating; 3: spatial, then temporal attention in each block;
    4: half of the heads spatial, half temporal (Sec. 3.2 of the paper)."""
    patch_embedding: Literal["uniform", "compression"] = "uniform"
    """`uniform`: patches of each frame; `compression`: tubes of several frames (Sec. 3.3)."""
    tube_size: int | None = Field(None, ge=2)
    """Frames of a tube, with `compression`; 2 by default."""
    conditioning: Literal["s_adaln", "all_tokens"] = "s_adaln"
    """How timestep and label enter: they steer norms and gates, or are tokens (Sec. 3.4)."""
    temporal_position: Literal["absolute", "rope"] = "absolute"
    """Sin-cos positions of the frames, or rotary ones (Sec. 3.5)."""
    text_encoder: str | None = None
    """With `data.captions`: path or hub id of the text encoder, any of transformers' with a pooled output; by default
    the CLIP of Stable Diffusion 1.4."""
    class_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Probability of training a clip without its label or caption, which classifier-free guidance needs."""
    learn_sigma: bool = True
    """Predict the variance beside the noise."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What is predicted: the noise, as in the paper, or the velocity, which learns colours and layout in far fewer
    steps."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> ModelConfig:
        if self.tube_size is not None and self.patch_embedding == "uniform":
            raise ValueError(f"tube_size is {self.tube_size}, but has no effect with patch_embedding=uniform")
        return self


class TrainConfig(StrictConfig):
    """The optimisation."""

    init_from: str | None = None
    """Weights to start from instead of random ones: a run's folder, or its pipeline's; `builtin`, the arcade model of
    the package; an image model, as DiT's .pt file or diffusers' folder (Sec. 3.6); or a published .pt checkpoint of
    this model."""
    init_weights: Literal["ema", "model"] | None = None
    """Which weights of a .pt file with both."""
    freeze: Literal["spatial", "temporal"] | None = None
    """With `init_from`, which modules do not learn. `temporal`: the temporal blocks of Variants 1 and 2, the temporal
    attention of Variant 3; `spatial`: all but those. What `init_from` has no weights for, such as new classes, learns
    all the same."""
    lora_rank: int = Field(0, ge=0)
    """With `init_from`, train low-rank adapters of this rank instead of the weights; 0 trains the weights. Needs the
    extra `lora`."""
    lora_alpha: float | None = Field(None, gt=0)
    """The adapters' change is scaled by `lora_alpha / lora_rank`; by default 1."""
    lora_targets: list[Literal["qkv", "proj", "fc1", "fc2", "adaLN_modulation"]] | None = Field(None, min_length=1)
    """Layers of the blocks that get adapters; by default the attention's `qkv` and `proj` and the MLP's `fc1` and
    `fc2`."""
    steps: int = Field(100_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(8, ge=1)
    """Clips of one optimizer step."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches that a process computes its clips of one step in; divides them."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """On several processes of torchrun: `ddp`, a whole model on each, which `auto` means; `fsdp`, weights, averages and
    optimizer cut into a share for each (FSDP2)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, as in the paper; `muon`: Muon for the matrices of the blocks, AdamW for the rest, which reaches the same
    loss in about half of the steps (docs/results.md)."""
    learning_rate: float = Field(1e-4, gt=0)
    """Constant rate between the warm-up and the decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0."""
    decay_steps: int = Field(0, ge=0)
    """Last steps of the run, over which the rate falls linearly to 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm where they exceed it."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the weights' moving average; short runs warm it up (`ema.decay_at`)."""
    gradient_checkpointing: Literal[True, False, "cheap"] = False
    """`true`: keep the inputs of the blocks only and compute the rest again in the backward pass: the same gradients,
    in less memory and about a third more time. `cheap`: keep the matrix products, too, and compute norms, gates and
    GELU again, which costs little (`lavita info` predicts the memory)."""
    compile: bool = False
    """Run the blocks compiled: less time a step, after a minute or so of compiling, for gradients that differ by
    rounding. Needs a C++ compiler on a CPU. Of what is cheap to recompute it keeps nothing anyway."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of matrix products. `auto`: bf16 where the processor has it, else fp16 on a GPU, else fp32; with fp16 the loss is
    scaled."""
    bad_steps: Literal["stop", "skip"] = "stop"
    """What a step with a loss or gradient that is not finite does: `stop` ends the run before it; `skip` leaves it out,
    and spikes too, up to ten in a row. Either way `events.jsonl` names its clips."""
    spike_factor: float = Field(10.0, ge=0)
    """A gradient norm of more than so many times the median of the last 100 is a spike; 0 knows none."""
    device: str = "auto"
    """`auto`: the first GPU if there is one, else the CPU."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: initial weights, clips, noise."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = Field(1_000, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that this divides are kept as well; 0 for none."""
    keep_best: bool = False
    """The checkpoint with the lowest validation loss is kept as well."""
    sample_every: int = Field(1_000, ge=0)
    """Steps between two sets of sample videos; 0 for none."""
    num_samples: int = Field(8, ge=1)
    """Videos in a set of samples: the same seeds and labels every time."""
    score_every: int = Field(0, ge=0)
    """Steps between two scores of the averaged model against `data.path`, in `scores.jsonl`; 0 for none. Needs the
    extra `evaluate`."""
    score_clips: int = Field(64, ge=3)
    """Clips of either side of a score: the same real ones and the same seeds every time."""
    validate_every: int = Field(0, ge=0)
    """Steps between two measurements of the loss on `data.validation`, in `validation.jsonl`; 0 for none."""
    validation_clips: int = Field(VALIDATION_CLIPS, ge=1)
    """Held-out clips of a measurement, each at ten noise levels: the same clips and noise every time."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics and samples are shown beside `metrics.jsonl`: TensorBoard, in `run_dir/tensorboard`, with the extra
    `track`; Weights & Biases, with the extra `wandb`."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers is {self.trackers}, but each may be named once")
        if self.validation_clips != VALIDATION_CLIPS and not self.validate_every:
            raise ValueError(
                f"validation_clips is {self.validation_clips}, but has no effect where validate_every is 0"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}, but must divide batch_size ({self.batch_size})")
        if self.compile and self.gradient_checkpointing == "cheap":
            raise ValueError("gradient_checkpointing is cheap, but has no effect beside compile, which does the same")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every is {self.keep_every}, but must be a multiple of checkpoint_every ({self.checkpoint_every})"
            )
        if self.keep_best and not (self.validate_every and self.checkpoint_every % self.validate_every == 0):
            raise ValueError(
                f"keep_best is set, but validate_every is {self.validate_every}: it must divide checkpoint_every "
                f"({self.checkpoint_every}), so that each checkpoint has its validation loss"
            )
        if self.init_weights is not None and self.init_from is None:
            raise ValueError("init_weights is set, but has no effect without init_from")
        for key in ("freeze", "lora_rank"):
            if getattr(self, key) and self.init_from is None:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, but needs init_from: frozen random weights would never learn"
                )
        for key in ("lora_alpha", "lora_targets"):
            if getattr(self, key) is not None and not self.lora_rank:
                raise ValueError(f"{key} is {getattr(self, key)!r}, but has no effect with lora_rank=0")
        return self


class RunConfig(StrictConfig):
    """One training run: `lavita train --config FILE`."""

    run_dir: Path = Path("runs/train")
    """Where checkpoints, metrics, samples and the pipeline go."""
    autoencoder: str = "auto"
    """Path or hub id of an `AutoencoderKL`; `builtin` is the one in the package;
    `auto`: `builtin` up to 128 pixels, Stable Diffusion's above."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        data, model = self.data, self.model
        if self.train.score_every and (data.path is None or data.captions is not None):
            raise ValueError(
                f"train.score_every is {self.train.score_every}, but needs data.path and a model without captions"
            )
        if self.train.validate_every and data.validation is None:
            raise ValueError(f"train.validate_every is {self.train.validate_every}, but needs data.validation")
        if data.validation is not None and not self.train.validate_every:
            raise ValueError("data.validation is set, but has no effect where train.validate_every is 0")
        if self.train.score_every and data.dataset != "folder":
            raise ValueError(
                f"train.score_every is {self.train.score_every}, but needs data.dataset=folder: it compares with every "
                "video in data.path"
            )
        if model.text_encoder is not None and data.captions is None:
            raise ValueError("model.text_encoder is set, but has no effect without data.captions")
        if self.train.freeze is not None and model.variant == 4:
            raise ValueError(
                f"train.freeze is {self.train.freeze!r}, but must be left out with model.variant=4: spatial and "
                "temporal heads share the parameters of a layer"
            )
        if model.patch_embedding == "compression":
            if data.num_images:
                raise ValueError(
                    f"data.num_images is {data.num_images}, but must be 0 with model.patch_embedding=compression: its "
                    "tokens hold several frames, an image is one"
                )
            if data.num_frames % (model.tube_size or DEFAULT_TUBE_SIZE):
                raise ValueError(
                    f"data.num_frames is {data.num_frames}, but must be a multiple of model.tube_size "
                    f"({model.tube_size or DEFAULT_TUBE_SIZE})"
                )
        return self


class AutoencoderConfig(StrictConfig):
    """Training of an autoencoder: `lavita autoencoder train`."""

    run_dir: Path = Path("runs/autoencoder")
    """Where checkpoints, metrics and the autoencoder go."""
    data: list[Path] = Field(min_length=1)
    """Folders of videos."""
    data_weights: list[PositiveFloat] | None = None
    """How often each folder is drawn from, whatever its size; equally by default."""
    held_out: list[Path] = Field(default_factory=list)
    """Folders whose frames are never trained on; PSNR is measured on them."""
    resolution: int = Field(64, ge=8)
    """Side of the training crops in pixels."""
    downsampling: Literal[2, 4, 8, 16] = 4
    """Pixels of a latent pixel's side."""
    latent_channels: int = Field(4, ge=1)
    """Channels of the latents."""
    block_out_channels: list[int] | None = None
    """Width at each resolution, finest first; by default doubling from 32."""
    layers_per_block: int = Field(1, ge=1)
    """Residual blocks at each resolution of the encoder."""
    steps: int = Field(20_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(8, ge=2, multiple_of=2)
    """Frames of one step: half as many pairs of successive frames."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak rate of AdamW: it rises over 200 steps and falls along a cosine to 1% of it."""
    kl_weight: float = Field(1e-4, ge=0)
    """Weight of the KL divergence to a unit Gaussian, in nats a latent value."""
    motion_weight: float = Field(4.0, ge=0)
    """How much more a moving pixel counts in the reconstruction loss than a still one."""
    edge_weight: float = Field(0.5, ge=0)
    """Weight of the L1 distance between image gradients."""
    horizontal_flip: bool = True
    """Mirror pairs with probability 1/2."""
    memory_gib: float = Field(2.0, gt=0)
    """Decoded frames kept in memory; a random part of each video where they are more."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Weights on disk; `float16` halves the file."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast where the processor has bf16 matrix products, else fp32."""
    device: str = "auto"
    """`auto`: the first GPU if there is one, else the CPU."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, draws and noise."""
    log_every: int = Field(20, ge=1)
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = Field(1_000, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints are kept."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> AutoencoderConfig:
        if self.data_weights is not None and len(self.data_weights) != len(self.data):
            raise ValueError(f"data_weights has {len(self.data_weights)} numbers for {len(self.data)} folders")
        levels = self.downsampling.bit_length()
        if self.block_out_channels is not None and len(self.block_out_channels) != levels:
            raise ValueError(
                f"block_out_channels has {len(self.block_out_channels)} widths, but downsampling "
                f"{self.downsampling} needs {levels}"
            )
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution is {self.resolution}, but must be a multiple of downsampling ({self.downsampling})"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, finest first."""
        return self.block_out_channels or [32 * 2**i for i in range(self.downsampling.bit_length())]
