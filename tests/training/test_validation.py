"""The loss on held-out clips: compared with a plain loop, on any number of processes, and refused settings."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from scipy import stats  # type: ignore[import-untyped]
from tiny_data import write_videos

from lavita.core.config import ConfigError, load_config
from lavita.core.processes import Processes, processes
from lavita.data.catalog import scan
from lavita.data.clips import ClipDraw, ClipSampler, read_pixels
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL, encode
from lavita.models.diffusion import GaussianDiffusion, Losses
from lavita.models.flow import make_objective
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.config import RunConfig
from lavita.training.validation import Validation

CPU = torch.device("cpu")
MakeValidation = Callable[..., Validation]


@pytest.fixture
def folders(tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    """Three classes to train on, two of them held out."""
    write_videos(tmp_path / "train", ["boxing/0.mp4", "enduro/0.mp4", "pong/0.mp4"], 4)
    write_videos(tmp_path / "held", ["enduro/7.mp4", "pong/8.mp4"], 5)
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def make_config(folders: Path, *overrides: str) -> RunConfig:
    data = {"num_frames": 2, "frame_interval": 2, "resolution": 16, "class_folders": True}
    values = {
        "data": {"path": str(folders / "train"), "validation": str(folders / "held"), **data},
        "train": {"validate_every": 2, "validation_clips": 5, "precision": "fp32", "steps": 5},
    }
    return load_config(RunConfig, values, overrides)


@pytest.fixture
def make_validation(folders: Path, tiny_vae: AutoencoderKL) -> MakeValidation:
    def make(*overrides: str, **others: Any) -> Validation:
        config = make_config(folders, *overrides)
        assert config.data.path is not None
        return Validation(
            config.data, config.train, tiny_vae, scan(config.data.path, config.data.class_folders), **others
        )

    return make


def record_inputs(diffusion: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """A list that receives z_0, timestep and noise of each clip whose loss is computed."""
    seen: list[tuple[torch.Tensor, ...]] = []
    objective = diffusion.losses

    def spy(output: torch.Tensor, *inputs: torch.Tensor) -> Losses:
        seen.extend(zip(*inputs, strict=True))
        return objective(output, *inputs)

    monkeypatch.setattr(diffusion, "losses", spy)
    return seen


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_it_is_the_objective_on_held_out_clips(
    prediction_type: str,
    folders: Path,
    tiny_vae: AutoencoderKL,
    make_validation: MakeValidation,
    make_transformer: MakeTransformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compared with a loop over single clips and timesteps, with the noise and timesteps that the model was given."""
    names, learn_sigma = ["boxing", "enduro", "pong"], prediction_type != "flow"
    model = make_transformer(num_classes=3, class_names=names, prediction_type=prediction_type, learn_sigma=learn_sigma)
    diffusion = make_objective(prediction_type)
    seen = record_inputs(diffusion, monkeypatch)
    validation = make_validation()
    result = validation.evaluate(model, diffusion, CPU, "fp32")
    monkeypatch.undo()
    assert len(seen) == 5 * 10

    catalog = scan(folders / "held", True)
    sampler = ClipSampler(catalog, 2, 2, False, 0, "validation")
    total, simple = np.zeros((5, 10)), np.zeros((5, 10))
    for clip in range(5):
        draw = sampler.draw(0, clip)
        assert not draw.flip
        mean, std = encode(tiny_vae, read_pixels(draw, 2, 2, 16), "fp32")
        label = {"enduro": 1, "pong": 2}[draw.video.name.split("/")[0]]
        for level in range(10):
            z, t, noise = (x[None] for x in seen[clip * 10 + level])
            assert 100 * level <= int(t) < 100 * (level + 1)
            assert ((z[0] - mean) / std).abs().max() < 6, "a sample of this clip's posterior"
            with torch.no_grad():
                output = model(diffusion.q_sample(z, t, noise), t, torch.tensor([label])).sample
                losses = diffusion.losses(output, z, t, noise)
            total[clip, level], simple[clip, level] = losses.total.item(), losses.mse.item()
    assert result["by_noise"] == pytest.approx(total.mean(0), rel=1e-5)
    assert result["simple_by_noise"] == pytest.approx(simple.mean(0), rel=1e-5)
    assert result["loss"] == pytest.approx(total.mean(), rel=1e-5)
    assert result["simple"] == pytest.approx(simple.mean(), rel=1e-5)
    noises = torch.stack([noise for _, _, noise in seen])
    assert abs(noises.mean().item()) < 0.02 and abs(noises.std().item() - 1) < 0.02
    assert len({float(noise.sum()) for noise in noises}) == 50, "another noise for each clip and level"


class Silent(torch.nn.Module):
    """Predicts zero noise and the least variance."""

    def forward(self, noisy: torch.Tensor, *_: Any) -> Any:
        return SimpleNamespace(sample=torch.cat([torch.zeros_like(noisy), -torch.ones_like(noisy)], dim=2))


def test_noise_and_timesteps_are_drawn_for_each_clip_and_level(
    make_validation: MakeValidation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timesteps are uniform within their level, and independent; no two clips share a sample or a noise."""
    diffusion, count = GaussianDiffusion(), 60
    seen = record_inputs(diffusion, monkeypatch)
    make_validation(f"train.validation_clips={count}").evaluate(Silent(), diffusion, CPU, "fp32")
    clips, timesteps, noises = (list(column) for column in zip(*seen, strict=True))
    places = torch.stack(timesteps).view(count, 10) - 100 * torch.arange(10)
    assert stats.kstest(places.flatten(), stats.randint(0, 100).cdf).pvalue > 1e-3
    for one, next_one in ((places[:, :-1], places[:, 1:]), (places[:-1], places[1:])):  # levels, then clips
        assert stats.spearmanr(one.flatten(), next_one.flatten()).pvalue > 1e-3
    assert len({float(clip.sum()) for clip in clips}) == count, "though there are fewer videos and starts"
    assert len({float(noise.sum()) for noise in noises}) == count * 10


def test_it_is_the_same_every_time_and_leaves_the_model_alone(
    make_validation: MakeValidation, tiny_transformer: LavitaTransformer3DModel
) -> None:
    validation, diffusion = make_validation(), GaussianDiffusion()
    tiny_transformer.train()
    before = copy.deepcopy(tiny_transformer.state_dict())
    modes = []
    hook = tiny_transformer.register_forward_hook(lambda module, *_: modes.append(module.training))
    torch.manual_seed(3)
    first = validation.evaluate(tiny_transformer, diffusion, CPU, "fp32")
    hook.remove()
    torch.manual_seed(4)
    assert validation.evaluate(tiny_transformer, diffusion, CPU, "fp32") == first
    assert make_validation().evaluate(tiny_transformer, diffusion, CPU, "fp32") == first
    assert make_validation("train.seed=1").evaluate(tiny_transformer, diffusion, CPU, "fp32") != first
    assert tiny_transformer.training and not any(modes)
    assert all(torch.equal(value, before[name]) for name, value in tiny_transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_transformer.parameters())
    tiny_transformer.eval()
    validation.evaluate(tiny_transformer, diffusion, CPU, "fp32")
    assert not tiny_transformer.training


@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_several_processes_make_the_whole(
    count: int,
    make_validation: MakeValidation,
    tiny_transformer: LavitaTransformer3DModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each share alone, then all of them merged, is identical to one process; all make the same number of passes."""
    diffusion = GaussianDiffusion()
    whole = make_validation().evaluate(tiny_transformer, diffusion, CPU, "fp32")
    team = [make_validation(team=Processes(rank, count)) for rank in range(count)]
    passes: list[int] = []
    hook = tiny_transformer.register_forward_hook(lambda *_: passes.append(1))
    shares: list[Any] = []
    counts = []

    def collect(team: Processes, share: Any) -> Any:
        shares.append(share)
        return share

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "collect", collect)
        for validation in team:
            passes.clear()
            validation.evaluate(tiny_transformer, diffusion, CPU, "fp32")
            counts.append(len(passes))
    hook.remove()
    assert len(set(counts)) == 1, "or sharded models would wait for each other"
    monkeypatch.setattr(Processes, "gather", lambda team, share: shares)
    for validation in team:
        assert validation.evaluate(tiny_transformer, diffusion, CPU, "fp32") == whole


def _one_of_two(rank: int, port: int, folders: Path, results: Any) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    model = LavitaTransformer3DModel.from_pretrained(folders / "model").eval()
    vae = AutoencoderKL.from_pretrained(folders / "vae")
    with processes() as team:
        config = make_config(folders)
        validation = Validation(config.data, config.train, vae, scan(folders / "train", True), team=team)
        results.put(validation.evaluate(model, GaussianDiffusion(), CPU, "fp32"))


@pytest.mark.slow
def test_two_processes_get_the_numbers_of_one(folders: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    tiny_transformer.save_pretrained(folders / "model")
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=_one_of_two, args=(rank, port, folders, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    vae = AutoencoderKL.from_pretrained(folders / "vae").eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = make_config(folders)
    alone = Validation(config.data, config.train, vae, scan(folders / "train", True))
    expected = alone.evaluate(tiny_transformer, GaussianDiffusion(), CPU, "fp32")
    torch.set_num_threads(threads)
    assert results.get() == results.get() == expected


def test_a_cache_gives_the_numbers_of_its_videos(
    folders: Path,
    tiny_vae: AutoencoderKL,
    make_validation: MakeValidation,
    tiny_transformer: LavitaTransformer3DModel,
) -> None:
    encode_dataset(scan(folders / "held"), folders / "cache", tiny_vae, 16, False, "fp32")
    diffusion = GaussianDiffusion()
    cached = make_validation(f"data.validation={folders / 'cache'}").evaluate(tiny_transformer, diffusion, CPU, "fp32")
    videos = make_validation().evaluate(tiny_transformer, diffusion, CPU, "fp32")
    assert cached["by_noise"] == pytest.approx(videos["by_noise"], rel=2e-3)
    with pytest.raises(ValueError, match=r"was made at resolution 16, but data\.resolution is 32"):
        make_validation(f"data.validation={folders / 'cache'}", "data.resolution=32")


def test_captions_condition_the_model(
    folders: Path, make_validation: MakeValidation, make_transformer: MakeTransformer, tmp_path: Path
) -> None:
    """Each clip has the embedding of a caption of its own video."""
    table = tmp_path / "held.csv"
    table.write_text("file,caption\nenduro/7.mp4,a car\npong/8.mp4,a ball\npong/8.mp4,two bats\n")
    (tmp_path / "train.csv").write_text("file,caption\n" + "".join(f"{n}/0.mp4,x\n" for n in ("boxing", "enduro")))
    vectors = {"a car": [1.0, 0.0, 0.0], "a ball": [0.0, 1.0, 0.0], "two bats": [0.0, 0.0, 1.0]}
    seen: list[Any] = []
    model = make_transformer(text_dim=3, text_encoder="any")
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[3].tolist()))
    validation = make_validation(
        "data.class_folders=false",
        f"data.captions={tmp_path / 'train.csv'}",
        f"data.validation_captions={table}",
        "train.validation_clips=12",
        embed=lambda texts: torch.tensor([vectors[text] for text in texts]),
    )
    validation.evaluate(model, GaussianDiffusion(), CPU, "fp32")
    sampler = ClipSampler(scan(folders / "held"), 2, 2, False, 0, "validation")
    allowed = {"enduro/7.mp4": ("a car",), "pong/8.mp4": ("a ball", "two bats")}
    for clip in range(12):
        draw: ClipDraw = sampler.draw(0, clip)
        rows = seen[clip * 10 : clip * 10 + 10]
        assert all(row == rows[0] for row in rows)
        assert rows[0] in [vectors[text] for text in allowed[draw.video.name]]
    assert {tuple(row) for row in seen} == {tuple(vector) for vector in vectors.values()}


def test_without_classes_no_label_is_given(make_validation: MakeValidation, make_transformer: MakeTransformer) -> None:
    validation = make_validation("data.class_folders=false")
    assert np.isfinite(validation.evaluate(make_transformer(), GaussianDiffusion(), CPU, "fp32")["loss"])


def test_what_does_not_fit_is_refused(folders: Path, make_validation: MakeValidation) -> None:
    write_videos(folders / "other", ["tennis/0.mp4"], 5)
    with pytest.raises(
        ConfigError, match=r"other: has class 'tennis', which the training videos do not have \(boxing, "
    ):
        make_validation(f"data.validation={folders / 'other'}")
    with pytest.raises(ConfigError, match=r"data\.validation is .*train, but its boxing/0\.mp4 is a training video"):
        make_validation(f"data.validation={folders / 'train'}")
    with pytest.raises(ConfigError, match=r"boxing/0\.mp4 is a training video, too"):
        make_validation(f"data.path={folders}", f"data.validation={folders / 'train'}")
    with pytest.raises(ValueError, match="none: no such folder"):
        make_validation(f"data.validation={folders / 'none'}")
    with pytest.raises(ConfigError, match=r"validation_clips is 5, but each of 6 processes needs one"):
        make_validation(team=Processes(0, 6))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.validate_every=5"], "train.validate_every is 5, but needs data.validation"),
        (["data.validation=v"], "data.validation is set, but has no effect with train.validate_every=0"),
        (["train.validation_clips=8"], "validation_clips is 8, but has no effect with validate_every=0"),
        (
            ["train.validate_every=5", "data.validation=v", "data.captions=c.csv"],
            "validation_captions is missing: a run with captions needs captions of the held-out videos",
        ),
        (["data.captions=c.csv", "data.validation_captions=v.csv"], "validation_captions is set, but needs"),
        (
            ["train.validate_every=5", "data.validation=v", "data.validation_captions=v.csv"],
            "validation_captions is set, but needs validation and captions",
        ),
    ],
)
def test_keys_without_an_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, {}, overrides)
