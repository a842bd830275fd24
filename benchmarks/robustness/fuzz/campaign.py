"""Runs many cases in parallel, keeps a log by which a stopped campaign goes on, and writes the result."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.robustness.fuzz import checkpoints, configurations, files, folders, options, pipelines, tables
from benchmarks.robustness.fuzz.cases import Build, generator, working_folder
from benchmarks.robustness.fuzz.material import Material, make_material
from benchmarks.robustness.fuzz.properties import Fault, find_faults
from benchmarks.robustness.fuzz.running import Main, Outcome, run_case
from lavita.core.progress import Progress

KINDS: dict[str, Build] = {
    "files": files.build,
    "folders": folders.build,
    "tables": tables.build,
    "configurations": configurations.build,
    "options": options.build,
    "pipelines": pipelines.build,
    "checkpoints": checkpoints.build,
}
LOG, MATERIAL, CASES = "cases.jsonl", "material", "cases"


@dataclass(frozen=True)
class Result:
    """What became of a case: a line of the log."""

    kind: str
    seed: int
    what: str
    command: str
    code: int
    seconds: float
    memory: int
    message: str
    """Last line of stderr."""
    faults: tuple[Fault, ...]

    @classmethod
    def from_line(cls, line: str) -> Result:
        """Reads a line of the log."""
        values = json.loads(line)
        return cls(**{**values, "faults": tuple(Fault(**fault) for fault in values["faults"])})


@dataclass(frozen=True)
class Fuzzer:
    """Everything that a case needs besides its kind and seed."""

    folder: Path
    material: Material
    main: Main

    def run(self, kind: str, seed: int) -> tuple[Result, Outcome]:
        """Builds a case in a sandbox of its own, runs it, and checks every property."""
        sandbox = self.sandbox(kind, seed)
        remove_tree(sandbox)
        home = working_folder(sandbox)
        home.mkdir(parents=True)
        case = KINDS[kind](generator(kind, seed), home, self.material)
        outcome = run_case(case, sandbox, self.main)
        faults = tuple(find_faults(outcome))
        message = next((line for line in reversed(outcome.errors.splitlines()) if line.strip()), "")
        result = Result(
            kind=kind,
            seed=seed,
            what=case.what,
            command=" ".join(case.arguments)[:300],
            code=outcome.code,
            seconds=round(outcome.seconds, 2),
            memory=outcome.memory,
            message=message[:300],
            faults=faults,
        )
        return result, outcome

    def sandbox(self, kind: str, seed: int) -> Path:
        """The folder of a case."""
        return self.folder / CASES / f"{kind}-{seed}"


def open_fuzzer(folder: Path, main: Main | None = None) -> Fuzzer:
    """Makes the material if it is missing, and loads everything that the commands need, so that a fork is quick.

    Args:
        folder: for the material, the log and the cases.
        main: the entry point to be fuzzed; by default that of `lavita`.
    """
    folder = folder.absolute()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(folder / "huggingface")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    material = folder / MATERIAL
    if not (material / "modules.json").exists():
        remove_tree(material)
        child = multiprocessing.get_context("fork").Process(target=make_material, args=(material,))
        child.start()
        child.join()
        if child.exitcode:
            raise ValueError(f"{material}: the material could not be made (exit code {child.exitcode})")
    for name in json.loads((material / "modules.json").read_text(encoding="utf-8")):
        if name not in sys.modules and not name.startswith(("__", "benchmarks")):
            with suppress(Exception):  # made by another module, or only importable in its context
                importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    if main is None:
        from lavita.cli import main as lavita_main

        main = lavita_main
    return Fuzzer(folder, Material(material), main)


def run_campaign(fuzzer: Fuzzer, counts: Mapping[str, int], first_seed: int, workers: int) -> list[Result]:
    """Runs cases of each kind, those that the log has not; returns the log's results of these cases.

    Args:
        fuzzer: made by `open_fuzzer`.
        counts: number of cases of each kind.
        first_seed: cases have the seeds from this one on.
        workers: cases that run at a time.
    """
    wanted = [(kind, seed) for kind, count in counts.items() for seed in range(first_seed, first_seed + count)]
    log = fuzzer.folder / LOG
    done = {(result.kind, result.seed): result for result in read_log(log)}
    # Interleaved, so that a stopped campaign has seen all kinds.
    todo = sorted((each for each in wanted if each not in done), key=lambda each: (each[1], list(KINDS).index(each[0])))
    progress = Progress("input", len(wanted), len(wanted) - len(todo))
    num_faults = 0
    with log.open("a", encoding="utf-8", buffering=1) as stream, closing(_results(fuzzer, todo, workers)) as results:
        for result in results:
            stream.write(json.dumps(asdict(result)) + "\n")
            done[result.kind, result.seed] = result
            num_faults += bool(result.faults)
            progress.update(progress.done + 1, f"{num_faults} with faults")
    return [done[each] for each in wanted if each in done]


_fuzzer: Fuzzer | None = None  # of the worker processes, which inherit it


def _results(fuzzer: Fuzzer, todo: Sequence[tuple[str, int]], workers: int) -> Generator[Result, None, None]:
    global _fuzzer
    _fuzzer = fuzzer
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    # No `multiprocessing.Pool`: its workers are daemons, and a command could not have processes of its own.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        waiting = {pool.submit(_run_quietly, each) for each in todo[: 2 * workers]}
        upcoming = iter(todo[2 * workers :])
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(_run_quietly, each) for each in itertools.islice(upcoming, len(finished))}
            yield from (future.result() for future in finished)


def _run_quietly(each: tuple[str, int]) -> Result:
    assert _fuzzer is not None
    try:
        result, _ = _fuzzer.run(*each)
    except Exception as error:  # the fuzzer's own mistake must not end a campaign
        kind, seed = each
        what = f"{type(error).__name__}: {error}"[:300]
        return Result(kind, seed, "", "", 0, 0.0, 0, "", (Fault("the fuzzer itself failed", what),))
    finally:
        remove_tree(_fuzzer.sandbox(*each))
    return result


def read_log(file: Path) -> list[Result]:
    """The results in a log; a last line that is cut off does not count."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(Result.from_line(line))
    return found


def remove_tree(folder: Path) -> None:
    """Removes a folder, also what nobody may read and what is too deep for Python's recursion."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        if folder.exists():
            subprocess.run([*command, str(folder)], stderr=subprocess.DEVNULL, check=False)


def replay(fuzzer: Fuzzer, word: str) -> int:
    """Runs one case, named as KIND:SEED, keeps its folder and prints everything; 1 if it has a fault."""
    kind, _, seed = word.partition(":")
    if kind not in KINDS or not seed.isdecimal():
        raise ValueError(f"only is {word!r}; allowed: KIND:SEED with a kind of {', '.join(KINDS)}")
    start = time.monotonic()
    result, outcome = fuzzer.run(kind, int(seed))
    print(f"{result.what}\nlavita {' '.join(map(repr, outcome.case.arguments))}\nin {outcome.folder}")
    print(f"exit code {outcome.code}, {time.monotonic() - start:.1f} s, {outcome.memory / 2**20:,.0f} MiB")
    print(f"---- stdout\n{outcome.printed}\n---- stderr\n{outcome.errors}\n----")
    for fault in result.faults:
        print(f"{fault.name}: {fault.what} {fault.place}")
    print("every property holds" if not result.faults else f"{len(result.faults)} faults")
    return int(bool(result.faults))
