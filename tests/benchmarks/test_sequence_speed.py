"""The benchmark of processes that share clips: it runs, and says when processes would not agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.speed.sequence_parallel import Work, compare_processes, largest_difference, take_steps
from lavita.core.processes import Processes


@pytest.mark.slow
def test_two_processes_beside_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work("tiny/2", variant=3, num_frames=33, sample_size=8, steps=3)
    compare_processes(work, [2], tmp_path / "out.json")
    one, two = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert max(two["largest_differences"].values()) < 2e-5
    assert two["measured"]["losses"][0] != two["measured"]["losses"][1]
    for row in (one, two):
        parts = row["predicted"]["parts"]
        predicted = parts["activations and temporaries"] + parts.get("gradients", 0)
        assert row["measured"]["activations"] == pytest.approx(predicted, rel=0.05)
    assert two["measured"]["activations"] < 0.6 * one["measured"]["activations"]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_step_depends_on_the_tokens() -> None:
    work = Work("mini/4", num_frames=4, sample_size=8, steps=2)
    found, other = (take_steps(each, Processes()) for each in (work, Work(**{**vars(work), "variant": 1})))
    assert largest_difference(found.losses, found.losses) == 0
    assert largest_difference(found.grad_norms, other.grad_norms) > 1e-4  # the same blocks in another order
    assert largest_difference(found.losses, other.losses) > 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 1,x", "processes is '1,x'; allowed: numbers such as 1,2,4"),
        ("--processes 0", "processes has 0, but must be at least 1"),
        ("--preset S/3", "preset is 'S/3'"),
    ],
)
def test_bad_values(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sequence-parallel", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
