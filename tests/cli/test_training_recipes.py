"""`lavita train --recipe`: what a recipe sets, what wins over it, and a modern run from videos to a sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import MakeConfig, Run

from lavita.core.config import load_config, read_yaml
from lavita.training.config import RunConfig


def test_a_recipe_is_printed_with_what_wins_over_it(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("config", "--recipe", "modern", "train.optimizer=adamw")
    config = load_config(RunConfig, yaml.safe_load(out))
    assert code == 0 and config.model.prediction_type == "flow" and config.train.optimizer == "adamw"
    assert config.train.warmup_steps == 200
    (tmp_path / "mine.yaml").write_text("train: {warmup_steps: 7, steps: 9}\n")
    code, out, _ = run("config", "mine.yaml", "--recipe", "modern", "train.steps=11")
    config = load_config(RunConfig, yaml.safe_load(out))
    assert (config.train.warmup_steps, config.train.steps, config.train.timestep_shift) == (7, 11, "auto")
    code, out, _ = run("config", "--recipe", "paper")
    paper = load_config(RunConfig, yaml.safe_load(out))
    assert code == 0 and paper.model.preset == "XL/2"
    # Beyond the size, the defaults differ from the paper in these fields, which docs/paper.md explains.
    found, usual = (config.model_dump() for config in (paper, RunConfig()))
    differing = {
        f"{section}.{key}": found[section][key]
        for section in ("data", "model", "train")
        for key in found[section]
        if found[section][key] != usual[section][key]
    }
    assert differing == {
        "model.preset": "XL/2",
        "model.temporal_position": "absolute_input",
        "model.class_dropout": 0.0,
        "train.clip_grad_norm": None,
        "train.ema_warmup": False,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--recipe", "modern"), "nothing to train on"),
        (("train", "--recipe", "old", "--data", "videos"), "'old' is not one of 'paper', 'modern'"),
        (
            ("train", "--recipe", "modern", "--data", "videos", "model.prediction_type=epsilon"),
            "train.timestep_sampling is logit_normal, but has no effect with model.prediction_type=epsilon",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2 and said in err


def test_a_modern_run_from_videos_to_a_sample(run: Run, tmp_path: Path, make_config: MakeConfig) -> None:
    make_config("unused")  # writes the videos and the autoencoder
    code, _, err = run(
        *("train", "--recipe", "modern", "--data", tmp_path / "videos", "--run-dir", tmp_path / "run"),
        *("model.preset=tiny/4", f"autoencoder={tmp_path / 'vae'}", "data.num_frames=2", "data.frame_interval=1"),
        *("data.resolution=16", "train.steps=2", "train.batch_size=2", "train.sample_every=2", "train.num_samples=1"),
        "train.device=cpu",
    )
    assert code == 0, err
    saved = load_config(RunConfig, read_yaml(tmp_path / "run" / "config.yaml"))
    assert saved.model.prediction_type == "flow" and saved.train.steps == 2 and saved.data.normalize_latents
    transformer = json.loads((tmp_path / "run" / "pipeline" / "transformer" / "config.json").read_text())
    assert transformer["flow_shift"] == 1.0 and len(transformer["latent_std"]) == 4
    sample = ("sample", tmp_path / "run" / "pipeline", "--seeds", "0", "--steps", "3", "--device", "cpu")
    for sampler in ("unipc", "heun"):
        code, _, err = run(*sample, "--out", tmp_path / sampler, "--sampler", sampler)
        assert code == 0 and (tmp_path / sampler / "0.mp4").exists(), err
    code, _, err = run(*sample, "--out", tmp_path / "paper", "--recipe", "paper")
    assert code == 2 and err.startswith("error: sampler is ddpm, which does not fit a model with prediction_type flow")
    assert not (tmp_path / "paper").exists()
