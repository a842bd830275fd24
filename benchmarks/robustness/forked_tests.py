"""Runs pytest against a copy of the sources, in a process that is forked after the large libraries were loaded.

Nothing here imports the package itself: the forked process must find it in the copy.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

LIBRARIES = (
    *("pytest", "scipy.stats", "av", "PIL.Image", "pydantic", "rich.console", "typer", "yaml", "safetensors.torch"),
    *("torch", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict_loader", "torch.distributed.fsdp"),
    *("transformers", "diffusers.pipelines.pipeline_utils", "diffusers.models.transformers.dit_transformer_2d"),
    *("diffusers.schedulers.scheduling_ddpm", "diffusers.schedulers.scheduling_unipc_multistep", "torch.optim"),
)
"""Loading these takes longer than most tests."""


def fork_server(libraries: Sequence[str] = LIBRARIES) -> ForkServerContext:
    """A server of processes with these modules loaded, as far as they are installed; one per process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(libraries))
    return server


def run_tests(
    server: ForkServerContext, tests: Sequence[str], root: Path, sources: Path, limit: float
) -> tuple[int | None, str]:
    """Runs tests, up to the first one that fails, without the slow ones.

    Args:
        server: see `fork_server`.
        tests: test files or single tests, below `root`.
        root: the folder that the tests run in.
        sources: folder that packages are imported from.
        limit: seconds after which the tests, and all processes that they have started, are killed.

    Returns:
        Pytest's exit code, or None after the time limit, and the first test that failed, if any.
    """
    with tempfile.TemporaryDirectory(prefix="tests-") as folder:
        printed = Path(folder) / "printed.txt"
        process = server.Process(target=_run, args=(list(tests), root, sources, Path(folder)), daemon=False)
        process.start()
        try:
            process.join(limit)
            code = process.exitcode
        finally:
            if process.is_alive() and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        text = printed.read_text(encoding="utf-8", errors="replace") if printed.exists() else ""
    failed = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return code, failed[0].partition(" - ")[0] if failed else ""


def _run(tests: list[str], root: Path, sources: Path, folder: Path) -> None:
    os.setsid()  # a group of its own, so that processes which the tests start can be killed with it
    with (folder / "printed.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    # Bytecode is found by the time and size of its source, which a planted fault may leave as they are.
    os.environ |= {"PYTHONPATH": str(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    sys.path[:] = [str(sources), *(folder for folder in sys.path if folder)]
    import pytest

    options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    options += ["-m", "not slow", f"--rootdir={root}", f"--basetemp={folder / 'tmp'}"]
    sys.exit(int(pytest.main([*options, *tests])))
