"""Fixtures of many tests: the command line in this process, and tiny networks with no gate closed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_videos

from lavita import cli
from lavita.core.config import load_config
from lavita.models import blocks
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.training.config import RunConfig

Run = Callable[..., tuple[int, str, str]]
MakeTransformer = Callable[..., LavitaTransformer3DModel]
SavePipeline = Callable[..., str]
MakeConfig = Callable[..., RunConfig]

TINY: dict[str, Any] = {"sample_size": 8, "num_frames": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}


def random_transformer(**fields: Any) -> LavitaTransformer3DModel:
    """Builds a tiny transformer, the same at each call; any field of its constructor can be given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LavitaTransformer3DModel(**{**TINY, **fields})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `lavita` with the given arguments in this process; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)  # by default run folders are created in the working directory

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lavita", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def traced_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks are traced as ever, but no code is generated for them, which can take a minute."""
    torch._dynamo.reset()
    mix = torch.compile(blocks.TransformerBlock._mix, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(blocks, "compiled_mix", lambda: mix)


@pytest.fixture
def make_transformer() -> MakeTransformer:
    """See `random_transformer`."""
    return random_transformer


@pytest.fixture
def tiny_transformer(make_transformer: MakeTransformer) -> LavitaTransformer3DModel:
    """A transformer with three classes, for clips of 2 frames and the latents of `tiny_vae` at 16 pixels, 4 x 8 x 8."""
    return make_transformer(num_classes=3, class_names=["boxing", "enduro", "pong"], fps=4.0)


def make_tiny_vae() -> AutoencoderKL:
    """An autoencoder from frames of 16 pixels to latents of 4 x 8 x 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            mid_block_add_attention=False,
            sample_size=16,
        )
    return vae.eval().requires_grad_(False)


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """An autoencoder from frames of 16 pixels to latents of 4 x 8 x 8."""
    return make_tiny_vae()


@pytest.fixture
def pipeline(tiny_transformer: LavitaTransformer3DModel, tiny_vae: AutoencoderKL) -> LavitaPipeline:
    """The pipeline of `tiny_transformer` and `tiny_vae`."""
    return make_pipeline(tiny_transformer, tiny_vae)


@pytest.fixture
def save_pipeline(tmp_path: Path, tiny_vae: AutoencoderKL) -> SavePipeline:
    """Saves a transformer with `tiny_vae` as a pipeline, whose folder it returns."""

    def save(model: LavitaTransformer3DModel, name: str = "pipeline") -> str:
        make_pipeline(model, tiny_vae).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def make_config(tmp_path: Path, tiny_vae: AutoencoderKL) -> MakeConfig:
    """Builds configurations of tiny runs on three tiny videos, from the name of the run's folder and overrides."""
    write_videos(tmp_path / "videos")
    tiny_vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    tiny_vae.save_pretrained(tmp_path / "vae")

    def make(name: str, *overrides: str) -> RunConfig:
        values = {
            "run_dir": str(tmp_path / name),
            "autoencoder": str(tmp_path / "vae"),
            "data": {
                "path": str(tmp_path / "videos"),
                "class_folders": True,
                "num_frames": 2,
                "frame_interval": 2,
                "resolution": 16,
            },
            "model": {"preset": "tiny/4", "class_dropout": 0.3},
            "train": {
                "steps": 4,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "device": "cpu",
                "log_every": 1,
                "sample_every": 0,
            },
        }
        return load_config(RunConfig, values, overrides)

    return make
