"""Peak memory: in a process of its own, against a lower bound, and against the prediction."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks.speed import forward, memory, peaks, training
from benchmarks.speed.products import record
from benchmarks.speed.setup import Setup, build_model, model_inputs
from lavita.core.processes import Processes

TINY = Setup("tiny/2", num_frames=3, sample_size=8, batch_size=2, compiled=False)


@pytest.mark.slow
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
    candidate = forward.make_candidate(forward.INT8, setup)
    whole = peaks.stored_bytes(build_model(setup))
    blocks = setup.config["num_blocks"] * 12 * 128**2
    assert whole - peaks.stored_bytes(*candidate.modules) == pytest.approx(3 * blocks, rel=0.02)


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


@pytest.mark.parametrize("sampling", [False, True])
def test_a_measured_peak_is_the_predicted_one(sampling: bool) -> None:
    fields = {"num_frames": 4, "sample_size": 16, "num_classes": 0 if sampling else 8}
    setting = {} if sampling else {"accumulation": 2}
    case = memory.Case("tiny/2", fields, 1, 0 if sampling else 2, setting, sampling)
    predicted, measured = memory.predict(case).total, memory.measure(case, Processes())
    assert measured["allocated"] == pytest.approx(predicted, rel=0.02)
    assert measured["resident"] > 0
    assert case.title.startswith("tiny/2 sampling num_frames=4" if sampling else "tiny/2 num_frames=4")


def test_unknown_cases() -> None:
    with pytest.raises(ValueError, match="only is 'huge', which is in no title"):
        memory.compare("huge")
