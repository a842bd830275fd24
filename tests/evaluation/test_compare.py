"""The comparison of two reports: what it subtracts from what, and how sure that is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lavita.evaluation.report.compare import compare_reports


def write_report(file: Path, **parts: Any) -> Path:
    file.write_text(
        json.dumps({"protocol": {"comparable": {"features": {"num_frames": 16}}}, **parts}), encoding="utf-8"
    )
    return file


def test_the_first_report_is_subtracted_from_the_second(tmp_path: Path) -> None:
    prdc = {"precision": 0.5, "recall": 0.25, "density": 1.0, "coverage": 0.75}
    one = write_report(
        tmp_path / "one.json",
        scores={"kvd": {"value": 1.0, "standard_error": 0.3}, "prdc": prdc},
        accuracy={"accuracy": 0.5, "interval_95": [0.47, 0.53]},
        motion={"num_within_factor_two": 7},
    )
    two = write_report(
        tmp_path / "two.json",
        scores={"kvd": {"value": 3.0, "standard_error": 0.4}, "prdc": {**prdc, "recall": 0.5}},
        accuracy={"accuracy": 0.75, "interval_95": [0.71, 0.79]},
        motion={"num_within_factor_two": 5},
    )
    console = Console(file=io.StringIO(), width=240)
    compare_reports(one, two, console)
    assert isinstance(console.file, io.StringIO)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert found["kvd"] == ["1 +- 0.588", "3 +- 0.784", "2 +- 0.98"], "1.96 times the root of 0.3^2 + 0.4^2"
    assert found["accuracy"] == ["0.5 +- 0.03", "0.75 +- 0.04", "0.25 +- 0.05"]
    assert found["recall prdc"] == ["0.25", "0.5", "0.25"] and found["coverage prdc"] == ["0.75", "0.75", "0"]
    assert found["classes that move as real"] == ["7", "5", "-2"]


def test_other_scores_are_another_protocol(tmp_path: Path) -> None:
    one = write_report(tmp_path / "one.json", scores={})
    two = tmp_path / "two.json"
    two.write_text(json.dumps({"protocol": {"comparable": {"features": {"num_frames": 8}}}, "scores": {}}))
    with pytest.raises(ValueError, match=r"different protocols and cannot be compared: features\.num_frames: 16 / 8"):
        compare_reports(one, two)
