import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavita import demo
from lavita.page import write_curves, write_page
from lavita.video import write_video

CLASSES = ("disks", "stripes")


def scores(accuracy: float) -> dict:
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
    (tmp_path / "train").mkdir()
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-4, "grad_norm": 0.1, "clips_per_second": 9.0} for s in (10, 20)]
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "scores.json").write_text(json.dumps(scores(0.75)))
    (tmp_path / "scores-shipped.json").write_text(json.dumps(scores(1.0)))
    return tmp_path


def test_every_stage_is_a_command_that_exists(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lavita.cli import app

    for stage in demo.stages(tmp_path):
        words = [word for word in stage.arguments[:2] if word.isalpha()]
        command = words if words[0] in ("data", "autoencoder") else words[:1]
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0
        for word in stage.arguments:
            if word.startswith("--"):
                assert word in result.output, stage.command


def test_page_shows_scores_and_every_video_that_it_names_exists(finished: Path) -> None:
    commands = [("lavita train --config demo", 120.0)]
    summary = demo.summarize(finished, commands)
    write_page(finished, summary)
    page = (finished / "index.html").read_text()
    assert summary["models"]["trained here"]["accuracy"] == 0.75
    assert summary["models"]["trained here"]["training"] == "20 steps in 2.0 minutes"
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


def test_a_stopped_demo_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [demo.Stage("one", ("one",)), demo.Stage("two", ("two",))]
    ran: list[str] = []
    codes = {"one": 0, "two": 1}

    def run(arguments: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert arguments[:3] == [sys.executable, "-m", "lavita"]
        ran.append(arguments[3])
        return subprocess.CompletedProcess(arguments, codes[arguments[3]])

    monkeypatch.setattr(demo, "stages", lambda out: plan)
    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "summarize", lambda out, commands: {"models": {}})
    monkeypatch.setattr(demo, "write_page", lambda out, summary: None)
    with pytest.raises(demo.StageFailed):
        demo.run_demo(tmp_path)
    codes["two"] = 0
    demo.run_demo(tmp_path)
    assert ran == ["one", "two", "two"]
    assert (tmp_path / "summary.json").exists()
