"""Kills `lavita encode` and `lavita train` with SIGKILL at random moments, and compares the end with quiet runs.

    python benchmarks/crash.py --data runs/demo/data/train --out runs/crash --kills 30

Every kill is followed by the same command. The moments: while the command starts, while frames are encoded, within a
step, while a checkpoint is written, while samples or the pipeline are. At the end the latent cache, the weights, the
averages, the moments of the optimizer, the losses and the sample videos must be those of a run that nobody killed, to
the bit.
"""

from __future__ import annotations

import argparse
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
    """Encoding and training of a folder of their own."""
    size = ["--autoencoder", autoencoder, "--resolution", str(resolution)]
    encode = [*LAVITA, "encode", "--data", str(data), "--out", str(folder / "latents"), *size]
    encode += ["--shard-mb", "1"]  # many files, so that many can be cut off
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


def quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(command: list[str], moment: Moment, delay: float) -> bool:
    """Runs a command and kills it some seconds after a moment has come; False where it had ended before."""
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
    """Once a file has so many more lines than now."""

    def lines() -> int:
        return file.read_text().count("\n") if file.exists() else 0

    before = lines()
    return lambda: lines() < before or lines() >= before + more


def appearing(folder: Path, pattern: str) -> Moment:
    """Once something new of this name is in a folder."""
    before = {path.name for path in folder.glob(pattern)}
    return lambda: any(path.name not in before for path in folder.glob(pattern))


def crash(data: Path, out: Path, kills: int, steps: int, seed: int, autoencoder: str, resolution: int) -> Counter[str]:
    """Makes a quiet run and a crashed one below `out`; returns how often each kind of moment was hit."""
    quiet, crashed = out / "quiet", out / "crashed"
    for command in commands(data, quiet, steps, autoencoder, resolution):
        quietly(command)
    rng, hits = random.Random(seed), Counter[str]()
    encode, train = commands(data, crashed, steps, autoencoder, resolution)
    run, latents = crashed / "run", crashed / "latents"
    for number in range(max(1, kills // 4)):
        # Of a cache, something is written all the time: half of the kills come at a new file, half at any time.
        moment = appearing(latents, "*") if number % 2 else (lambda: latents.exists())
        hits["encoding"] += kill_when(encode, moment, rng.uniform(0, 1.0))
    quietly(encode)
    kinds = {
        "start": lambda: (lambda: True, rng.uniform(0, 8)),
        "step": lambda: (growing(run / "metrics.jsonl", rng.randint(2, 8)), rng.uniform(0, 0.1)),
        "checkpoint": lambda: (appearing(run / "checkpoints", ".step-*.partial-*"), rng.uniform(0, 0.02)),
        "samples": lambda: (appearing(run / "samples", "step-*"), rng.uniform(0, 0.02)),
        "pipeline": lambda: (appearing(run, "pipeline.*"), rng.uniform(0, 0.02)),
    }
    order = ["step", "checkpoint", "pipeline", "checkpoint", "step", "start", "checkpoint", "samples"]
    for number in range(kills - max(1, kills // 4)):
        kind = order[number % len(order)]
        moment, delay = kinds[kind]()
        hits[kind] += kill_when(train, moment, delay)
        print(f"kill {sum(hits.values())}: {kind}", file=sys.stderr, flush=True)
    quietly(train)
    return hits


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two folders that `crash` made."""
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
        records = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders of videos")
    parser.add_argument("--out", type=Path, default=Path("runs/crash"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", default="builtin")
    parser.add_argument("--resolution", type=int, default=64)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    hits = crash(**vars(options))
    print(f"{sum(hits.values())} kills: {', '.join(f'{count} {kind}' for kind, count in sorted(hits.items()))}")
    unlike = differences(options.out / "quiet", options.out / "crashed")
    print("equal to the bit" if not unlike else f"{len(unlike)} differences: {', '.join(sorted(unlike)[:10])}")
    sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
