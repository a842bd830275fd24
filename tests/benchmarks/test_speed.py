"""The benchmark: what it counts and computes against other sums; every section runs and writes. No time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run

from benchmarks.speed import command, data, forward, machine, peaks, plots, sampling, scaling, tables, timing, training
from benchmarks.speed.plain import PlainModel
from benchmarks.speed.products import Floor, record, total_macs
from benchmarks.speed.rivals import make_dit, make_latte
from benchmarks.speed.setup import Setup, build_model, model_inputs, resolve_precision, set_compiled
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.studies.complexity import measure

TINY = Setup("tiny/2", num_frames=3, sample_size=8, batch_size=2, repeats=2, steps=3, compiled=False, memory=False)
ARGUMENTS = [
    *("--preset", "tiny/4", "--num-frames", "2", "--sample-size", "8", "--repeats", "2", "--steps", "3"),
    *("--precision", "fp32", "--no-memory"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits, autoencoder and scaling of a size for tests; one thread, as they are too small for more."""
    monkeypatch.setitem(machine.SIDES, "cpu", 64)
    monkeypatch.setattr(machine, "COPIED_BYTES", 2**16)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.001)
    monkeypatch.setitem(sampling.STABLE_DIFFUSION_AUTOENCODER, "block_out_channels", (32, 32, 32, 32))
    point = scaling.Point(num_frames=2, sample_size=4, hidden_size=64)
    axes = {
        "frames": [point, replace(point, num_frames=4)],
        "tokens a frame": [point, replace(point, sample_size=8)],
        "batch": [point, replace(point, batch_size=3)],
        "width": [point, replace(point, hidden_size=128)],
    }
    monkeypatch.setattr(scaling, "AXES", axes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The floor


def test_recorded_products_are_those_of_the_formula() -> None:
    model, inputs = build_model(TINY), model_inputs(TINY)
    products = record(lambda: model(*inputs))
    cost = measure(TINY.config, TINY.batch_size)
    assert total_macs(products) == cost.macs - cost.attention_products
    # The timestep's two, patches and decoder; four and S-AdaLN's a block; S-AdaLN's at the end.
    assert len(products) == 2 + 2 + 2 * 5 + 1
    assert Floor(products, torch.float32).macs == total_macs(products)
    assert Floor(products, torch.float32, backward=True).macs == 3 * total_macs(products)


def test_the_floor_calls_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 8, 3, groups=4, bias=False)
    ).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    products = record(lambda: torch.nn.functional.linear(module(image), torch.ones(5, 6)))
    again = record(Floor(products, torch.float32))
    shapes = [(each.input_shape, each.weight.shape, each.output_shape, each.convolution) for each in products]
    assert shapes == [(each.input_shape, each.weight.shape, each.output_shape, each.convolution) for each in again]
    assert [each.channels_last for each in again[:2]] == [True, True]
    assert again[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert [each.macs for each in products] == [2 * 64 * 8 * 27, 2 * 36 * 8 * 18, 2 * 8 * 6 * 5 * 6]
    Floor(products, torch.bfloat16, backward=True)()
    assert {each.weight.dtype for each in record(Floor(products, torch.bfloat16))} == {torch.bfloat16}


# --- Other implementations


@pytest.mark.parametrize("frames", [4, 3])
def test_the_plain_model_computes_what_ours_does(make_transformer: MakeTransformer, frames: int) -> None:
    model = make_transformer(num_frames=4, num_blocks=4, num_classes=3, sample_size=16)
    latents, timesteps = torch.randn(2, frames, 4, 16, 16), torch.tensor([3, 977])
    labels = torch.tensor([2, 3])
    plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), model.config)
    with torch.no_grad():
        expected = model(latents, timesteps, labels).sample
        torch.testing.assert_close(plain(latents, timesteps, labels), expected, rtol=1e-4, atol=1e-4)
    cost = measure(model.config, 2, num_frames=frames)
    # Its S-AdaLN is repeated as Table 3 counts it.
    rows = total_macs(record(lambda: plain(latents, timesteps, labels)))
    width, tokens = 32, 64
    once = 2 * (4 * 6 + 2) * width**2
    repeated = 2 * ((frames + tokens) * 2 * 6 + frames * 2) * width**2
    assert rows == cost.macs - cost.attention_products - once + repeated


def test_the_plain_model_has_our_gradient(make_transformer: MakeTransformer) -> None:
    model = make_transformer().double()
    latents, timesteps = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64), torch.tensor([500])
    plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), model.config)
    gradients = []
    for run in (lambda: model(latents, timesteps).sample, lambda: plain(latents, timesteps)):
        model.zero_grad()
        run().square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


def test_the_plain_model_refuses_other_kinds(make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=3)
    with pytest.raises(ValueError, match="variant is 3, but the plain model has 2"):
        PlainModel(model.state_dict(), model.config)


def test_the_rivals_have_our_width_and_depth() -> None:
    setup = replace(TINY, preset="mini/2")
    config, ours = setup.config, build_model(setup)
    inputs = model_inputs(setup)
    body = sum(
        parameter.numel()
        for name, parameter in ours.named_parameters()
        if name.startswith("blocks.") and "adaLN" not in name
    )
    width, depth = config["hidden_size"], config["num_blocks"]

    latte = make_latte(config)
    blocks = [*latte.model.transformer_blocks, *latte.model.temporal_transformer_blocks]
    tables = depth * 6 * width
    assert len(blocks) == depth
    assert sum(p.numel() for block in blocks for p in block.parameters()) - tables == body

    dit = make_dit(config)
    assert len(dit.model.transformer_blocks) == depth
    parameters = [
        parameter for name, parameter in dit.model.transformer_blocks.named_parameters() if ".norm1." not in name
    ]
    assert sum(parameter.numel() for parameter in parameters) == body
    # S-AdaLN's layer of a block is as large as ours.
    assert dit.model.transformer_blocks[0].norm1.linear.weight.shape == (6 * width, width)

    with torch.no_grad():
        expected = ours(*inputs).sample.shape
        assert latte.run(*inputs).shape == dit.run(*inputs).shape == expected
    own = total_macs(record(lambda: ours(*inputs)))
    assert 0.9 < total_macs(record(lambda: latte.run(*inputs))) / own < 1.0
    assert 1.0 < total_macs(record(lambda: dit.run(*inputs))) / own < 1.2


# --- Numbers


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    sizes = [4, 8, 16, 64]
    assert scaling.exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)
    with pytest.raises(ValueError, match="two at least"):
        scaling.exponent([4, 4], [1.0, 1.0])


def test_the_theory_of_scaling() -> None:
    point = scaling.Point(sample_size=128, hidden_size=32)
    costs = [measure(replace(point, sample_size=size).config).macs for size in (128, 256)]
    # At 4,096 tokens a frame and 32 values a token attention is nearly all of the work.
    assert 1.9 < scaling.exponent([1, 4], costs) < 2.0
    assert [scaling.axis_value("tokens a frame", point), scaling.axis_value("width", point)] == [4096, 32]


def test_ratios_are_medians_of_rounds() -> None:
    rows = [
        timing.Row("floor", [1.0, 2.0, 10.0], 100),
        timing.Row("ours", [2.0, 5.0, 30.0], 100, "floor"),
        timing.Row("theirs", [8.0, 10.0, 30.0], 200, "floor", "ours"),
        timing.Row("square", [1.0, 1.0, 1.0], 400),
    ]
    section = timing.Section("forward", "A forward pass", "one", rows, {"a": 1}, ["note"], "square")
    assert section.ratio(rows[1], "floor") == timing.Spread(2.5, 2.0, 3.0)
    assert section.ratio(rows[0], rows[0].floor) is None
    assert section.ratio(rows[2], "ours") == timing.Spread(2.0, 1.0, 4.0)
    assert section.per_product(rows[2]) == 1.0
    assert section.share_of_peak(rows[1]) == timing.Spread(0.05, pytest.approx(1 / 120), 0.125)
    read = timing.Section.from_json(json.loads(json.dumps(section.to_json())))
    assert read == section
    headings, lines = tables.cells(section)
    assert headings == ["", "seconds", "times the floor", "times ours", "per product", "of the peak"]
    assert lines[1] == ["ours", "5 s (2 s to 30 s)", "2.50 (2.00 to 3.00)", "", "", "5% (1% to 12%)"]
    assert tables.cells(section, ranges=False)[1][1][:3] == ["ours", "5 s", "2.50"]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    called: list[str] = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.interleave(runs, 3, torch.device("cpu"))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(called) == "aabbcc" + "abc" + "bca" + "cab"


def test_one_thread_goes_by_the_processors_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, device, expected in ((1, "cpu", "processor"), (2, "cpu", "wall"), (1, "cuda", "wall")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert timing.clock_name(torch.device(device)) == expected


def test_half_of_the_pairs_are_reused() -> None:
    moves = [[0.1 * (group + 1) * (step + 1) for group in range(4)] for step in range(10)]
    path = [[sum(column[: step + 1]) for column in zip(*moves, strict=True)] for step in range(10)]
    times = [900.0 - 90 * step for step in range(10)]
    calibration = sampling.Calibration(times, path, {})
    cache, share = sampling.half_reused(calibration, times)
    assert 0.4 <= share <= 0.6
    assert sum(map(len, cache.plan(times))) / 40 == share


def test_a_loop_that_waits_for_its_reader() -> None:
    import time

    assert data.waiting_share(lambda number: time.sleep(0.05), lambda: time.sleep(0.001), 3) > 0.5
    assert data.waiting_share(lambda number: None, lambda: time.sleep(0.02), 3) < 0.5


# --- Memory


def test_peak_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replace(TINY, preset="mini/2", num_frames=8, sample_size=16)
    found = peaks.measure_peaks("forward", [forward.OURS], setup)[forward.OURS]
    model, inputs = build_model(setup), model_inputs(setup)
    smallest = forward.smallest_memory(setup, record(lambda: model(*inputs)), model)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert smallest == weights + 2 * 8 * 64 * (128 + 4 * 128) * 4
    assert smallest < found["allocated"] < 4 * smallest
    if "resident" in found:
        assert found["resident"] > 0.9 * smallest
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match=r"peak memory of forward, ours, eager: its process ended with 1: killed"):
        peaks.measure_peaks("forward", [forward.OURS], TINY)


def test_packed_weights_count() -> None:
    setup = replace(TINY, preset="mini/2")
    case = forward.make_case(forward.INT8, setup)
    whole = forward.stored_bytes(build_model(setup))
    blocks = setup.config["num_blocks"] * 12 * 128**2
    assert whole - forward.stored_bytes(*case.modules) == pytest.approx(3 * blocks, rel=0.02)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    least = training.predicted_memory(TINY, True)
    most = training.predicted_memory(TINY)
    assert least < most
    monkeypatch.setattr(training, "available_memory", lambda device: round((least + most) / 2 / 0.9))
    names, notes = training.candidates(TINY)
    assert training.CHECKPOINTED in names and training.OURS not in names and training.PLAIN not in names
    assert any(note.startswith(f"{training.OURS} was left out: it needs about") for note in notes)
    monkeypatch.setattr(training, "available_memory", lambda device: 1)
    with pytest.raises(ValueError, match="preset is tiny/2, whose training does not fit"):
        training.candidates(TINY)


# --- The command


def test_every_section_runs_and_writes(run: Run, small: None, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bench"
    code, printed, errors = run("bench", *ARGUMENTS, "--no-compile", "--out", out)
    assert code == 0, errors
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [command.RESULT, command.TABLE, plots.BARS, plots.SCALING]
    )
    assert [path.name for path in out.parent.iterdir()] == ["bench"]
    result = json.loads((out / command.RESULT).read_text())
    assert [section["name"] for section in result["sections"]] == list(command.SECTIONS)
    assert result["setup"]["preset"] == "tiny/4" and result["setup"]["precision"] == "fp32"
    assert result["machine"]["threads"] == 1 and result["machine"]["libraries"]["torch"] == torch.__version__
    assert result["machine"]["clock"] == "processor" and isinstance(result["machine"]["fast_bf16"], bool)
    sections = command.read_sections(out / command.RESULT)
    assert [section.to_json() for section in sections] == result["sections"]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for section in sections for row in section.rows)
    forward_rows = [row.name for row in sections[0].rows]
    assert forward_rows == [
        forward.FLOOR,
        forward.OURS,
        forward.INT8,
        forward.PLAIN,
        forward.LATTE,
        forward.DIT,
        machine.PEAK,
    ]
    table = (out / command.TABLE).read_text()
    for section in sections:
        assert f"## {section.title}" in table and section.title in printed
    assert set(sections[-1].facts["axes"]) == {"frames", "tokens a frame", "batch", "width"}
    assert sections[-1].facts["axes"]["batch"]["theory"] == pytest.approx(1.0, abs=0.01)
    assert 0 <= sections[4].facts["waiting_share"] <= 1

    code, _, _ = run("bench", "evaluation", *ARGUMENTS, "--out", out)
    assert code == 0 and len(command.read_sections(out / command.RESULT)) == 1


def test_bf16(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    sections = command.run_bench(replace(TINY, precision="bf16", repeats=1), ["forward", "training", "autoencoder"])
    names = [row.name for row in sections[0].rows]
    assert forward.HALVED in names and "bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_candidates(small: None) -> None:
    setup = replace(TINY, compiled=True, repeats=1)
    first, second, third = command.run_bench(setup, ["forward", "training", "sampling"])
    assert {forward.COMPILED, forward.INT8_COMPILED} <= {row.name for row in first.rows}
    assert training.COMPILED in {row.name for row in second.rows} and sampling.COMPILED in {r.name for r in third.rows}


def test_stopping_leaves_nothing(run: Run, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(setup: Setup) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "run", stop)
    code, _, _ = run("bench", "evaluation", "scaling", *ARGUMENTS, "--out", tmp_path / "bench")
    assert code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed", "section is 'speed'; allowed: forward, training, sampling"),
        ("forward --preset S/3", "preset is 'S/3'; allowed"),
        ("forward --precision fp8", "precision is 'fp8'; allowed: auto, fp32, bf16"),
        ("forward --sample-size 15", "sample_size is 15, but must be a multiple of the preset's patch (2)"),
        ("forward --device tpu", "device is 'tpu'"),
        ("forward --out file", "out is file, which is no folder"),
    ],
)
def test_bad_values_are_one_line(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    code, printed, errors = run("bench", *arguments.split())
    assert code == 2
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not printed


@pytest.mark.parametrize("field", ["num_frames", "sample_size", "batch_size", "repeats", "steps"])
def test_numbers_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0, but must be at least"):
        replace(TINY, **{field: 0})


def test_precision_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("benchmarks.speed.setup.has_bf16", lambda device, fast=fast: fast)
        assert resolve_precision("auto", torch.device("cpu")) == expected
        assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
        assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_switching_compiled_blocks(make_transformer: MakeTransformer) -> None:
    model: LavitaTransformer3DModel = make_transformer()
    for compiled in (True, False):
        set_compiled(model, compiled)
        assert {block.compiled for block in model.blocks} == {compiled}
