import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lavita.core.commands import CommandFailed, run_command
from lavita.core.config import save_config
from lavita.demo import stages as demo
from lavita.demo.page import write_curves, write_page
from lavita.training.config import RunConfig, TrainConfig
from lavita.video.writing import write_video

CLASSES = ("disks", "stripes")


def scores(accuracy: float) -> dict[str, Any]:
    motion = {
        name: {"real": 2.0, "generated": 3.0, "ratio": 1.5, "within_factor_two": name == "disks"} for name in CLASSES
    }
    return {
        "accuracy": {
            "accuracy": accuracy,
            "num_clips": 4,
            "per_class": dict.fromkeys(CLASSES, accuracy),
            "controls": {"held_out": 1.0, "recoloured": 0.9, "shuffled": 0.2},
        },
        "motion": {"per_class": motion},
    }


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a demo whose commands have all run."""
    frames = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    for folder in ("data/train", "samples", "samples-shipped"):
        for name in CLASSES:
            for seed in range(2):
                write_video(tmp_path / folder / name / f"{seed}.mp4", frames, 15)
    transformer = tmp_path / "train" / "pipeline" / "transformer"
    transformer.mkdir(parents=True)
    weights = {"a.weight": np.zeros((250, 1000), np.float32), "pos_embed": np.zeros((1, 999, 1000), np.float32)}
    save_file(weights, transformer / "diffusion_pytorch_model.safetensors")
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-4, "grad_norm": 0.1, "clips_per_second": 2.0} for s in (10, 20)]
    save_config(RunConfig(train=TrainConfig(batch_size=12)), tmp_path / "train" / "config.yaml")
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "scores.json").write_text(json.dumps(scores(0.75)))
    (tmp_path / "scores-shipped.json").write_text(json.dumps(scores(1.0)))
    return tmp_path


def test_every_stage_is_a_command_that_exists(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lavita.cli import app

    stages = [*demo.first_stages(tmp_path), *demo.later_stages(tmp_path, 100)]
    assert len(stages) == demo.NUM_STAGES
    for stage in stages:
        words = [word for word in stage.arguments[:2] if word.isalpha()]
        command = words if words[0] in ("data", "autoencoder") else words[:1]
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0
        for word in stage.arguments:
            if word.startswith("--"):
                assert word in result.output, stage.command


def test_page_shows_scores_and_every_video_that_it_names_exists(finished: Path) -> None:
    summary = demo.summarize(finished, [(stage, 30.0) for stage in demo.later_stages(finished, 20)])
    write_page(finished, summary)
    page = (finished / "index.html").read_text()
    assert summary["models"]["trained here"]["accuracy"] == 0.75
    assert summary["models"]["trained here"]["training"] == "0.2 M parameters, 20 steps in 2.0 minutes"
    assert summary["models"]["shipped"]["motion_within_factor_2"] == 1
    assert "75.0%" in page and "100.0%" in page
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 1 + 3 * 2 * len(CLASSES)
    for source in sources:
        assert (finished / source).is_file(), source
    sheet = Image.open(finished / "contact_sheet.png")
    assert sheet.width >= 16 * 16 and sheet.height >= 16 * 6


def test_curves(finished: Path, tmp_path: Path) -> None:
    write_curves(finished / "train" / "metrics.jsonl", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 1000


def test_the_training_is_as_long_as_the_computer_is_fast(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.mkdir()
    save_config(RunConfig(train=TrainConfig(batch_size=8)), probe / "config.yaml")
    rows = [{"step": 10, "clips_per_second": 1.0}, {"step": 40, "clips_per_second": 20.0}]
    (probe / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert demo.training_steps(tmp_path, 8) == 1200  # 8 min * 60 s * 20 clips/s / 8 clips
    assert demo.training_steps(tmp_path, 1) == 150
    train = demo.later_stages(tmp_path, demo.training_steps(tmp_path, 8))[0]
    assert "train.steps=1200" in train.arguments and "train.decay_steps=360" in train.arguments


def test_a_stopped_demo_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    fails = {"two"}

    def run(arguments: tuple[str, ...]) -> None:
        ran.append(arguments[0])
        if arguments[0] in fails:
            raise CommandFailed(1)

    monkeypatch.setattr(demo, "first_stages", lambda out: [demo.Stage("one", ("one",))])
    monkeypatch.setattr(demo, "training_steps", lambda out, minutes: 20)
    monkeypatch.setattr(demo, "later_stages", lambda out, steps: [demo.Stage("two", ("two",))])
    monkeypatch.setattr(demo, "run_command", run)
    monkeypatch.setattr(demo, "summarize", lambda out, timed: {"models": {}})
    monkeypatch.setattr(demo, "write_page", lambda out, summary: None)
    with pytest.raises(CommandFailed):
        demo.run_demo(tmp_path, 1)
    fails.clear()
    demo.run_demo(tmp_path, 1)
    assert ran == ["one", "two", "two"]
    assert (tmp_path / "summary.json").exists()


def test_a_command_that_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandFailed) as failed:
        run_command(["train", "--config", "no-such-file.yaml"])
    assert failed.value.code == 2
    assert capfd.readouterr().err == "error: no-such-file.yaml: no such file\n"
