"""Generates a folder of videos from a model, one per class or prompt and seed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lavita.core.files import folded, inside, replacing
from lavita.core.precision import pick_device
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.core.seeds import DRAWS, generator
from lavita.core.text import normal_name
from lavita.data.captions import read_captions
from lavita.data.catalog import scan
from lavita.models.adapters import apply_adapter
from lavita.models.autoencoder import decode, downsampling, pixel_frames
from lavita.models.fingerprint import fingerprint
from lavita.models.packaged import model_source
from lavita.sampling.class_choice import ALL, parse_classes
from lavita.sampling.given import Fitting, Frames, digest, places_of, read_places
from lavita.sampling.names import class_folders, prompt_folder, table_prefixes
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe
from lavita.sampling.records import (
    GIVEN_TABLE,
    PROMPT_TABLE,
    Table,
    check_files,
    check_generation,
    record_files,
    write_generation,
)
from lavita.sampling.roll_out import DEFAULT_OVERLAP, MOST_FRAMES, Windows, roll_out
from lavita.video.tree import is_frame_folder
from lavita.video.writing import video_writer, write_video

MOST_SEEDS = 10**6


def parse_seeds(text: str) -> list[int]:
    """Parses seeds such as `0-3`, `1,5,9` or `0-3,9`, in the order given.

    Raises:
        ValueError: for another text, an empty range, or more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None:
            raise ValueError(f"seeds is {text!r}; allowed: numbers and ranges such as 0-7 or 1,5,9")
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(seeds) + len(numbers) > MOST_SEEDS:
            raise ValueError(f"seeds is {text!r}; at most {MOST_SEEDS:,} seeds are allowed")
        seeds.extend(numbers)
    if not seeds:
        raise ValueError(f"seeds is {text!r}, an empty range")
    return seeds


class Job(NamedTuple):
    """One video to generate."""

    path: Path
    seed: int
    label: int | None = None
    prompt: str | None = None
    source: Path | None = None
    """The video of a folder that gives the frames."""


@dataclass(frozen=True)
class GivenFiles:
    """Files whose frames are given to the videos."""

    image: Path | None = None
    """Image, or video for its first frame."""
    last_image: Path | None = None
    video: Path | None = None
    """Video whose first frames are given, or a folder of videos: one is generated for each of them."""
    keep_frames: int | None = None
    """Number of first frames of `video`; by default 1."""
    keep_every: int | None = None
    """Every n-th frame of `video` instead."""
    guided: bool = False
    """Guide towards the frames (see `LavitaPipeline`)."""
    exact: bool = False
    """Put the given pixels in the place of their decoded ones."""
    labelled: bool = True
    """False generates with "no class" in a model with classes, for a folder of videos."""

    def __post_init__(self) -> None:
        """Checks that the fields fit together.

        Raises:
            ValueError: if one has no effect without another, or two give the same frame.
        """
        if self.image is not None and self.video is not None:
            raise ValueError("image and video both give the first frame; give one of them")
        if self.video is None and (self.keep_frames is not None or self.keep_every is not None):
            raise ValueError("keep_frames and keep_every have no effect without a video")
        if not self and (self.guided or self.exact):
            raise ValueError("guide_frames and exact have no effect without an image or a video")
        if not self.labelled and self.folder is None:
            raise ValueError("unlabelled has no effect without --video and a folder of videos")

    def __bool__(self) -> bool:
        """Whether any frame is given."""
        return any(path is not None for path in (self.image, self.last_image, self.video))

    @property
    def folder(self) -> Path | None:
        """`video`, if it is a folder of videos."""
        is_folder = self.video is not None and self.video.is_dir() and not is_frame_folder(self.video)
        return self.video if is_folder else None


def generate(
    model: str,
    out: Path,
    *,
    classes: str | Sequence[str] = "all",
    prompts: Sequence[str] = (),
    prompt_table: Path | None = None,
    most: int | None = None,
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
    given: GivenFiles = GivenFiles(),
    length: int | None = None,
    seconds: float | None = None,
    overlap: int | None = None,
) -> list[Path]:
    """Writes `out/<class>/<seed>.mp4`, `out/<words of the prompt>/<seed>.mp4`, or `out/<seed>.mp4`; see `names`.

    A video depends only on its class or prompt and its seed, not on its batch. Files that are there already are kept if
    the folder records that they are these videos; see `records`. A folder never mixes videos made in different ways.

    Args:
        model: pipeline folder, hub id, or `builtin`.
        out: folder for the videos; made if missing.
        classes: see `class_choice.parse_classes`; one text or several.
        prompts: texts for a text-conditional model.
        prompt_table: table of prompts, in a format of `captions.read_captions`; the videos of a row are written to
            `out/<file>-<seed>.mp4`, see `names.table_prefixes`.
        most: generate the first of the videos only, at most so many.
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
        given: frames that the videos are given. With a folder of videos, a video is written to
            `out/<its path>-<seed>.mp4`, and in a model with classes has the class of its folder, or those of `classes`.
        length: frames of longer videos, generated in windows (see `roll_out`); a stopped command goes on in a video.
        seconds: the same in seconds.
        overlap: frames that windows have in common; by default 4.

    Returns:
        All requested files, each once, written now or before, once all processes have finished.

    Raises:
        ValueError: if the model, a class, a prompt, a seed or the length does not exist or does not fit, or the folder
            holds videos made in another way, or does not record how they were made.
        FloatingPointError: if the model or its options give numbers that are not finite; nothing of them is written.
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
    ending = ".png" if images else suffix
    if given.folder is not None:
        jobs = _plan_continuations(config, out, ending, numbers, classes, given.folder, given.labelled)[:most]
    else:
        jobs = _plan_jobs(config, out, ending, numbers, classes, prompts, prompt_table)[:most]
    if images:
        num_frames = 1

    settings = {
        "transformer": fingerprint(pipeline.transformer),
        "autoencoder": fingerprint(pipeline.vae),
        **recipe.settings(config),
        "num_frames": num_frames or pixel_frames(pipeline.vae.config, config["num_frames"]),
        "use_temporal": not images,
        "frame_interval": config["frame_interval"],
        "fps": config["fps"],
        "draws": DRAWS,
    }
    if given:
        settings |= {"guide_frames": given.guided, "exact": given.exact}
    windows = _windows(
        pipeline,
        None if images else num_frames,
        length,
        seconds,
        overlap,
        images or given.exact or bool(given.last_image),
    )
    if windows is not None:
        settings |= {"num_frames": windows.length, "overlap": windows.overlap}
    kept = _read_given(given, jobs, pipeline, settings["num_frames"] if windows is None else windows.window)
    check_generation(out, settings)
    records: dict[Table, dict[Path, str | None]] = {
        PROMPT_TABLE: {job.path: job.prompt for job in jobs},
        GIVEN_TABLE: {path: digest(places) for path, places in kept.items()},
    }
    for table, values in records.items():
        check_files(out, table, values)
    options = recipe.prepare(pipeline)
    team = team or Processes()
    # Batches never depend on what exists or on the number of processes, so files are identical to the bit.
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
    todo = team.share([batch for batch in batches if not all(job.path.exists() for job in batch)])
    team.wait()  # until all processes have looked for existing files
    if team.is_first:
        for table, values in records.items():
            record_files(out, table, values)
    team.wait()
    unit = "image" if images else "video" if windows is None else "window"
    progress = Progress(unit, sum(map(len, todo)) * (1 if windows is None else windows.count), active=team.is_first)
    # A batch is written while the next one is sampled.
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for batch in todo:
            inputs: dict[str, Any] = {
                "class_labels": [job.label for job in batch] if config["num_classes"] else None,
                "prompt": [job.prompt for job in batch if job.prompt is not None] or None,
                "num_videos": len(batch),
                "given": [kept[job.path] for job in batch] if given else None,
                "guide_given": given.guided,
                **options,
            }
            if windows is not None:
                write_generation(out, settings)
                _roll_out(pipeline, batch, windows, out, settings, records[GIVEN_TABLE], inputs, progress)
                continue
            videos = pipeline(
                num_frames=num_frames,
                generator=[generator(job.seed, "sample") for job in batch],
                use_temporal=not images,
                exact=given.exact,
                **inputs,
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


def _windows(
    pipeline: LavitaPipeline,
    num_frames: int | None,
    length: int | None,
    seconds: float | None,
    overlap: int | None,
    is_refused: bool,
) -> Windows | None:
    """How long videos are divided; None for videos of one window."""
    config = pipeline.transformer.config
    if length is not None and seconds is not None:
        raise ValueError(f"length is {length} and seconds {seconds:g}; give one of them")
    if length is None and seconds is None:
        if overlap is not None:
            raise ValueError(f"overlap is {overlap}, but has no effect without --length or --seconds")
        return None
    if num_frames is not None:
        raise ValueError(f"num_frames is {num_frames}, but the length of the videos is given, too; give one of them")
    if is_refused:
        raise ValueError("length has no effect on images, and does not go with exact or last_image")
    if seconds is not None:
        if not 0 < seconds * config["fps"] <= MOST_FRAMES:
            raise ValueError(f"seconds is {seconds:g}, but must be above 0 and give at most {MOST_FRAMES} frames")
        length = max(1, round(seconds * config["fps"]))
    assert length is not None
    return Windows(length, config["num_frames"], DEFAULT_OVERLAP if overlap is None else overlap)


def _roll_out(
    pipeline: LavitaPipeline,
    batch: Sequence[Job],
    windows: Windows,
    out: Path,
    settings: Mapping[str, Any],
    given: Mapping[Path, str | None],
    inputs: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Generates a batch of long videos and writes them while they grow; finished windows are kept until then."""
    what = [settings, [(job.path.as_posix(), job.seed, job.label, job.prompt, given.get(job.path)) for job in batch]]
    journal = out / ".windows" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def noise(window: int) -> list[torch.Generator]:
        return [generator(job.seed, "sample", *([window] if window else [])) for job in batch]

    def finished() -> None:
        progress.update(progress.done + len(batch))

    with ExitStack() as stack:
        writers = [
            None if job.path.exists() else stack.enter_context(video_writer(job.path, settings["fps"])) for job in batch
        ]
        for latents in roll_out(pipeline, windows, noise, journal, finished, **inputs):
            for write, frames in zip(writers, decode(pipeline.vae, latents.to(pipeline.vae.device)), strict=True):
                if write is not None:
                    write(frames)
    shutil.rmtree(journal, ignore_errors=True)
    with suppress(OSError):  # other processes may have theirs there
        journal.parent.rmdir()


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
        folders = class_folders(names)
        return _distinct(
            Job(inside(out, f"{folders[label]}/{seed}{suffix}"), seed, label) for label in labels for seed in seeds
        )
    asked = classes if isinstance(classes, str) else ",".join(classes)
    if asked != ALL:
        raise ValueError(f"classes is {asked!r}, but this model has none")
    if not config["text_dim"]:
        return _distinct(Job(out / f"{seed}{suffix}", seed) for seed in seeds)
    rows: list[tuple[str, str]] = [(f"{prompt_folder(prompt)}/", prompt) for prompt in prompts]
    if prompt_table is not None:
        captions = read_captions(prompt_table)
        for file in captions:
            inside(out, file)  # else an error that names the file, not the name made of it
        rows += table_prefixes(captions)
    if not rows:
        raise ValueError("this model has texts: give --prompt, or a table with --prompts")
    return _distinct(
        Job(inside(out, f"{name}{seed}{suffix}"), seed, prompt=text) for name, text in rows for seed in seeds
    )


def _plan_continuations(
    config: Mapping[str, Any],
    out: Path,
    suffix: str,
    seeds: list[int],
    classes: str | Sequence[str],
    folder: Path,
    labelled: bool,
) -> list[Job]:
    """Lists the videos to generate from the frames of each video in a folder."""
    if config["text_dim"]:
        raise ValueError("a folder of videos was given, but this model needs a prompt for each; give a single video")
    catalog = scan(folder)
    sources = {video.name: video for video in catalog.videos}
    labels: list[int | None] = [None]
    names = [normal_name(name) for name in config["class_names"] or map(str, range(config["num_classes"]))]
    asked = [classes] if isinstance(classes, str) else list(classes)
    by_folder = bool(names) and labelled and asked == [ALL]
    if names and labelled and not by_folder:
        labels = list(parse_classes([normal_name(text) for text in asked], names))
    elif not by_folder and asked != [ALL]:
        raise ValueError(f"classes is {','.join(asked)!r}, but no class is used here")
    jobs = []
    for prefix, source in table_prefixes({name: [name] for name in sources}):
        path = Path(sources[source].info.path)
        if by_folder:
            parent = normal_name(path.parent.name)
            if parent not in names:
                raise ValueError(f"{path}: its folder is no class of this model; give --classes or --unlabelled")
            labels = [names.index(parent)]
        for label in labels:
            group = f"{class_folders(names)[label]}/" if label is not None and not by_folder else ""
            jobs += [Job(inside(out, f"{group}{prefix}{seed}{suffix}"), seed, label, source=path) for seed in seeds]
    return _distinct(jobs)


def _read_given(
    given: GivenFiles, jobs: Sequence[Job], pipeline: LavitaPipeline, num_frames: int
) -> dict[Path, dict[int, Frames]]:
    """The given frames of each job, by its file; empty without any."""
    if not given:
        return {}
    config = pipeline.transformer.config
    fit = Fitting(config["sample_size"] * downsampling(pipeline.vae))
    shared: dict[int, Frames] = {}
    for path, place in ((given.image, 0), (given.last_image, num_frames - 1)):
        if path is not None:
            shared[place] = fit(path, read_places(path, [0], 1))[0]
    found: dict[Path | None, dict[int, Frames]] = {None: shared}
    for source in dict.fromkeys(job.source or given.video for job in jobs):
        if source is not None:
            places = places_of(source, given.keep_frames, given.keep_every, num_frames)
            found[source] = {**fit(source, read_places(source, places, config["frame_interval"])), **shared}
    fit.report()
    return {job.path: dict(sorted(found[job.source or given.video].items())) for job in jobs}


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once; no two of them may have one file, on any file system."""
    owners: dict[str, Job] = {}
    for job in jobs:
        other = owners.setdefault(folded(job.path.as_posix()), job)
        if other != job:
            raise ValueError(f"{other.path} and {job.path} would be one file for two videos; sample them apart")
    return list(owners.values())
