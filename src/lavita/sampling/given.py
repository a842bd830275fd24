"""Frames that a video is given: encoded, and put in their places in the latents of a sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lavita.core.precision import Precision
from lavita.models.autoencoder import (
    Autoencoder,
    downsampling,
    encode,
    latent_frames,
    pixel_frames,
    temporal_downsampling,
)
from lavita.models.given_frames import kinds_of
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.shapes import sample_grid
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.video.formats import Frames

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


def frames_of_videos(
    image: Frames | None,
    last_image: Frames | None,
    video: Frames | None,
    given: Places | Sequence[Places] | None,
    batch: int,
    num_frames: int,
) -> list[dict[int, Frames]]:
    """The given frames of each video of a batch, see `merge_places`; empty if there are none.

    Raises:
        ValueError: also if `given` is a list of another length.
    """
    each = [given] * batch if given is None or isinstance(given, Mapping) else list(given)
    if len(each) != batch:
        raise ValueError(f"given has frames for {len(each)} videos, but this call makes {batch}")
    kept = [merge_places(image, last_image, video, places, num_frames) for places in each]
    return kept if any(kept) else []


def encode_given(
    model: LavitaTransformer3DModel,
    vae: Autoencoder,
    batch: Sequence[Places],
    num_frames: int,
    precision: Precision = "auto",
    grid: tuple[int, int] | None = None,
) -> GivenLatents:
    """Encodes the given frames of a batch of videos, all at the same places.

    Args:
        model: has to be trained with frames at such places.
        vae: the autoencoder of its latents.
        batch: the frames of each video.
        num_frames: frames of a video.
        precision: see `autoencoder.encode`.
        grid: height and width of the videos' latents; by default those of the model.

    Raises:
        ValueError: if the frames are not at places that the model knows, have another size than its videos, or are not
            whole groups of an autoencoder that merges frames.
    """
    places = list(batch[0])
    if any(list(given) != places for given in batch):
        raise ValueError("given has frames at different places for some videos, but a batch has them at the same ones")
    count, grid = latent_frames(vae.config, num_frames), grid or sample_grid(model.config)
    which = places
    if (factor := temporal_downsampling(vae.config)) > 1:
        number = latent_frames(vae.config, len(places)) if places == list(range(len(places))) else 0
        if not number or pixel_frames(vae.config, number) != len(places):
            raise ValueError(
                f"frames {listed(places)} are given, but the autoencoder merges groups of {factor}: only the first "
                f"1, {1 + factor}, {1 + 2 * factor} ... frames can be given"
            )
        which = list(range(number))
    latents = []
    for given in batch:
        mean = encode(vae, np.stack(list(given.values())), precision)[0]
        if mean.shape[-2:] != grid:
            height, width = next(iter(given.values())).shape[:2]
            there, across = (side * downsampling(vae) for side in grid)
            raise ValueError(f"a given frame is {width}x{height}, but the model's videos are {across}x{there}")
        latents.append(mean)
    return place_latents(model, torch.stack(latents), which, count)


def latents_of(
    model: LavitaTransformer3DModel, vae: Autoencoder, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of the latents of videos of a size in pixels; by default those of the model.

    Raises:
        ValueError: if the autoencoder or the model's patches do not divide the size.
    """
    grid, unit = sample_grid(model.config), downsampling(vae)
    sides = []
    for name, asked, default in (("height", height, grid[0]), ("width", width, grid[1])):
        side = default * unit if asked is None else asked
        if side < 1 or side % (unit * model.config["patch_size"]):
            raise ValueError(f"{name} is {side}, but must be a multiple of {unit * model.config['patch_size']}")
        sides.append(side // unit)
    return sides[0], sides[1]


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
    mask = check_places(model.config, places, count)
    statistics, device = LatentStatistics.of(model.config), model.device
    clips = torch.zeros(len(latents), count, *latents.shape[2:], device=device)
    latents = latents.to(device)
    clips[:, list(places)] = latents if statistics is None else statistics.normalize(latents)
    return GivenLatents(clips, mask.to(device))


def check_places(config: Mapping[str, Any], places: Sequence[int], count: int) -> torch.Tensor:
    """Checks that a model was trained with given frames at such places.

    Args:
        config: the model's fields.
        places: the places of the given latents.
        count: latents of a video.

    Returns:
        The mask, bool (F,).

    Raises:
        ValueError: if it was not; frames at all places are right for every model with given frames.
    """
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(places)] = True
    known = config["given_frames"]
    if not known:
        raise ValueError(
            "frames were given, but this model was trained to make whole clips; train it with model.given_frames"
        )
    if not mask.all() and not kinds_of(mask) & set(known):
        raise ValueError(
            f"frames {listed(places)} of {count} are given, but this model was trained with given frames of the kinds "
            f"{', '.join(known)}"
        )
    return mask


def listed(places: Sequence[int]) -> str:
    """Places as text, shortened if there are many."""
    return ", ".join(map(str, places)) if len(places) < 8 else f"{places[0]} to {places[-1]}"
