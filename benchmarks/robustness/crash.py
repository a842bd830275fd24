"""Kills `lavita encode` and `lavita train` with SIGKILL at random moments and compares the end with quiet runs.

Every kill is followed by the same command. The moments: while the command starts, while frames are encoded, within a
step, while a checkpoint is written, while samples or the pipeline are written. At the end the latent cache, the
weights, their moving averages, the optimizer's moments, the losses and the sample videos must equal those of an
uninterrupted run, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from lavita.training.checkpoint import load_last_checkpoint

LAVITA = [sys.executable, "-m", "lavita"]
Moment = Callable[[], bool]


def commands(data: Path, folder: Path, steps: int, autoencoder: str, resolution: int) -> tuple[list[str], list[str]]:
    """The commands that encode and train in a folder."""
    size = ["--autoencoder", autoencoder, "--resolution", str(resolution)]
    encode = [*LAVITA, "encode", "--data", str(data), "--out", str(folder / "latents"), *size]
    encode += ["--shard-mb", "1"]  # many files, so that many can be cut short
    fields = {
        "run_dir": folder / "run",
        "autoencoder": autoencoder,
        "data.latent_cache": folder / "latents",
        "data.class_folders": "true",
        "data.num_frames": 4,
        "data.frame_interval": 2,
        "data.resolution": resolution,
        "model.preset": "tiny/4",
        "train.steps": steps,
        "train.batch_size": 4,
        "train.learning_rate": 1e-3,
        "train.log_every": 1,
        "train.checkpoint_every": 5,
        "train.sample_every": 25,
        "train.num_samples": 2,
    }
    return encode, [*LAVITA, "train", *(f"{key}={value}" for key, value in fields.items())]


def run_quietly(command: list[str]) -> None:
    """Runs a command to its end."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(command: list[str], moment: Moment, delay: float) -> bool:
    """Runs a command and kills it `delay` seconds after a moment; False if it ended before that."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not moment():
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        errors = process.stderr.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a restarted command failed: {errors[-2000:]}")
    return process.returncode == -signal.SIGKILL


def growing(file: Path, more: int) -> Moment:
    """The moment when a file has `more` lines than now, or was written again."""

    def lines() -> int:
        return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0

    before = lines()
    return lambda: lines() < before or lines() >= before + more


def appearing(folder: Path, pattern: str) -> Moment:
    """The moment when a folder has a new entry that matches a pattern."""
    before = {path.name for path in folder.glob(pattern)}
    return lambda: any(path.name not in before for path in folder.glob(pattern))


def crash(data: Path, out: Path, kills: int, steps: int, seed: int, autoencoder: str, resolution: int) -> Counter[str]:
    """Makes a quiet run and a crashed run in `out`; returns how often each kind of moment was hit."""
    quiet, crashed = out / "quiet", out / "crashed"
    for command in commands(data, quiet, steps, autoencoder, resolution):
        run_quietly(command)
    rng, hits = random.Random(seed), Counter[str]()
    encode, train = commands(data, crashed, steps, autoencoder, resolution)
    run, latents = crashed / "run", crashed / "latents"
    for number in range(max(1, kills // 4)):
        # A cache is written to all the time: half of the kills come at a new file, half at any time.
        moment = appearing(latents, "*") if number % 2 else (lambda: latents.exists())
        hits["encoding"] += kill_when(encode, moment, rng.uniform(0, 1.0))
    run_quietly(encode)
    kinds = {
        "start": lambda: (lambda: True, rng.uniform(0, 8)),
        "step": lambda: (growing(run / "metrics.jsonl", rng.randint(2, 8)), rng.uniform(0, 0.1)),
        "checkpoint": lambda: (appearing(run / "checkpoints", ".step-*.partial-*"), rng.uniform(0, 0.02)),
        "samples": lambda: (appearing(run / "samples", "step-*"), rng.uniform(0, 0.02)),
        "pipeline": lambda: (appearing(run, "*pipeline.*"), rng.uniform(0, 0.02)),
    }
    order = ["step", "checkpoint", "pipeline", "checkpoint", "step", "start", "checkpoint", "samples"]
    for number in range(kills - max(1, kills // 4)):
        kind = order[number % len(order)]
        moment, delay = kinds[kind]()
        hits[kind] += kill_when(train, moment, delay)
        print(f"kill {sum(hits.values())}: {kind}", file=sys.stderr, flush=True)
    run_quietly(train)
    return hits


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two folders that `crash` made."""
    found = []
    caches = [{file.name: _digest(file) for file in (root / "latents").iterdir()} for root in (one, other)]
    found += [f"latents/{name}" for name in caches[0].keys() | caches[1] if caches[0].get(name) != caches[1].get(name)]
    checkpoints = [load_last_checkpoint(root / "run" / "checkpoints") for root in (one, other)]
    assert checkpoints[0] is not None and checkpoints[1] is not None
    if (checkpoints[0].step, checkpoints[0].facts) != (checkpoints[1].step, checkpoints[1].facts):
        found.append("facts of the checkpoint")
    tensors = [checkpoint.read_all() for checkpoint in checkpoints if checkpoint is not None]
    for name in tensors[0].keys() | tensors[1].keys():
        if name not in tensors[0] or name not in tensors[1] or not torch.equal(tensors[0][name], tensors[1][name]):
            found.append(name)
    lines = []
    for root in (one, other):
        records = [
            json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        lines.append([{key: value for key, value in r.items() if key != "clips_per_second"} for r in records])
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    for folder in ("samples", "pipeline"):
        trees = [
            {f.relative_to(root).as_posix(): _digest(f) for f in (root / "run" / folder).rglob("*") if f.is_file()}
            for root in (one, other)
        ]
        found += [name for name in trees[0].keys() | trees[1].keys() if trees[0].get(name) != trees[1].get(name)]
    return found


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run_crashes(data: Path, out: Path, kills: int, steps: int, seed: int, autoencoder: str, resolution: int) -> int:
    """Runs the benchmark in an empty folder `out` and prints the result; the exit code is 1 if anything differs."""
    shutil.rmtree(out, ignore_errors=True)
    hits = crash(data, out, kills, steps, seed, autoencoder, resolution)
    print(f"{sum(hits.values())} kills: {', '.join(f'{count} {kind}' for kind, count in sorted(hits.items()))}")
    found = differences(out / "quiet", out / "crashed")
    print("equal bit for bit" if not found else f"{len(found)} differences: {', '.join(sorted(found)[:10])}")
    return int(bool(found))
