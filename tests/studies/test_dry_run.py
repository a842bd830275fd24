"""`lavita train --dry-run`: the numbers are those of the run, nothing is written, and mistakes are one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import MakeConfig, Run
from tiny_data import write_broken, write_videos
from tiny_text import CLIP, save_text_encoder
from transformers import CLIPTextModelWithProjection

from lavita.core.config import save_config
from lavita.sampling.pipeline import load_pipeline
from lavita.studies import dry_run as module
from lavita.studies.dry_run import dry_run
from lavita.studies.memory import Setting, training_memory
from lavita.training.config import RunConfig
from lavita.training.train import train


def tree(root: Path) -> dict[str, int]:
    """Every file and folder below one, hidden ones too, with the time of its last change."""
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.rglob("*")}


def command(config: RunConfig) -> tuple[str, ...]:
    file = config.run_dir.with_suffix(".yaml")
    save_config(config, file)
    return "train", "--config", str(file), "--dry-run"


def test_the_command_prints_what_a_run_needs_and_writes_nothing(
    run: Run, make_config: MakeConfig, tmp_path: Path
) -> None:
    write_broken(tmp_path / "videos" / "a" / "9.mp4")
    write_videos(tmp_path / "held-out", ["a/7.mp4", "b/8.mp4"], 12)
    fields = (f"data.validation={tmp_path / 'held-out'}", "train.validate_every=2", "train.accumulation=2")
    config = make_config("run", "data.num_images=1", *fields)
    arguments = command(config)
    before = tree(tmp_path)
    code, out, err = run(*arguments)
    assert code == 0, err
    assert tree(tmp_path) == before

    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(lines) == {"run", "data", "validation", "model", "memory", "step", "duration"}
    assert lines["run"] == f"{config.run_dir}: new; 4 steps of 4 clips"
    assert lines["data"].startswith("3 videos, 24 clips, 2 classes; 1 left out, the first: a/9.mp4: ")
    assert lines["validation"] == "2 videos, 64 clips"
    assert re.fullmatch(r"tiny/4, variant 2: 0\.\d M parameters", lines["model"])
    step = re.match(r"([\d.e-]+) s, measured on cpu in fp32: the last of 2 real steps of 4 clips", lines["step"])
    assert step is not None and 0 < float(step.group(1)) < 60
    assert re.match(r"at most about \d+:\d\d for the 4 remaining steps, less if ", lines["duration"])
    assert "GiB at the peak of a step" in lines["memory"] and "weights 0.00" in lines["memory"]


def test_the_numbers_are_those_of_the_run(run: Run, make_config: MakeConfig) -> None:
    """Before it starts, and when it is to be resumed."""
    fields = ("train.accumulation=2", "train.optimizer=muon")
    fresh = dry_run(make_config("run", "train.steps=2", *fields))
    assert (fresh.steps_done, fresh.device, fresh.precision) == (0, "cpu", "fp32")
    folder = train(make_config("run", "train.steps=2", *fields))
    config = make_config("run", "train.steps=5", *fields)
    arguments = command(config)
    before = tree(config.run_dir)
    code, out, err = run(*arguments)
    assert code == 0, err
    assert tree(config.run_dir) == before
    assert f"{config.run_dir}: resumes after step 2; 5 steps of 4 clips" in out
    assert "for the 3 remaining steps" in out
    resumed = dry_run(config)
    assert resumed.step_seconds is not None and resumed.read_seconds is not None
    assert (resumed.steps_done, resumed.run_seconds) == (2, 3 * (resumed.step_seconds + resumed.read_seconds))

    transformer = load_pipeline(folder).transformer
    setting = Setting("muon", False, "fp32", 2)
    assert fresh.memory == training_memory(transformer.config, 2, setting=setting)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert fresh.parameters == f"{count / 1e6:.1f} M parameters"
    assert fresh.step_seconds is not None and fresh.read_seconds is not None and fresh.free_bytes is not None
    assert fresh.run_seconds == 2 * (fresh.step_seconds + fresh.read_seconds)
    assert fresh.memory.total < fresh.free_bytes


def test_captions_are_counted_and_not_embedded(make_config: MakeConfig, tmp_path: Path) -> None:
    save_text_encoder(CLIPTextModelWithProjection(CLIP), tmp_path / "clip")
    names = ("a/0.mp4", "a/1.mp4", "b/2.mp4")
    rows = "".join(f"{name},a game of boxing number {number}\n" for number, name in enumerate(names))
    (tmp_path / "captions.csv").write_text(f"file,caption\n{rows}", encoding="utf-8")
    fields = (f"data.captions={tmp_path / 'captions.csv'}", f"model.text_encoder={tmp_path / 'clip'}")
    config = make_config("run", "data.class_folders=false", *fields)
    before = tree(tmp_path)
    found = dry_run(config)
    assert (found.num_captions, found.class_names) == (3, ())
    assert found.step_seconds is not None
    assert tree(tmp_path) == before


def test_a_model_that_does_not_fit_is_not_built(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda device: 1000)
    config = make_config("run", "model.preset=XL/2")
    code, out, err = run(*command(config))
    assert code == 0, err
    assert "XL/2, variant 2: 673." in out and "not measured: a step does not fit into the 0.000 GiB" in out
    assert "duration    unknown" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=null"], "data.path is missing"),
        (["data.frame_interval=10", "data.broken=error"], "has 10 frames, but a clip needs 11"),
        (["data.resolution=60"], "data.resolution is 60, but must be a multiple of 8, such as 56 or 64"),
        (["train.device=abacus"], "device is 'abacus', which is not available here"),
        (["train.init_from=nowhere"], "nowhere"),
        (["data.validation=videos", "train.validate_every=1"], "is a training video, too"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, make_config: MakeConfig, tmp_path: Path, overrides: list[str], message: str
) -> None:
    arguments = command(make_config("run", *overrides))
    before = tree(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert tree(tmp_path) == before


def test_another_configuration_of_the_folder_is_refused(run: Run, make_config: MakeConfig) -> None:
    train(make_config("run", "train.steps=1"))
    code, _, err = run(*command(make_config("run", "train.learning_rate=1")))
    assert code == 2 and "train.learning_rate=0.001, but 1.0 was asked for" in err


def test_several_processes_are_refused(run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(make_config("run", "train.parallel=fsdp"))
    assert run(*arguments)[0] == 0, "one process can try all but the sharing"
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(*arguments)
    assert code == 2 and "start it without torchrun" in err
