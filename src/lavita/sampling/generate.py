"""Generates a folder of videos from a model, one per class or prompt and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lavita.core.files import replacing, write_text
from lavita.core.precision import pick_device
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.core.seeds import generator
from lavita.core.text import normal_name
from lavita.data.captions import read_captions
from lavita.data.catalog import read_generation
from lavita.models.adapters import apply_adapter
from lavita.models.fingerprint import fingerprint
from lavita.models.packaged import model_source
from lavita.sampling.class_choice import ALL, parse_classes
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe
from lavita.video.formats import GENERATION
from lavita.video.writing import write_video


def parse_seeds(text: str) -> list[int]:
    """Parses seeds such as `0-3`, `1,5,9` or `0-3,9`, in the order given.

    Raises:
        ValueError: for another text, or an empty range.
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


class Job(NamedTuple):
    """One video to generate."""

    path: Path
    seed: int
    label: int | None = None
    prompt: str | None = None


def generate(
    model: str,
    out: Path,
    *,
    classes: str | Sequence[str] = "all",
    prompts: Sequence[str] = (),
    prompt_table: Path | None = None,
    seeds: str = "0-3",
    recipe: Recipe = RECIPES["default"],
    num_frames: int | None = None,
    images: bool = False,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    batch_size: int = 8,
    suffix: str = ".mp4",
    device: str = "auto",
    team: Processes | None = None,
) -> list[Path]:
    """Writes `out/<class>/<seed>.mp4`, `out/<words of the prompt>/<seed>.mp4`, or `out/<seed>.mp4`.

    A video depends only on its class or prompt and its seed, not on its batch. Existing files are kept.
    `out/generation.json` records how the videos were made; a folder never mixes videos made in different ways.

    Args:
        model: pipeline folder, hub id, or `builtin`.
        out: folder for the videos; made if missing.
        classes: see `class_choice.parse_classes`; one text or several.
        prompts: texts for a text-conditional model.
        prompt_table: table of prompts, in a format of `captions.read_captions`; the videos of a row are written to
            `out/<file without its suffix>-<seed>.mp4`.
        seeds: see `parse_seeds`.
        recipe: sampler, steps, guidance, and what makes sampling faster.
        num_frames: length of the videos; by default that of the training clips.
        images: write single images, `.png`, from the model without its temporal modules (A.4).
        adapter: folder of low-rank adapters trained on this model, in peft's layout.
        adapter_scale: weight of the adapters.
        batch_size: number of videos per batch.
        suffix: `.mp4`, `.gif`, or the lossless `.mkv`.
        device: see `core.precision.pick_device`.
        team: processes that share the batches; the files are those that one process would write.

    Returns:
        All requested files, written now or before, once all processes have finished.

    Raises:
        ValueError: if the model, a class, a prompt, a seed or the length does not exist or does not fit, or the folder
            holds videos made in another way.
    """
    numbers = parse_seeds(seeds)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    if images and num_frames not in (None, 1):
        raise ValueError(f"num_frames is {num_frames}, but an image has 1")
    pipeline = load_pipeline(model_source(model), pick_device(device))
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        apply_adapter(pipeline.transformer, adapter, adapter_scale)
    config = pipeline.transformer.config
    jobs = _plan_jobs(config, out, ".png" if images else suffix, numbers, classes, prompts, prompt_table)
    if images:
        num_frames = 1

    settings = {
        "transformer": fingerprint(pipeline.transformer),
        "autoencoder": fingerprint(pipeline.vae),
        **recipe.settings(config),
        "num_frames": num_frames or config["num_frames"],
        "use_temporal": not images,
        "frame_interval": config["frame_interval"],
        "fps": config["fps"],
    }
    check_generation(out, settings)
    options = recipe.prepare(pipeline)
    team = team or Processes()
    # Batches never depend on what exists or on the number of processes, so files are identical to the bit.
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
    todo = team.share([batch for batch in batches if not all(job.path.exists() for job in batch)])
    team.wait()  # until all processes have looked for existing files
    progress = Progress("image" if images else "video", sum(map(len, todo)), active=team.is_first)
    # A batch is written while the next one is sampled.
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for batch in todo:
            videos = pipeline(
                class_labels=[job.label for job in batch if job.label is not None] or None,
                prompt=[job.prompt for job in batch if job.prompt is not None] or None,
                num_videos=len(batch),
                num_frames=num_frames,
                generator=[generator(job.seed, "sample") for job in batch],
                use_temporal=not images,
                **options,
            ).frames
            if writing is not None:
                writing.result()
            write_generation(out, settings)
            writing = writer.submit(_write, batch, np.asarray(videos), config["fps"])
            progress.update(progress.done + len(batch))
        if writing is not None:
            writing.result()
    team.wait()
    return [job.path for job in jobs]


def _write(batch: Sequence[Job], videos: npt.NDArray[np.uint8], fps: float) -> None:
    for job, frames in zip(batch, videos, strict=True):
        if job.path.exists():
            continue
        if job.path.suffix == ".png":
            with replacing(job.path) as partial:
                Image.fromarray(frames[0]).save(partial)
        else:
            write_video(job.path, frames, fps)


def _plan_jobs(
    config: Mapping[str, Any],
    out: Path,
    suffix: str,
    seeds: list[int],
    classes: str | Sequence[str],
    prompts: Sequence[str],
    prompt_table: Path | None,
) -> list[Job]:
    """Lists the videos to generate with a class-conditional, a text-conditional or an unconditional model."""
    if (prompts or prompt_table is not None) and not config["text_dim"]:
        raise ValueError("a prompt was given, but this model has no texts")
    if config["num_classes"]:
        names = config["class_names"] or [str(label) for label in range(config["num_classes"])]
        asked = [classes] if isinstance(classes, str) else classes
        labels = parse_classes([normal_name(text) for text in asked], [normal_name(name) for name in names])
        return [Job(out / names[label] / f"{seed}{suffix}", seed, label) for label in labels for seed in seeds]
    asked = classes if isinstance(classes, str) else ",".join(classes)
    if asked != ALL:
        raise ValueError(f"classes is {asked!r}, but this model has none")
    if not config["text_dim"]:
        return [Job(out / f"{seed}{suffix}", seed) for seed in seeds]
    rows: list[tuple[str, str]] = [(f"{_slug(prompt)}/", prompt) for prompt in prompts]
    if prompt_table is not None:
        for file, texts in read_captions(prompt_table).items():
            stem = Path(file).with_suffix("").as_posix()
            if Path(stem).is_absolute() or ".." in Path(stem).parts:
                raise ValueError(f"{prompt_table}: file is {file!r}, but must be inside the folder of samples")
            rows += [(f"{stem}-" if len(texts) == 1 else f"{stem}-{i}-", text) for i, text in enumerate(texts)]
    if not rows:
        raise ValueError("this model has texts: give --prompt, or a table with --prompts")
    return [Job(out / f"{name}{seed}{suffix}", seed, prompt=text) for name, text in rows for seed in seeds]


def _slug(prompt: str) -> str:
    """Makes the name of a folder from the words of a prompt."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:80] or "no-prompt"


def check_generation(out: Path, settings: dict[str, Any]) -> None:
    """Checks that the videos in a folder were made in the same way.

    Raises:
        ValueError: for the first setting that differs.
    """
    before = read_generation(out)
    for key in {**settings, **(before or {})}:
        if before is not None and before.get(key) != settings.get(key):
            raise ValueError(
                f"{out}: holds videos made with {key}={before.get(key)}, not {settings.get(key)}; use another folder"
            )


def write_generation(out: Path, settings: dict[str, Any]) -> None:
    """Records how the videos in a folder are made, in its `generation.json`."""
    write_text(out / GENERATION, json.dumps(settings, indent=1))
