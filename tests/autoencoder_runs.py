"""Runs of `lavita autoencoder train` that are tiny: 8-pixel frames, a network of 8 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavita.core.config import load_config
from lavita.training.autoencoder.config import AutoencoderConfig


def tiny_run(tmp_path: Path, *overrides: str, name: str = "run", **values: Any) -> AutoencoderConfig:
    """The configuration of a run in `tmp_path/NAME` on `tmp_path/videos`; structure only if it is given."""
    defaults: dict[str, Any] = {
        "run_dir": str(tmp_path / name),
        "data": [str(tmp_path / "videos")],
        "resolution": 8,
        "batch_size": 4,
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return load_config(AutoencoderConfig, defaults | values, overrides)


KL: dict[str, Any] = {"architecture": "kl", "downsampling": 2, "block_out_channels": [4, 8], "latent_channels": 2}
TINY: dict[str, Any] = {
    "architecture": "tiny",
    "downsampling": 4,
    "block_out_channels": [8, 8, 8],
    "blocks_per_level": [1, 1, 2],
    "latent_channels": 3,
}
PATCH: dict[str, Any] = {
    "architecture": "patch",
    "downsampling": 4,
    "latent_channels": 2,
    "width": 8,
    "num_encoder_blocks": 1,
    "num_decoder_blocks": 2,
}
STRUCTURES = {"kl": KL, "tiny": TINY, "patch": PATCH}
