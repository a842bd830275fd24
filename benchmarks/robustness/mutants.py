"""Plants faults in the sources, one at a time, and finds out which of them the tests notice (mutation testing).

The faults stand in `faults.toml`: a file, a fragment of a line, what it becomes, and the tests that should notice. The
sources are copied to a temporary folder, and the tests run against the copy, so that the working tree never changes. A
test that fails counts only if it passes without the fault.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.robustness.forked_tests import LIBRARIES, fork_server, run_tests
from lavita.core.files import write_json, write_text
from lavita.core.progress import Progress, clock

REPOSITORY = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults.toml")
RESULT, TABLE = "result.json", "table.md"
CAUGHT, SURVIVED, NOT_APPLICABLE = "caught", "survived", "not applicable"
RunTests = Callable[[Sequence[str]], tuple[int | None, str]]
"""Runs tests: pytest's exit code, None after the time limit, and the first test that failed."""
VERDICTS = (CAUGHT, SURVIVED, NOT_APPLICABLE)


@dataclass(frozen=True)
class Fault:
    """A fault on a single line."""

    name: str
    file: str
    """The source file, below `src`."""
    old: str
    """Part of a line that occurs exactly once in the file."""
    new: str
    """What it becomes."""
    tests: tuple[str, ...]
    """Test files, or single tests, below `tests`, that should notice."""
    what: str
    """What is wrong then, for a reader."""


@dataclass(frozen=True)
class Outcome:
    """What a run of tests came to."""

    verdict: str
    """One of `VERDICTS`."""
    by: str
    """The test that failed, below `tests`; or why there is no verdict."""
    seconds: float
    key: str
    """Digest of everything that the outcome depends on, as far as it is known: fault, source file and tests."""


def read_faults(table: Path = FAULTS, only: str = "") -> list[Fault]:
    """Reads the faults whose name or file contains `only`.

    Raises:
        ValueError: if the table is damaged, has a name twice, or holds no such fault.
    """
    try:
        rows = tomllib.loads(table.read_text(encoding="utf-8"))["fault"]
        faults = [Fault(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        known = ", ".join(field.name for field in fields(Fault))
        raise ValueError(f"{table}: is not a table of faults with {known} ({error})") from error
    for name, count in Counter(fault.name for fault in faults).items():
        if count > 1:
            raise ValueError(f"{table}: has {count} faults with the name {name!r}")
    chosen = [fault for fault in faults if only in fault.name or only in fault.file]
    if not chosen:
        raise ValueError(f"only is {only!r}, which is in the name or file of none of the {len(faults)} faults")
    return chosen


def planted(fault: Fault, text: str) -> str:
    """The text of the source file with the fault in it.

    Raises:
        ValueError: if the fault does not apply to this text.
    """
    if "\n" in fault.old + fault.new or fault.old == fault.new:
        raise ValueError(f"{fault.name}: old and new must be two different parts of a line")
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {count} times in {fault.file}, but must occur once")
    changed = text.replace(fault.old, fault.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise ValueError(f"{fault.name}: {fault.new!r} is not valid Python there ({error.msg})") from error
    return changed


def problems_of(faults: Sequence[Fault], root: Path = REPOSITORY) -> list[str]:
    """Why faults do not apply to the present sources and tests; empty if all of them do."""
    problems = []
    for fault in faults:
        file = root / "src" / fault.file
        missing = [test for test in fault.tests if not (root / "tests" / test.partition("::")[0]).is_file()]
        if not file.is_file():
            problems.append(f"{fault.name}: src/{fault.file}: no such file")
            continue
        if missing or not fault.tests:
            problems.append(f"{fault.name}: tests/{missing[0]}: no such file" if missing else f"{fault.name}: no tests")
        try:
            planted(fault, file.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(str(error))
    return problems


def run_mutants(
    out: Path,
    only: str = "",
    limit: int = 300,
    table: Path = FAULTS,
    root: Path = REPOSITORY,
    libraries: Sequence[str] = LIBRARIES,
) -> int:
    """Runs the tests of each fault, and writes `result.json` and `table.md` after each of them.

    Verdicts in the folder are kept where neither the fault nor its source file nor its tests have changed since.

    Args:
        out: folder for the results.
        only: see `read_faults`.
        limit: seconds after which tests are stopped; a fault that makes them hang is caught.
        table: the faults.
        root: folder with `src` and `tests`.
        libraries: modules that are loaded before tests run.

    Returns:
        The exit code: 0 if every fault was caught.

    Raises:
        ValueError: if a fault does not apply to the present source; nothing is run then.
    """
    faults = read_faults(table, only)
    if problems := problems_of(faults, root):
        raise ValueError(f"the table of faults does not fit the sources: {'; '.join(problems)}")
    before = _read_outcomes(out / RESULT)
    outcomes: dict[str, Outcome] = {}
    for fault in faults:
        known = before.get(fault.name)
        if known is not None and known.verdict != NOT_APPLICABLE and known.key == _key(fault, root):
            outcomes[fault.name] = known
    progress = Progress("fault", len(faults), len(outcomes))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(root / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        sound: dict[str, str] = {}
        server = fork_server(libraries)

        def run(tests: Sequence[str]) -> tuple[int | None, str]:
            code, failed = run_tests(server, [f"tests/{test}" for test in tests], root, copy, limit)
            return code, failed.removeprefix("tests/")

        for fault in faults:
            if fault.name in outcomes:
                continue
            outcomes[fault.name] = _try_fault(fault, root, copy, limit, run, sound)
            _write(out, faults, outcomes, only)
            progress.message(f"{outcomes[fault.name].verdict}: {fault.name}  {outcomes[fault.name].by}")
            progress.update(len(outcomes))
    _write(out, faults, outcomes, only)
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    for fault in faults:
        if outcomes[fault.name].verdict != CAUGHT:
            print(f"{outcomes[fault.name].verdict}: {fault.name} ({fault.what})")
    print(out / TABLE)
    return int(counts[CAUGHT] < len(faults))


def _try_fault(fault: Fault, root: Path, copy: Path, limit: int, run: RunTests, sound: dict[str, str]) -> Outcome:
    """Runs the tests with the fault, and what failed once more without it; `sound` remembers the latter."""
    key, start = _key(fault, root), time.monotonic()
    file = copy / fault.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(planted(fault, whole), encoding="utf-8")
    try:
        code, failed = run(fault.tests)
    finally:
        file.write_text(whole, encoding="utf-8")
    verdict, by = SURVIVED, ""
    if code is None or (code == 1 and failed):
        verdict, by = CAUGHT, failed or f"{fault.tests[0]}: still running after {limit} s"
        for test in [failed] if failed else fault.tests:
            if test not in sound:
                again, _ = run([test])
                sound[test] = {0: "", None: f"takes more than {limit} s"}.get(again, "fails")
            if sound[test]:
                verdict, by = NOT_APPLICABLE, f"{test}: {sound[test]} without the fault, too"
    elif code:
        verdict, by = NOT_APPLICABLE, f"the tests could not be run (pytest's exit code {code})"
    return Outcome(verdict, by, round(time.monotonic() - start, 1), key)


def _key(fault: Fault, root: Path) -> str:
    digest = hashlib.sha256(json.dumps(asdict(fault)).encode())
    for file in (f"src/{fault.file}", *(f"tests/{test.partition('::')[0]}" for test in fault.tests)):
        digest.update((root / file).read_bytes())
    return digest.hexdigest()[:20]


def _read_outcomes(file: Path) -> dict[str, Outcome]:
    """Outcomes of an earlier run by the names of their faults; none if there is no such file."""
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["faults"]
        return {row["name"]: Outcome(**{field.name: row[field.name] for field in fields(Outcome)}) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not a result of this command; remove it or use another folder") from error


def _write(out: Path, faults: Sequence[Fault], outcomes: Mapping[str, Outcome], only: str) -> None:
    from benchmarks.speed.machine import describe  # loads torch
    from lavita.core.precision import pick_device

    done = [(fault, outcomes[fault.name]) for fault in faults if fault.name in outcomes]
    machine = describe(pick_device("cpu"))
    today = date.today().isoformat()
    rows: list[dict[str, Any]] = [{**asdict(fault), **asdict(outcome)} for fault, outcome in done]
    write_json(out / RESULT, {"date": today, "machine": machine.to_json(), "only": only, "faults": rows})
    counts = Counter(outcome.verdict for _, outcome in done)
    command = f"mutants --only {only}" if only else "mutants"
    lines = [
        f"# Planted faults, {today}",
        "",
        f'`make bench ARGS="{command}"`, on {machine.processor} ({machine.cores} cores), '
        f"{clock(sum(outcome.seconds for _, outcome in done))} of tests; "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        + (f"; {len(faults) - len(done)} not tried yet" if len(done) < len(faults) else "")
        + ".",
        "",
        "| fault | file | verdict | by |",
        "| --- | --- | --- | --- |",
    ]
    for fault, outcome in done:
        by = f"`{outcome.by}`" if outcome.by else ""
        cells = (fault.what, f"`{fault.file.removeprefix('lavita/')}`", outcome.verdict, by)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    write_text(out / TABLE, "\n".join(lines) + "\n")
