"""What runs are configured by: their fields, defaults, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from lavita.core.config import StrictConfig
from lavita.data.config import DataConfig
from lavita.models.config import DEFAULT_TUBE_SIZE, ModelConfig

VALIDATION_CLIPS = 64


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
