"""Training within a time: the number of steps follows the measured time of a step until the time is spent.

The learning rate rises, stays constant and falls linearly to 0, so that the length of a run need not be known at its
start (Haegele et al. 2024, Sec. 3). Until the fall begins, a new length only moves the fall; from then on it only makes
the rest of the fall longer or shorter, so that the rate never rises again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from lavita.core.config import ConfigError
from lavita.core.progress import clock as as_clock

DECAY_SHARE = 0.3
"""Share of the steps over which the learning rate falls."""
INTERVAL = 0.01
"""Share of the time between two decisions."""
NOTABLE = 0.05
"""Change of the number of steps that is written down."""
MOST_DRIFT = 2.0
"""Change of a machine's speed that is believed."""
SMOOTHING = 0.3
"""Weight of the newest measurement in the estimated time of a step: machines are briefly slow, too."""


@dataclass(frozen=True)
class Plan:
    """How long a run is to be; everything that a checkpoint holds of it."""

    seconds: float
    """The whole budget that the plan was made for."""
    steps: int
    """Steps of the whole run."""
    decay_steps: int
    """See `TrainConfig.decay_steps`."""
    step_seconds: float
    """Estimated time of a step."""
    output_seconds: float
    """Time of the last samples, checkpoint and pipeline, as it was estimated or measured last."""
    output_step_seconds: float
    """Time of a step when that was: what has slowed down steps since then slows down samples, too."""
    spent: float
    """Seconds of the budget that are spent."""
    measured_from: float
    """Value of `spent` at which the present measurement of the time of a step began."""
    measured_from_step: int
    """Step at which it began."""

    def outputs(self) -> float:
        """Seconds of the last samples, checkpoint and pipeline, at the present speed."""
        return self.output_seconds * min(MOST_DRIFT, max(1 / MOST_DRIFT, self.step_seconds / self.output_step_seconds))


def falls(plan: Plan, step: int) -> bool:
    """Whether the learning rate of the step after `step` steps is below the full one."""
    return plan.steps - step <= plan.decay_steps


def new_length(
    step: int, steps: int, decay_steps: int, steps_left: int, wanted_decay: int | None = None
) -> tuple[int, int]:
    """Changes the length of a run so that the learning rate of the next step is at most what it was to be.

    Args:
        step: steps done, at most `steps`.
        steps: planned steps of the whole run.
        decay_steps: planned steps of the fall, see `step.learning_rate`.
        steps_left: steps that are to follow.
        wanted_decay: steps of the fall; by default `DECAY_SHARE` of all.

    Returns:
        Steps of the whole run, and those of the fall. A fall that has begun goes on from where it is: its length is
        that of a longer fall, whose beginning is in the past.
    """
    end = step + steps_left
    share = (steps - step) / (decay_steps + 1)  # of the full rate, at the next step
    if not steps_left:
        return end, decay_steps
    if share >= 1:
        wanted = round(DECAY_SHARE * end) if wanted_decay is None else wanted_decay
        return end, min(wanted, steps_left - 1)
    return end, math.ceil(steps_left / share) - 1 if share > 0 else steps_left - 1


class Budget:
    """The time that a command may take, and the plan of the training in it.

    It belongs to a run in one process. `begin` comes first, then `replan` after every step.
    """

    def __init__(
        self,
        seconds: float,
        step_seconds: float,
        output_seconds: float = 0.0,
        after_seconds: float = 0.0,
        decay_steps: int | None = None,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        """Starts to count the time.

        Args:
            seconds: time for everything, before and after the training, too.
            step_seconds: first estimate of the time of a step.
            output_seconds: first estimate of the time of the last samples, checkpoint and pipeline.
            after_seconds: time of everything that follows them.
            decay_steps: steps over which the rate falls; by default `DECAY_SHARE` of all.
            spent: seconds that earlier commands spent on a run without a checkpoint.
            clock: gives seconds from any moment on.
            started: value of the clock when this command began; by default now.
        """
        self.seconds, self.after_seconds, self.decay_steps = seconds, after_seconds, decay_steps
        self._clock, self._started, self._before = clock, clock() if started is None else started, spent
        self._first = max(step_seconds, 1e-6), output_seconds
        self._plan: Plan | None = None
        self._announced = (0, False)

    @property
    def plan(self) -> Plan:
        """The present plan."""
        assert self._plan is not None, "begin comes first"
        return self._plan

    def spent(self) -> float:
        """Seconds of the budget that are spent, by interrupted commands as well."""
        return self._before + self._clock() - self._started

    def begin(self, step: int, saved: dict[str, Any] | None = None) -> Plan:
        """Plans the run, or goes on with the plan that a checkpoint holds (`facts`).

        With another budget than that of the checkpoint, the rate is the full one again, and falls at the new end.

        Args:
            step: steps done.
            saved: the facts in the checkpoint of that step; None without one.

        Raises:
            ConfigError: if the budget is spent.
        """
        if saved is not None:
            before = Plan(**saved)
            self._before = before.spent
            now = self.spent()
            # The start of this command is not part of a step.
            since = now - (before.spent - before.measured_from)
            if before.seconds == self.seconds:
                return self._start(replace(before, spent=now, measured_from=since), step)
            self._first = before.step_seconds, before.outputs()
        now, (step_seconds, outputs) = self.spent(), self._first
        left = self._steps_left(now, step_seconds, outputs)
        if not left:
            raise ConfigError(
                f"the budget is {as_clock(self.seconds)}, of which {as_clock(now)} are spent: with about "
                f"{as_clock(outputs + self.after_seconds)} for the last samples and the page, no time is left to "
                "train; give more"
            )
        steps, decay_steps = new_length(step, step + left, 0, left, self.decay_steps)
        plan = Plan(self.seconds, steps, decay_steps, step_seconds, outputs, step_seconds, now, now, step)
        return self._start(plan, step)

    def _start(self, plan: Plan, step: int) -> Plan:
        self._plan = plan
        self._announced = plan.steps, falls(plan, step)
        return plan

    def replan(self, step: int) -> bool:
        """Decides again how many steps there are, if it is time to; returns whether it did.

        Args:
            step: steps done.
        """
        now, plan = self.spent(), self.plan
        taken = step - plan.measured_from_step
        if taken < 1 or now - plan.measured_from < INTERVAL * self.seconds or step >= plan.steps:
            return False
        measured = (now - plan.measured_from) / taken
        step_seconds = plan.step_seconds + SMOOTHING * (measured - plan.step_seconds)
        left = self._steps_left(now, step_seconds, replace(plan, step_seconds=step_seconds).outputs())
        steps, decay_steps = new_length(step, plan.steps, plan.decay_steps, left, self.decay_steps)
        self._plan = replace(
            plan,
            steps=steps,
            decay_steps=decay_steps,
            step_seconds=step_seconds,
            spent=now,
            measured_from=now,
            measured_from_step=step,
        )
        return True

    def news(self, step: int) -> str | None:
        """One line about the plan, if it differs by more than 5% from the last line, or if the rate begins to fall."""
        plan, (steps, fell) = self.plan, self._announced
        if falls(plan, step) == fell and abs(plan.steps - steps) <= NOTABLE * steps and plan.steps > step:
            return None
        self._announced = plan.steps, falls(plan, step)
        return self.describe(step)

    def describe(self, step: int) -> str:
        """One line about the plan, after `step` steps."""
        plan = self.plan
        fall = "falls" if falls(plan, step) else "will fall"
        return (
            f"{plan.steps:,} steps, the rate {fall} over {plan.decay_steps:,}; "
            f"{as_clock(plan.spent)} of {as_clock(plan.seconds)} are spent, {plan.step_seconds:.3g} s per step"
        )

    def leave_out(self, seconds: float) -> None:
        """Says that samples, a checkpoint or a validation took some seconds, which are not part of a step."""
        plan = self.plan
        if seconds > plan.outputs():
            plan = replace(plan, output_seconds=seconds, output_step_seconds=plan.step_seconds)
        self._plan = replace(plan, measured_from=plan.measured_from + seconds)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds for `begin`: numbers by name."""
        return asdict(replace(self.plan, spent=self.spent()))

    def _steps_left(self, now: float, step_seconds: float, outputs: float) -> int:
        return max(0, int((self.seconds - now - outputs - self.after_seconds) / step_seconds))
