"""TensorBoard files read by TensorBoard, a stand-in for Weights & Biases, and missing packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavita.core.config import ConfigError, load_config
from lavita.training.config import RunConfig
from lavita.training.trackers import Trackers


def make_config(run_dir: Path, *names: str) -> RunConfig:
    return load_config(RunConfig, {"run_dir": str(run_dir), "train": {"trackers": list(names)}})


def open_trackers(config: RunConfig, resume_step: int = 0) -> Trackers:
    return Trackers(config.train.trackers, config.run_dir, config.model_dump(mode="json"), resume_step)


def read_events(run_dir: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "images": 0})
    return events.Reload()


def curve(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_shows_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trackers = open_trackers(make_config(tmp_path, "tensorboard"))
    trackers.log(10, {"loss": 0.5, "lr": 1e-3, "step": 10})
    trackers.log(20, {"loss": 0.25, "lr": 1e-3})
    trackers.log(20, {"loss": 0.75, "by_noise": [1.0, 2.0]}, "validation")
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "sheet.png")
    trackers.image(20, tmp_path / "sheet.png")
    read = read_events(tmp_path)  # before it is closed: a killed run has shown what it logged
    trackers.close()
    assert set(read.Tags()["scalars"]) == {
        *("train/loss", "train/lr"),
        *("validation/loss", "validation/by_noise/0", "validation/by_noise/1"),
    }
    assert curve(read, "train/loss") == [(10, 0.5), (20, 0.25)]
    assert curve(read, "validation/by_noise/1") == [(20, 2.0)]
    (shown,) = read.Images("samples")
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    assert shown.step == 20
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), picture)


@pytest.mark.parametrize("resume_step", [0, 20])
def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path, resume_step: int) -> None:
    pytest.importorskip("tensorboard")
    config = make_config(tmp_path, "tensorboard")
    trackers = open_trackers(config)
    for step in (10, 20, 30, 40):
        trackers.log(step, {"loss": float(step)})
    trackers = open_trackers(config, resume_step)  # the first run was killed after a checkpoint at this step
    for step in range(resume_step + 10, 60, 10):
        trackers.log(step, {"loss": step + 0.5})
    trackers.close()
    kept = [(step, float(step)) for step in range(10, resume_step + 1, 10)]
    again = [(step, step + 0.5) for step in range(resume_step + 10, 60, 10)]
    assert curve(read_events(tmp_path), "train/loss") == kept + again


class FakeWandb:
    """A stand-in for the package `wandb` that records its calls."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0
        self.errors = SimpleNamespace(Error=RuntimeError)

    def init(self, **settings: Any) -> FakeWandb:
        self.runs.append(settings)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def Image(self, file: str) -> str:
        return f"picture {file}"

    def finish(self) -> None:
        self.finished += 1


def test_wandb_continues_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = make_config(tmp_path / "run", "wandb")
    for resume_step in (0, 20, 0):
        trackers = open_trackers(config, resume_step)
        trackers.log(resume_step + 10, {"loss": 0.5, "by_noise": [1.0]}, "validation")
        trackers.image(resume_step + 10, tmp_path / "sheet.png")
        trackers.close()
    first, resumed, restarted = (run["id"] for run in fake.runs)
    assert first == resumed != restarted, "a run without steps done is a new one"
    assert fake.runs[0]["project"] == "lavita" and fake.runs[0]["resume"] == "allow"
    assert fake.runs[0]["config"]["train"]["trackers"] == ["wandb"]
    assert fake.logged[2:4] == [
        ({"validation/loss": 0.5, "validation/by_noise/0": 1.0}, 30),
        ({"samples": f"picture {tmp_path / 'sheet.png'}"}, 30),
    ]
    assert fake.finished == 3


def test_wandb_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()

    def refuse(**settings: Any) -> FakeWandb:
        raise RuntimeError("no API key")

    monkeypatch.setattr(fake, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"train\.trackers names wandb, which does not start: no API key"):
        open_trackers(make_config(tmp_path, "wandb"))


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("tensorboard", "torch.utils.tensorboard", "track"), ("wandb", "wandb", "wandb")]
)
def test_a_missing_package_is_named(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        open_trackers(make_config(tmp_path, name))
    assert str(caught.value) == (f'train.trackers names {name}, which is not installed; pip install "lavita[{extra}]"')


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = open_trackers(make_config(tmp_path / "run"))
    trackers.log(1, {"loss": 1.0})
    trackers.image(1, tmp_path / "none.png")
    trackers.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("names", "message"), [("[mlflow]", "trackers"), ("[wandb, wandb]", "each may be named once")])
def test_unknown_trackers_are_refused(names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, {}, [f"train.trackers={names}"])
