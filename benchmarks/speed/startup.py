"""How long `--help` takes, and what loading a model takes in time and memory.

Every call is a process of its own, and the calls take turns; times are medians. `wall` is what a user waits;
`processor` is the process's own time, which other work on the machine disturbs less. Memory: the highest resident
memory while loading (VmHWM, reset before) minus what the process held before, after a first small load, in multiples of
the weights in float32. Weights that are mapped from a file are not resident until they are used.
"""

from __future__ import annotations

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

import torch

from benchmarks.speed.machine import describe
from benchmarks.speed.peaks import reset_peak, resident
from lavita.core.files import write_json
from lavita.models.autoencoder import AutoencoderKL, load_autoencoder
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER, autoencoder_source, model_source
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.schedulers import make_scheduler

COMMANDS = ("", "demo", "data arcade", "encode", "train", "sample", "evaluate", "convert", "autoencoder train")
LOADED = (("pipeline", "float32"), ("pipeline", "bfloat16"), ("autoencoder", "float32"))


def measure_startup(preset: str, repeats: int, out: Path | None) -> None:
    """Prints all rows, and writes them as JSON if `out` is given."""
    report = {
        "machine": describe(torch.device("cpu")).to_json(),
        "command": sys.argv,
        "help": help_times(repeats),
        "import_seconds": import_shares(),
        "load": load_times(preset, min(3, repeats)),
    }
    if out is not None:
        write_json(out, report)


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def help_times(repeats: int) -> list[dict[str, Any]]:
    """One row per command with the times of its `--help`."""
    calls = {
        " ".join(["lavita", *name.split(), "--help"]): ["-m", "lavita", *name.split(), "--help"] for name in COMMANDS
    }
    calls["python -c pass"] = ["-c", "pass"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(1 + repeats):
        for name, arguments in calls.items():
            spent = timed([sys.executable, *arguments])
            if number:  # the first round warms up
                times[name].append(spent)
    rows = []
    for name, all_spent in times.items():
        wall, processor = (round(statistics.median(column), 3) for column in zip(*all_spent, strict=True))
        fastest = round(min(all_spent)[0], 3)
        rows.append({"command": name, "wall_s": wall, "fastest_s": fastest, "processor_s": processor})
        print(f"{name:36}{wall:7.3f} s  fastest {fastest:.3f} s  processor {processor:.3f} s", flush=True)
    return rows


def import_shares() -> dict[str, float]:
    """Seconds that `lavita --help` spends in the imports of each top-level package itself, for the largest ones."""
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


def load_times(preset: str, repeats: int) -> list[dict[str, Any]]:
    """One row per model with the time and memory of loading it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), preset)
        for what, saved in LOADED:
            command = [sys.executable, "-m", "benchmarks.speed.startup", what, str(Path(folder, saved))]
            runs = []
            for _ in range(repeats):
                answer = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(answer.stdout.splitlines()[-1]))
            medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            rows.append({"what": what, "preset": preset, "saved_in": saved, **medians})
            print(rows[-1], flush=True)
    return rows


def make_models(folder: Path, preset: str) -> None:
    """Saves a pipeline with random weights in float32 and in bfloat16."""
    model = LavitaTransformer3DModel.from_preset(preset, variant=2, sample_size=32, num_frames=16)
    pipeline = LavitaPipeline(model, AutoencoderKL(**STABLE_DIFFUSION_AUTOENCODER), make_scheduler("ddim"))
    pipeline.save_pretrained(folder / "float32")
    pipeline.to(torch.bfloat16).save_pretrained(folder / "bfloat16")


def measure_load(what: str, folder: str) -> dict[str, float]:
    """Loads a model in this process."""
    loaders: dict[str, Callable[[str], Any]] = {"pipeline": load_pipeline, "autoencoder": load_autoencoder}
    load_pipeline(model_source("builtin"))
    load_autoencoder(autoencoder_source("builtin", 64))
    reset_peak()
    before, start = _resident("VmRSS"), time.perf_counter()
    loaded = loaders[what](folder)
    seconds, peak, now = time.perf_counter() - start, _resident("VmHWM") - before, _resident("VmRSS") - before
    networks = [loaded.transformer, loaded.vae] if what == "pipeline" else [loaded]
    weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    return {"seconds": seconds, "peak_over_weights": peak / weights, "after_over_weights": now / weights}


def _resident(kind: str) -> int:
    if (found := resident(kind)) is None:
        raise OSError("this system does not say how much memory is resident; the benchmark needs Linux")
    return found


if __name__ == "__main__":
    print(json.dumps(measure_load(*sys.argv[1:3])))
