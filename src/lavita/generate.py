"""Generates a folder of videos from a model, one seed a video."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lavita.checkpoint import fingerprint
from lavita.data.catalog import GENERATION, read_generation
from lavita.pipeline import load_pipeline
from lavita.runtime import Progress, generator, pick_device
from lavita.video import write_video

BUILTIN = "builtin"
DEFAULT_GUIDANCE = 1.5


def model_source(name: str) -> str:
    """The path or hub id that a name stands for; `builtin` is the arcade model of the package."""
    return str(files("lavita") / "weights" / "arcade") if name == BUILTIN else name


def parse_seeds(text: str) -> list[int]:
    """`0-3` or `1,5,9` or both to numbers, in the order given.

    Raises:
        ValueError: for anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"seeds is {text!r}; allowed: numbers and ranges such as 0-7 or 1,5,9")
        seeds.extend(range(int(first), int(last or first) + 1))
    if not seeds:
        raise ValueError(f"seeds is {text!r}, an empty range")
    return seeds


def generate(
    model: str,
    out: Path,
    *,
    classes: str = "all",
    seeds: str = "0-3",
    steps: int = 25,
    sampler: str = "unipc",
    guidance_scale: float | None = None,
    num_frames: int | None = None,
    batch_size: int = 8,
    suffix: str = ".mp4",
    device: str = "auto",
) -> list[Path]:
    """Writes `out/<class>/<seed>.mp4`, or `out/<seed>.mp4` for an unconditional model.

    A video depends on its class and seed alone, not on the batch that it is made in. Files that are there already
    are left alone; `out/generation.json` records how they were made, and a folder never holds two kinds.

    Args:
        model: pipeline folder, hub id, or `builtin`.
        out: folder; made if missing.
        classes: `all`, or names or numbers, comma separated.
        seeds: see `parse_seeds`.
        steps: network evaluations.
        sampler: one of `pipeline.SAMPLERS`.
        guidance_scale: 1 for none; by default 1.5 for a model with classes.
        num_frames: length; by default that of the training clips.
        batch_size: videos at once.
        suffix: `.mp4` or `.gif`.
        device: see `runtime.pick_device`.

    Returns:
        All the files asked for, written now or before.

    Raises:
        ValueError: for a model, class, seed or length that does not exist or fit, or a folder whose videos were made
            in another way.
    """
    numbers = parse_seeds(seeds)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    pipeline = load_pipeline(model_source(model), pick_device(device))
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    pipeline.use_sampler(sampler)
    names = config["class_names"] or [str(label) for label in range(config["num_classes"])]
    jobs: list[tuple[Path, int | None, int]] = []
    if config["num_classes"]:
        for label in _parse_classes(classes, names):
            jobs += [(out / names[label] / f"{seed}{suffix}", label, seed) for seed in numbers]
    elif classes != "all":
        raise ValueError(f"classes is {classes!r}, but this model is unconditional")
    else:
        jobs = [(out / f"{seed}{suffix}", None, seed) for seed in numbers]
    if guidance_scale is None:
        guidance_scale = DEFAULT_GUIDANCE if config["num_classes"] else 1.0

    settings = {
        "transformer": fingerprint(pipeline.transformer),
        "autoencoder": fingerprint(pipeline.vae),
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "num_frames": num_frames or config["num_frames"],
        "frame_interval": config["frame_interval"],
        "fps": config["fps"],
    }
    check_generation(out, settings)
    missing = [job for job in jobs if not job[0].exists()]
    progress = Progress("video", len(jobs), len(jobs) - len(missing))
    for first in range(0, len(missing), batch_size):
        batch = missing[first : first + batch_size]
        videos = pipeline(
            class_labels=[label for _, label, _ in batch if label is not None] or None,
            num_videos=len(batch),
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[generator(seed, "sample") for _, _, seed in batch],
        ).frames
        write_generation(out, settings)
        for (path, _, _), frames in zip(batch, np.asarray(videos), strict=True):
            write_video(path, frames, config["fps"])
        progress.update(progress.done + len(batch))
    return [path for path, _, _ in jobs]


def check_generation(out: Path, settings: dict[str, Any]) -> None:
    """Refuses to add to a folder whose videos were made in another way.

    Raises:
        ValueError: naming the first setting that differs.
    """
    before = read_generation(out)
    for key, value in settings.items():
        if before is not None and before.get(key) != value:
            raise ValueError(f"{out}: holds videos made with {key}={before.get(key)}, not {value}; use another folder")


def write_generation(out: Path, settings: dict[str, Any]) -> None:
    """Records how a folder's videos are made, in `generation.json`."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{GENERATION}.partial"
    partial.write_text(json.dumps(settings, indent=1))
    partial.replace(out / GENERATION)


def _parse_classes(text: str, names: list[str]) -> list[int]:
    if text == "all":
        return list(range(len(names)))
    labels = []
    for part in text.split(","):
        word = part.strip()
        if word in names:
            labels.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            labels.append(int(word))
        else:
            raise ValueError(f"class is {word!r}; allowed: all, {', '.join(names)}, or 0-{len(names) - 1}")
    return labels
