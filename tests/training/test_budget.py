"""Training within a time: simulated machines of changing speed, the learning rate, and an interrupted run."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from run_folders import last_checkpoint, lines_of

from lavita.core.config import ConfigError, load_config, read_yaml
from lavita.training import budget as module
from lavita.training import step as step_module
from lavita.training import train as loop
from lavita.training.budget import Budget, new_length
from lavita.training.config import RunConfig, TrainConfig
from lavita.training.run_folder import Stopped
from lavita.training.step import learning_rate
from lavita.training.train import train

SECONDS = 3600.0
SPEEDS: dict[str, Callable[[float], float]] = {
    "as measured": lambda share: 1.0,
    "twice as slow": lambda share: 2.0,
    "twice as fast": lambda share: 0.5,
    "ever slower": lambda share: 1.0 + share,
    "ever faster": lambda share: 2.0 - 1.5 * share,
    "slow in the fall": lambda share: 2.0 if share > 0.8 else 1.0,
    "fast in the fall": lambda share: 0.5 if share > 0.8 else 1.0,
    "slow at the very end": lambda share: 2.0 if share > 0.97 else 1.0,
    "waves": lambda share: 2.0 ** math.sin(40 * share),
    "every tenth minute slow": lambda share: 2.0 if int(share * 6) % 2 else 0.6,
}


class Time:
    """A clock that only goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulate(speed: Callable[[float], float], step_seconds: float, first: float = 1.0) -> tuple[Time, list[float]]:
    """A run on a machine whose step takes `step_seconds` times the speed at a share of the budget; rates of its steps.

    The estimate before the first step is `first` times the real time.
    """
    time, outputs = Time(), 20.0
    start = time.now
    budget = Budget(SECONDS, step_seconds * first, output_seconds=10.0, after_seconds=5.0, clock=time)
    time.now += 120.0  # encoding
    plan, step = budget.begin(0), 0
    settings, rates = TrainConfig(learning_rate=1.0, warmup_steps=10), []
    while step < plan.steps:
        settings = settings.model_copy(update={"steps": plan.steps, "decay_steps": plan.decay_steps})
        rates.append(learning_rate(settings, step))
        time.now += step_seconds * speed((time.now - start) / SECONDS)
        step += 1
        budget.replan(step)
        plan = budget.plan
        if step % 500 == 0:
            time.now += outputs
            budget.leave_out(outputs)
    time.now += outputs + 5.0
    time.now -= start
    return time, rates


@pytest.mark.parametrize("step_seconds", [0.2, 1.0, 20.0])
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_budget_is_kept_on_a_machine_of_changing_speed(speed: str, step_seconds: float) -> None:
    time, rates = simulate(SPEEDS[speed], step_seconds)
    assert 0.95 * SECONDS < time.now < 1.05 * SECONDS
    fall = next(index for index, rate in enumerate(rates) if index >= 10 and rate < 1)
    assert all(rate == 1 for rate in rates[10:fall]), "constant until the fall"
    assert all(later < earlier for earlier, later in zip(rates[fall - 1 :], rates[fall:], strict=False))
    assert 0.1 < 1 - fall / len(rates) < 0.6
    assert rates[-1] < 0.1, "the run ends with a small rate"


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_a_wrong_first_estimate_does_no_harm(first: float) -> None:
    time, rates = simulate(SPEEDS["as measured"], 1.0, first)
    assert 0.95 * SECONDS < time.now < 1.05 * SECONDS
    assert max(rates) == 1 and rates[-1] < 0.05


def test_a_steady_machine_gets_the_schedule_that_it_would_be_given_by_hand() -> None:
    _, rates = simulate(SPEEDS["as measured"], 1.0)
    fall = next(index for index, rate in enumerate(rates) if index >= 10 and rate < 1)
    assert 1 - fall / len(rates) == pytest.approx(module.DECAY_SHARE, abs=0.03)


def test_the_length_of_a_fall_is_changed_without_a_jump() -> None:
    settings = TrainConfig(steps=100, decay_steps=40, learning_rate=1.0)
    for left in (1, 7, 20, 55, 1000):
        steps, decay_steps = new_length(80, 100, 40, left)
        changed = settings.model_copy(update={"steps": steps, "decay_steps": decay_steps})
        assert steps == 80 + left
        assert learning_rate(changed, 80) <= learning_rate(settings, 80) < learning_rate(settings, 79)
        assert learning_rate(changed, 80) > 0.8 * learning_rate(settings, 80) or left < 5
        assert learning_rate(changed, steps - 1) <= 2 * learning_rate(changed, 80) / left


def test_a_fall_of_a_length_of_its_own() -> None:
    time = Time()
    budget = Budget(100.0, 1.0, decay_steps=7, clock=time)
    assert (budget.begin(0).steps, budget.plan.decay_steps) == (100, 7)
    time.now += 10
    assert budget.replan(5) and budget.plan.decay_steps == 7


def test_what_is_spent_counts_across_commands_and_a_longer_budget_goes_on() -> None:
    time = Time()
    budget = Budget(100.0, 1.0, clock=time, spent=10.0)
    assert budget.begin(0).steps == 90
    time.now += 30
    assert budget.replan(30) and budget.spent() == 40
    facts = json.loads(json.dumps(budget.facts()))

    time.now += 5000  # in between
    again = Budget(100.0, 9.0, clock=time)
    time.now += 4
    plan = again.begin(30, facts)
    assert again.spent() == 44 and plan.steps == budget.plan.steps and plan.step_seconds == 1.0

    longer = Budget(300.0, 9.0, clock=time)
    assert longer.begin(30, facts).steps == 30 + 260 and longer.plan.decay_steps == 87

    with pytest.raises(ConfigError, match=r"budget is 0:20, of which 0:40 are spent.*give more"):
        Budget(20.0, 1.0, clock=time).begin(30, facts)


@pytest.fixture
def steps_as_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """A clock on which a training step takes 1 second, from the 20th step on 2, and nothing else any time."""
    time, real = Time(), step_module.train_step

    def slow(state: Any, *arguments: Any) -> Any:
        result = real(state, *arguments)
        time.now += 1.0 if state.step < 20 else 2.0
        return result

    monkeypatch.setattr(loop, "train_step", slow)
    return time


@pytest.mark.parametrize("stop_at", [9, 33])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    make_config: MakeConfig, steps_as_time: Time, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """To the bit, before the rate falls and while it does."""

    def config(name: str) -> RunConfig:
        return make_config(name, "train.warmup_steps=2", "train.batch_size=2", "train.steps=3")

    train(config("whole"), Budget(60.0, 0.5, clock=steps_as_time))
    whole = last_checkpoint(config("whole"))
    assert 35 < whole.step < 45, "60 steps were expected, but 40 fit"

    def interrupted(budget: Budget, run: Any, settings: TrainConfig, team: Any) -> TrainConfig:
        if run.state.step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return real(budget, run, settings, team)

    real = loop._follow
    monkeypatch.setattr(loop, "_follow", interrupted)
    with pytest.raises(Stopped):
        train(config("parts"), Budget(60.0, 0.5, clock=steps_as_time))
    monkeypatch.setattr(loop, "_follow", real)
    steps_as_time.now += 500
    train(config("parts"), Budget(60.0, 0.5, clock=steps_as_time))
    parts = last_checkpoint(config("parts"))
    assert parts.step == whole.step and parts.facts == whole.facts
    tensors = parts.read_all()
    for name, tensor in whole.read_all().items():
        assert torch.equal(tensor, tensors[name]), name
    rates = [[line["lr"] for line in lines_of(config(name))] for name in ("whole", "parts")]
    assert rates[0] == rates[1] and rates[0][-1] < 1e-4


def test_a_finished_run_takes_no_step_and_a_longer_budget_does(make_config: MakeConfig, steps_as_time: Time) -> None:
    config = make_config("run", "train.batch_size=2", "train.log_every=5")
    train(config, Budget(15.0, 1.0, clock=steps_as_time))
    plans = [event for event in lines_of(config, "events.jsonl") if event["event"] == "plan"]
    assert plans[0]["step"] == 0 and "15 steps, the rate will fall over 4; 0:00 of 0:15 are spent" in plans[0]["note"]
    assert any("the rate falls" in plan["note"] for plan in plans)
    saved = load_config(RunConfig, read_yaml(config.run_dir / "config.yaml")).train
    assert (saved.steps, saved.decay_steps) == (15, plans[-1]["decay_steps"])

    before = steps_as_time.now
    train(config, Budget(15.0, 1.0, clock=steps_as_time))
    assert steps_as_time.now == before and last_checkpoint(config).step == 15
    train(config, Budget(25.0, 1.0, clock=steps_as_time))
    assert 18 <= last_checkpoint(config).step <= 22
    assert (config.run_dir / "pipeline" / "model_index.json").exists()


def test_the_time_of_outputs_is_no_time_of_steps() -> None:
    time = Time()
    budget = Budget(1000.0, 1.0, after_seconds=50.0, clock=time)
    budget.begin(0)
    time.now += 100
    budget.leave_out(90.0)
    time.now += 10
    assert budget.replan(20)
    assert budget.plan.step_seconds == pytest.approx(1.0)
    assert budget.plan.steps == 20 + 1000 - 110 - 50 - 90


def test_outputs_take_longer_on_a_machine_that_has_become_slower() -> None:
    time = Time()
    budget = Budget(1000.0, 1.0, output_seconds=100.0, clock=time)
    assert budget.begin(0).steps == 900
    for step in range(20, 401, 20):
        time.now += 30.0
        assert budget.replan(step)
    assert budget.plan.outputs() == pytest.approx(150.0, rel=0.01)
    assert budget.plan.steps == pytest.approx(400 + (1000 - 600 - 150) / 1.5, abs=2)
    budget.leave_out(400.0)
    assert budget.plan.outputs() == 400.0
