"""Planted faults: every one in the table applies to the present sources, and verdicts on a toy package are right."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness import mutants
from benchmarks.robustness.forked_tests import fork_server, run_tests
from benchmarks.robustness.mutants import planted, problems_of, read_faults, run_mutants

SOURCE = """def total(values):
    return sum(values)


def largest(values):
    return max(values)
"""
TESTS = """import os

from toy import largest, total


def test_total():
    assert total([1, 2]) == 3


def test_largest():
    assert largest([5]) == 5
"""
TABLE = """
[[fault]]
name = "{name}"
file = "toy.py"
old = '{old}'
new = '{new}'
tests = ["{tests}"]
what = "a toy is broken"
"""


def test_every_fault_applies_to_the_present_sources() -> None:
    faults = read_faults()
    assert problems_of(faults) == []
    assert len(faults) >= 60
    assert read_faults(only="captions.py") and all(
        "captions.py" in fault.file for fault in read_faults(only="captions.py")
    )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with `src/toy.py` and its tests; of its two functions one is tested well."""
    for name, text in (("src/toy.py", SOURCE), ("tests/test_toy.py", TESTS), ("tests/test_no.py", "assert False\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_table(tmp_path)
    return tmp_path


def write_table(toy: Path, old: str = "sum(values)", new: str = "max(values)") -> Path:
    rows = [
        {"name": "noticed", "old": old, "new": new, "tests": "test_toy.py"},
        {"name": "unnoticed", "old": "return max(values)", "new": "return min(values)", "tests": "test_toy.py"},
        {"name": "unknown", "old": "return max(values)", "new": "return min(values)", "tests": "test_no.py"},
    ]
    (toy / "faults.toml").write_text("".join(TABLE.format(**row) for row in rows), encoding="utf-8")
    return toy / "faults.toml"


def test_one_fault_is_caught_one_survives_and_one_cannot_be_judged(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = toy / "deep" / "out"

    def run() -> int:
        return run_mutants(out, limit=60, table=toy / "faults.toml", root=toy, libraries=["pytest"])

    assert run() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "1 caught, 1 survived, 1 not applicable",
        "survived: unnoticed (a toy is broken)",
        "not applicable: unknown (a toy is broken)",
        str(out / "table.md"),
    ]
    rows = json.loads((out / "result.json").read_text(encoding="utf-8"))["faults"]
    assert [(row["name"], row["verdict"]) for row in rows] == [
        ("noticed", "caught"),
        ("unnoticed", "survived"),
        ("unknown", "not applicable"),
    ]
    assert rows[0]["by"] == "test_toy.py::test_total"
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| a toy is broken | `toy.py` | caught | `test_toy.py::test_total` |" in table
    assert "1 caught, 1 survived, 1 not applicable" in table
    assert (toy / "src" / "toy.py").read_text(encoding="utf-8") == SOURCE, "faults are planted in a copy"

    ran: list[list[str]] = []

    def recording(server: Any, tests: list[str], *others: Any) -> tuple[int | None, str]:
        ran.append(tests)
        return run_tests(server, tests, *others)

    monkeypatch.setattr(mutants, "run_tests", recording)
    assert run() == 1
    assert ran == [["tests/test_no.py"]], "what is known is not run again"
    (toy / "tests" / "test_toy.py").write_text(TESTS + "    assert largest([1, 2]) == 2\n", encoding="utf-8")
    assert run() == 1, "the fault that cannot be judged is left"
    assert capsys.readouterr().out.splitlines()[-3] == "2 caught, 0 survived, 1 not applicable"


def test_a_table_that_does_not_fit_the_sources_is_refused(toy: Path) -> None:
    def refused(message: str, only: str = "") -> None:
        with pytest.raises(ValueError, match=message):
            run_mutants(toy / "out", only, table=toy / "faults.toml", root=toy, libraries=["pytest"])
        assert not (toy / "out").exists()

    write_table(toy, old="values", new="value")
    refused("noticed: 'values' occurs 4 times in toy.py, but must occur once")
    write_table(toy, old="product(values)")
    refused(r"noticed: 'product\(values\)' occurs 0 times in toy\.py")
    write_table(toy, new="sum(values")
    refused(r"noticed: 'sum\(values' is not valid Python there")
    refused("only is 'nothing', which is in the name or file of none of the 3 faults", only="nothing")
    (toy / "tests" / "test_no.py").unlink()
    write_table(toy)
    refused(r"unknown: tests/test_no\.py: no such file")
    (toy / "faults.toml").write_text("[[fault]]\nname = 'x'\n", encoding="utf-8")
    refused("is not a table of faults with name, file, old, new, tests, what")


def test_a_fault_is_one_change_of_a_line() -> None:
    (fault,) = read_faults(only="weight-decay-ignored")
    text = f"a = 1\nf({fault.old})\n"
    assert planted(fault, text) == f"a = 1\nf({fault.new})\n"
    with pytest.raises(ValueError, match="occurs 2 times"):
        planted(fault, text + text)


def test_tests_that_hang_are_killed_with_the_processes_that_they_started(toy: Path) -> None:
    (toy / "tests" / "test_toy.py").write_text(
        "import pathlib, subprocess, sys, time\n\n\ndef test_hang():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    pathlib.Path('pid').write_text(str(child.pid))\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    began = time.monotonic()
    code, failed = run_tests(fork_server(["pytest"]), ["tests/test_toy.py"], toy, toy / "src", limit=4)
    assert (code, failed) == (None, "") and time.monotonic() - began < 60
    if (toy / "pid").exists():  # else it was killed before it began
        state = Path("/proc") / (toy / "pid").read_text() / "stat"
        deadline = time.monotonic() + 10
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "the process goes on"
            time.sleep(0.05)
