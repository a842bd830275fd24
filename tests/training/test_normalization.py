"""Normalised latents: trained, validated and sampled, resumed and fine-tuned with the statistics of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig, MakeTransformer
from sampling.sampled import sample
from tiny_data import write_videos

from lavita.core.config import ConfigError
from lavita.data.catalog import scan
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.fingerprint import fingerprint
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.transformer import TransformerOutput
from lavita.sampling.latte_files import export_latte
from lavita.sampling.pipeline import load_pipeline, make_pipeline
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig
from lavita.training.normalization import latent_statistics
from lavita.training.train import train
from lavita.training.validation import Validation

NORMAL = "data.normalize_latents=true"
STATISTICS = LatentStatistics((0.5, -1.0, 0.0, 2.0), (2.0, 0.5, 1.0, 0.1))


@pytest.fixture
def cache(tmp_path: Path, make_config: MakeConfig, tiny_vae: AutoencoderKL) -> Path:
    encode_dataset(scan(tmp_path / "videos"), tmp_path / "cache", tiny_vae, 16, True, "fp32")
    return tmp_path / "cache"


def of_run(config: RunConfig) -> LatentStatistics | None:
    file = config.run_dir / "pipeline" / "transformer" / "config.json"
    return LatentStatistics.of(json.loads(file.read_text()))


def test_batches_are_normalised_and_draw_as_before(
    make_config: MakeConfig, cache: Path, tiny_vae: AutoencoderKL
) -> None:
    config = make_config("run", NORMAL, f"data.latent_cache={cache}", "data.num_images=1", "train.batch_size=32")
    batches = BatchMaker(config.data, config.train, tiny_vae, 0.1)
    plain = batches.make(3)
    statistics = latent_statistics(config, batches.source)
    assert statistics is not None
    batches.statistics = statistics
    normal = batches.make(3)
    torch.testing.assert_close(normal.latents, statistics.normalize(plain.latents))
    assert torch.equal(normal.noise, plain.noise) and torch.equal(normal.timesteps, plain.timesteps)
    np.testing.assert_allclose(normal.latents.mean((0, 1, 3, 4)), 0, atol=0.25)
    np.testing.assert_allclose(normal.latents.std((0, 1, 3, 4)), 1, rtol=0.2)


def test_held_out_clips_are_normalised(make_config: MakeConfig, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    held_out = write_videos(tmp_path / "held-out", ["a/7.mp4", "b/8.mp4"], 12)
    config = make_config("run", f"data.validation={held_out}", "train.validate_every=2", "train.validation_clips=2")
    training = scan(tmp_path / "videos", True)
    plain = Validation(config.data, config.train, tiny_vae, training)
    normal = Validation(config.data, config.train, tiny_vae, training, statistics=STATISTICS)
    for before, after in zip(plain.latents, normal.latents, strict=True):
        torch.testing.assert_close(after, STATISTICS.normalize(before))


def test_sampling_undoes_it(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    plain = make_pipeline(make_transformer(), tiny_vae)
    normal = make_pipeline(make_transformer(**STATISTICS.fields()), tiny_vae)
    state = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inner = sample(plain, [0, 0], latents=state)
    outer = sample(normal, [0, 0], latents=state)
    torch.testing.assert_close(outer, STATISTICS.denormalize(inner))
    options: dict[str, Any] = {"num_videos": 2, "num_inference_steps": 6, "precision": "fp32", "latents": state}
    np.testing.assert_array_equal(normal(**options).frames, decode(tiny_vae, outer, "fp32"))
    normal.save_pretrained(tmp_path / "saved")
    assert torch.equal(sample(load_pipeline(tmp_path / "saved"), [0, 0], latents=state), outer)
    assert fingerprint(plain.transformer) != fingerprint(normal.transformer)
    with pytest.raises(ValueError, match=r"latent_mean is .*, but Latte's format only holds None"):
        export_latte(tmp_path / "saved", tmp_path / "out.pt")


def test_a_perfect_model_of_unit_variance_gives_the_datas_statistics(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = make_transformer(prediction_type="flow", learn_sigma=False, **STATISTICS.fields())

    def forward(latents: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> Any:
        time = float(timesteps[0]) / 1000  # E[noise - z_0 | z_t] for standard normal z_0
        return TransformerOutput(sample=(2 * time - 1) / ((1 - time) ** 2 + time**2) * latents)

    monkeypatch.setattr(transformer, "forward", forward)
    latents = sample(make_pipeline(transformer, tiny_vae), [0] * 32, num_inference_steps=25)
    np.testing.assert_allclose(latents.mean((0, 1, 3, 4)), STATISTICS.mean, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 1, 3, 4)), STATISTICS.std, rtol=0.05)


def test_a_resumed_run_keeps_its_statistics(make_config: MakeConfig, cache: Path) -> None:
    options = (NORMAL, f"data.latent_cache={cache}")
    config = make_config("run", *options, "train.steps=2", "train.checkpoint_every=2")
    train(config)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert of_run(config) == LatentStatistics.of(manifest)
    before = of_run(config)
    grown = {**manifest, "latent_mean": [9.0] * 4}  # as the statistics of a cache that has grown
    (cache / "manifest.json").write_text(json.dumps(grown))
    train(make_config("run", *options, "train.steps=3", "train.checkpoint_every=2"))
    assert of_run(config) == before
    fresh = make_config("fresh", *options, "train.steps=1")
    train(fresh)
    assert of_run(fresh) != before


def test_fine_tuning_keeps_the_statistics_of_the_weights(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_config("first", NORMAL, "train.steps=1")
    folder = train(first)
    tuned = make_config("tuned", NORMAL, "train.steps=1", f"train.init_from={folder}", "data.resolution=32")
    train(tuned)
    assert of_run(tuned) == of_run(first)
    assert "not normalised" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"normalize_latents is false, but .*first was trained on normalised latents"):
        train(make_config("plain", "train.steps=1", f"train.init_from={first.run_dir}"))
    plain = make_config("plain", "train.steps=1")
    train(plain)
    assert of_run(plain) is None
    changed = make_config("changed", NORMAL, "train.steps=1", f"train.init_from={plain.run_dir}")
    train(changed)
    assert of_run(changed) is not None
    assert "was trained on latents that are not normalised; this run normalises them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_mean": [0.0] * 4}, "latent_mean and latent_std are lists of one number for each of the 4 channels"),
        ({"latent_mean": [0.0] * 3, "latent_std": [1.0] * 3}, "lists of one number for each of the 4 channels"),
        ({"latent_mean": [0.0] * 4, "latent_std": [1.0, 1.0, 0.0, 1.0]}, "and deviations are above 0"),
    ],
)
def test_statistics_of_another_shape_are_refused(
    fields: dict[str, Any], message: str, make_transformer: MakeTransformer
) -> None:
    with pytest.raises(ValueError, match=message):
        make_transformer(**fields)
