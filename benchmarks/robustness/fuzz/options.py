"""Kind `options`: every option of every command, from the list that the application itself has."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import Material
from benchmarks.robustness.fuzz.values import anything, number, text

# Options that make a command as small as possible. Later ones win where an option is given twice.
TINY: dict[tuple[str, ...], list[str]] = {
    ("sample",): ["pipeline", "--out", "out", "--seeds", "0", "--steps", "1"],
    ("encode",): ["--data", "in", "--out", "out", "--autoencoder", "pipeline/vae", "--resolution", "16"],
    ("data", "inspect"): ["in"],
    ("data", "photos"): ["in", "out", "--videos-per-photo", "1", "--num-frames", "1", "--resolution", "16"],
    ("data", "arcade"): ["out", "--train-episodes", "0", "--heldout-episodes", "0", "--num-frames", "1"],
    ("evaluate",): ["--real", "in", "--generated", "in", "--metrics", "motion"],
    ("convert",): ["pipeline", "out/latte.pt"],
    ("info",): ["tiny/4"],
    ("average",): ["run", "--sigma-rel", "0.1", "--out", "out"],
    ("report",): ["run", "--out", "out"],
    ("train",): ["--data", "in", "--run-dir", "out", "autoencoder=pipeline/vae", "--dry-run"],
    ("autoencoder", "train"): ["--data", "in", "--run-dir", "out", "steps=1", "resolution=16", "batch_size=2"],
    ("autoencoder", "evaluate"): ["pipeline/vae", "--data", "in", "--resolution", "16"],
    ("config",): ["demo"],
    ("study",): ["variant", "--config", "demo", "--out", "out"],
    ("demo",): ["--out", "out"],
    ("push",): ["pipeline", "name/model"],
    ("lora", "merge"): ["pipeline", "in", "--out", "out"],
    ("lora", "extract"): ["pipeline", "pipeline", "--out", "out", "--rank", "1"],
    ("lora", "convert"): ["in", "--out", "out"],
}
TINY[("train",)] += ["data.num_frames=2", "data.resolution=16", "model.preset=tiny/4", "train.batch_size=2"]
NEVER_TO_THE_END = {("demo",), ("study",), ("data", "arcade"), ("push",)}
"""Commands that take minutes where they succeed, or reach out of this machine: they get only what the parser or the
first check refuses."""
FOLDERS = ("out", "runs", "in/out", "evil")


@cache
def commands() -> dict[tuple[str, ...], list[Any]]:
    """The parameters of every command, by its words."""
    import typer

    from lavita.cli import app

    found: dict[tuple[str, ...], list[Any]] = {}

    def visit(command: Any, words: tuple[str, ...]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            visit(below, (*words, name))
        if not hasattr(command, "commands"):
            found[words] = command.params

    visit(typer.main.get_command(app), ())
    return found


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """A small command with some options that are wrong, in themselves or together."""
    words = rng.choice(sorted(commands()))
    parameters = commands()[words]
    arguments = list(TINY.get(words, []))
    text_of_options = []
    for parameter in rng.sample(parameters, min(len(parameters), rng.choice([1, 1, 1, 2, 3]))):
        if parameter.name in ("compiled", "help"):  # compiling takes a minute
            continue
        given = _give(rng, parameter)
        text_of_options.append(" ".join(given))
        if _is_argument(parameter) and arguments and rng.random() < 0.8:
            arguments[0] = given[0]
        else:
            arguments += given
    if words in NEVER_TO_THE_END:
        arguments += [rng.choice(["--steps", "--minutes", "--unknown", "--config"]), rng.choice(["x", "", "nan x"])]
    elif rng.random() < 0.05:
        arguments = rng.choice(
            [[], arguments[:-1], [*arguments, "--"], [*arguments, "--", "-x"], ["--help"], arguments * 2]
        )
    for name in ("a/0.mp4", "b/1.mp4"):
        material.write_video(folder / "in" / name)
    (folder / "in" / "file.txt").write_text("hello", encoding="utf-8")
    (folder / "in" / "loop").symlink_to("loop")
    (folder / "in" / "link-out").symlink_to("../..")
    os.mkfifo(folder / "in" / "pipe")
    with contextlib.suppress(PermissionError):  # as root: the device that /dev/null is
        os.mknod(folder / "in" / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    if any("pipeline" in argument for argument in arguments):
        material.copy("pipeline", folder / "pipeline")
    if words in (("report",), ("average",)):
        material.copy("run", folder / "run")
    return Case((*words, *arguments), f"options {text_of_options}", writable=_outputs(words, arguments), seconds=60)


def _outputs(words: tuple[str, ...], arguments: list[str]) -> tuple[str, ...]:
    """Folders and files that the user has named as outputs, and the defaults."""
    named = [after for before, after in itertools.pairwise(arguments) if before in OUTPUTS]
    if words == ("convert",) or words == ("data", "arcade"):
        named += arguments
    named += [word.partition("=")[2] for word in arguments if word.lstrip("-").startswith(OUTPUT_WORDS)]
    inputs = ("in/null", "in/pipe", "in/a", "in/b")
    clean = [os.path.normpath(name) for name in named if name and not name.startswith(inputs)]
    return ("out", "runs", *(name for name in clean if name != "."))


OUTPUTS = {"--out", "--run-dir", "--page", "--cache", "--samples", "--manifest"}
OUTPUT_WORDS = ("run_dir=", *(f"{option.lstrip('-')}=" for option in sorted(OUTPUTS)))


def _is_argument(parameter: Any) -> bool:
    return "Argument" in type(parameter).__name__


def _give(rng: random.Random, parameter: Any) -> list[str]:
    """An option with a wrong value; most are of the right type."""
    values = [_value(rng, parameter).replace("\0", "") for _ in range(max(1, parameter.nargs))]
    if _is_argument(parameter):
        return values
    option = rng.choice(parameter.opts)
    if getattr(parameter, "is_flag", False):
        return [rng.choice([option, f"{option}=true", f"{option}=x"])]
    if rng.random() < 0.1:
        return [f"{option}={values[0]}"]
    return [option, *values] * (2 if getattr(parameter, "multiple", False) and rng.random() < 0.3 else 1)


def _value(rng: random.Random, parameter: Any) -> str:
    # Typer has a type of its own from 0.27 on, and Click's before that.
    kind = parameter.type_descriptor.annotation if hasattr(parameter, "type_descriptor") else parameter.type
    choices = get_args(kind) if get_origin(kind) is Literal else getattr(kind, "choices", None)
    described = str(kind).lower()
    if rng.random() < 0.15:
        return anything(rng)
    if choices:
        choice = str(rng.choice([getattr(each, "value", each) for each in choices]))
        return rng.choice([choice, choice, choice.upper(), choice + " ", text(rng)])
    if "int" in described or "float" in described:
        return number(rng)
    if "path" in described or "file" in described:
        return rng.choice(
            ["in", "in/file.txt", "in/loop", "pipeline", "out", "missing", "../evil", "in/a/0.mp4", anything(rng)]
        )
    return rng.choice([text, anything])(rng)
