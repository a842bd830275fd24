"""Frames that a video is given: read, encoded, and put in their places in the latents of a sampling loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lavita.core.precision import Precision
from lavita.core.progress import say
from lavita.data.clips import center_crop_resize
from lavita.models.autoencoder import Autoencoder, encode, latent_frames, pixel_frames, temporal_downsampling
from lavita.models.given_frames import kinds_of
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.video.reading import probe, read_clip

Frames = npt.NDArray[np.uint8]
Places = Mapping[int, Frames]
"""Frames by their places in a video, from 0: uint8 (H, W, 3)."""


@dataclass(frozen=True)
class GivenLatents:
    """The given frames of a batch, as the model takes them."""

    latents: torch.Tensor
    """(B, F, C, h, w), zero in the frames that are not given."""
    mask: torch.Tensor
    """bool (F,), the frames that are given."""

    def placed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, F, C, h, w) with the given ones in their places."""
        return torch.where(self.mask[None, :, None, None, None], self.latents, latents)


def merge_places(
    image: Frames | None, last_image: Frames | None, video: Frames | None, given: Places | None, num_frames: int
) -> dict[int, Frames]:
    """The frames of a video that are given, by their places.

    Args:
        image: the first frame, uint8 (H, W, 3).
        last_image: the last frame, uint8 (H, W, 3).
        video: the first frames, uint8 (k, H, W, 3).
        given: further frames.
        num_frames: frames of the video.

    Raises:
        ValueError: if a frame is given twice, lies outside of the video, or is no frame.
    """
    found: dict[int, Frames] = {}
    named: list[tuple[str, Mapping[int, Frames]]] = [
        ("image", {} if image is None else {0: image}),
        ("video", {} if video is None else dict(enumerate(video))),
        ("given", given or {}),
        ("last_image", {} if last_image is None else {num_frames - 1: last_image}),
    ]
    for name, places in named:
        for place, frame in places.items():
            if not 0 <= place < num_frames:
                raise ValueError(f"{name} has a frame for place {place}, but the video has {num_frames} frames")
            if place in found:
                raise ValueError(f"{name} has a frame for place {place}, which is given already")
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"{name} has {frame.dtype} {frame.shape}, but frames are uint8 (H, W, 3)")
            found[place] = frame
    return dict(sorted(found.items()))


def encode_given(
    model: LavitaTransformer3DModel,
    vae: Autoencoder,
    batch: Sequence[Places],
    num_frames: int,
    precision: Precision = "auto",
) -> GivenLatents:
    """Encodes the given frames of a batch of videos, all at the same places.

    Args:
        model: has to be trained with frames at such places.
        vae: the autoencoder of its latents.
        batch: the frames of each video.
        num_frames: frames of a video.
        precision: see `autoencoder.encode`.

    Raises:
        ValueError: if the frames are not at places that the model knows, have another size than its videos, or are not
            whole groups of an autoencoder that merges frames.
    """
    places = list(batch[0])
    if any(list(given) != places for given in batch):
        raise ValueError(f"the videos of a batch must be given frames at the same places, but {places} differ")
    count, size = latent_frames(vae.config, num_frames), model.config["sample_size"]
    which = places
    if (factor := temporal_downsampling(vae.config)) > 1:
        number = latent_frames(vae.config, len(places)) if places == list(range(len(places))) else 0
        if not number or pixel_frames(vae.config, number) != len(places):
            raise ValueError(
                f"frames {_listed(places)} are given, but the autoencoder merges groups of {factor}: only the first "
                f"1, {1 + factor}, {1 + 2 * factor} ... frames can be given"
            )
        which = list(range(number))
    latents = []
    for given in batch:
        mean = encode(vae, np.stack(list(given.values())), precision)[0]
        if mean.shape[-2:] != (size, size):
            height, width = next(iter(given.values())).shape[:2]
            side = size * height // mean.shape[-2]
            raise ValueError(f"a given frame is {width}x{height}, but the model's videos are {side}x{side}")
        latents.append(mean)
    return place_latents(model, torch.stack(latents), which, count)


def place_latents(
    model: LavitaTransformer3DModel, latents: torch.Tensor, places: Sequence[int], count: int
) -> GivenLatents:
    """Puts given latents in their places.

    Args:
        model: has to be trained with frames at such places.
        latents: scaled latents (B, k, C, h, w), not normalised.
        places: the places of the k latents, rising.
        count: latents of a video.

    Raises:
        ValueError: if the model does not know such places.
    """
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(places)] = True
    known = model.config["given_frames"]
    if not known:
        raise ValueError(
            "frames were given, but this model was trained to make whole clips; train it with model.given_frames"
        )
    if not mask.all() and not kinds_of(mask) & set(known):
        raise ValueError(
            f"frames {_listed(places)} of {count} are given, but this model was trained with given frames of the kinds "
            f"{', '.join(known)}"
        )
    statistics, device = LatentStatistics.of(model.config), model.device
    clips = torch.zeros(len(latents), count, *latents.shape[2:], device=device)
    latents = latents.to(device)
    clips[:, list(places)] = latents if statistics is None else statistics.normalize(latents)
    return GivenLatents(clips, mask.to(device))


def _listed(places: Sequence[int]) -> str:
    return ", ".join(map(str, places)) if len(places) < 8 else f"{places[0]} to {places[-1]}"


def read_places(path: Path, places: Sequence[int], frame_interval: int) -> dict[int, Frames]:
    """Reads frames of a video, or an image.

    Args:
        path: video file, frame folder or image.
        places: frames of the clip that starts with the video, rising.
        frame_interval: frames of the file from one frame of the clip to the next.

    Raises:
        VideoError: if the file is missing, broken or too short.
    """
    return dict(zip(places, read_clip(path, 0, places[-1] + 1, frame_interval)[list(places)], strict=True))


class Fitting:
    """Crops and scales given frames to the size of the model's videos, and counts what was not of this size."""

    def __init__(self, resolution: int) -> None:
        """`resolution` is the side of the videos in pixels."""
        self._resolution = resolution
        self._others: list[str] = []

    def __call__(self, path: Path, places: Places) -> dict[int, Frames]:
        """The frames of a file in the size of the videos."""
        height, width = next(iter(places.values())).shape[:2]
        if (height, width) != (self._resolution, self._resolution):
            self._others.append(f"{path} is {width}x{height}")
        fitted = center_crop_resize(np.stack(list(places.values())), self._resolution)
        return dict(zip(places, fitted, strict=True))

    def report(self) -> None:
        """Says on stderr what was cropped and scaled, in one line."""
        if self._others:
            more = f" (and {len(self._others) - 1:,} more are of other sizes)" if self._others[1:] else ""
            say(f"{self._others[0]}{more}: the middle is cut out and scaled to {self._resolution}x{self._resolution}")


def places_of(path: Path, keep_frames: int | None, keep_every: int | None, num_frames: int) -> list[int]:
    """Which frames of a video are kept: the first ones, or every n-th.

    Args:
        path: the video.
        keep_frames: number of first frames; by default 1.
        keep_every: n.
        num_frames: frames of the video that is generated.

    Raises:
        ValueError: if both are set, or nothing would be left to generate.
        VideoError: if the file is missing or broken.
    """
    if keep_frames is not None and keep_every is not None:
        raise ValueError(f"keep_frames is {keep_frames} and keep_every {keep_every}; give one of them")
    if keep_every is not None:
        if not 2 <= keep_every < num_frames:
            raise ValueError(f"keep_every is {keep_every}, but must be in 2..{num_frames - 1}")
        return list(range(0, num_frames, keep_every))
    number = 1 if keep_frames is None else keep_frames
    if not 1 <= number < num_frames:
        raise ValueError(
            f"keep_frames is {number}, but must be in 1..{num_frames - 1}: a video has {num_frames} frames"
        )
    probe(path)
    return list(range(number))


def digest(places: Places) -> str:
    """A text that tells given frames apart: their places and a hash of their pixels."""
    pixels = hashlib.sha256(b"".join(frame.tobytes() for frame in places.values())).hexdigest()[:16]
    return f"{_listed(list(places))}: {pixels}"
