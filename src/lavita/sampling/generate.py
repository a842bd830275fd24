"""Generates a folder of videos from a model, one per class or prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lavita.core.files import replacing
from lavita.core.precision import pick_device
from lavita.core.processes import Processes
from lavita.core.progress import Progress
from lavita.core.seeds import DRAWS, generator
from lavita.core.sizes import AnySize, Size
from lavita.core.text import read_text
from lavita.models.actions import action_numbers
from lavita.models.adapters import apply_adapter
from lavita.models.autoencoder import pixel_frames
from lavita.models.fingerprint import fingerprint
from lavita.models.packaged import model_source
from lavita.models.sequence_parallel import open_group
from lavita.models.shapes import default_frames
from lavita.sampling.given import latents_of
from lavita.sampling.given_files import NO_FILES, GivenFiles, digest, read_given
from lavita.sampling.jobs import Job, parse_seeds, plan_continuations, plan_jobs
from lavita.sampling.long_videos import plan_windows, write_long_videos
from lavita.sampling.pipeline import load_pipeline
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
from lavita.video.writing import write_video


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
    given: GivenFiles = NO_FILES,
    length: int | None = None,
    seconds: float | None = None,
    overlap: int | None = None,
    actions: Path | None = None,
    size: AnySize | None = None,
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
        team: processes that share the batches; the files are those that one process would write. Those of a
            group share each video, which then differs by rounding, and one of them writes it.
        given: frames that the videos are given. With a folder of videos, a video is written to
            `out/<its path>-<seed>.mp4`, and in a model with classes has the class of its folder, or those of `classes`.
        length: frames of longer videos, generated in windows (see `roll_out`); a stopped command goes on in a video.
        seconds: the same in seconds.
        overlap: frames that windows have in common; by default 4.
        actions: file of the actions of all frames, by name, separated by white space, for a model with actions.
        size: size of the videos in pixels; by default that of the training clips, the first of several.

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
    team = team or Processes()
    if team.members > 1 and (images or length is not None or seconds is not None):
        what = "images" if images else "videos with a length, whose windows are those of the training clips"
        raise ValueError(f"sequence_parallel is {team.members}, but has no effect on {what}; leave it out")
    pipeline = load_pipeline(model_source(model), pick_device(device))
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        apply_adapter(pipeline.transformer, adapter, adapter_scale)
    config = pipeline.transformer.config
    ending = ".png" if images else suffix
    if given.folder is not None:
        jobs = plan_continuations(config, out, ending, numbers, classes, given.folder, given.labelled)[:most]
    else:
        jobs = plan_jobs(config, out, ending, numbers, classes, prompts, prompt_table)[:most]
    if images:
        num_frames = 1

    own = latents_of(pipeline.transformer, pipeline.vae, None, None)
    asked = None if size is None else Size.of(size)
    grid = own if asked is None else latents_of(pipeline.transformer, pipeline.vae, asked.height, asked.width)
    clip_frames = default_frames(config, grid)
    settings = {
        "transformer": fingerprint(pipeline.transformer),
        "autoencoder": fingerprint(pipeline.vae),
        **recipe.settings(config),
        "num_frames": num_frames or pixel_frames(pipeline.vae.config, clip_frames),
        "use_temporal": not images,
        "frame_interval": config["frame_interval"],
        "fps": config["fps"],
        "draws": DRAWS,
    }
    if asked is not None and grid != own:
        settings["size"] = str(asked)
    if given.guided and recipe.scale(config) == 1:
        raise ValueError("guide_frames has no effect with a guidance_scale of 1")
    if given:
        settings |= {"guide_frames": given.guided, "exact": given.exact}
    windows = plan_windows(
        pipeline,
        None if images else num_frames,
        length,
        seconds,
        overlap,
        images or given.exact or bool(given.last_image),
        clip_frames,
    )
    if windows is not None:
        settings |= {"num_frames": windows.length, "overlap": windows.overlap}
    doings = None if actions is None else read_actions(actions, config, settings["num_frames"])
    if doings is not None:
        if images:
            raise ValueError("actions have no effect on images")
        settings |= {"actions": " ".join(doings)}
    kept = read_given(given, jobs, pipeline, settings["num_frames"] if windows is None else windows.window, size)
    check_generation(out, settings)
    records: dict[Table, dict[Path, str | None]] = {
        PROMPT_TABLE: {job.path: job.prompt for job in jobs},
        GIVEN_TABLE: {path: digest(places) for path, places in kept.items()},
    }
    for table, values in records.items():
        check_files(out, table, values)
    options = recipe.prepare(pipeline)
    pipeline.transformer.sequence_group = open_group(team, pipeline.transformer.device)
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
                "actions": None if doings is None else [doings] * len(batch),
                "height": None if asked is None else asked.height,
                "width": None if asked is None else asked.width,
                **options,
            }
            if windows is not None:
                write_generation(out, settings)
                write_long_videos(pipeline, batch, windows, out, settings, records[GIVEN_TABLE], inputs, progress)
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
            if team.member == 0:
                writing = writer.submit(_write, batch, np.asarray(videos), config["fps"])
            progress.update(progress.done + len(batch))
        if writing is not None:
            writing.result()
    team.wait()
    return [job.path for job in jobs]


def read_actions(file: Path, config: Mapping[str, Any], num_frames: int) -> list[str]:
    """Reads the actions of a video: names, separated by white space.

    Raises:
        ValueError: if the file cannot be read, or names other actions than the model has, or not one for each frame.
    """
    try:
        names = read_text(file).split()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if len(names) != num_frames:
        raise ValueError(f"{file}: has {len(names)} actions, but the videos have {num_frames} frames")
    try:
        action_numbers(config, [names])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return names


def _write(batch: Sequence[Job], videos: npt.NDArray[np.uint8], fps: float) -> None:
    for job, frames in zip(batch, videos, strict=True):
        if job.path.exists():
            continue
        if job.path.suffix == ".png":
            with replacing(job.path) as partial:
                Image.fromarray(frames[0]).save(partial)
        else:
            write_video(job.path, frames, fps)
