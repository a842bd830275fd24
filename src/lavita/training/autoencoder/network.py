"""The autoencoder of a run: where its structure and first weights come from, and what of it is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from lavita.core.config import ConfigError, load_config
from lavita.models.autoencoder import (
    Autoencoder,
    AutoencoderKL,
    AutoencoderTiny,
    autoencoder_class,
    downsampling,
    encode,
    frame_network,
    load_autoencoder,
    temporal_downsampling,
)
from lavita.models.causal_autoencoder import LavitaCausalAutoencoder, inflate
from lavita.models.packaged import autoencoder_source
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.training.autoencoder.config import STRUCTURE, AutoencoderConfig
from lavita.training.autoencoder.frames import Frames, clip_length, draw_frames
from lavita.training.checkpoint import list_checkpoints

_INIT = "init"


def start_autoencoder(config: AutoencoderConfig) -> tuple[AutoencoderConfig, Autoencoder]:
    """The autoencoder before the first step, in training mode, and the configuration with its structure.

    With `init_from` the structure is that of the autoencoder named there. A run that is resumed does not read it again:
    the weights are in the checkpoint, the structure in `<run_dir>/init`.

    Raises:
        ConfigError: if `init_from` has another structure than the configuration asks for.
        ValueError: if `init_from` holds no autoencoder.
    """
    if config.init_from is None:
        torch.manual_seed(config.seed)
        return config, build_autoencoder(config)
    begun = config.run_dir / _INIT
    if list_checkpoints(config.run_dir / "checkpoints") and begun.is_dir():
        vae = _with_random_weights(begun)
    else:
        vae = load_autoencoder(autoencoder_source(config.init_from, config.resolution))
        if (factor := config.temporal_downsampling) > 1 and not isinstance(vae, LavitaCausalAutoencoder):
            vae = inflate(frame_network(vae), factor)
    config = _with_structure(config, vae)
    vae.register_to_config(_name_or_path=None)  # where it was read from, which would be saved with the result
    vae.train().requires_grad_(True)
    if config.freeze == "encoder":
        _freeze_encoder(config, vae)
    return config, vae


def record_start(config: AutoencoderConfig, vae: Autoencoder) -> None:
    """Writes the structure of `init_from` to the run's folder, for when the run is resumed."""
    if config.init_from is not None:
        vae.save_config(config.run_dir / _INIT)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """A randomly initialized autoencoder of a configuration."""
    if config.architecture == "patch":
        return LavitaPatchAutoencoder(
            config.downsampling,
            config.latent_channels,
            config.width,
            config.num_encoder_blocks,
            config.num_decoder_blocks,
        )
    levels = len(config.widths)
    if config.architecture == "tiny":
        blocks = tuple(config.blocks)
        return AutoencoderTiny(
            encoder_block_out_channels=tuple(config.widths),
            decoder_block_out_channels=tuple(reversed(config.widths)),
            num_encoder_blocks=blocks,
            num_decoder_blocks=tuple(reversed(blocks)),
            latent_channels=config.latent_channels,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=math.gcd(8, *config.widths),
        mid_block_add_attention=False,
        sample_size=config.resolution,
    )


def measure_scaling(vae: Autoencoder, sources: list[list[Frames]], config: AutoencoderConfig) -> None:
    """Sets `scaling_factor` and `shift_factor` from the latents of at least 1,024 training frames."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    frames = draw_frames(sources, config)
    clips = (
        frames.reshape(-1, clip_length(config), *frames.shape[1:])
        if temporal_downsampling(vae.config) > 1
        else [frames]
    )
    mean, std = map(torch.cat, zip(*(encode(vae, clip, config.precision) for clip in clips), strict=True))
    mean64, std64 = mean.double(), std.double()
    variance = mean64.var() + std64.square().mean()
    vae.register_to_config(
        scaling_factor=round(1.0 / variance.sqrt().item(), 5), shift_factor=round(mean64.mean().item(), 5)
    )


def _with_random_weights(folder: Path) -> Autoencoder:
    """An autoencoder of the structure that `record_start` wrote; ValueError if that is damaged."""
    try:
        fields = AutoencoderKL.load_config(folder)
        vae = autoencoder_class(fields).from_config(fields)
        assert not isinstance(vae, tuple)  # as it is if unused fields are asked for
    except Exception as error:  # diffusers raises many kinds
        raise ValueError(f"{folder}: damaged, but needed to resume the run; use another run_dir") from error
    return vae


def _with_structure(config: AutoencoderConfig, vae: Autoencoder) -> AutoencoderConfig:
    """The configuration with the structure of `init_from`; what was asked for by hand must agree with it."""
    found: dict[str, Any] = {
        "downsampling": downsampling(vae),
        "latent_channels": vae.config["latent_channels"],
        "temporal_downsampling": temporal_downsampling(vae.config),
    }
    vae = frame_network(vae)
    fields = vae.config
    if isinstance(vae, LavitaPatchAutoencoder):
        found |= {"architecture": "patch"} | {key: fields[key] for key in STRUCTURE["patch"]}
    elif isinstance(vae, AutoencoderTiny):
        found |= {"architecture": "tiny", "block_out_channels": list(fields["encoder_block_out_channels"])}
        found["blocks_per_level"] = list(fields["num_encoder_blocks"])
    else:
        found |= {"architecture": "kl", "block_out_channels": list(fields["block_out_channels"])}
        found["layers_per_block"] = fields["layers_per_block"]
    # A saved configuration names every key: what the architecture does not have is at its default there.
    others = set().union(*STRUCTURE.values()) - found.keys()
    expected = {key: AutoencoderConfig.model_fields[key].default for key in others} | found
    for key in sorted(config.model_fields_set & expected.keys()):
        asked = getattr(config, key)
        if asked is not None and asked != expected[key]:
            that = (
                f"that of init_from={config.init_from} is {found[key]}"
                if key in found
                else (
                    f"init_from={config.init_from} is of architecture={found['architecture']}, which has no such field"
                )
            )
            raise ConfigError(f"{key} is {asked}, but {that}; leave it out")
    values = config.model_dump(mode="json", exclude_unset=True)
    return load_config(AutoencoderConfig, values | found, [], source=f"init_from={config.init_from}")


def _freeze_encoder(config: AutoencoderConfig, vae: Autoencoder) -> None:
    """Stops training what turns pixels into latents."""
    parts = [vae.encoder, getattr(vae, "quant_conv", None)]
    for name, weight in ((n, p) for part in parts if part is not None for n, p in part.named_parameters()):
        weight.requires_grad_(False)
        if config.save_dtype == "float16" and not torch.equal(weight.half().float(), weight):
            raise ConfigError(
                f"save_dtype is float16, but would change the frozen encoder of init_from={config.init_from} ({name}); "
                "allowed with freeze=encoder: float32"
            )
