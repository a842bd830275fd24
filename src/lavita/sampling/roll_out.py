"""Videos of any length: windows of the model's length, each of which goes on from the last frames of the one before.

A window is given latents, not decoded frames, so nothing is lost from one to the next, and positions in time are those
of training. Only one window is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavita.core.files import replacing
from lavita.models.actions import Actions
from lavita.models.autoencoder import temporal_downsampling
from lavita.sampling.pipeline import LavitaPipeline

DEFAULT_OVERLAP = 4
MOST_FRAMES = 2**20
"""Longest video; more would be taken for a slip of the pen."""


@dataclass(frozen=True)
class Windows:
    """How a long video is divided."""

    length: int
    """Frames of the video."""
    window: int
    """Frames of a window: the length of the training clips."""
    overlap: int = DEFAULT_OVERLAP
    """Last frames of a window that are given to the next one."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: if windows would not go on, or the video has no frame.
        """
        if not 1 <= self.length <= MOST_FRAMES:
            raise ValueError(f"length is {self.length}, but must be in 1..{MOST_FRAMES}")
        if not 1 <= self.overlap < self.window:
            raise ValueError(
                f"overlap is {self.overlap}, but must be in 1..{self.window - 1}: a window has {self.window} frames"
            )

    def frames_of(self, index: int) -> range:
        """The frames of a window, of which the last one's may lie beyond the end of the video."""
        start = index * (self.window - self.overlap)
        return range(start, start + self.window)

    @property
    def count(self) -> int:
        """Number of windows."""
        return 1 + max(0, -(-(self.length - self.window) // (self.window - self.overlap)))


def roll_out(
    pipeline: LavitaPipeline,
    windows: Windows,
    noise: Callable[[int], Sequence[torch.Generator]],
    journal: Path | None = None,
    on_window: Callable[[], None] = lambda: None,
    **options: Any,
) -> Generator[torch.Tensor]:
    """Generates long videos window by window.

    Args:
        pipeline: its model must know the given frames of kind `start` (`first`, for an overlap of 1).
        windows: how the videos are divided.
        noise: gives the generators of a window, one per video; those of the first window make the first frames the same
            as those of a video without roll-out.
        journal: folder in which each finished window is kept, so that a stopped roll-out goes on; by default none.
        on_window: called after each window.
        options: arguments of `LavitaPipeline`, of which `image`, `video` and `given` are for the first window, and
            `actions` for the whole videos.

    Yields:
        Scaled latents of the next frames, (B, n, C, h, w).

    Raises:
        ValueError: if the model does not know such given frames, or its autoencoder merges frames.
    """
    if (factor := temporal_downsampling(pipeline.vae.config)) > 1:
        raise ValueError(
            f"length is {windows.length}, but the autoencoder merges groups of {factor} frames, which windows would cut"
        )
    names = {"image", "video", "given"} & set(options)
    first: dict[str, Any] = {name: options.pop(name) for name in names}
    guided = options.pop("guide_given", False)
    actions: Actions | None = options.pop("actions", None)
    for row in actions or ():
        if len(row) != windows.length:
            raise ValueError(f"actions are for {len(row)} frames, but the videos have {windows.length}")
    tail: torch.Tensor | None = None
    done = 0
    for index in range(windows.count):
        file = None if journal is None else journal / f"window-{index:05d}.safetensors"
        found = None if file is None else _read(file)
        if found is None:
            given: dict[str, Any] = first if tail is None else {"given_latents": tail}
            if actions is not None:
                places = windows.frames_of(index)
                options["actions"] = [
                    [row[place] if place < windows.length else None for place in places] for row in actions
                ]
            is_given = any(value is not None for value in given.values())
            latents = pipeline(
                num_frames=windows.window,
                generator=list(noise(index)),
                output_type="latent",
                guide_given=guided and is_given,
                **given,
                **options,
            ).frames
            assert isinstance(latents, torch.Tensor)
            found = latents.cpu()
            if file is not None:
                with replacing(file) as partial:
                    save_file({"latents": found.contiguous()}, partial)
        tail = found[:, -windows.overlap :]
        new = found if index == 0 else found[:, windows.overlap :]
        new = new[:, : windows.length - done]
        done += new.shape[1]
        on_window()
        yield new


def _read(file: Path) -> torch.Tensor | None:
    """The latents of a window that was finished before."""
    try:
        return load_file(file)["latents"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
