"""Runs whose processes share clips are those of one process: losses, weights, validation, samples, checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from run_folders import lines_of
from training.parallel_runs import assert_alike, tensors_of, torchrun

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.training.setup import check_batch_size
from lavita.training.train import train
from lavita.video.reading import read_clip

HALF = "train.steps=2"
PAIRS = "train.sequence_parallel=2"


@pytest.mark.slow
def test_groups_of_processes_train_as_one(make_config: MakeConfig, tmp_path: Path) -> None:
    # 3 frames and an image, which 4 processes divide and no group of 2 keeps apart; and 5 frames, which none divides.
    common = ["data.num_frames=3", "data.num_images=1", "train.clip_grad_norm=0.5", "data.frame_interval=1"]
    watched = [*common, "train.sample_every=4", "train.num_samples=3", f"data.validation={tmp_path / 'heldout'}"]
    watched += ["train.validate_every=4", "train.validation_clips=3"]
    tokens = ["data.num_frames=5", "data.frame_interval=1", "model.variant=3", "model.conditioning=all_tokens"]
    tokens += ["model.given_frames=[start]", "train.optimizer=muon", "train.power_ema=[0.1]"]
    (tmp_path / "heldout" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "1.mp4").rename(tmp_path / "heldout" / "a" / "1.mp4")

    one, one_tokens = make_config("one", *watched), make_config("one-tokens", *tokens)
    train(one)
    train(one_tokens)
    train(make_config("resumed", *common, HALF))
    torchrun(
        4,
        ddp := make_config("ddp", *watched, PAIRS, "train.accumulation=2"),
        fsdp := make_config("fsdp", *watched, PAIRS, "train.parallel=fsdp"),
        four := make_config("four", *tokens, "train.sequence_parallel=4", "train.gradient_checkpointing=true"),
        four_fsdp := make_config("four-fsdp", *tokens, "train.sequence_parallel=4", "train.parallel=fsdp"),
        make_config("resumed", *common, "train.steps=3", PAIRS, "train.parallel=fsdp"),
        make_config("again", *common, PAIRS, "train.parallel=fsdp", HALF),
        again := make_config("again", *common, PAIRS, "train.parallel=fsdp"),
    )
    train(resumed := make_config("resumed", *common))

    for run in (ddp, fsdp, resumed, again):
        assert_alike(run, one)
    for run in (four, four_fsdp):
        assert_alike(run, one_tokens)
    for name, tensor in tensors_of(fsdp).items():
        assert torch.equal(tensor, tensors_of(again)[name]), f"{name}: on the same processes, resuming is exact"
    for run in (ddp, fsdp):
        (expected,), (found,) = lines_of(one, "validation.jsonl"), lines_of(run, "validation.jsonl")
        np.testing.assert_allclose(found["by_noise"], expected["by_noise"], rtol=2e-5)
        for index in range(3):
            file = Path("samples") / "step-00000004" / f"{index}.mp4"
            sample, other = (read_clip(config.run_dir / file, 0, 3, 1).astype(int) for config in (run, one))
            assert np.abs(sample - other).mean() < 1
        assert lines_of(run, "events.jsonl")[0]["processes"] == 4


def test_one_process_has_no_one_to_share_with(make_config: MakeConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"sequence_parallel is 2, but must divide the processes \(1\); start several"
    ):
        train(make_config("run", PAIRS))


def test_a_batch_is_divided_among_groups(make_config: MakeConfig) -> None:
    settings = make_config("run", "train.batch_size=2").train
    check_batch_size(settings, Processes(0, 4).grouped(2))
    with pytest.raises(ConfigError, match=r"multiple of the groups of 2 processes \(3\) times train.accumulation"):
        check_batch_size(settings, Processes(0, 6).grouped(2))
