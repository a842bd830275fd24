"""Configuration of the training of an autoencoder: the fields, their defaults, and which of them go together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lavita.core.config import StrictConfig

STRUCTURE = {
    "kl": ("block_out_channels", "layers_per_block"),
    "tiny": ("block_out_channels", "blocks_per_level"),
    "patch": ("width", "num_encoder_blocks", "num_decoder_blocks"),
}
"""Fields of `AutoencoderConfig` that only some architectures have."""


class AutoencoderConfig(StrictConfig):
    """Training of an autoencoder: `lavita autoencoder train`."""

    run_dir: Path = Path("runs/autoencoder")
    """Folder of the run: checkpoints, metrics and the autoencoder."""
    data: list[Path] = Field(min_length=1)
    """Folders of videos."""
    data_weights: list[PositiveFloat] | None = None
    """Relative frequency at which each folder is drawn from, whatever its size; by default all are equal."""
    held_out: list[Path] = Field(default_factory=list)
    """Folders of videos that are not trained on; PSNR is measured on them at the end."""
    init_from: str | None = None
    """Autoencoder whose weights the run starts from, instead of random ones: its folder, that of a pipeline, a hub id,
    or `builtin`, the one in the package. The structure (`architecture`, `downsampling`, `latent_channels`, widths and
    numbers of blocks) is then that of this autoencoder."""
    freeze: Literal["encoder"] | None = None
    """`encoder`: with `init_from`, train only the decoder, so that all latents stay what they are."""
    temporal_downsampling: Literal[1, 2, 4] = 1
    """Frames that are merged into one latent, after the first one of a clip; more than 1 makes the autoencoder of
    `init_from` a causal one of clips, and trains it on clips of 1 + 2 x `temporal_downsampling` frames."""
    resolution: int = Field(64, ge=8)
    """Side of the training crops in pixels."""
    architecture: Literal["patch", "kl", "tiny"] = "patch"
    """`patch`: all layers at the resolution of the latents, starting from principal components, so that it is good
    after minutes (docs/results.md). `kl`: diffusers' `AutoencoderKL`. `tiny`: diffusers' `AutoencoderTiny`,
    convolutions without norms, and latents without randomness."""
    downsampling: Literal[2, 4, 8, 16] = 4
    """Pixels per latent pixel, along each side."""
    latent_channels: int = Field(8, ge=1)
    """Channels of the latents."""
    block_out_channels: list[int] | None = None
    """Channels at each resolution, finest first; by default 32, doubled at each further one. With `architecture=tiny`
    all are equal, by default 64."""
    layers_per_block: int = Field(1, ge=1)
    """Residual blocks at each resolution of the encoder, with `architecture=kl`."""
    blocks_per_level: list[PositiveInt] | None = None
    """Residual blocks at each resolution, finest first, with `architecture=tiny`; the decoder has as many. Default: 1
    at the finest and 3 at each other one."""
    width: int = Field(128, ge=1)
    """Channels of the hidden layers, with `architecture=patch`."""
    num_encoder_blocks: int = Field(4, ge=0)
    """Residual blocks of the encoder, with `architecture=patch`."""
    num_decoder_blocks: int = Field(8, ge=0)
    """Residual blocks of the decoder, with `architecture=patch`."""
    steps: int = Field(20_000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(8, ge=2, multiple_of=2)
    """Frames per step: half as many pairs of successive frames; with `temporal_downsampling` as many clips as have no
    more frames, but at least one."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW: it rises over 200 steps and falls along a cosine to 1% of the peak."""
    kl_weight: float = Field(1e-4, ge=0)
    """Weight of the KL divergence to a unit Gaussian, in nats per latent value."""
    motion_weight: float = Field(4.0, ge=0)
    """Additional weight of a moving pixel in the reconstruction loss; a still pixel has the weight 1."""
    edge_weight: float = Field(0.5, ge=0)
    """Weight of the L1 distance between image gradients."""
    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of a distance between feature maps of frames and reconstructions, in the manner of LPIPS, by the network
    EfficientNet-Lite0; 0 leaves it out. Needs the extra `evaluate`."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the loss by a discriminator of patches, which learns to tell reconstructions from frames; 0 trains
    none."""
    adversarial_start: int = Field(0, ge=0)
    """Steps before the discriminator begins, with `adversarial_weight`: it spoils what is still blurred."""
    adversarial_adaptive: bool = True
    """Also weight the loss by the discriminator so that its gradient at the decoder's last layer is as large as that of
    the other terms (VQGAN)."""
    discriminator_learning_rate: float = Field(2e-4, gt=0)
    """Learning rate of the discriminator's AdamW."""
    horizontal_flip: bool = True
    """Mirror each pair with probability 1/2."""
    memory_gib: float = Field(2.0, gt=0)
    """Memory for decoded frames, in GiB; if all frames need more, a random part of each video is kept."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the saved weights; `float16` halves the file."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products. `auto`: bf16 if the device has it, otherwise fp32."""
    device: str = "auto"
    """Device to train on; `auto` is the first GPU if there is one, otherwise the CPU."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, draws and noise."""
    log_every: int = Field(20, ge=1)
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = Field(1_000, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints to keep."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> AutoencoderConfig:
        if self.data_weights is not None and len(self.data_weights) != len(self.data):
            raise ValueError(f"data_weights has {len(self.data_weights)} numbers for {len(self.data)} folders")
        self._check_structure()
        self._check_start()
        if not self.adversarial_weight:
            for key in ("adversarial_start", "adversarial_adaptive", "discriminator_learning_rate"):
                value = getattr(self, key)
                if value != AutoencoderConfig.model_fields[key].default:
                    raise ValueError(f"{key} is {value}, but has no effect with adversarial_weight=0")
        elif self.adversarial_start >= self.steps:
            raise ValueError(f"adversarial_start is {self.adversarial_start}, but must be below steps ({self.steps})")
        return self

    def _check_structure(self) -> None:
        levels = self.downsampling.bit_length()
        from_elsewhere = self.init_from is not None and "downsampling" not in self.model_fields_set
        for key in ("block_out_channels", "blocks_per_level"):
            value = getattr(self, key)
            if value is not None and len(value) != levels and not from_elsewhere:
                what = "widths" if key == "block_out_channels" else "numbers"
                raise ValueError(f"{key} has {len(value)} {what}, but downsampling {self.downsampling} needs {levels}")
        if self.resolution % self.downsampling and not from_elsewhere:
            raise ValueError(
                f"resolution is {self.resolution}, but must be a multiple of downsampling ({self.downsampling})"
            )
        if self.init_from is not None and "architecture" not in self.model_fields_set:
            return
        for key in sorted(set().union(*STRUCTURE.values()) - set(STRUCTURE[self.architecture])):
            value = getattr(self, key)
            if value != AutoencoderConfig.model_fields[key].default:
                raise ValueError(f"{key} is {value}, but has no effect with architecture={self.architecture}")
        if self.architecture == "tiny" and len(set(self.widths)) > 1:
            raise ValueError(
                f"block_out_channels is {self.widths}, but must be the same width at each resolution with "
                "architecture=tiny"
            )

    def _check_start(self) -> None:
        if self.temporal_downsampling > 1 and self.init_from is None:
            raise ValueError(
                f"temporal_downsampling is {self.temporal_downsampling}, but needs init_from: an autoencoder of frames"
            )
        if self.temporal_downsampling > 1 and self.freeze is not None:
            raise ValueError(f"freeze is {self.freeze!r}, but temporal_downsampling changes the encoder")
        if self.freeze is None:
            return
        if self.init_from is None:
            raise ValueError(f"freeze is {self.freeze!r}, but needs init_from: frozen random weights would never learn")
        if self.kl_weight != AutoencoderConfig.model_fields["kl_weight"].default:
            raise ValueError(f"kl_weight is {self.kl_weight:g}, but has no effect with freeze=encoder")

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, finest first."""
        levels = self.downsampling.bit_length()
        default = [64] * levels if self.architecture == "tiny" else [32 * 2**level for level in range(levels)]
        return self.block_out_channels or default

    @property
    def blocks(self) -> list[int]:
        """Residual blocks at each resolution of a tiny autoencoder, finest first."""
        return self.blocks_per_level or [1] + [3] * (self.downsampling.bit_length() - 1)
