"""Checks that two versions of LAVITA compute the same: records what one computes, and compares two records.

python tools/same_results.py record before.json
python tools/same_results.py compare before.json after.json

`record` takes about five minutes on two cores. It encodes a small data set, trains on it, once in one go and once
stopped and resumed, samples, evaluates, trains an autoencoder and renders arcade games, all through `python -m lavita`.
So it records any version that has these commands: PYTHONPATH=OTHER/src picks the code of another folder. A record that
is made again on the same machine is the same to the bit; other processors and other versions of torch round otherwise.
MP4 files are compared only approximately, by their frames, because x264 does not always write the same file.
`compare` prints a line for each fact, and its exit code is 0 only if all of them are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np

STOP_AFTER = 20  # steps, where a run is stopped to be resumed
MEASURED = {"clips_per_second", "seconds", "versions"}  # times and versions are not results
ABOUT, TOLERANCE = " (about)", 2.0  # of facts about MP4 files, which are brightnesses from 0 to 255
CLASSES = ("boxing", "enduro", "riverraid", "tennis")  # all but the last are known to the model of the package
TRAIN = (
    "train --config demo data.latent_cache=latents data.validation=data/heldout train.steps=50 train.batch_size=2 "
    "train.log_every=1 train.checkpoint_every=15 train.sample_every=50 train.num_samples=2 train.validate_every=25 "
    "train.validation_clips=4"
)
SHORT = (
    "train --config demo train.steps=4 train.decay_steps=0 train.batch_size=4 train.log_every=1 train.sample_every=0"
)
OTHER_RUNS = {
    "variant 1, tubes, tokens, rope, AdamW, videos": "model.variant=1 model.patch_embedding=compression "
    "model.conditioning=all_tokens model.temporal_position=rope train.optimizer=adamw train.learning_rate=1e-3 "
    "data.path=data/train data.latent_cache=null data.frame_interval=2 data.num_frames=8 data.horizontal_flip=true",
    "variant 4, noise, images, accumulation, checkpointing": "model.variant=4 model.prediction_type=epsilon "
    "data.latent_cache=latents data.num_images=2 train.accumulation=2 train.gradient_checkpointing=true",
    "fine-tuning, frozen": "data.latent_cache=latents model.preset=small/4 "
    "train.init_from=builtin train.freeze=spatial",
}
FEW = "builtin --classes boxing,riverraid --seeds 0,5"
SAMPLES = {
    "trained": "train/pipeline --seeds 0-3 --steps 4 --format mkv",
    "shipped": f"{FEW} --steps 8",
    "shipped, paper": f"{FEW} --recipe paper --steps 8 --format mkv",
    "shipped, fast": f"{FEW} --recipe fast --batch-size 3 --format gif",
    "shipped, int8 and attention cache": f"{FEW} --steps 10 --quantize int8 --cache pab --format mkv",
    "shipped, images": f"{FEW} --steps 6 --images",
}
EVALUATE = (
    "evaluate --real data/train --held-out data/heldout --generated samples/trained --out scores.json --preset offline "
    "--metrics accuracy,motion,kernel-video,kernel-image,prdc,prdc-image,inception-score num_real_clips=16 "
    "num_generated_clips=16 frames_a_clip=2 inception_score=custom inception_splits=2"
)
AUTOENCODER = (
    "autoencoder train --config autoencoder-small --run-dir autoencoder data=[data/train] data_weights=null "
    "held_out=[data/heldout] block_out_channels=[16,32,32] steps=8 log_every=1"
)


def lavita(work: Path, arguments: str, stop_at: int = 0) -> str:
    """Runs a command in the work folder, where all paths are relative, so that no record names the machine's folders.

    Args:
        work: the folder.
        arguments: of `python -m lavita`, as in a shell.
        stop_at: SIGTERM is sent once the run in `resumed` has logged this step; 0 lets it end.

    Returns:
        Its standard output.
    """
    print(f"$ lavita {arguments}", file=sys.stderr, flush=True)
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command, pipe = [sys.executable, "-m", "lavita", *shlex.split(arguments)], subprocess.PIPE
    with subprocess.Popen(command, cwd=work, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        while stop_at and process.poll() is None:
            if len(json_lines(work / "resumed" / "metrics.jsonl")) >= stop_at:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        output, errors = process.communicate()
    if stop_at and process.returncode == 0:
        sys.exit("error: the run that was to be stopped ended first")
    expected = 128 + signal.SIGTERM if stop_at else 0
    if process.returncode != expected:
        code = process.returncode
        sys.exit(f"error: exit code {code}, but {expected} was expected: lavita {arguments}\n{errors[-3000:]}")
    return output


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may still be written to, without what is measured."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [results(json.loads(line)) for line in lines if line.endswith("\n")]


def results(value: Any) -> Any:
    """A JSON value without what is measured."""
    if isinstance(value, dict):
        return {key: results(inner) for key, inner in value.items() if key not in MEASURED}
    return [results(inner) for inner in value] if isinstance(value, list) else value


def write_data(root: Path) -> None:
    """Writes videos of textures that move, 4 per class in `train` and in `heldout`, each the same file every time."""
    for seed, (split, name, number) in enumerate(product(("train", "heldout"), CLASSES, range(4))):
        texture = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        path = root / split / name / f"{number}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("ffv1", rate=15, width=64, height=64, pix_fmt="bgr0")
            for index in range(24):
                pixels = np.roll(texture, ((1 + number) * index, CLASSES.index(name) * index), (0, 1))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="bgr0")))
            container.mux(stream.encode())


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of the files below a folder, by name, but for MP4 files."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file() and file.suffix != ".mp4")
    if not files:
        sys.exit(f"error: {folder.name} holds no {pattern}")
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def frames_of(folder: Path, *suffixes: str) -> dict[str, Any]:
    """The decoded frames of the videos and images below a folder, by name.

    Returns:
        For each its shape, and its SHA-256; or, of an MP4 file, brightnesses of 4 x 4 parts of some frames.
    """
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.suffix in suffixes):
        with av.open(str(file)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        seen = hashlib.sha256(frames.tobytes()).hexdigest()
        if file.suffix == ".mp4":
            some = frames[:: max(1, len(frames) // 3)]
            parts = some.reshape(len(some), 4, some.shape[1] // 4, 4, some.shape[2] // 4, 3).mean((2, 4, 5))
            seen = parts.round(1).tolist()
        found[file.relative_to(folder).as_posix()] = [*frames.shape, seen]
    return found


def record(work: Path) -> dict[str, Any]:
    """All facts about the code that `python -m lavita` runs."""
    facts: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:  # each command has one thread

        def run(*commands: str) -> list[str]:
            return list(pool.map(partial(lavita, work), commands))

        write_data(work / "data")
        encode = "encode --data data/train --out latents --resolution 64 --no-flip --shard-mb 1"
        arcade = "data arcade arcade --train-episodes 1 --heldout-episodes 0 --num-frames 16"
        inspection, *_ = run("data inspect data/train --json", encode, arcade)
        in_one_go = pool.submit(lavita, work, f"{TRAIN} run_dir=train")
        lavita(work, f"{TRAIN} run_dir=resumed", stop_at=STOP_AFTER)
        lavita(work, f"{TRAIN} run_dir=resumed")
        in_one_go.result()
        samples = (f"sample {options} --out {shlex.quote(f'samples/{name}')}" for name, options in SAMPLES.items())
        others = (f"{SHORT} {options} run_dir={shlex.quote(name)}" for name, options in OTHER_RUNS.items())
        costs, large, *_ = run("info --table 3 --json", "info XL/2 --variant 3 --json", *samples, *others, AUTOENCODER)
        run(EVALUATE)

    facts["arcade: frames" + ABOUT] = frames_of(work / "arcade", ".mp4")
    facts["arcade: captions"] = digests(work / "arcade")
    facts["inspection"] = json.loads(inspection)
    facts["latent cache: files"] = digests(work / "latents")
    for name in ("train", "resumed", *OTHER_RUNS):
        facts[f"{name}: steps"] = json_lines(work / name / "metrics.jsonl")
        facts[f"{name}: weights"] = digests(work / name / "pipeline", "*.safetensors")
        if name not in OTHER_RUNS:
            facts[f"{name}: validation"] = json_lines(work / name / "validation.jsonl")
            facts[f"{name}: samples on the way"] = digests(work / name / "samples")
            facts[f"{name}: samples on the way, frames" + ABOUT] = frames_of(work / name / "samples", ".mp4")
    facts["resumed is as in one go"] = all(
        facts[f"train: {part}"] == facts[f"resumed: {part}"] for part in ("steps", "weights", "validation")
    )
    facts["autoencoder: steps"] = json_lines(work / "autoencoder" / "metrics.jsonl")
    facts["autoencoder: files"] = digests(work / "autoencoder" / "autoencoder")
    for name in SAMPLES:
        facts[f"samples, {name}: frames"] = frames_of(work / "samples" / name, ".mkv", ".gif", ".png")
        facts[f"samples, {name}: frames" + ABOUT] = frames_of(work / "samples" / name, ".mp4")
        facts[f"samples, {name}: files"] = digests(work / "samples" / name)
    facts["evaluation"] = results(json.loads((work / "scores.json").read_text(encoding="utf-8")))
    facts["costs: Table 3"], facts["costs: XL/2, Variant 3"] = json.loads(costs), json.loads(large)
    return {name: fact for name, fact in facts.items() if fact != {}}


def made_with() -> dict[str, str]:
    """What a record was made with; only the results are compared."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")]
    processor = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    packages = {name: version(name) for name in ("lavita", "torch", "diffusers", "numpy", "av")}
    return {
        "processor": processor,
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "python": platform.python_version(),
        **packages,
    }


def difference(before: Any, after: Any, place: str = "", tolerance: float = 0.0) -> str | None:
    """Where two JSON values first differ, by more than the tolerance if numbers, and how; None where they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = f"{place}.{key}" if place else key
            if key not in before or key not in after:
                return f"{inner} is only {'after' if key in after else 'before'}"
            if (found := difference(before[key], after[key], inner, tolerance)) is not None:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list):
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            if (found := difference(old, new, f"{place}[{number}]", tolerance)) is not None:
                return found
        return None if len(before) == len(after) else f"{place} has {len(before)} items before, {len(after)} after"
    if before == after and type(before) is type(after):
        return None
    if tolerance and isinstance(before, float) and isinstance(after, float) and abs(before - after) <= tolerance:
        return None
    return f"{place}: {before!r} before, {after!r} after"


def compare(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Prints a line for each fact of two records; whether all are equal."""
    if (found := difference(before["made_with"], after["made_with"])) is not None:
        print(f"note: not made with the same: {found}")
    equal = 0
    names = list(before["facts"] | after["facts"])
    for name in names:
        old, new = ({name: each["facts"][name]} if name in each["facts"] else {} for each in (before, after))
        found = difference(old, new, tolerance=TOLERANCE if name.endswith(ABOUT) else 0.0)
        equal += found is None
        print(f"{name}: equal" if found is None else f"{name}: DIFFERS: {found.removeprefix(name).lstrip('.: ')}")
    print(f"{equal} of {len(names)} facts are equal")
    return equal == len(names)


def main() -> None:
    """Parses and calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write what this version computes")
    recording.add_argument("file", type=Path)
    recording.add_argument("--work", type=Path, help="empty folder to work in, which is kept. default: a temporary one")
    comparing = commands.add_parser("compare", help="print where two records differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (given.before, given.after))
        sys.exit(not compare(before, after))
    spec = find_spec("lavita")
    print(f"recording {spec.origin if spec else 'lavita'}", file=sys.stderr)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work {work} is not empty")
        facts = record(work.resolve())
    used = sum(os.times()[2:4])
    given.file.write_text(json.dumps({"made_with": made_with(), "facts": facts}, indent=1) + "\n", encoding="utf-8")
    print(
        f"{given.file}: {len(facts)} facts in {time.monotonic() - start:.0f} s, {used:.0f} s of processor time",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
