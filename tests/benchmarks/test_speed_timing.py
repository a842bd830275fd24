"""Ratios, exponents and shares of times that are known. No time is asserted that the machine decides."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import data, scaling, tables, timing
from lavita.studies.complexity import measure


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    sizes = [4, 8, 16, 64]
    assert scaling.exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)
    with pytest.raises(ValueError, match="must be at least two"):
        scaling.exponent([4, 4], [1.0, 1.0])


def test_the_theory_of_scaling() -> None:
    point = scaling.Point(sample_size=128, hidden_size=32)
    costs = [measure(replace(point, sample_size=size).config).macs for size in (128, 256)]
    # With 4,096 tokens per frame and a width of 32, attention is nearly all of the work.
    assert 1.9 < scaling.exponent([1, 4], costs) < 2.0
    assert [scaling.axis_value("tokens per frame", point), scaling.axis_value("width", point)] == [4096, 32]


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
    share = section.share_of_peak(rows[1])
    assert share is not None
    assert [share.median, share.least, share.most] == pytest.approx([0.05, 1 / 120, 0.125])
    assert timing.Section.from_json(json.loads(json.dumps(section.to_json()))) == section
    headings, lines = tables.cells(section)
    assert headings == ["", "seconds", "times the floor", "times ours", "per product", "of the peak"]
    assert lines[1] == ["ours", "5 s (2 s to 30 s)", "2.50 (2.00 to 3.00)", "", "", "5% (1% to 12%)"]
    assert tables.cells(section, ranges=False)[1][1][:3] == ["ours", "5 s", "2.50"]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    called: list[str] = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.interleave(runs, 3, torch.device("cpu"))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(called) == "aabbcc" + "abc" + "bca" + "cab"


def test_one_thread_is_timed_by_the_clock_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, device, expected in ((1, "cpu", "processor"), (2, "cpu", "wall"), (1, "cuda", "wall")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert timing.default_clock(torch.device(device)) == expected
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    sleeping = {"sleep": lambda: time.sleep(0.02)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.interleave(sleeping, 1, torch.device("cpu"))["sleep"][0] < 0.02
    assert timing.interleave(sleeping, 1, torch.device("cpu"), clock="wall")["sleep"][0] >= 0.02


def test_the_share_of_a_loop_that_waits_for_its_reader() -> None:
    assert data.waiting_share(lambda number: time.sleep(0.05), lambda: time.sleep(0.001), 3) > 0.5
    assert data.waiting_share(lambda number: None, lambda: time.sleep(0.02), 3) < 0.5
