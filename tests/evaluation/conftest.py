"""Videos, network weights and a trained classifier that the tests of evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Run
from scripted import save_all
from shapes import SHAPES, SIZE, shape_in_any_colour, write_set
from tiny_data import write_videos

from lavita.data.catalog import Catalog, scan
from lavita.evaluation.classes import classifier as classifier_module
from lavita.evaluation.classes.classifier import Classifier, train_classifier


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of small random networks under the names of I3D, Inception and C3D."""
    return save_all(tmp_path_factory.mktemp("weights", numbered=False))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real, generated and held-out videos in the class folders `a` and `b`; not to be changed."""
    root = tmp_path_factory.mktemp("world")
    write_videos(root / "real", [f"{label}/{i}.mp4" for label in "ab" for i in range(4)], 40, 18, 24)
    write_videos(root / "generated", [f"{label}/{i}.mp4" for label in "ab" for i in range(5)], 16, 16, 16)
    write_videos(root / "heldout", [f"{label}/{9 - i}.mp4" for label in "ab" for i in range(3)], 48, 18, 24)
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of three shapes in any colours; not to be changed."""
    return write_set(tmp_path_factory.mktemp("shapes"), SHAPES, shape_in_any_colour, count=16, seed=0)


@pytest.fixture(scope="session")
def shape_classifier(shapes: Path) -> Classifier:
    """A classifier of `shapes`."""
    return train_classifier(scan(shapes, class_folders=True), SIZE, num_steps=130)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, shape_classifier: Classifier) -> list[int]:
    """Seeds of the trainings that were asked for; each is answered with `shape_classifier`."""
    seeds: list[int] = []

    def answer(catalog: Catalog, resolution: int, seed: int) -> Classifier:
        seeds.append(seed)
        return shape_classifier

    monkeypatch.setattr(classifier_module, "train_classifier", answer)
    return seeds


@pytest.fixture
def run(run: Run, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `lavita evaluate` with some arguments; only the scripted networks are found."""
    monkeypatch.setenv("LAVITA_WEIGHTS", str(weights))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        return run("evaluate", *arguments)

    return call


@pytest.fixture
def refuse(run: Run) -> Callable[..., None]:
    """Checks that `lavita evaluate` ends with one line of error that contains some words."""

    def check(arguments: Sequence[str | Path], *words: str) -> None:
        code, _, err = run(*arguments)
        lines = err.splitlines()
        assert code == 2, err
        assert "Traceback" not in err
        assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
        assert all(word in lines[-1] for word in words), lines[-1]

    return check
