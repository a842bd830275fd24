"""Runs stop at bad steps or skip them and name their clips; the loss scale of fp16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from run_folders import last_checkpoint, lines_of

from lavita.training.batches import Batch, BatchMaker
from lavita.training.checkpoint import list_checkpoints
from lavita.training.stability import ENOUGH, LossScale, StepGuard
from lavita.training.train import train


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Multiplies the noise of the first clip by a factor in some steps (from 0)."""
    real = BatchMaker.make

    def spoil(factors: dict[int, float]) -> None:
        def make(self: BatchMaker, step: int, *places: range) -> Batch:
            batch = real(self, step, *places)
            batch.noise[0] *= factors.get(step, 1.0)
            return batch

        monkeypatch.setattr(BatchMaker, "make", make)

    return spoil


def test_spikes_are_measured_against_the_median() -> None:
    guard = StepGuard(10.0)
    assert guard.judge(1e9) == "good", "nothing to compare it with"
    for number in range(ENOUGH):
        assert guard.judge(1.0 + number % 2) == "good"
    assert guard.judge(14.0) == "good"
    assert guard.judge(21.0) == "spike"
    assert guard.judge(math.nan) == guard.judge(math.inf) == "not-finite"
    again = StepGuard(10.0)
    again.restore(json.loads(json.dumps(guard.state())))
    assert list(again.norms) == list(guard.norms)
    assert StepGuard(0.0).judge(1e30) == "good"
    for _ in range(200):
        guard.judge(50.0)
    assert guard.judge(51.0) == "good", "a norm that stays high is not a spike"


def test_a_step_that_is_not_finite_names_its_clips_and_stops(make_config: MakeConfig, spoil: Any) -> None:
    spoil({2: math.nan})
    config = make_config("run", "train.checkpoint_every=1")
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 3; lower train\.learning_rate"):
        train(config)
    event = lines_of(config, "events.jsonl")[-1]
    assert (event["step"], event["event"], event["skipped"]) == (3, "not-finite", True)
    assert len(event["clips"]) == 4 and math.isnan(event["clips"][0]["loss"])
    assert event["clips"][0]["video"] in ("a/0.mp4", "a/1.mp4", "b/2.mp4")
    assert all(math.isfinite(clip["loss"]) for clip in event["clips"][1:])
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")][-1] == "step-00000002"

    # As the message advises: the same run is resumed and skips the bad step.
    train(make_config("run", "train.checkpoint_every=1", "train.bad_steps=skip"))
    assert [line["step"] for line in lines_of(config, "metrics.jsonl")] == [1, 2, 4]
    loaded = last_checkpoint(config)
    assert loaded.step == 4
    assert all(tensor.isfinite().all() for tensor in loaded.read_all().values())
    assert loaded.read_all()["optimizer.x_embedder.proj.weight.step"] == 3


def test_not_every_step_may_be_skipped(make_config: MakeConfig, spoil: Any) -> None:
    spoil(dict.fromkeys(range(1, 30), math.nan))
    with pytest.raises(FloatingPointError, match="at step 12"):
        train(make_config("run", "train.bad_steps=skip", "train.steps=30"))


@pytest.mark.parametrize("bad_steps", ["stop", "skip"])
def test_a_spike_is_reported_and_may_be_skipped(make_config: MakeConfig, spoil: Any, bad_steps: str) -> None:
    spoil({ENOUGH + 1: 300.0})
    config = make_config("run", f"train.steps={ENOUGH + 3}", f"train.bad_steps={bad_steps}", "train.warmup_steps=1000")
    train(config)
    spikes = [event for event in lines_of(config, "events.jsonl") if event["event"] == "spike"]
    assert [(event["step"], event["skipped"]) for event in spikes] == [(ENOUGH + 2, bad_steps == "skip")]
    assert spikes[0]["clips"][0]["loss"] > 100 * spikes[0]["clips"][1]["loss"], "the worst comes first"
    taken = ENOUGH + 3 - (bad_steps == "skip")
    assert last_checkpoint(config).read_all()["optimizer.x_embedder.proj.weight.step"] == taken


def test_a_resumed_run_judges_as_the_first_one_would_have() -> None:
    guard, scale = StepGuard(5.0), LossScale(True)
    for number in range(ENOUGH + 3):
        guard.judge(1.0 + number % 2)
    guard.skipped = 3
    assert scale.overflowed(math.inf)
    for _ in range(7):
        assert not scale.overflowed(1.0)
    resumed_guard, resumed_scale = StepGuard(5.0), LossScale(True)
    resumed_guard.restore(json.loads(json.dumps(guard.state())))
    resumed_scale.restore(json.loads(json.dumps(scale.state())))
    assert (resumed_guard.norms, resumed_guard.skipped) == (guard.norms, 3)
    assert resumed_guard.judge(30.0) == guard.judge(30.0) == "spike" and StepGuard(5.0).judge(30.0) == "good"
    for number in range(1, LossScale.GROWTH_INTERVAL + 1):
        for each in (scale, resumed_scale):
            assert not each.overflowed(1.0)
        assert resumed_scale.value == scale.value == (2**16 if number >= LossScale.GROWTH_INTERVAL - 7 else 2**15)


def test_the_loss_scale_falls_on_overflow_and_rises_again() -> None:
    scale = LossScale(True)
    assert scale.value == 2**16
    gradients = [torch.full((2,), 2.0**16)]
    scale.unscale(gradients)
    assert torch.equal(gradients[0], torch.ones(2))
    assert scale.overflowed(math.inf) and scale.value == 2**15
    for _ in range(LossScale.GROWTH_INTERVAL):
        assert not scale.overflowed(1.0)
    assert scale.value == 2**16
    scale.value = 1.0
    assert not scale.overflowed(math.nan), "what is wrong without a scale is not its overflow"
    assert not LossScale(False).overflowed(math.nan) and LossScale(False).value == 1.0


@pytest.mark.slow
def test_fp16_trains_like_fp32_and_resumes_exactly(make_config: MakeConfig) -> None:
    fields = ("train.steps=4", "train.checkpoint_every=2", "data.num_images=1")
    full, half = make_config("full", *fields), make_config("half", *fields, "train.precision=fp16")
    train(full)
    train(half)
    lines = lines_of(half, "metrics.jsonl")
    assert {line["loss_scale"] for line in lines} <= {2.0**power for power in range(17)}
    for line, expected in zip(lines, lines_of(full, "metrics.jsonl"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-2)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    again = make_config("again", *fields, "train.precision=fp16")
    train(make_config("again", "train.steps=2", *fields[1:], "train.precision=fp16"))
    train(again)
    one, other = last_checkpoint(half), last_checkpoint(again)
    assert one.facts == other.facts
    for name, tensor in one.read_all().items():
        assert torch.equal(tensor, other.read_all()[name]), name
