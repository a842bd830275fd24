"""Runs a command in a forked child with limits, and records everything that it did."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.robustness.fuzz.cases import Case, working_folder

MOST_MEMORY = 1 << 30
"""Bytes that a command may use beyond what the libraries take; every input is tiny."""
MOST_ADDRESSES = 4 << 30
"""Bytes of address space beyond that, after which allocations fail: threads reserve more than they use."""
MOST_FILE = 1 << 28
"""Largest file that a command may write."""
NOBODY = 65534

Main = Callable[[], None]
Listing = dict[str, tuple[int, ...]]
"""For each path below a folder, what a change of it would change."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    case: Case
    code: int
    """Exit code; negative: killed by that signal."""
    timed_out: bool
    seconds: float
    memory: int
    """Bytes of memory at the peak beyond what the process had at its start."""
    printed: str
    errors: str
    before: Listing
    after: Listing
    folder: Path
    """Where the command ran."""


def run_case(case: Case, sandbox: Path, main: Main) -> Outcome:
    """Runs a command in `working_folder(sandbox)`, which holds its inputs.

    Args:
        case: the command.
        sandbox: a folder of this case alone. All of it is compared before and after.
        main: the entry point, which takes its arguments from `sys.argv`.
    """
    folder = working_folder(sandbox)
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=sandbox.parent))
    (sandbox / "tmp").mkdir(exist_ok=True)
    if case.as_nobody and os.getuid() == 0:
        for path in (sandbox.parent, sandbox, sandbox / "tmp", *folder.parents[:4], folder):
            path.chmod(0o777)
    before = list_tree(sandbox)
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _be_the_command(case, folder, sandbox / "tmp", logs, main)
    timed_out = not _ends(child, 2 * case.seconds)
    if timed_out:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    printed, errors = ((logs / name).read_bytes().decode("utf-8", "replace") for name in ("stdout", "stderr"))
    started = logs / "resident"  # a fork has only some of its parent's pages
    resident = int(started.read_text(encoding="utf-8")) if started.exists() else 0
    after = list_tree(sandbox)
    shutil.rmtree(logs)
    return Outcome(
        case=case,
        code=code,
        timed_out=timed_out or code == -signal.SIGXCPU,
        seconds=seconds,
        memory=max(0, usage.ru_maxrss * 1024 - resident),
        printed=printed,
        errors=errors,
        before=before,
        after=after,
        folder=folder,
    )


def list_tree(root: Path) -> Listing:
    """Kind, size and time of every entry below a folder, of folders only the kind; links are not followed."""
    found: Listing = {}
    waiting = [os.fspath(root)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            kind = stat.S_IFMT(facts.st_mode)
            is_folder = kind == stat.S_IFDIR
            found[os.path.relpath(entry.path, root)] = (
                (kind,) if is_folder else (kind, facts.st_size, facts.st_mtime_ns, facts.st_ino)
            )
            if is_folder:
                waiting.append(entry.path)
    return found


def _ends(child: int, seconds: float) -> bool:
    """Whether a child ends within some time."""
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _status(field: str) -> int:
    """A number of this process in bytes, as the system counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _be_the_command(case: Case, folder: Path, temporary: Path, logs: Path, main: Main) -> NoReturn:
    """Turns this forked child into the command."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, str(logs / "stdout")), (2, str(logs / "stderr"))):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(descriptor, number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
        faulthandler.enable(2)
        (logs / "resident").write_text(str(_status("VmRSS")), encoding="utf-8")
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        limits = {
            resource.RLIMIT_AS: _status("VmSize") + MOST_ADDRESSES,
            resource.RLIMIT_CPU: int(case.seconds),
            resource.RLIMIT_FSIZE: MOST_FILE,
            resource.RLIMIT_CORE: 0,
        }
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value + (limit == resource.RLIMIT_CPU)))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if case.as_nobody and os.getuid() == 0:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        sys.argv = ["lavita", *case.arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    finally:
        os._exit(code & 0xFF)
