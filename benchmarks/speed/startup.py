"""How long `--help` takes, and what loading a model takes in time and memory.

    python benchmarks/startup.py --out benchmarks/results/startup.json

Every call is a process of its own, and the calls take turns; times are medians. `wall` is what a user waits;
`processor` is the process's own time, which other work on the machine disturbs less. Memory: the highest resident
memory while loading (VmHWM, reset before) over what the process held then, after a first small load, in multiples of
the weights in float32. Weights that are mapped from a file are not resident until they are used.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("", "demo", "data arcade", "encode", "train", "sample", "evaluate", "convert", "autoencoder train")


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def help_times(repetitions: int) -> list[dict[str, Any]]:
    calls = {f"lavita {name} --help".replace("  ", " "): ["-m", "lavita", *name.split(), "--help"] for name in COMMANDS}
    calls["python -c pass"] = ["-c", "pass"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repetition in range(1 + repetitions):
        for name, arguments in calls.items():
            spent = timed([sys.executable, *arguments])
            if repetition:
                times[name].append(spent)
    rows = []
    for name, spent in times.items():
        wall, processor = (round(statistics.median(column), 3) for column in zip(*spent, strict=True))
        rows.append({"command": name, "wall_s": wall, "fastest_s": round(min(spent)[0], 3), "processor_s": processor})
        print(f"{name:36}{wall:7.3f} s  fastest {rows[-1]['fastest_s']:.3f} s  processor {processor:.3f} s", flush=True)
    return rows


def import_shares() -> dict[str, float]:
    """Seconds of imports of `lavita --help`, own time of each top-level package."""
    command = [sys.executable, "-X", "importtime", "-m", "lavita", "--help"]
    trace = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    shares: dict[str, float] = {}
    for line in trace.splitlines()[1:]:
        if line.startswith("import time:"):
            own, _, name = line.removeprefix("import time:").split("|")
            package = name.strip().partition(".")[0]
            shares[package] = shares.get(package, 0.0) + int(own) / 1e6
    largest = sorted(shares.items(), key=lambda item: -item[1])[:8]
    return {package: round(seconds, 4) for package, seconds in largest}


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {kind} in /proc/self/status")


def make_model(folder: Path, preset: str) -> None:
    """Random weights, in float32 and in bfloat16."""
    import torch

    from lavita.models.autoencoder import AutoencoderKL
    from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER
    from lavita.models.transformer import LavitaTransformer3DModel
    from lavita.sampling.pipeline import LavitaPipeline
    from lavita.sampling.schedulers import make_scheduler

    model = LavitaTransformer3DModel.from_preset(preset, variant=2, sample_size=32, num_frames=16)
    pipeline = LavitaPipeline(model, AutoencoderKL(**STABLE_DIFFUSION_AUTOENCODER), make_scheduler("ddim"))
    pipeline.save_pretrained(folder / "float32")
    pipeline.to(torch.bfloat16).save_pretrained(folder / "bfloat16")


def measure_load(what: str, folder: str) -> dict[str, float]:
    """In this process."""
    from lavita.models.autoencoder import load_autoencoder
    from lavita.models.packaged import autoencoder_source, model_source
    from lavita.sampling.pipeline import load_pipeline

    loaders: dict[str, Callable[[str], Any]] = {"pipeline": load_pipeline, "autoencoder": load_autoencoder}
    load_pipeline(model_source("builtin"))
    load_autoencoder(autoencoder_source("builtin", 64))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before, start = resident("VmRSS"), time.perf_counter()
    loaded = loaders[what](folder)
    seconds, peak, now = time.perf_counter() - start, resident("VmHWM") - before, resident("VmRSS") - before
    networks = [loaded.transformer, loaded.vae] if what == "pipeline" else [loaded]
    weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    return {"seconds": seconds, "peak_over_weights": peak / weights, "after_over_weights": now / weights}


def load_times(preset: str, repetitions: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, __file__, "--make", folder, "--preset", preset]
        subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
        for what, saved in [("pipeline", "float32"), ("pipeline", "bfloat16"), ("autoencoder", "float32")]:
            command = [sys.executable, __file__, "--load", what, str(Path(folder, saved))]
            runs = []
            for _ in range(repetitions):
                answer = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(answer.stdout.splitlines()[-1]))
            medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            rows.append({"what": what, "preset": preset, "saved_in": saved, **medians})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="L/2", help="of the loaded transformer")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        make_model(arguments.make, arguments.preset)
        return
    if arguments.load is not None:
        print(json.dumps(measure_load(*arguments.load)))
        return
    import torch

    from benchmarks.speed.machine import describe

    report = {
        "machine": describe(torch.device("cpu")).to_json(),
        "command": sys.argv,
        "help": help_times(arguments.repetitions),
        "import_seconds": import_shares(),
        "load": load_times(arguments.preset, min(3, arguments.repetitions)),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
