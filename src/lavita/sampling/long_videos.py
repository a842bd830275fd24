"""Long videos of `lavita sample`: their windows, and files that are written while they grow."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from lavita.core.progress import Progress
from lavita.core.seeds import generator
from lavita.models.autoencoder import decode
from lavita.sampling.given import check_places
from lavita.sampling.jobs import Job
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.roll_out import DEFAULT_OVERLAP, MOST_FRAMES, Windows, roll_out
from lavita.video.writing import video_writer


def plan_windows(
    pipeline: LavitaPipeline,
    num_frames: int | None,
    length: int | None,
    seconds: float | None,
    overlap: int | None,
    is_refused: bool,
    window: int,
) -> Windows | None:
    """How long videos are divided; None for videos of one window.

    Args:
        pipeline: the model.
        num_frames: length of videos of one window, if it was asked for.
        length: frames of long videos.
        seconds: the same in seconds.
        overlap: frames that windows have in common.
        is_refused: whether something else was asked for that does not go with long videos.
        window: frames of a window.

    Raises:
        ValueError: if the arguments do not fit together.
    """
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
    windows = Windows(length, window, DEFAULT_OVERLAP if overlap is None else overlap)
    if windows.count > 1:
        check_places(config, range(windows.overlap), windows.window)
    return windows


def write_long_videos(
    pipeline: LavitaPipeline,
    batch: Sequence[Job],
    windows: Windows,
    out: Path,
    settings: Mapping[str, Any],
    given: Mapping[Path, str | None],
    inputs: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Generates a batch of long videos and writes them while they grow; finished windows are kept until the end.

    Args:
        pipeline: the model.
        batch: the videos.
        windows: how they are divided.
        out: the folder of the samples; the windows are kept in its folder `.windows`.
        settings: how its videos are made, for windows of other settings are not gone on with.
        given: what tells the given frames of each video apart.
        inputs: arguments of the pipeline.
        progress: counts the windows.
    """
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
