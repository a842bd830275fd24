"""What must hold for every command on every input; each property is a function that says how it is violated."""

from __future__ import annotations

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.running import MOST_MEMORY, Outcome
from lavita.core.text import one_line, printable

FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)(?:,)? in (\S+)', re.MULTILINE)
LONGEST_MESSAGE = 2100


@dataclass(frozen=True)
class Fault:
    """A property that does not hold for a case."""

    name: str
    """The property."""
    what: str
    """How it is violated, in one line."""
    place: str = ""
    """Last frame of the traceback in this package, or else of all, if there is a traceback."""


def find_faults(outcome: Outcome) -> list[Fault]:
    """All properties that do not hold. A command that was stopped or crashed is not checked any further."""
    for check in ENDS:
        if what := check(outcome):
            return [Fault(check.__name__, what, _place(outcome.errors)), *_faults(outcome, SAFETY)]
    return _faults(outcome, (*SAFETY, *HONESTY))


def _faults(outcome: Outcome, checks: tuple[Check, ...]) -> list[Fault]:
    return [Fault(check.__name__, what) for check in checks if (what := check(outcome))]


def ends_in_time(outcome: Outcome) -> str:
    """The command ends within its time limit."""
    return f"did not end within {outcome.case.seconds:g} s" if outcome.timed_out else ""


def bounded_memory(outcome: Outcome) -> str:
    """The command's memory is bounded, whatever the input claims to be."""
    if "MemoryError" in outcome.errors or "std::bad_alloc" in outcome.errors:
        return "ran out of memory"
    return f"used {outcome.memory / 2**20:,.0f} MiB" if outcome.memory > MOST_MEMORY else ""


def no_crash(outcome: Outcome) -> str:
    """The command ends with 0, with 2, or with 1 for numbers that are not finite, and without a traceback."""
    if "Traceback (most recent call last)" in outcome.errors:
        return _last_line(outcome.errors)
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}"
    if outcome.code == 1 and re.match(r"error: .*\b(not finite|inf|nan)\b", _last_line(outcome.errors)):
        return ""
    return "" if outcome.code in (0, 2) else f"exit code {outcome.code}: {_last_line(outcome.errors)}"


def writes_only_its_output(outcome: Outcome) -> str:
    """Nothing outside the folder of outputs is written, and the inputs stay as they are."""
    home = outcome.folder.relative_to(_root(outcome))
    allowed = [os.path.normpath(home / name) for name in outcome.case.writable]
    for path in sorted(outcome.before.keys() | outcome.after.keys()):
        if any(path == name or path.startswith(f"{name}/") for name in allowed) or path.startswith("tmp/"):
            continue
        if path not in outcome.after:
            return f"{path!r} was removed"
        if outcome.before.get(path) != outcome.after[path]:
            return f"{path!r} was {'changed' if path in outcome.before else 'written'}"
    return ""


def leaves_nothing_unfinished(outcome: Outcome) -> str:
    """No half-written or temporary file is left."""
    new = outcome.after.keys() - outcome.before.keys()
    left = sorted(path for path in new if ".partial-" in path or path.startswith("tmp/") or path.endswith(".deleted"))
    return f"{left[0]!r} is left" if left else ""


def clear_message(outcome: Outcome) -> str:
    """Bad input is one line that names something of the input or an option."""
    if outcome.code != 2:
        return ""
    lines = [line for line in outcome.errors.splitlines() if line.strip()]
    found = [line for line in lines if line.lower().startswith("error:")]
    if not found or lines[-1] != found[0]:
        return f"does not end with one line that begins with error: {_last_line(outcome.errors)[:200]!r}"
    message = found[0].partition(":")[2].strip()
    if len(message) > LONGEST_MESSAGE:
        return f"the message has {len(message):,} characters"
    if odd := [letter for letter in message if unicodedata.category(letter) in ("Cc", "Zl", "Zp")]:
        return f"the message holds the control character {odd[0]!r}"
    return "" if _names_something(message, outcome) else f"the message names nothing: {message!r}"


def refuses_what_cannot_be_right(outcome: Outcome) -> str:
    """Exit code 0 only if the output can be right."""
    return f"exit code 0 for {outcome.case.what}" if outcome.case.must_fail and outcome.code == 0 else ""


def makes_what_it_claims(outcome: Outcome) -> str:
    """With exit code 0, as many outputs are there as the command says, and every input is accounted for."""
    if outcome.code != 0:
        return ""
    return next((what for claim in CLAIMS for what in claim(outcome)), "")


Check = Callable[[Outcome], str]
ENDS: tuple[Check, ...] = (ends_in_time, bounded_memory, no_crash)
SAFETY: tuple[Check, ...] = (writes_only_its_output, leaves_nothing_unfinished)
HONESTY: tuple[Check, ...] = (clear_message, refuses_what_cannot_be_right, makes_what_it_claims)
PROPERTIES: tuple[Check, ...] = (*ENDS, *SAFETY, *HONESTY)


def _claimed_samples(outcome: Outcome) -> Iterator[str]:
    if outcome.case.arguments[0] != "sample":
        return
    match = re.search(r"^(.+): (\d+) (?:videos|images)\s*$", outcome.printed, re.MULTILINE | re.DOTALL)
    if match is None:
        yield "does not say how many videos it made"
        return
    # Those of an earlier call, which are kept, count as well.
    files = [file for file in (outcome.folder / match[1]).rglob("*") if file.suffix in (".mp4", ".gif", ".mkv", ".png")]
    if sum(file.stat().st_size > 0 for file in files) < int(match[2]):
        yield f"says {match[2]} videos, but {len(files)} are there"


def _claimed_latents(outcome: Outcome) -> Iterator[str]:
    match = re.search(r"^(.+): (\d+) videos, (\d+) broken\s*$", outcome.printed, re.MULTILINE)
    if outcome.case.arguments[0] != "encode" or match is None:
        return
    manifest = json.loads((outcome.folder / match[1] / "manifest.json").read_text(encoding="utf-8"))
    if missing := [row for row in manifest["videos"] if not (outcome.folder / match[1] / row["shard"]).is_file()]:
        yield f"the shard of {missing[0]['name']!r} is missing"
    if len(manifest["videos"]) != int(match[2]):
        yield f"says {match[2]} videos, but the manifest has {len(manifest['videos'])}"
    yield from _accounted(outcome, int(match[2]) + int(match[3]))


def _claimed_inspection(outcome: Outcome) -> Iterator[str]:
    if "--json" not in outcome.case.arguments or outcome.case.arguments[:2] != ("data", "inspect"):
        return
    found: dict[str, Any] = json.loads(outcome.printed)
    yield from _accounted(outcome, found["num_videos"] + len(found["broken"]))
    frames = outcome.case.num_frames
    if frames is not None and found["num_videos"] == 1 and found["longest"] < frames:
        yield f"counts {found['longest']} frames in a video of {frames} that is cut off"


def _claimed_paths(outcome: Outcome) -> Iterator[str]:
    lines = outcome.printed.strip().splitlines()
    if lines and lines[-1].startswith("out") and ":" not in lines[-1] and not (outcome.folder / lines[-1]).exists():
        yield f"says {lines[-1]!r}, which is not there"
    for option in ("--out", "--page"):
        # Where an option is given twice, the last one counts.
        words = [*itertools.pairwise(outcome.case.arguments), *(word.split("=", 1) for word in outcome.case.arguments)]
        target = next((word[1] for word in reversed(words) if word[0] == option and len(word) == 2), "")
        if target and not (outcome.folder / target).exists():
            yield f"{option} {target!r} was not written"


def _accounted(outcome: Outcome, count: int) -> Iterator[str]:
    if outcome.case.num_videos is not None and count != outcome.case.num_videos:
        yield f"accounts for {count} of {outcome.case.num_videos} videos"


CLAIMS = (_claimed_samples, _claimed_latents, _claimed_inspection, _claimed_paths)


def _root(outcome: Outcome) -> Path:
    return outcome.folder.parents[3]


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")[:300]


def _names_something(message: str, outcome: Outcome) -> bool:
    if re.search(r"[a-z]+[_.-][a-z]+|'[^']*'|\"[^\"]*\"|-[a-z0-9]|/", message):
        return True
    subject = message.partition(": ")[0]
    as_stderr_shows = [word.encode("utf-8", "backslashreplace").decode("utf-8") for word in outcome.case.arguments]
    shown = [one_line(word) for word in (*map(printable, outcome.case.arguments), *as_stderr_shows)]
    if subject and any(subject in word for word in shown):
        return True
    words = [
        word.strip(" -").removesuffix("s")
        for argument in outcome.case.arguments
        for word in re.split(r"[=/,]", argument)
    ]
    words += outcome.case.arguments
    words += [one_line(word) for word in words]  # as `lavita` prints control characters
    return any(word and re.search(rf"(?<!\w){re.escape(word)}", message) for word in words)


def _place(errors: str) -> str:
    """Last frame of the package in the last traceback, with the kind of error: `video/reading.py:probe ValueError`."""
    text = errors.rpartition("Traceback (most recent call last)")[2]
    frames = FRAME.findall(text)
    ours = [frame for frame in frames if "/lavita/" in frame[0]]
    if not frames:
        return ""
    # faulthandler prints the innermost frame first, a traceback last
    first = "Fatal Python error" in text
    file, _, function = (ours or frames)[0 if first else -1]
    kind = re.match(r"[\w.]+", _last_line(text))
    return f"{file.rpartition('/lavita/')[2]}:{function} {kind[0] if kind and not first else ''}".strip()
