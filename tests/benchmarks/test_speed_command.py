"""The command: every section runs and writes; bad input is one line. No time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer

from benchmarks.__main__ import SECTIONS, main
from benchmarks.speed import (
    autoencoder,
    command,
    data,
    extractor,
    forward,
    machine,
    plots,
    sampling,
    scaling,
    timing,
    training,
)
from benchmarks.speed.setup import Setup, resolve_precision, set_compiled
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER

Bench = Callable[..., tuple[int, str, str]]
TINY = Setup("tiny/2", num_frames=3, sample_size=8, batch_size=2, repeats=2, steps=3, compiled=False, memory=False)
ARGUMENTS = [
    *("--preset", "tiny/4", "--num-frames", "2", "--sample-size", "8", "--repeats", "2", "--steps", "3"),
    *("--precision", "fp32", "--no-memory", "--no-compile"),
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs `python -m benchmarks` with some arguments in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits, autoencoders, data and scaling of a size for tests; one thread, as they are too small for more."""
    monkeypatch.setitem(machine.SIDES, "cpu", 64)
    monkeypatch.setattr(machine, "COPIED_BYTES", 2**16)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.001)
    monkeypatch.setitem(STABLE_DIFFUSION_AUTOENCODER, "block_out_channels", (32, 32, 32, 32))
    monkeypatch.setattr(autoencoder, "AT_ONCE", (1, 2))
    monkeypatch.setattr(autoencoder, "PACKAGED_SIDE", 16)
    monkeypatch.setattr(extractor, "COUNT", 2)
    for section in (training, data):  # no rehearsal of memory
        monkeypatch.setattr(section, "available_memory", lambda device: None)
    sizes = {"NUM_SHARDS": 2, "SHARD_VIDEOS": 2, "LENGTH": 60, "CACHED_CLIPS": 4, "VIDEO_CLIPS": 2, "MANY_READS": 3}
    for name, value in (sizes | {"EARLY_READS": 2}).items():
        monkeypatch.setattr(data, name, value)
    point = scaling.Point(num_frames=2, sample_size=4, hidden_size=64)
    axes = {
        "frames": [point, replace(point, num_frames=4)],
        "tokens per frame": [point, replace(point, sample_size=8)],
        "batch": [point, replace(point, batch_size=3)],
        "width": [point, replace(point, hidden_size=128)],
    }
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "BLOCKS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_section_runs_and_writes(bench: Bench, small: None, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bench"
    code, printed, errors = bench("speed", *ARGUMENTS, "--out", out)
    assert code == 0, errors
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [command.RESULT, command.TABLE, plots.BARS, plots.SCALING]
    )
    assert [path.name for path in out.parent.iterdir()] == ["bench"]
    result = json.loads((out / command.RESULT).read_text(encoding="utf-8"))
    assert [section["name"] for section in result["sections"]] == list(SECTIONS)
    assert result["setup"]["preset"] == "tiny/4" and result["setup"]["precision"] == "fp32"
    assert result["machine"]["threads"] == 1 and result["machine"]["libraries"]["torch"] == version("torch")
    assert result["machine"]["clock"] == "processor" and isinstance(result["machine"]["fast_bf16"], bool)
    sections = command.read_sections(out / command.RESULT)
    assert [section.to_json() for section in sections] == result["sections"]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for section in sections for row in section.rows)
    found = {section.name: section for section in sections}
    assert [row.name for row in found["forward"].rows] == [
        forward.FLOOR,
        forward.OURS,
        forward.INT8,
        forward.PLAIN,
        forward.LATTE,
        forward.DIT,
        machine.PEAK,
    ]
    table = (out / command.TABLE).read_text(encoding="utf-8")
    for section in sections:
        assert f"## {section.title}" in table and section.title in printed
    assert {row.name for row in found["sampling"].rows} >= set(sampling.CACHES.values())
    assert len(found["autoencoder"].rows) == 2 * 2 * (1 + 2) + 1
    assert 0 <= found["data"].facts["waiting_share"] <= 1
    axes = found["scaling"].facts["axes"]
    assert set(axes) == {"frames", "tokens per frame", "batch", "width"}
    assert axes["batch"]["theory"] == pytest.approx(1.0, abs=0.01)

    code, _, _ = bench("extractor", *ARGUMENTS, "--out", out)
    assert code == 0 and len(command.read_sections(out / command.RESULT)) == 1


def test_memory_of_many_reads(small: None) -> None:
    (section,) = command.run_sections(replace(TINY, memory=True, repeats=1), ["data"])
    assert section.facts["resident"]["after_2"] > 0 and section.facts["resident"]["after_3"] > 0
    assert any("Resident memory after 2 reads" in note for note in section.notes)


def test_bf16(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    sections = command.run_sections(replace(TINY, precision="bf16", repeats=1), ["forward", "training", "autoencoder"])
    names = [row.name for row in sections[0].rows]
    assert forward.HALVED in names and "bf16" in capsys.readouterr().out


def test_compiled_candidates(small: None, traced_blocks: None) -> None:
    setup = replace(TINY, compiled=True, repeats=1)
    first, second, third = command.run_sections(setup, ["forward", "training", "sampling"])
    assert {forward.COMPILED, forward.INT8_COMPILED} <= {row.name for row in first.rows}
    assert training.COMPILED in {row.name for row in second.rows}
    assert sampling.COMPILED in {row.name for row in third.rows}


def test_stopping_leaves_nothing(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(setup: Setup) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        command.run_sections(TINY, ["extractor", "scaling"], tmp_path / "bench")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("forward --preset S/3", "preset is 'S/3'; allowed"),
        ("forward --precision fp8", "precision is 'fp8'; allowed: auto, fp32, bf16"),
        ("forward --sample-size 15", "sample_size is 15, but must be a multiple of the preset's patch size (2)"),
        ("forward --device tpu", "device is 'tpu'"),
        ("forward --out file", "out is file, which is not a folder"),
        ("recipes --out runs --recipes slow", "recipes has 'slow'; allowed: ddpm250"),
        ("recipes --out runs", "data is not given, but --quality needs it"),
        ("fuzz --kinds files,colours", "kinds has 'colours'; allowed: files, folders, tables"),
    ],
)
def test_bad_values_are_one_line(bench: Bench, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, printed, errors = bench(*arguments.split())
    assert code == 2
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not printed


def test_help_lists_the_commands(bench: Bench) -> None:
    code, printed, _ = bench("--help")
    assert code == 0
    names = (
        *SECTIONS,
        "speed",
        "memory",
        "sequence-parallel",
        "startup",
        "coverage",
        "monotone",
        "evaluation-speed",
        "recipes",
        "autoencoder-losses",
        "sprites",
        "continuation",
        "drift",
        "crash",
        "fuzz",
        "mutants",
    )
    listed = printed.partition("Commands:")[2].splitlines()
    assert "..." not in printed.partition("Commands:")[2]
    assert [line.split()[0] for line in listed if line.strip()] == list(names)
    for name in names:
        code, printed, _ = bench(name, "--help")
        assert code == 0 and "Usage:" in printed


@pytest.mark.parametrize("field", ["num_frames", "sample_size", "batch_size", "repeats", "steps"])
def test_numbers_out_of_range(field: str) -> None:
    wrong: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=f"{field} is 0, but must be at least"):
        replace(TINY, **wrong)


def test_precision_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("benchmarks.speed.setup.has_bf16", lambda device, fast=fast: fast)
        assert resolve_precision("auto", torch.device("cpu")) == expected
        assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
        assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_switching_compiled_blocks(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    for compiled in (True, False):
        set_compiled(model, compiled)
        assert {block.compiled for block in model.blocks} == {compiled}
