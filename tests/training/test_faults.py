"""Faults during long runs: each has one clear outcome and loses nothing (docs/training.md)."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, Run
from run_folders import last_checkpoint, lines_of

from lavita.core.config import save_config
from lavita.training.batches import BatchMaker
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig
from lavita.training.ema import EMA
from lavita.training.run_folder import only_run
from lavita.training.train import train
from lavita.video.formats import VideoError, VideoInfo
from lavita.video.reading import probe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(config: RunConfig, *launch: str) -> list[str]:
    file = config.run_dir.with_suffix(".yaml")
    save_config(config, file)
    return [sys.executable, "-m", *launch, "lavita", "train", "--config", str(file)]


@contextmanager
def no_room() -> Iterator[None]:
    """The system refuses to let a file grow beyond 200 kB, as if the disk were full."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_stops_with_one_line_and_leaves_the_last_checkpoint(run: Run, make_config: MakeConfig) -> None:
    train(make_config("run", "train.steps=2"))
    config = make_config("run", "train.steps=4")
    save_config(config, config.run_dir.with_suffix(".yaml"))
    with no_room():
        code, _, err = run("train", "--config", config.run_dir.with_suffix(".yaml"))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ")
    assert "File too large" in err or "No space left" in err
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")] == ["step-00000002"]
    assert (config.run_dir / "pipeline" / "model_index.json").exists()
    assert not list(config.run_dir.rglob("*.partial*"))
    train(config)  # there is room again
    assert [line["step"] for line in lines_of(config)] == [1, 2, 3, 4]


def test_two_runs_in_one_folder(make_config: MakeConfig) -> None:
    config = make_config("run", "train.steps=1")
    with only_run(config.run_dir), pytest.raises(ValueError, match="another run is using this folder"):
        train(config)
    train(config)  # the folder is free again


def test_a_folder_that_cannot_be_written(run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = make_config("run")
    save_config(config, tmp_path / "run.yaml")
    code, _, err = run("train", "--config", tmp_path / "run.yaml", f"run_dir={tmp_path / 'file' / 'run'}")
    assert code == 2 and err.count("\n") == 1 and "file" in err


def test_a_video_that_becomes_unreadable_is_replaced(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All other clips stay the same, and a resumed run draws the same clips."""
    fields = ("train.batch_size=8", "train.checkpoint_every=2", "train.steps=6")
    whole = make_config("whole", *fields)
    real = BatchMaker.make

    def make(self: BatchMaker, step: int, *places: range) -> Any:
        if step == 3:
            video = tmp_path / "videos" / "a" / "1.mp4"
            video.write_bytes(bytes(video.stat().st_size))
        return real(self, step, *places)

    monkeypatch.setattr(BatchMaker, "make", make)
    train(whole)
    err = capsys.readouterr().err
    assert err.count("another clip is drawn in place of one of") == 1 and "1.mp4" in err
    assert len(lines_of(whole)) == 6
    shutil.rmtree(list_checkpoints(whole.run_dir / "checkpoints")[-1])
    expected = lines_of(whole)
    with monkeypatch.context() as patch:  # the header could be read when the first run began
        patch.setattr("lavita.data.catalog._try_probe", _remembered)
        train(whole)
    for line, before in zip(lines_of(whole), expected, strict=True):
        assert line["loss"] == before["loss"]

    (tmp_path / "videos" / "a" / "1.mp4").write_bytes(b"damaged")
    strict = make_config("strict", *fields, "data.broken=error")
    with pytest.raises(VideoError, match=r"1\.mp4"):
        train(strict)


def _remembered(path: Path) -> VideoInfo:
    """The header of a damaged video is that of the one next to it."""
    return replace(probe(path.parent / "0.mp4" if path.name == "1.mp4" else path), path=path)


def test_a_clock_that_is_set_back(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("run", "train.steps=2")
    train(config)
    clock = iter(range(2_000_000_000, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train(make_config("run", "train.steps=4"))
    assert [line["step"] for line in lines_of(config)] == [1, 2, 3, 4]
    assert last_checkpoint(config).step == 4


def test_sigterm_saves_a_checkpoint_and_ends_the_run(
    run: Run, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("run")
    save_config(config, config.run_dir.with_suffix(".yaml"))
    update = EMA.update

    def terminated(ema: EMA, step: int) -> None:
        update(ema, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(EMA, "update", terminated)
    code, _, err = run("train", "--config", config.run_dir.with_suffix(".yaml"))
    assert code == 128 + signal.SIGTERM, err
    assert last_checkpoint(config).step == 2
    assert "stopped at step 2 of 4; run the same command again to resume" in err


@pytest.mark.slow
def test_a_killed_worker_is_replaced(make_config: MakeConfig) -> None:
    """With two agents of torchrun, as on two machines: all workers restart from the last checkpoint."""
    fields = ("train.checkpoint_every=5", "train.steps=60")
    quiet, killed = make_config("quiet", *fields), make_config("killed", *fields)
    train(quiet)
    nodes = ["torch.distributed.run", "--nnodes", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    # An agent that starts again for the other's sake, before it has seen that its own worker failed, counts its
    # restarts otherwise than the other, and torch lets the new workers wait for each other for ever. Look rarely, then.
    nodes += ["--monitor-interval", "10"]
    nodes += ["--rdzv-endpoint", f"localhost:{_free_port()}", "--rdzv-id", "test", "-m"]
    agents = _start(killed, nodes)
    try:
        _wait_for(killed, 8, agents[0])
        os.kill(_children(agents[1].pid)[0], signal.SIGKILL)
        try:
            errors = [agent.communicate(timeout=120)[1] for agent in agents]
        except subprocess.TimeoutExpired:  # torch's miscount, all the same: restart the agents, as a scheduler would
            _kill(agents)
            agents = _start(killed, nodes)
            errors = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        _kill(agents)
    assert [agent.returncode for agent in agents] == [0, 0], errors[0][-3000:]
    events = [event["event"] for event in lines_of(killed, "events.jsonl")]
    assert events[0] == "start" and "resume" in events and events[-1] == "end"
    assert lines_of(killed, "events.jsonl")[-2]["processes"] == 2
    for line, expected in zip(lines_of(killed), lines_of(quiet), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def _start(config: RunConfig, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Starts two agents of torchrun."""
    return [
        subprocess.Popen(command(config, *arguments), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]


def _kill(agents: list[subprocess.Popen[str]]) -> None:
    """Kills agents and their workers."""
    for agent in agents:
        for worker in _children(agent.pid):
            os.kill(worker, signal.SIGKILL)
        agent.kill()
        agent.wait()


def _wait_for(config: RunConfig, lines: int, process: subprocess.Popen[str]) -> None:
    metrics = config.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
        assert process.poll() is None and time.monotonic() < deadline, "it does not train"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
