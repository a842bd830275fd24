"""Several processes train like one: the same losses, weights and averages, and exchangeable checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from run_folders import lines_of
from training.parallel_runs import assert_alike, tensors_of, torchrun

from lavita.core.config import ConfigError
from lavita.sampling.pipeline import load_pipeline
from lavita.training.train import train
from lavita.video.reading import read_clip


@pytest.mark.slow
def test_several_processes_train_as_one(make_config: MakeConfig, tmp_path: Path) -> None:
    common = ["train.log_every=1", "data.num_images=1", "train.clip_grad_norm=0.5", "train.warmup_steps=2"]
    watched = [*common, "train.sample_every=4", "train.num_samples=3", f"data.validation={tmp_path / 'heldout'}"]
    watched += ["train.validate_every=4", "train.validation_clips=3"]
    (tmp_path / "videos" / "a" / "1.mp4").parent.mkdir(exist_ok=True)
    (tmp_path / "heldout" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "1.mp4").rename(tmp_path / "heldout" / "a" / "1.mp4")
    muon = [*common, "train.optimizer=muon"]
    half = "train.steps=2"

    one, one_muon = make_config("one", *watched), make_config("one-muon", *muon)
    train(one)
    train(one_muon)
    train(make_config("one-then-fsdp", *common, half))
    torchrun(
        2,
        ddp := make_config("ddp", *watched, "train.accumulation=2"),
        fsdp := make_config("fsdp", *watched, "train.parallel=fsdp"),
        fsdp_muon := make_config("fsdp-muon", *muon, "train.parallel=fsdp", "train.accumulation=2"),
        make_config("fsdp-then-one", *common, half, "train.parallel=fsdp"),
        one_then_fsdp := make_config("one-then-fsdp", *common, "train.parallel=fsdp"),
        make_config("fsdp-again", *common, half, "train.parallel=fsdp"),
        fsdp_again := make_config("fsdp-again", *common, "train.parallel=fsdp"),
    )
    fsdp_then_one = make_config("fsdp-then-one", *common)
    train(fsdp_then_one)

    for run in (ddp, fsdp, fsdp_then_one, one_then_fsdp, fsdp_again):
        assert_alike(run, one)
    assert_alike(fsdp_muon, one_muon)
    # On the same processes, resuming is exact.
    for name, tensor in tensors_of(fsdp).items():
        assert torch.equal(tensor, tensors_of(fsdp_again)[name]), name

    shares = list((fsdp.run_dir / "checkpoints" / "step-00000004").glob("*.distcp"))
    sizes = [file.stat().st_size for file in shares]
    assert len(sizes) == 2 and max(sizes) < 1.5 * min(sizes), "each process writes its own share"
    for run in (ddp, fsdp):
        (expected,), (found,) = lines_of(one, "validation.jsonl"), lines_of(run, "validation.jsonl")
        np.testing.assert_allclose(found["by_noise"], expected["by_noise"], rtol=2e-5)
        weights = load_pipeline(run.run_dir / "pipeline").transformer.state_dict()
        for name, weight in load_pipeline(one.run_dir / "pipeline").transformer.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)
        for index in range(3):
            file = Path("samples") / "step-00000004" / f"{index}.mp4"
            sample, other = (read_clip(config.run_dir / file, 0, 2, 1).astype(int) for config in (run, one))
            assert np.abs(sample - other).mean() < 1
        assert (run.run_dir / "samples" / "step-00000004.png").exists()
        assert lines_of(run, "events.jsonl")[0]["processes"] == 2


def test_what_cannot_be_shared_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"parallel is fsdp, but there is one process; start several with torchrun"):
        train(make_config("run", "train.parallel=fsdp"))
