"""Progress lines: what is done, and how long the rest takes."""

from __future__ import annotations

import pytest

from lavita.core import progress
from lavita.core.progress import Progress, clock, say


def test_the_time_left_is_that_of_the_rest_at_the_speed_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work that an earlier run has done took no time in this one."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    shown = Progress("step", 2_000, done=1_000)
    for seconds, done in ((10, 1_100), (15, 1_150), (50, 1_500), (90, 2_000)):
        now = 1000.0 + seconds
        shown.update(done, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "step 1,100/2,000  loss 0.5  ETA 1:30",
        "step 1,500/2,000  loss 0.5  ETA 0:50",
        "step 2,000/2,000  loss 0.5  took 1:30",
    ], "at most one line every 30 seconds, and the last"
    Progress("step", 3, active=False).update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3599.6, "1:00:00"), (3905, "1:05:05"), (360_000, "100:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_one_of_several_processes_says_a_thing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        say("3 videos are left out")
    assert capsys.readouterr().err == "3 videos are left out\n"
