"""`lavita config` and docs/configuration.md: complete, true, and readable again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run

from lavita.core.config import StrictConfig, load_config, read_yaml
from lavita.core.config_reference import fields_of
from lavita.evaluation.protocol import Protocol
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.config import RunConfig
from tools.configuration_docs import PAGE, render

CONFIGS = (RunConfig, AutoencoderConfig, Protocol)


def all_fields(cls: type[StrictConfig], prefix: str = "") -> dict[str, str]:
    found = {}
    for field in fields_of(cls):
        if field.section is None:
            found[prefix + field.name] = field.description
        else:
            found |= all_fields(field.section, f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_is_described_by_a_sentence(cls: type[StrictConfig]) -> None:
    for name, description in all_fields(cls).items():
        assert description.endswith(".") and not description.startswith("Of "), (name, description)


def test_the_page_is_what_the_fields_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tools/configuration_docs.py"


@pytest.mark.parametrize(
    ("source", "cls"), [("", RunConfig), ("demo", RunConfig), ("autoencoder-small", AutoencoderConfig)]
)
def test_what_is_printed_is_the_same_configuration(run: Run, source: str, cls: type[StrictConfig]) -> None:
    code, out, _ = run("config", *filter(None, [source]))
    packaged = Path("configs") / f"{source}.yaml"
    values = read_yaml(Path(__file__).parents[2] / packaged) if source else {}
    assert code == 0 and load_config(cls, yaml.safe_load(out)) == load_config(cls, values)
    shown = yaml.safe_load(out)
    for name in all_fields(cls):
        value: Any = shown
        for part in name.split("."):
            value = value[part]
    for line in out.splitlines():
        assert len(line) <= 100 or not line.lstrip().startswith("#")


def test_a_change_shows_the_default_beside_the_value(run: Run) -> None:
    code, out, _ = run("config", "demo", "data.resolution=96")
    lines = out.splitlines()
    place = lines.index("  resolution: 96")
    comment = " ".join(line.strip(" #") for line in lines[place - 2 : place])
    assert code == 0 and comment.endswith("[integer or height x width; default: 256]")


def test_a_run_folder_and_a_required_field(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 12}\n")
    code, out, _ = run("config", tmp_path)
    assert code == 0 and "\n  steps: 12\n" in out
    code, out, _ = run("config", "--kind", "autoencoder")
    assert code == 0 and "\n# data:\n" in out and "required" in out
    code, out, _ = run("config", "--kind", "autoencoder", "data=[DATA]")
    assert code == 0 and "\ndata: [DATA]\n" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("demo", "nope=1"), "unknown key 'nope'"),
        (("nowhere.yaml",), "nowhere.yaml: no such file"),
        (("demo", "small"), "give one SOURCE"),
        (("train.steps=0",), "train.steps is 0"),
    ],
)
def test_bad_words_are_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    code, out, err = run("config", *words)
    assert code == 2 and not out and said in err and err.count("\n") == 1
