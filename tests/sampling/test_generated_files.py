"""Each file holds the video of its class or prompt and its seed, in whatever order they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer

from lavita.core.seeds import DRAWS, generator
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling import generate as module
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.sampling.recipes import Recipe

TWO = Recipe(steps=2, guidance_scale=1.0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[Path, np.ndarray]:
    """Frames by the file that they were to be written to."""
    monkeypatch.setenv("LAVITA_BF16", "off")
    videos: dict[Path, np.ndarray] = {}
    monkeypatch.setattr(module, "write_video", lambda path, frames, *_: videos.update({path: frames}))
    return videos


def alone(pipeline: LavitaPipeline, seed: int, **condition: Any) -> np.ndarray:
    """The frames of a single video."""
    frames = pipeline(
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
        assert np.abs(written[file] - alone(pipeline, seed, class_labels=[label])).max() <= 1, file
    assert len({video.tobytes() for video in written.values()}) == 4


def test_prompts(
    tmp_path: Path,
    make_transformer: MakeTransformer,
    tiny_vae: AutoencoderKL,
    written: dict[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = make_pipeline(make_transformer(text_dim=3, text_encoder="letters"), tiny_vae)
    letters: Any = lambda texts: torch.tensor([[9.0 * text.count(letter) for letter in "abc"] for text in texts])  # noqa: E731
    pipeline._text_encoder = letters
    monkeypatch.setattr(module, "load_pipeline", lambda *_: pipeline)
    prompts = ["ccc", "a", "bb"]
    files = generate("builtin", tmp_path / "out", prompts=prompts, seeds="9,2", recipe=TWO, device="cpu")
    cases = [(prompt, seed) for prompt in prompts for seed in (9, 2)]
    for file, (prompt, seed) in zip(files, cases, strict=True):
        distances = {case: np.abs(written[file] - alone(pipeline, case[1], prompt=[case[0]])).max() for case in cases}
        assert distances.pop((prompt, seed)) <= 1 and min(distances.values()) > 5, file


def test_a_folder_does_not_mix_videos_of_other_random_numbers(
    tmp_path: Path, pipeline: LavitaPipeline, written: dict[Path, np.ndarray]
) -> None:
    """Folders from before the version was recorded are of version 1."""
    pipeline.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"recipe": TWO, "device": "cpu", "classes": "pong"}
    generate(str(tmp_path / "model"), tmp_path / "out", seeds="0", **options)
    record = tmp_path / "out" / "generation.json"
    settings = json.loads(record.read_text())
    assert settings.pop("draws") == DRAWS
    record.write_text(json.dumps(settings))
    written.clear()
    with pytest.raises(ValueError, match="holds videos of a version that drew other noise from the same seed"):
        generate(str(tmp_path / "model"), tmp_path / "out", seeds="0-1", **options)
    assert not written and json.loads(record.read_text()) == settings
