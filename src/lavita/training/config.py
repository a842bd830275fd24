"""Configuration of training runs: the fields, their defaults, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from lavita.core.config import StrictConfig
from lavita.data.config import DataConfig
from lavita.models.config import DEFAULT_TUBE_SIZE, ModelConfig

VALIDATION_CLIPS = 64
MIN_SNR_GAMMA = 5.0
LEAST_LENGTH, MOST_LENGTH = 0.01, 0.28
"""Relative lengths of averages that can be tracked and reconstructed; a mean over the whole run has 0.289."""
TimestepSampling = Literal["uniform", "logit_normal"]


class TrainConfig(StrictConfig):
    """The optimization."""

    init_from: str | None = None
    """Pretrained weights to start from, instead of random ones: the folder of a run or of its pipeline; `builtin`, the
    arcade model in the package; an image model, as DiT's .pt file or diffusers' folder (Sec. 3.6); or a published .pt
    checkpoint of this model."""
    init_weights: Literal["ema", "model"] | None = None
    """Weights to take from a .pt file that holds both: the averaged ones (`ema`) or the others (`model`)."""
    init_closed: bool = True
    """Close attention in time when starting from an image model: it adds nothing at first. `false`, as in the paper:
    only positions and labels are adapted (Sec. 3.6), so that blocks which attend in time start as the image model's
    blocks, and an attention in time beside the image model's starts random."""
    freeze: Literal["spatial", "temporal"] | None = None
    """Modules that are not trained, with `init_from`. `temporal`: the temporal blocks of Variants 1 and 2, the temporal
    attention of Variants 3 and 4; `spatial`: all other modules. Parameters that `init_from` has no weights for, such as
    new classes, are trained in either case."""
    lora_rank: int = Field(0, ge=0)
    """Rank of low-rank adapters that are trained instead of the weights, with `init_from`; 0 trains the weights. Needs
    the extra `lora`."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the adapters: their product is multiplied by `lora_alpha / lora_rank`; by default that is 1."""
    lora_targets: list[Literal["qkv", "q", "kv", "proj", "fc1", "fc2", "adaLN_modulation"]] | None = Field(
        None, min_length=1
    )
    """Layers of the blocks that get adapters; by default `qkv` and `proj` of the attention, `q`, `kv` and `proj` of the
    attention to texts, and `fc1` and `fc2` of the MLP."""
    steps: int = Field(100_000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(8, ge=1)
    """Clips per optimizer step, over all processes."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches into which each process cuts its clips of a step, to save memory; must divide them evenly."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How the processes of torchrun share a model. `ddp`: each holds all of it (`auto` means this); `fsdp`: weights,
    averages and optimizer state are sharded over the processes (FSDP2)."""
    sequence_parallel: int = Field(1, ge=1)
    """Successive processes that share each clip, for clips too long for one device: each has some of the frames in
    spatial attention, and some of the places in temporal attention. Must divide the number of processes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, as in the paper, or `muon`: Muon for the matrices of the blocks and AdamW for everything else, which
    reaches the same loss in about half of the steps (docs/results.md)."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate between warm-up and decay, where it is constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = Field(0, ge=0)
    """Last steps of the run, over which the learning rate falls linearly to 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it. `null`: none is, as in the paper."""
    timestep_sampling: TimestepSampling = "uniform"
    """Distribution of the timesteps of a flow: `uniform`; or `logit_normal`, which has most of them between data and
    noise, where the velocity is hardest to predict (Esser et al. 2024). Needs `model.prediction_type=flow`."""
    timestep_shift: PositiveFloat | Literal["auto"] = 1.0
    """Shift of the timesteps of a flow, in training and sampling: 1 for none, more for more noise. `auto`: the square
    root of the number of latent positions of a clip over 1,024, at least 1. Needs `model.prediction_type=flow`."""
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weights of the timesteps in the loss of noise or velocity. `uniform`: all have the same, as in the paper;
    `min_snr`: timesteps with little noise, which tell the least about a clip, count less (Hang et al. 2023). Validation
    is not weighted."""
    min_snr_gamma: float = Field(MIN_SNR_GAMMA, gt=0)
    """Largest weight of a timestep in terms of the clean latents, with `loss_weighting=min_snr`."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights."""
    ema_warmup: bool = True
    """Let the decay rise to `ema_decay`: at step n it is at most (1 + n) / (10 + n), which reaches 0.9999 at step
    89,990, so that short runs forget their random start. `false`: `ema_decay` at every step, as in the paper."""
    power_ema: list[float] = Field(default_factory=list)
    """Relative lengths of further averages, which are stored in `averages/` with each checkpoint and kept for good:
    with `[0.05, 0.1]`, `lavita average` makes the average of any length after training (Karras et al. 2024). Each takes
    as much memory as the weights. Default: none."""
    gradient_checkpointing: Literal[True, False, "cheap"] = False
    """`true`: keep only the inputs of the blocks and recompute the rest in the backward pass, which gives the same
    gradients with less memory and takes about a third longer. `cheap`: also keep the matrix products and recompute only
    norms, gates and GELU, which takes little time (`lavita info` predicts the memory)."""
    compile: bool = False
    """Compile the blocks: faster steps after about a minute of compilation, with gradients that differ by rounding.
    Needs a C++ compiler on a CPU. It recomputes cheap operations in the backward pass by itself."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the matrix products. `auto`: bf16 if the device has it, otherwise fp16 on a GPU and fp32 on a CPU.
    With fp16 the loss is scaled."""
    bad_steps: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite. `stop`: end the run before the step; `skip`: skip
    the step, and skip spikes too, at most ten steps in a row. Either way `events.jsonl` names the clips."""
    spike_factor: float = Field(10.0, ge=0)
    """A gradient norm of more than this many times the median of the last 100 is a spike; with 0 none is."""
    device: str = "auto"
    """Device to train on; `auto` is the first GPU if there is one, otherwise the CPU."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: initial weights, clips, noise."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = Field(1_000, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are kept as well; 0 for none."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss as well."""
    sample_every: int = Field(1_000, ge=0)
    """Steps between two sets of sample videos; 0 for none."""
    num_samples: int = Field(8, ge=1)
    """Videos per set of samples; every set has the same seeds and labels."""
    score_every: int = Field(0, ge=0)
    """Steps between two scores of the averaged model against `data.path`, in `scores.jsonl`; 0 for none. Needs the
    extra `evaluate`."""
    score_clips: int = Field(64, ge=3)
    """Real clips, and as many samples, per score; every score has the same clips and seeds."""
    validate_every: int = Field(0, ge=0)
    """Steps between two measurements of the loss on `data.validation`, in `validation.jsonl`; 0 for none."""
    validation_clips: int = Field(VALIDATION_CLIPS, ge=1)
    """Held-out clips per measurement, each at ten noise levels; every measurement has the same clips and noise."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Trackers that show metrics and samples, in addition to `metrics.jsonl`: TensorBoard, in `run_dir/tensorboard`,
    with the extra `track`; Weights & Biases, with the extra `wandb`."""

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers is {self.trackers}, but each may be named once")
        if self.validation_clips != VALIDATION_CLIPS and not self.validate_every:
            raise ValueError(f"validation_clips is {self.validation_clips}, but has no effect with validate_every=0")
        if self.min_snr_gamma != MIN_SNR_GAMMA and self.loss_weighting != "min_snr":
            raise ValueError(
                f"min_snr_gamma is {self.min_snr_gamma:g}, but has no effect with loss_weighting={self.loss_weighting}"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}, but must divide batch_size ({self.batch_size})")
        if self.compile and self.gradient_checkpointing == "cheap":
            raise ValueError("gradient_checkpointing is cheap, but has no effect with compile, which does the same")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every is {self.keep_every}, but must be a multiple of checkpoint_every ({self.checkpoint_every})"
            )
        if self.keep_best and not (self.validate_every and self.checkpoint_every % self.validate_every == 0):
            raise ValueError(
                f"keep_best is set, but validate_every is {self.validate_every}: it must divide checkpoint_every "
                f"({self.checkpoint_every}), so that each checkpoint has its validation loss"
            )
        if any(not LEAST_LENGTH <= length <= MOST_LENGTH for length in self.power_ema):
            raise ValueError(f"power_ema is {self.power_ema}, but each must be in {LEAST_LENGTH:g} to {MOST_LENGTH:g}")
        if len(set(self.power_ema)) < len(self.power_ema):
            raise ValueError(f"power_ema is {self.power_ema}, but each may be given once")
        if self.power_ema and self.lora_rank:
            raise ValueError(f"power_ema is {self.power_ema}, but adapters have no such averages: set lora_rank=0")
        if self.init_weights is not None and self.init_from is None:
            raise ValueError("init_weights is set, but has no effect without init_from")
        if not self.init_closed and self.init_from is None:
            raise ValueError("init_closed is false, but has no effect without init_from")
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
    """Folder of the run: checkpoints, metrics, samples and the pipeline."""
    autoencoder: str = "auto"
    """Path or hub id of an autoencoder, see autoencoder.md for those that load, or `builtin`, the package's for
    videos of all kinds; `arcade`, that of the package's arcade model; `auto` is `builtin` up to 128 pixels and Stable
    Diffusion's above."""
    data: DataConfig = DataConfig()
    """The videos, and the clips that are taken from them."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    train: TrainConfig = TrainConfig()
    """The optimization."""

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        data, model = self.data, self.model
        if self.train.score_every and (data.path is None or data.captions is not None):
            raise ValueError(
                f"train.score_every is {self.train.score_every}, but needs data.path and a model without captions"
            )
        if self.train.score_every and (data.fit != "crop" or not isinstance(data.resolution, int)):
            raise ValueError(
                f"train.score_every is {self.train.score_every}, but scores compare squares: they need data.fit=crop "
                "and a square data.resolution"
            )
        if data.buckets and self.train.timestep_shift == "auto":
            raise ValueError(
                "train.timestep_shift is auto, but clips of data.buckets differ in their number of positions: give a "
                "number"
            )
        if self.train.validate_every and data.validation is None:
            raise ValueError(f"train.validate_every is {self.train.validate_every}, but needs data.validation")
        if data.actions is None and self.model.action_dropout != ModelConfig.model_fields["action_dropout"].default:
            raise ValueError(
                f"model.action_dropout is {self.model.action_dropout}, but has no effect without data.actions"
            )
        if data.validation is not None and not self.train.validate_every:
            raise ValueError("data.validation is set, but has no effect with train.validate_every=0")
        if self.train.score_every and data.dataset != "folder":
            raise ValueError(
                f"train.score_every is {self.train.score_every}, but needs data.dataset=folder: it compares with every "
                "video in data.path"
            )
        for key in ("timestep_sampling", "timestep_shift"):
            value = getattr(self.train, key)
            if value != TrainConfig.model_fields[key].default and model.prediction_type != "flow":
                raise ValueError(
                    f"train.{key} is {value}, but has no effect with model.prediction_type={model.prediction_type}"
                )
        if self.train.loss_weighting == "min_snr" and model.prediction_type == "flow":
            raise ValueError(
                "train.loss_weighting is min_snr, but is for model.prediction_type=epsilon and v_prediction: a flow "
                "weights its timesteps by train.timestep_sampling"
            )
        if model.text_encoder is not None and data.captions is None:
            raise ValueError("model.text_encoder is set, but has no effect without data.captions")
        if model.text_tokens is not None and data.captions is None:
            raise ValueError(f"model.text_tokens is {model.text_tokens}, but has no effect without data.captions")
        if model.patch_embedding == "compression":
            if data.num_images:
                raise ValueError(
                    f"data.num_images is {data.num_images}, but must be 0 with model.patch_embedding=compression, "
                    "whose tokens hold several frames: an image is one frame"
                )
            tube = model.tube_size or DEFAULT_TUBE_SIZE
            for shape in data.shapes:
                if shape.num_frames % tube:
                    raise ValueError(
                        f"data.num_frames is {shape.num_frames}, but must be a multiple of model.tube_size ({tube})"
                        + (f": data.buckets has {shape}" if data.buckets else "")
                    )
        return self
