"""The training loop: exact resuming, the cache, the files of a run, and how it is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from run_folders import last_checkpoint, lines_of
from tiny_data import write_videos

from lavita.core.config import ConfigError, load_config, read_yaml
from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.data.catalog import scan
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL, load_autoencoder
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.training import snapshots
from lavita.training import train as module
from lavita.training.batches import BatchMaker
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig
from lavita.training.ema import EMA
from lavita.training.run_folder import Stopped
from lavita.training.setup import build_model
from lavita.training.train import train
from lavita.video.reading import probe, read_clip
from lavita.video.writing import write_video

FLOW = (
    "model.prediction_type=flow",
    "model.learn_sigma=false",
    "train.timestep_sampling=logit_normal",
    "train.timestep_shift=2",
)


def metrics_of(config: RunConfig, *dropped: str) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in dropped} for line in lines_of(config)]


def last_state(config: RunConfig) -> dict[str, Any]:
    checkpoint = last_checkpoint(config)
    return {"step": checkpoint.step, **checkpoint.facts, **checkpoint.read_all()}


def assert_equal(one: Any, other: Any, where: str = "state") -> None:
    """Nested dicts and lists are equal, tensors to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    else:
        assert one == other, where


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Sends SIGINT to this process at the `call`-th call of a function that the main thread runs."""
    real, calls = getattr(owner, name), []

    def signalling(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, signalling)


# --- the optimisation


def test_the_loss_falls_on_one_clip(make_config: MakeConfig, tmp_path: Path) -> None:
    write_videos(tmp_path / "one", ["only.mp4"], num_frames=2)
    config = make_config(
        "run",
        f"data.path={tmp_path / 'one'}",
        "data.class_folders=false",
        "data.frame_interval=1",
        "data.horizontal_flip=false",
        "model.preset=tiny/2",
        "train.learning_rate=3e-3",
        "train.batch_size=8",
        "train.steps=80",
    )
    train(config)
    losses = [line["loss"] for line in metrics_of(config)]
    assert losses[0] > 0.9, "a fresh model predicts no noise at all"
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_a_run_starts_from_other_weights(make_config: MakeConfig) -> None:
    """It starts with the averaged weights of the other run, which a resumed run no longer needs."""
    first = make_config("first", "train.ema_decay=0.5")
    folder = train(first)
    again = make_config("again", f"train.init_from={folder}", "train.learning_rate=1e-12", "train.steps=1")
    train(again)
    started = last_state(again)
    for name, weight in last_state(first).items():
        if name.startswith("ema."):
            torch.testing.assert_close(started[name.replace("ema", "model", 1)], weight, rtol=0, atol=1e-9, msg=name)
    assert "loaded" in (again.run_dir / "init.txt").read_text()
    shutil.rmtree(folder)
    longer = make_config("again", f"train.init_from={folder}", "train.learning_rate=1e-12", "train.steps=2")
    train(longer)


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
def test_every_combination_trains_and_samples(
    variant: int, conditioning: str, temporal_position: str, patch_embedding: str, make_config: MakeConfig
) -> None:
    images = 0 if patch_embedding == "compression" else 2
    config = make_config(
        "run",
        f"model={{preset: tiny/4, variant: {variant}, conditioning: {conditioning}, "
        f"temporal_position: {temporal_position}, patch_embedding: {patch_embedding}}}",
        f"data.num_images={images}",
        "train.steps=2",
    )
    pipeline = load_pipeline(train(config))
    saved = pipeline.transformer.config
    assert (saved["variant"], saved["conditioning"]) == (variant, conditioning)
    assert (saved["temporal_position"], saved["patch_embedding"]) == (temporal_position, patch_embedding)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(["a"], num_inference_steps=2, guidance_scale=2.0, precision="fp32").frames
    assert frames.shape == (1, 2, 16, 16, 3)
    losses = [line["loss"] for line in metrics_of(config)]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_the_run(make_config: MakeConfig) -> None:
    with pytest.raises(FloatingPointError, match=r"at step 2; lower train\.learning_rate"):
        train(make_config("run", "train.learning_rate=1e30"))
    config = make_config("run", "train.learning_rate=1e-3")
    assert not list_checkpoints(config.run_dir / "checkpoints")
    train(config)  # nothing was saved, so that the advice can be followed in the same folder
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4]


# --- resuming


@pytest.mark.parametrize("changes", [(), ("train.optimizer=muon",), FLOW], ids=["paper", "muon", "flow"])
def test_resuming_equals_an_uninterrupted_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    slow_start = ["train.log_every=3", "train.warmup_steps=3", *changes]
    whole = make_config("whole", "train.checkpoint_every=2", *slow_start)
    train(whole)
    assert [file.name for file in list_checkpoints(whole.run_dir / "checkpoints")] == [
        "step-00000002",
        "step-00000004",
    ]

    killed = make_config("whole", "train.checkpoint_every=2", *slow_start)
    expected, expected_metrics = last_state(whole), metrics_of(whole, "clips_per_second")
    assert [line["step"] for line in expected_metrics] == [3, 4]
    shutil.rmtree(list_checkpoints(killed.run_dir / "checkpoints")[-1])  # as a kill before step 4 would leave it
    train(killed)
    assert_equal(last_state(killed), expected)
    assert metrics_of(killed, "clips_per_second") == expected_metrics

    stopped = make_config("stopped", *slow_start)
    with monkeypatch.context() as patch:
        stop_after(patch, EMA, "update", call=2)
        with pytest.raises(Stopped, match="stopped at step 2 of 4"):
            train(stopped)
    assert last_state(stopped)["step"] == 2
    assert (stopped.run_dir / "pipeline" / "model_index.json").exists()
    train(stopped)
    assert_equal(last_state(stopped), expected)
    assert metrics_of(stopped, "clips_per_second") == expected_metrics


@pytest.mark.parametrize(("owner", "name"), [(module, "write_samples"), (module, "save_pipeline")])
def test_a_signal_at_any_moment_loses_no_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.setattr(module, "write_samples", lambda *_: None)
    stop_after(monkeypatch, owner, name, call=1)
    config = make_config("run", "train.sample_every=1", "train.checkpoint_every=2")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as caught:
        train(config)
    saved = last_state(config)["step"]
    assert str(caught.value).startswith(f"stopped at step {saved} of 4")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_left_alone_and_can_be_extended(make_config: MakeConfig) -> None:
    config = make_config("run", "train.steps=2")
    folder = train(config)
    before, line = last_state(config), metrics_of(config)
    assert train(config) == folder
    assert metrics_of(config) == line
    assert_equal(last_state(config), before)
    train(make_config("run", "train.steps=3", "train.log_every=2", "train.keep_checkpoints=1"))
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3]
    assert len(list_checkpoints(config.run_dir / "checkpoints")) == 1


def test_resuming_something_else_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config("run", "train.steps=1"))

    with pytest.raises(ConfigError, match=r"started with data\.frame_interval=2, but 3 was asked for; use another run"):
        train(make_config("run", "data.frame_interval=3"))
    with pytest.raises(ConfigError, match=r"train\.learning_rate=0\.001, but 0\.002"):
        train(make_config("run", "train.learning_rate=2e-3"))

    write_videos(tmp_path / "videos", ["c/0.mp4"])
    with pytest.raises(ConfigError, match=r"was trained on other data \(videos: 1 added \(c/0\.mp4\)\)"):
        train(make_config("run"))
    (tmp_path / "run" / "videos.json").unlink()
    with pytest.raises(ValueError, match="a model with num_classes=2, but this data and configuration give 3"):
        train(make_config("run"))
    (tmp_path / "videos" / "c" / "0.mp4").unlink()

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="was trained with another autoencoder; use another run_dir"):
        train(make_config("run"))


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run")
    overrides = [
        f"data.path={tmp_path / 'videos'}",
        "data.class_folders=true",
        "data.num_frames=2",
        "data.frame_interval=2",
        "data.resolution=16",
        f"autoencoder={tmp_path / 'vae'}",
        "model={preset: tiny/4, class_dropout: 0.3}",
        "train={steps: 1000000, batch_size: 4, learning_rate: 1e-3, precision: fp32}",
        "train={device: cpu, log_every: 1, sample_every: 0}",
    ]
    command = [sys.executable, "-m", "lavita", "train", "--run-dir", str(config.run_dir), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        metrics = config.run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1]
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert out == "" and "Traceback" not in err
    step = last_state(config)["step"]
    assert f"stopped at step {step:,} of 1,000,000; run the same command again to resume" in err

    resumed = make_config("run", f"train.steps={step + 2}", "train.checkpoint_every=1000")
    train(resumed)
    assert [line["step"] for line in metrics_of(resumed)] == list(range(1, step + 3))


# --- the cache


@pytest.mark.parametrize("class_folders", ["true", "false"])
def test_training_from_the_cache_equals_training_from_the_videos(
    make_config: MakeConfig, tmp_path: Path, class_folders: str
) -> None:
    straight = make_config("straight", f"data.class_folders={class_folders}")
    vae = load_autoencoder(straight.autoencoder)
    assert straight.data.path is not None
    encode_dataset(scan(straight.data.path), tmp_path / "cache", vae, 16, True, precision="fp32")
    cached = make_config(
        "cached",
        f"data.latent_cache={tmp_path / 'cache'}",
        "data.path=null",
        f"data.class_folders={class_folders}",
    )
    both = make_config("both", f"data.latent_cache={tmp_path / 'cache'}", f"data.class_folders={class_folders}")
    for config in (straight, cached, both):
        train(config)
        for line, expected in zip(metrics_of(config), metrics_of(straight), strict=True):
            # A last bit of float16 may round to the other side.
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    fields = load_pipeline(cached.run_dir / "pipeline").transformer.config
    assert (fields["num_classes"], fields["class_names"]) == ((2, ["a", "b"]) if class_folders == "true" else (0, None))
    assert (fields["frame_interval"], fields["fps"]) == (2, 5.0)


def test_data_that_does_not_fit_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing: name a folder of videos, or a data\.latent_cache"):
        train(make_config("run", "data.path=null"))
    with pytest.raises(ValueError, match="no finished latent cache"):
        train(make_config("run", f"data.latent_cache={tmp_path}"))
    with pytest.raises(ValueError, match="has 10 frames, but a clip needs 11"):
        train(make_config("run", "data.frame_interval=10", "data.broken=error"))
    # 60 pixels are 30 latent pixels, which are no whole number of patches.
    message = r"data\.resolution is 60, but must be a multiple of 8, such as 56 or 64: .*model\.preset=tiny/4 by 4"
    with pytest.raises(ConfigError, match=message):
        train(make_config("run", "data.resolution=60"))
    with pytest.raises(ValueError, match="device is 'abacus', which is not available here"):
        train(make_config("run", "train.device=abacus"))
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing behind"


# --- what a run writes


def test_what_a_run_writes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[Path, np.ndarray] = {}

    def recording(path: Path, frames: np.ndarray, fps: float) -> None:
        written[path] = frames
        write_video(path, frames, fps)

    monkeypatch.setattr(snapshots, "write_video", recording)
    config = make_config(
        "run", "train.warmup_steps=2", "train.decay_steps=1", "train.ema_decay=0.5", "train.sample_every=3"
    )
    folder = train(config)

    lines = metrics_of(config)
    assert [set(line) for line in lines] == [{"step", "loss", "lr", "grad_norm", "clips_per_second"}] * 4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert all(line["grad_norm"] > 0 and line["clips_per_second"] > 0 for line in lines)

    assert folder == config.run_dir / "pipeline"
    state = last_state(config)
    pipeline = load_pipeline(folder)
    for name, parameter in pipeline.transformer.named_parameters():
        assert torch.equal(parameter, state[f"ema.{name}"]), name
    assert not torch.equal(state["ema.x_embedder.proj.weight"], state["model.x_embedder.proj.weight"])

    samples = sorted(path.relative_to(config.run_dir / "samples").as_posix() for path in config.run_dir.rglob("*.mp4"))
    assert samples == [f"step-0000000{step}/{i}.mp4" for step in (3, 4) for i in range(8)]
    assert probe(config.run_dir / "samples" / samples[-1]).num_frames == 2
    assert (config.run_dir / "samples" / "step-00000004.png").exists()
    # The last samples are those of the saved pipeline, labels in turn.
    seed = generator(3, "sample")
    (video,) = pipeline(["b"], num_inference_steps=snapshots.SAMPLE_STEPS, generator=[seed], precision="fp32").frames
    sampled = written[config.run_dir / "samples" / "step-00000004" / "3.mp4"]
    assert np.abs(sampled.astype(int) - video).max() <= 1
    assert not np.array_equal(sampled, written[config.run_dir / "samples" / "step-00000004" / "1.mp4"])
    assert load_config(RunConfig, read_yaml(config.run_dir / "config.yaml")) == config


def test_samples_have_the_same_seeds_and_labels_each_time(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, np.ndarray] = {}
    monkeypatch.setattr(snapshots, "write_video", lambda path, frames, fps: written.update({path.as_posix(): frames}))
    monkeypatch.setattr(snapshots, "contact_sheet", lambda *_: None)

    def sample(step: int, batch_size: int) -> list[np.ndarray]:
        written.clear()
        config = make_config("run", f"train.batch_size={batch_size}", "train.num_samples=3")
        vae = load_autoencoder(config.autoencoder)
        batches = BatchMaker(config.data, config.train, vae, config.model.class_dropout)
        model = build_model(config, vae, batches)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.05)
        torch.manual_seed(step)  # what else is random does not matter
        pipeline = make_pipeline(model.eval(), vae)
        snapshots.write_samples(config.run_dir / "samples", pipeline, batches, config.train, step, Processes())
        return list(written.values())

    first = sample(1, batch_size=4)
    assert len(first) == 3
    assert not np.array_equal(first[0], first[2]), "two seeds of a class are two videos"
    np.testing.assert_array_equal(sample(2, batch_size=4), first)
    difference = np.abs(np.stack(sample(3, batch_size=2)).astype(int) - np.stack(first))
    assert difference.max() <= 1, "a sample does not depend on the batch that it is made in"


def test_samples_that_are_not_finite_do_not_end_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(*arguments: Any, **options: Any) -> Any:
        raise FloatingPointError("the latents are not finite")

    monkeypatch.setattr(LavitaPipeline, "__call__", overflow)
    config = make_config("run", "train.steps=2", "train.sample_every=1", "train.num_samples=3", "train.batch_size=2")
    train(config)
    folder = config.run_dir / "samples" / "step-00000001"
    clips = [read_clip(folder / f"{index}.mp4", 0, 1) for index in range(3)]
    assert all(clip.max() <= 2 for clip in clips)
    said = capsys.readouterr().err
    for step in (1, 2):
        assert f"step {step}: samples 0 to 1 are black: the latents are not finite" in said
