"""`lavita train --minutes` from videos to page: tiny budgets, what is written, resuming, and refusals."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tiny_data import write_videos

from lavita.core.config import load_config, read_yaml
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL
from lavita.studies.budget import measure, table
from lavita.studies.budget import run as module
from lavita.studies.budget.run import train_within
from lavita.training import step as step_module
from lavita.training import train as loop
from lavita.training.checkpoint import load_last_checkpoint
from lavita.training.config import RunConfig
from lavita.training.run_folder import Stopped
from lavita.video.reading import probe

Within = Callable[..., Path | None]


@pytest.fixture
def within(tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> Within:
    """Trains a tiny model on tiny videos for some seconds."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(measure, "MOST_STEPS", 2)
    monkeypatch.setattr(table, "PAGE_SECONDS", 0.1)
    monkeypatch.setattr(table, "FILES_SECONDS", 0.5)

    def call(videos: Path, seconds: float, *overrides: str, **options: Any) -> Path | None:
        values = {
            "run_dir": str(tmp_path / "run"),
            "autoencoder": str(tmp_path / "vae"),
            "data": {"path": str(videos), "resolution": 16, "num_frames": 2},
            "model": {"preset": "tiny/4"},
            "train": {"batch_size": 2, "num_samples": 2, "device": "cpu", "precision": "fp32"},
        }
        return train_within(values, overrides, seconds, **options)

    return call


def test_a_folder_of_videos_becomes_a_pipeline_samples_and_a_page(
    within: Within, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_videos(tmp_path / "videos", ["a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4"])
    seconds, begin = 8.0, time.monotonic()
    assert within(videos, seconds) == tmp_path / "run" / "pipeline"
    took, run_dir = time.monotonic() - begin, tmp_path / "run"
    assert took > 0.5 * seconds, "bounds on both sides are for a simulated clock: test_budget.py"

    out = capsys.readouterr().out
    choices, results = (dict(line.split(maxsplit=1) for line in part.splitlines()) for part in out.split("\n\n"))
    assert set(choices) == {
        *("data", "conditions", "clips", "resolution", "autoencoder", "latents"),
        *("model", "training", "time", "expect"),
    }
    assert choices["conditions"].startswith("the 2 folders of the videos are classes")
    assert set(results) == {"time", "trained", "pipeline", "samples", "page", "next"}
    config = load_config(RunConfig, read_yaml(run_dir / "config.yaml"))
    checkpoint = load_last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None and checkpoint.step == config.train.steps > 5
    assert results["trained"].startswith(f"{config.train.steps:,} steps, ")
    assert config.data.latent_cache == run_dir / "latents" and (run_dir / "latents" / "manifest.json").exists()
    samples = run_dir / "samples" / f"step-{config.train.steps:08d}"
    assert results["samples"] == f"{samples}.png, videos in {samples}"
    assert [probe(samples / f"{number}.mp4").num_frames for number in range(2)] == [2, 2]
    page = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    assert "finished" in page and "the rate will fall over" in page
    assert (run_dir / "pipeline" / "model_index.json").exists()

    # Again: everything is there already.
    begin = time.monotonic()
    assert within(videos, seconds) == run_dir / "pipeline"
    again = load_last_checkpoint(run_dir / "checkpoints")
    assert again is not None and again.step == checkpoint.step
    assert "goes on with these choices" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_what_is_left(
    within: Within, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_videos(tmp_path / "videos")
    real = step_module.train_step
    steps: list[int] = []

    def stopping(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    # A clock on which a step takes a second, and nothing else any time.
    monkeypatch.setattr(loop, "train_step", stopping)
    clock = lambda: float(len(steps))  # noqa: E731
    with pytest.raises(Stopped):
        within(videos, 30.0, clock=clock)
    saved = load_last_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 4 and saved.facts["budget"]["spent"] == 4
    first = capsys.readouterr().out.splitlines()

    def encoded_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache is there")

    monkeypatch.setattr(module, "encode_dataset", encoded_again)
    within(videos, 30.0, clock=clock)
    last = load_last_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None and 22 <= last.step <= 30
    second = capsys.readouterr().out.splitlines()
    assert second[: len(first)] == first, "the same choices"
    assert any(line.startswith("time         0:2") and line.endswith(" of 0:30") for line in second)

    with pytest.raises(ValueError, match=r"the budget is 0:10, of which 0:\d\d are spent"):
        within(videos, 10.0, clock=clock)
    within(videos, 45.0, clock=clock)
    longer = load_last_checkpoint(tmp_path / "run" / "checkpoints")
    assert longer is not None and 35 <= longer.step <= 45
    with pytest.raises(ValueError, match=r"was started with train.learning_rate=.*but 0.5 was asked for"):
        within(videos, 45.0, "train.learning_rate=0.5", clock=clock)


def test_encoding_that_is_interrupted_counts(within: Within, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, now = write_videos(tmp_path / "videos"), [0.0]
    real = encode_dataset

    def interrupted(*arguments: Any, **options: Any) -> None:
        now[0] += 7.0
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        within(videos, 30.0, clock=lambda: now[0])
    assert json.loads((tmp_path / "run" / "budget.json").read_text(encoding="utf-8"))["spent"] == 7
    monkeypatch.setattr(module, "encode_dataset", real)
    step = step_module.train_step

    def slow(*arguments: Any) -> Any:
        now[0] += 1.0
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", slow)
    within(videos, 30.0, clock=lambda: now[0])
    last = load_last_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None and 15 <= last.step <= 23


def test_a_folder_of_one_short_clip(
    within: Within, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = write_videos(tmp_path / "videos", ["only.mp4"], num_frames=5)
    assert within(videos, 600.0, "data.num_frames=16", dry_run=True) is None  # as given
    capsys.readouterr()
    values = {"run_dir": str(tmp_path / "run"), "autoencoder": str(tmp_path / "vae"), "data": {"path": str(videos)}}
    assert train_within(values, ["model.preset=tiny/4", "train.batch_size=2", "train.device=cpu"], 6.0) is not None
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert lines["clips"].startswith("5 frames, interval 1: the videos are too short for 16 frames")
    assert "memorise this video" in lines["expect"]
    config = load_config(RunConfig, read_yaml(tmp_path / "run" / "config.yaml"))
    assert config.data.num_frames == 5 and not config.data.horizontal_flip and config.data.resolution == 16


# --- the command


def test_the_command_prints_its_choices_and_writes_nothing(run: Run, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae")
    videos = write_videos(tmp_path / "videos", num_frames=40)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(
        *("train", "--data", videos, "--hours", "1", "--dry-run", f"autoencoder={tmp_path / 'vae'}"),
        *("model.preset=tiny/4", "train.batch_size=2", "train.device=cpu"),
    )
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["model"].startswith("tiny/4, 0.2 M parameters: as given")
    assert lines["clips"].startswith("16 frames, interval 1: 1.6 s of video at 10 frames per second")
    assert lines["time"].startswith("1:00:00 in all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "0"), "--minutes is 0, but must be at least 2 minutes"),
        (("--minutes", "1.5"), "--minutes is 1.5, but must be at least 2 minutes"),
        (("--minutes", "nan"), "--minutes is nan, but must be a finite number"),
        (("--minutes", "5", "--hours", "1"), "--minutes is 5 and --hours is 1: give one of them"),
        (("--hours", "1e30"), "at most 366 days"),
        (("--minutes", "5", "train.steps=7"), "train.steps is 7, but with --minutes or --hours the time decides"),
        (("--minutes", "5", "data=7"), "data is 7"),
        (("--minutes", "5", "run_dir=[1]"), "run_dir is [1]"),
        (("--minutes", "5", "data.num_frames=x"), "data.num_frames is 'x'"),
        (("--minutes", "5", "data.path=nowhere"), "nowhere: no such folder"),
        (("--minutes", "5", "model.preset=huge/2"), "preset is 'huge/2'; allowed: one of tiny mini"),
        (("--minutes", "5", "model.preset=mini"), "preset is 'mini'; allowed: one of tiny mini"),
        (("--minutes", "5", "run_dir=videos/run"), "inside videos, the folder of the videos"),
        (("--minutes", "5", "data.resolution=29"), "resolution is 29, but this autoencoder needs a multiple of 4"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    write_videos(tmp_path / "videos", ["0.mp4"])
    before = sorted(tmp_path.rglob("*"))
    path = () if any(word.startswith(("data.path", "data=")) for word in arguments) else ("data.path=videos",)
    code, _, err = run("train", *path, *arguments)
    assert code == 2 and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_torchrun_and_runs_without_a_budget_are_refused(
    within: Within, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = write_videos(tmp_path / "videos")
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="work in one process; start the command without torchrun"):
            within(videos, 10.0)
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run without a budget"):
        within(videos, 10.0)
