"""The folder of a run: lines that a resumed run keeps, and exit codes of a stopped one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from lavita.training.run_folder import Metrics, Stopped


@pytest.mark.parametrize("resume_step", [0, 3, 4])
def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(tmp_path: Path, resume_step: int) -> None:
    """That of the checkpoint's own step too, which is not done again; and no line that is damaged or cut off."""
    file = tmp_path / "metrics.jsonl"
    with Metrics(file, 0) as metrics:
        for step in range(1, 5):
            metrics.write(step=step, loss=1.0)
    with file.open("a", encoding="utf-8") as stream:
        stream.write('3\n{"step": []}\n{"loss": 1.0}\n{"step": 1, "lo')
    with Metrics(file, resume_step, active=False) as metrics:
        metrics.write(step=9)
    with Metrics(file, resume_step) as metrics:
        for step in range(resume_step + 1, 6):
            metrics.write(step=step, loss=2.0)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": step, "loss": 1.0 if step <= resume_step else 2.0} for step in range(1, 6)]


@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGINT], 143), ([], 143)]
)
def test_a_stopped_run_has_the_exit_code_of_its_first_signal(signals: list[int], code: int) -> None:
    stopped = Stopped(1234, 5678, signals)
    assert stopped.exit_code == code
    assert str(stopped) == "stopped at step 1,234 of 5,678; run the same command again to resume"
