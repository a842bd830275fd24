"""Configurations: strict, typed, and every field has a reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from lavita.cli.options import find_recipe
from lavita.core.config import ConfigError, StrictConfig, check_given_once, load_config, merge, read_yaml, save_config
from lavita.core.config_reference import commented_yaml
from lavita.core.names import TrainingRecipe
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.checkpoint import Keep, save_checkpoint
from lavita.training.config import RunConfig
from lavita.training.run_folder import check_resumable

PACKAGE = Path(str(files("lavita")))
CONFIGS = sorted((PACKAGE / "configs").glob("*.yaml"))


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# --- unknown keys


@pytest.mark.parametrize(
    ("values", "override", "key", "known"),
    [
        ({"dta": {}}, [], "dta", RunConfig),
        ({}, ["modle.preset=S/2"], "modle", RunConfig),
        ({"train": {"learning_rat": 1}}, [], "train.learning_rat", "train"),
        ({}, ["train.stps=3"], "train.stps", "train"),
        ({}, ["data.x.y=3"], "data.x", "data"),
    ],
)
def test_an_unknown_key_is_refused_and_the_known_ones_are_listed(
    values: dict[str, Any], override: list[str], key: str, known: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, values, override, source="my.yaml")
    section = RunConfig.model_fields[known].annotation if isinstance(known, str) else known
    assert isinstance(section, type) and issubclass(section, StrictConfig)
    names = ", ".join(sorted(section.model_fields))
    assert str(caught.value) == f"my.yaml: unknown key {key!r}; known here: {names}"


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(RunConfig().train, "steps", 3)  # noqa: B010


# --- layers


def test_overrides_win_over_values_and_values_over_defaults() -> None:
    config = load_config(
        RunConfig,
        {"train": {"steps": 5, "seed": 7}, "data": {"num_frames": 8}},
        ["train.steps=6", "model.preset=tiny/8", "train.steps=9"],
    )
    assert (config.train.steps, config.train.seed, config.data.num_frames) == (9, 7, 8)
    assert config.model.preset == "tiny/8"
    assert config.train.batch_size == RunConfig().train.batch_size


def test_a_section_can_be_overridden_as_a_whole() -> None:
    config = load_config(RunConfig, {"train": {"steps": 5, "seed": 7}}, ["train={steps: 6}"])
    assert (config.train.steps, config.train.seed) == (6, 7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=6", "train.steps=9"], "train.steps is given twice: 'train.steps=6' and 'train.steps=9'"),
        (["train={steps: 6, seed: 1}", "train.seed=2"], "train.seed is given twice: 'train={steps: 6, seed: 1}' and"),
        (["data.path=a", "data=null"], "data is given twice: 'data.path=a' and 'data=null'"),
        (["data.captions="], "'data.captions=' has no value; write data.captions=null for none"),
    ],
)
def test_a_command_sets_a_field_once(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_given_once(overrides)
    assert str(caught.value).startswith(message)
    check_given_once(["train={steps: 6}", "train.seed=2"])


def test_loading_leaves_the_values_alone() -> None:
    values = {"train": {"steps": 5}}
    load_config(RunConfig, values, ["train.steps=6", "train.seed=1"])
    assert values == {"train": {"steps": 5}}


def test_values_of_any_size_make_a_short_message(tmp_path: Path) -> None:
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join(['*' + before] * 9)}]" for before, name in pairwise(names)]
    bomb = write(tmp_path / "bomb.yaml", "data: {path: &p [{" + ", ".join(lines) + "}]}")
    with pytest.raises(ConfigError, match=r"data\.path is \[\{'a': \['x', ") as caught:
        load_config(RunConfig, read_yaml(bomb))
    assert len(str(caught.value)) < 5000
    with pytest.raises(ConfigError, match=r"autoencoder is \['xxx.*\.\.\."):
        load_config(RunConfig, {"autoencoder": ["x" * 10**6]})


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: &a {b: *a}")
    with pytest.raises(ConfigError, match=r"a\.yaml: a value contains itself"):
        load_config(RunConfig, read_yaml(file), source=str(file))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".1e-3"])
def test_numbers_with_exponents(tmp_path: Path, text: str) -> None:
    assert load_config(RunConfig, {}, [f"train.learning_rate={text}"]).train.learning_rate == 1e-4
    file = write(tmp_path / "run.yaml", f"train:\n  learning_rate: {text}\n")
    assert load_config(RunConfig, read_yaml(file)).train.learning_rate == 1e-4


def test_whole_numbers_with_exponents(tmp_path: Path) -> None:
    assert load_config(RunConfig, {}, ["train.steps=1e3"]).train.steps == 1000
    file = write(tmp_path / "run.yaml", "train: {steps: 2e3}")
    assert load_config(RunConfig, read_yaml(file)).train.steps == 2000


def test_text_that_looks_like_a_number_stays_text_in_quotes(tmp_path: Path) -> None:
    assert load_config(RunConfig, read_yaml(write(tmp_path / "a.yaml", "autoencoder: '1e5'"))).autoencoder == "1e5"
    assert load_config(RunConfig, {}, ["autoencoder='1e5'"]).autoencoder == "1e5"


def test_values_of_overrides_are_yaml() -> None:
    config = load_config(
        AutoencoderConfig,
        {},
        [
            "data=[a, b]",
            "data_weights=[3, 1]",
            "architecture=kl",
            "block_out_channels=[8, 8, 16]",
            "horizontal_flip=false",
        ],
    )
    assert config.data == [Path("a"), Path("b")]
    assert config.data_weights == [3.0, 1.0]
    assert config.widths == [8, 8, 16]
    assert config.horizontal_flip is False
    assert load_config(RunConfig, {}, ["data.path=null"]).data.path is None
    assert load_config(RunConfig, {}, ["run_dir=a=b"]).run_dir == Path("a=b")


WORDS = ["010", "007", "no", "off", "yes", "On", "1:30", "2024-01-01", "0x10", "=", "nan", "café"]


@pytest.mark.parametrize("word", WORDS)
def test_words_that_only_look_like_something_else_are_texts(word: str, tmp_path: Path) -> None:
    """YAML 1.1 reads numbers, dates and truth values in them, so that a folder of that name would be another one."""
    file = write(tmp_path / "a.yaml", f"run_dir: {word}\ndata: {{captions: {word}}}")
    config = load_config(RunConfig, read_yaml(file), [f"autoencoder={word}"])
    assert (config.run_dir, config.data.captions, config.autoencoder) == (Path(word), Path(word), word)


@pytest.mark.parametrize("word", [*WORDS, "1e5", "true", "null", "~", "", "3", "2.5", ".inf", "<<", "a: b", "- a"])
def test_every_text_is_saved_as_a_text(word: str, tmp_path: Path) -> None:
    config = load_config(RunConfig, {"autoencoder": word, "run_dir": f"{word}/x"})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RunConfig, read_yaml(tmp_path / "config.yaml")) == config
    (tmp_path / "shown.yaml").write_text(commented_yaml(RunConfig, config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(RunConfig, read_yaml(tmp_path / "shown.yaml")) == config


# --- values that do not fit


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps", "'train.steps' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=many", "train.steps is 'many'"),
        ("train.steps=0", "train.steps is 0"),
        ("train.steps=2.5", "train.steps is 2.5"),
        ("train.learning_rate=.nan", "train.learning_rate is nan: Input should be a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate is inf: Input should be a finite number"),
        ("train.learning_rate=nan", "train.learning_rate is 'nan': must be a number"),
        ("train.steps='1000'", "train.steps is '1000': must be a number, without quotes or leading zeros"),
        ("train.steps=010", "train.steps is '010': must be a number, without quotes or leading zeros"),
        ("train.steps=true", "train.steps is True: must be a number"),
        ("model.variant=true", "model.variant is True: must be a number"),
        ("run_dir=2024", "run_dir is 2024: must be a text; put one that looks like a number"),
        ("autoencoder=[a]", "autoencoder is ['a']: Input should be a valid string"),
        ("train.steps=" + "9" * 5000, "not valid YAML"),
        ("train.steps=" + "[" * 5000, "not valid YAML"),
        ("train.precision=fp8", "train.precision is 'fp8'"),
        ("model.variant=5", "model.variant is 5"),
        ("model.class_dropout=1.0", "model.class_dropout is 1.0"),
        ("train=3", "train is 3"),
        ("train.accumulation=3", "accumulation is 3, but must divide batch_size (8)"),
        ("data={workers: 2, latent_cache: x}", "workers is 2, but has no effect with latent_cache"),
    ],
)
def test_a_value_that_does_not_fit_is_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, {}, [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "'data' is missing"),
        (["data=[]"], "data is []"),
        (["data=[a]", "data_weights=[1, 2]"], "data_weights has 2 numbers for 1 folders"),
        (["data=[a]", "data_weights=[0]"], "data_weights.0 is 0"),
        (
            ["data=[a]", "block_out_channels=[8]"],
            "block_out_channels has 1 widths, but downsampling 4 needs 3",
        ),
        (["data=[a]", "resolution=66"], "resolution is 66, but must be a multiple of downsampling (4)"),
        (["data=[a]", "batch_size=3"], "batch_size is 3"),
    ],
)
def test_what_an_autoencoder_refuses(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(AutoencoderConfig, {}, overrides)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b", "found list"),
        ("", "found NoneType"),
        ("a: [1", "cannot be read as YAML"),
        ("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", "(line 4: the key 'steps' is there twice)"),
        ("run_dir: a\ntrain: {steps: 1}\nrun_dir: b", "(line 3: the key 'run_dir' is there twice)"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping(tmp_path: Path, text: str, named: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert named in str(caught.value)


def test_the_encoding_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text("run_dir: café", encoding=encoding)
        assert read_yaml(file) == {"run_dir": "café"}
    file.write_bytes("# café\nrun_dir: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml: line 1 is not UTF-8 \(byte 6 is 0xe9\); save it as UTF-8"):
        read_yaml(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")


# --- files


def test_a_saved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(
        RunConfig, {}, ["train.learning_rate=1e-5", "data.path=videos", "train.steps=7", "run_dir=runs/x"]
    )
    save_config(config, tmp_path / "made" / "config.yaml")
    assert load_config(RunConfig, read_yaml(tmp_path / "made" / "config.yaml")) == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_configuration_loads(file: Path) -> None:
    cls = AutoencoderConfig if file.name.startswith("autoencoder") else RunConfig
    config = load_config(cls, read_yaml(file), source=str(file))
    assert config != (RunConfig() if cls is RunConfig else None)
    commands = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# Command: lavita ")]
    assert len(commands) == 1 and file.stem in commands[0], "the header names the command that runs it"


@pytest.mark.parametrize("recipe", get_args(TrainingRecipe))
def test_every_recipe_loads_and_says_how_to_run_it(recipe: TrainingRecipe) -> None:
    file = find_recipe(recipe)
    assert load_config(RunConfig, read_yaml(file), source=str(file))
    assert f"# Command: lavita train --recipe {recipe} " in file.read_text()
    assert sorted(get_args(TrainingRecipe)) == sorted(path.stem for path in file.parent.glob("*.yaml"))


def test_the_modern_recipe_is_another_than_the_papers() -> None:
    modern = load_config(RunConfig, read_yaml(find_recipe("modern")))
    assert (modern.model.prediction_type, modern.model.learn_sigma) == ("flow", False)
    assert (modern.train.timestep_sampling, modern.train.timestep_shift) == ("logit_normal", "auto")
    assert modern.data.normalize_latents and modern.train.optimizer == "muon"


def test_configurations_are_shipped() -> None:
    assert CONFIGS


def test_merging_keeps_what_is_not_named() -> None:
    values: dict[str, Any] = {"a": {"x": 1, "y": 2}, "b": 3, "c": {"z": 4}}
    merge(values, {"a": {"y": 5, "w": {"v": 6}}, "b": {"u": 7}, "c": 8})
    assert values == {"a": {"x": 1, "y": 5, "w": {"v": 6}}, "b": {"u": 7}, "c": 8}


# --- fields


def sections(cls: type[StrictConfig]) -> Iterator[type[StrictConfig]]:
    yield cls
    for field in cls.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictConfig):
            yield from sections(field.annotation)


def reads(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def attributes_read(cls: type[StrictConfig]) -> set[str]:
    """Every `.name` that is read in modules that know a section, and in properties of the sections themselves."""
    names: set[str] = set()
    classes = {section.__name__ for section in sections(cls)}
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        if not any(name in text for name in classes):
            continue
        if file.name != "config.py":
            names |= reads(ast.parse(text))
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                decorators = [item.id for item in node.decorator_list if isinstance(item, ast.Name)]
                names |= reads(node) if "property" in decorators else set()
    return names


@pytest.mark.parametrize("cls", [RunConfig, AutoencoderConfig])
def test_every_field_is_read_and_documented(cls: type[StrictConfig]) -> None:
    read = attributes_read(cls)
    assert "nobody_reads_this" not in read
    for section in sections(cls):
        unread = set(section.model_fields) - read
        assert not unread, f"no code reads these fields of {section.__name__}: {sorted(unread)}"
        undocumented = [name for name, field in section.model_fields.items() if not field.description]
        assert not undocumented, f"fields of {section.__name__} without a docstring: {undocumented}"


# --- resuming


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    config = load_config(RunConfig, {}, ["train.steps=5", "data.path=a"])
    other = load_config(RunConfig, {}, ["train.steps=9", "data.path=b"])
    save_config(config, tmp_path / "config.yaml")
    check_resumable(tmp_path, other, set())  # nothing has been trained there yet

    save_checkpoint(tmp_path / "checkpoints", 1, {}, {}, Keep(1))
    check_resumable(tmp_path, config, set())
    check_resumable(tmp_path, other, {"train.steps", "data.path"})
    with pytest.raises(ConfigError, match=r"started with data\.path=a, but b was asked for; use another run_dir"):
        check_resumable(tmp_path, other, {"train.steps"})
    with pytest.raises(ConfigError, match=r"train\.steps=5, but 9"):
        check_resumable(tmp_path, other, {"data.path"})
