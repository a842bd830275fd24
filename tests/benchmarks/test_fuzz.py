"""The fuzzer: a short campaign, and a bad command for every property, which must notice it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.robustness.fuzz import campaign, properties
from benchmarks.robustness.fuzz.campaign import KINDS, Fuzzer, Result, open_fuzzer, remove_tree, replay, run_campaign
from benchmarks.robustness.fuzz.cases import Case, generator, working_folder
from benchmarks.robustness.fuzz.containers import boxes
from benchmarks.robustness.fuzz.material import Material
from benchmarks.robustness.fuzz.options import TINY, commands
from benchmarks.robustness.fuzz.properties import PROPERTIES, Fault, find_faults
from benchmarks.robustness.fuzz.report import group_faults, write_report
from benchmarks.robustness.fuzz.running import list_tree, run_case

SAMPLE = Case(("sample", "in", "--out", "out"), "a test", seconds=20)


def faults_of(folder: Path, main: Callable[[], None], case: Case = SAMPLE) -> list[Fault]:
    """What the properties say about a command on a small input."""
    home = working_folder(folder / "sandbox")
    (home / "in").mkdir(parents=True)
    (home / "in" / "a.txt").write_text("a", encoding="utf-8")
    return find_faults(run_case(case, folder / "sandbox", main))


def write(name: str, text: str = "x") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def fail(message: str, code: int = 2) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def good() -> None:
    write("out/a/0.mp4")
    print("out: 1 videos")


def raise_error() -> None:
    raise KeyError("a")


def use_memory() -> None:
    np.ones(30_000_000)


def use_more_than_there_is() -> None:
    np.ones(10**12)


def write_outside() -> None:
    good()
    write("../../evil")


def change_an_input() -> None:
    good()
    write("in/a.txt", "changed")


def remove_an_input() -> None:
    good()
    os.remove("in/a.txt")


def leave_a_half() -> None:
    write("out/.a.partial-12345678.mp4")
    good()


def leave_something_temporary() -> None:
    write(f"{os.environ['TMPDIR']}/left")
    good()


def claim_too_much() -> None:
    write("out/a/0.mp4")
    print("out: 2 videos")


def claim_an_empty_file() -> None:
    write("out/a/0.mp4", "")
    print("out: 1 videos")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("main", "name", "what"),
    [
        (lambda: time.sleep(60), "ends_in_time", "did not end within 1 s"),
        (use_memory, "bounded_memory", "used 2"),
        (use_more_than_there_is, "bounded_memory", "ran out of memory"),
        (raise_error, "no_crash", "KeyError: 'a'"),
        (kill_itself, "no_crash", "killed by signal 11"),
        (lambda: sys.exit(3), "no_crash", "exit code 3"),
        (lambda: fail("error: loss", 1), "no_crash", "exit code 1"),
        (write_outside, "writes_only_its_output", "'1/2/evil' was written"),
        (change_an_input, "writes_only_its_output", "'1/2/3/4/in/a.txt' was changed"),
        (remove_an_input, "writes_only_its_output", "'1/2/3/4/in/a.txt' was removed"),
        (leave_a_half, "leaves_nothing_unfinished", ".a.partial-12345678.mp4' is left"),
        (leave_something_temporary, "leaves_nothing_unfinished", "'tmp/left' is left"),
        (lambda: sys.exit(2), "clear_message", "does not end with one line"),
        (lambda: fail("error: in is bad\nand more"), "clear_message", "does not end with one line"),
        (lambda: fail("error: bad value"), "clear_message", "names nothing"),
        (lambda: fail("error: in/\x1b[31m is bad"), "clear_message", "control character"),
        (lambda: fail("error: in/" + "x" * 5000), "clear_message", "5,003 characters"),
        (claim_too_much, "makes_what_it_claims", "says 2 videos, but 1 are there"),
        (claim_an_empty_file, "makes_what_it_claims", "says 1 videos, but 1 are there"),
        (lambda: None, "makes_what_it_claims", "does not say how many"),
    ],
)
def test_each_property_can_fail(
    main: Callable[[], None], name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(properties, "MOST_MEMORY", 100 << 20)
    case = Case(SAMPLE.arguments, "a test", seconds=1) if name == "ends_in_time" else SAMPLE
    (found,) = faults_of(tmp_path, main, case)
    assert found.name == name and what in found.what


def test_a_good_command_and_a_clear_message_pass(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "good", good) == []
    assert faults_of(tmp_path / "bad", lambda: fail("error: in: holds no pipeline")) == []
    assert faults_of(tmp_path / "loss", lambda: fail("error: step 3: the loss is not finite", 1)) == []


def test_what_cannot_be_right_must_be_refused(tmp_path: Path) -> None:
    case = Case(SAMPLE.arguments, "NaN in a tensor", must_fail=True)
    (found,) = faults_of(tmp_path, good, case)
    assert found == Fault("refuses_what_cannot_be_right", "exit code 0 for NaN in a tensor")


@pytest.mark.parametrize(
    ("printed", "what"),
    [
        ({"num_videos": 1, "broken": [], "longest": 4}, "accounts for 1 of 2 videos"),
        ({"num_videos": 1, "broken": ["a"], "longest": 4}, "counts 4 frames in a video of 10 that is cut off"),
        ({"num_videos": 1, "broken": ["a"], "longest": 10}, ""),
    ],
)
def test_every_video_of_an_inspection_is_accounted_for(printed: dict[str, object], what: str, tmp_path: Path) -> None:
    case = Case(("data", "inspect", "in", "--json"), "a test", num_videos=2, num_frames=10)
    found = faults_of(tmp_path, lambda: print(json.dumps(printed)), case)
    assert [fault.what for fault in found] == ([what] if what else [])


def test_a_cache_has_what_it_says(tmp_path: Path) -> None:
    def encode() -> None:
        write("out/manifest.json", json.dumps({"videos": [{"name": "a", "shard": "a.safetensors"}]}))
        print("out: 1 videos, 0 broken")

    (found,) = faults_of(tmp_path, encode, Case(("encode", "--out", "out"), "a test", num_videos=1))
    assert found.what == "the shard of 'a' is missing"


def test_the_place_of_an_error_is_that_in_the_package(tmp_path: Path) -> None:
    from lavita.core.config import read_yaml

    (found,) = faults_of(tmp_path, lambda: print(read_yaml(None)))  # type: ignore[arg-type]
    assert found.place == "core/config.py:read_yaml TypeError"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return open_fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_a_short_campaign(fuzzer: Fuzzer, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_campaign(fuzzer, dict.fromkeys(KINDS, 6), first_seed=0, workers=2)
    assert len(results) == 6 * len(KINDS)
    assert not [result for result in results if result.faults]
    assert {result.code for result in results} == {0, 2}, "some inputs are good enough, others are refused"
    again = run_campaign(fuzzer, dict.fromkeys(KINDS, 6), first_seed=0, workers=2)
    assert again == results, "nothing was run twice"
    assert not list((fuzzer.folder / campaign.CASES).iterdir())

    capsys.readouterr()
    result = results[0]
    assert replay(fuzzer, f"{result.kind}:{result.seed}") == 0
    printed = capsys.readouterr().out
    assert result.what in printed and f"exit code {result.code}" in printed and "every property holds" in printed
    assert (working_folder(fuzzer.sandbox(result.kind, result.seed)) / "in").is_dir(), "its folder is kept"


def test_a_case_is_a_function_of_its_seed(fuzzer: Fuzzer, tmp_path: Path) -> None:
    for kind, build in KINDS.items():
        cases = []
        for attempt in ("first", "second"):
            home = tmp_path / attempt / kind
            home.mkdir(parents=True)
            cases.append(build(generator(kind, 3), home, fuzzer.material))
        assert cases[0] == cases[1], kind
        first, second = (list_tree(tmp_path / attempt).keys() for attempt in ("first", "second"))
        assert first == second
        for attempt in ("first", "second"):  # pytest cannot remove a tree as deep as some of these
            remove_tree(tmp_path / attempt)


def test_boxes_of_every_container(fuzzer: Fuzzer) -> None:
    contents = {**fuzzer.material.videos, **fuzzer.material.images}
    assert len(contents) > 15
    for suffix, data in contents.items():
        found = boxes(data, suffix)
        assert found and max(found) <= len(data), suffix


def test_every_command_has_small_options() -> None:
    assert set(commands()) == set(TINY)


def test_a_stopped_campaign_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(rng: object, folder: Path, material: Material) -> Case:
        return Case(("x",), "nothing")

    monkeypatch.setattr(campaign, "KINDS", {"options": build})
    fuzzer = Fuzzer(tmp_path, Material(tmp_path), raise_error)
    first = run_campaign(fuzzer, {"options": 2}, 0, workers=1)
    log = tmp_path / campaign.LOG
    log.write_text(log.read_text(encoding="utf-8") + '{"kind": "opt', encoding="utf-8")
    log.write_text(log.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    both = run_campaign(fuzzer, {"options": 3}, 0, workers=1)
    assert both[:2] == first and [result.seed for result in both] == [0, 1, 2]

    (group,) = group_faults(both)
    assert (group["count"], group["seeds"], group["property"]) == (3, [0, 1, 2], "no_crash")
    write_report(both, tmp_path / "fuzz-2026-01-02.md", "python -m benchmarks fuzz")
    page = (tmp_path / "fuzz-2026-01-02.md").read_text(encoding="utf-8")
    assert "# Fuzzing, 2026-01-02" in page and "| options | 3 | 0 | 0 | 3 |" in page
    assert all(check.__name__ in page for check in PROPERTIES)
    facts = json.loads((tmp_path / "fuzz-2026-01-02.json").read_text(encoding="utf-8"))
    assert facts["total"]["tried"] == 3 and facts["faults"] == [group] and facts["processor"]


@pytest.mark.parametrize("word", ["files", "colours:1", "files:-1", "files:x"])
def test_a_case_that_does_not_exist(word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: KIND:SEED"):
        replay(Fuzzer(tmp_path, Material(tmp_path), good), word)


def test_a_mistake_of_the_fuzzer_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(rng: object, folder: Path, material: Material) -> Case:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(campaign, "KINDS", {"options": build})
    (result,) = run_campaign(Fuzzer(tmp_path, Material(tmp_path), good), {"options": 1}, 0, workers=1)
    assert isinstance(result, Result) and result.faults[0].what == "RuntimeError: a mistake"
