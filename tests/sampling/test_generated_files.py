"""Each file holds the video of its class or prompt and its seed, in whatever order they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from tiny_text import BERT, save_text_encoder
from transformers import BertModel

from lavita.core.seeds import generator
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling import generate as module
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.sampling.recipes import Recipe

TWO = Recipe(steps=2, guidance_scale=1.0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[Path, np.ndarray]:
    """Frames by the file that they were to be written to."""
    monkeypatch.setenv("LAVITA_BF16", "off")
    videos: dict[Path, np.ndarray] = {}
    monkeypatch.setattr(module, "write_video", lambda path, frames, *_: videos.update({path: frames}))
    return videos


def alone(folder: Path, seed: int, **condition: Any) -> np.ndarray:
    """The frames of a single video."""
    frames = load_pipeline(folder)(
        **condition, num_inference_steps=2, generator=[generator(seed, "sample")], precision="fp32"
    ).frames
    assert isinstance(frames, np.ndarray)
    return frames[0].astype(int)


def test_classes(tmp_path: Path, pipeline: LavitaPipeline, written: dict[Path, np.ndarray]) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"recipe": TWO, "device": "cpu", "batch_size": 3}
    files = generate(str(tmp_path / "model"), tmp_path / "out", classes="pong,boxing", seeds="9,2", **options)
    cases = [(label, seed) for label in ("pong", "boxing") for seed in (9, 2)]
    for file, (label, seed) in zip(files, cases, strict=True):
        assert (file.parent.name, file.stem) == (label, str(seed))
        assert np.abs(written[file] - alone(tmp_path / "model", seed, class_labels=[label])).max() <= 1, file
    assert len({video.tobytes() for video in written.values()}) == 4


def test_prompts(
    tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, written: dict[Path, np.ndarray]
) -> None:
    torch.manual_seed(0)
    save_text_encoder(BertModel(BERT), tmp_path / "encoder")
    transformer = make_transformer(text_dim=16, text_encoder=str(tmp_path / "encoder"))
    make_pipeline(transformer, tiny_vae).save_pretrained(tmp_path / "model")
    prompts = ["freeway", "a game of boxing"]
    files = generate(str(tmp_path / "model"), tmp_path / "out", prompts=prompts, seeds="9,2", recipe=TWO, device="cpu")
    cases = [(prompt, seed) for prompt in prompts for seed in (9, 2)]
    for file, (prompt, seed) in zip(files, cases, strict=True):
        assert np.abs(written[file] - alone(tmp_path / "model", seed, prompt=[prompt])).max() <= 1, file
    assert len({video.tobytes() for video in written.values()}) == 4
