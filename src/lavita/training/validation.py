"""The loss on held-out clips, by noise level: the same clips, noise and timesteps every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lavita.core.config import ConfigError
from lavita.core.precision import Precision, autocast
from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.data.captions import CaptionSampler, match_captions
from lavita.data.catalog import Catalog
from lavita.data.clip_sources import open_validation
from lavita.data.clips import ClipSampler
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.diffusion import NUM_TIMESTEPS, GaussianDiffusion
from lavita.training.config import RunConfig

LEVELS = 10
"""Noise levels: equal parts of the schedule, the least noisy first."""
TOGETHER = 2  # levels in one forward pass: without gradients, less memory than a training step on one clip takes


class Validation:
    """Held-out clips of a run, and the model's loss on them.

    Each clip is noised once within every tenth of the schedule, so the mean over clips and levels estimates what the
    training loss would be on these videos (clips alone: no images, no labels dropped, nothing mirrored). As clips,
    noise and timesteps stay the same, a change of the loss is a change of the model.
    """

    def __init__(
        self,
        config: RunConfig,
        vae: AutoencoderKL,
        training: Catalog,
        embed: Callable[[Sequence[str]], torch.Tensor] | None = None,
        team: Processes | None = None,
    ) -> None:
        """Chooses the clips and reads the latents of this process's share of them, once.

        Args:
            config: the run, with `data.validation`.
            vae: the run's autoencoder.
            training: the videos that it trains on, for their classes; none of them may be held out.
            embed: texts to embeddings, float32 (B, text_dim); needed with captions.
            team: the processes that share the clips.

        Raises:
            ValueError: where held-out and training videos, captions and autoencoder do not fit together.
        """
        self._settings, self._team = config.train, team or Processes()
        data, seed, count = config.data, config.train.seed, config.train.validation_clips
        if count < self._team.count:
            raise ConfigError(f"train.validation_clips is {count}, but each of {self._team.count} processes needs one")
        source = open_validation(data, vae, self._settings.precision)
        tables = []
        if data.validation_captions is not None:
            table, source.catalog = match_captions(data.validation_captions, source.catalog, data.broken)
            tables.append((table, source.catalog))
        labels = _labels(source.catalog, training)
        _check_held_out(source.catalog, training)
        sampler = ClipSampler(source.catalog, data.num_frames, data.frame_interval, False, seed, "validation")
        draws = [sampler.draw(0, index) for index in range(count)]
        self._mine = self._team.share(range(len(draws)))
        latents = []
        clips = source.read_many([draws[index] for index in self._mine], data.num_frames, data.frame_interval)
        for index, (mean, std) in zip(self._mine, clips, strict=True):
            latents.append(mean + std * torch.randn(mean.shape, generator=generator(seed, "validation", index)))
        self._latents = latents
        """z_0 of each clip of this process, (F, C, h, w)."""
        self._labels: torch.Tensor | None = None
        self._embeds: torch.Tensor | None = None
        if labels:
            rows = [draws[index].video.label for index in self._mine]
            self._labels = torch.tensor([labels[row] for row in rows if row is not None], dtype=torch.int64)
        elif tables:
            assert embed is not None, "captions need their encoder"
            captions = CaptionSampler(tables, seed)
            root = source.catalog.root
            chosen = [captions.draw(root, draw.video.name, 0, index) for index, draw in enumerate(draws)]
            # Those of all clips in every process, as one of them may embed the texts for all.
            self._embeds = embed([captions.texts[row] for row in chosen]).cpu()[list(self._mine)]

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, diffusion: GaussianDiffusion, device: torch.device, precision: Precision
    ) -> dict[str, Any]:
        """The loss of a model; to be called by all processes of the team together.

        Args:
            model: the transformer, also one that several processes share; it is left in the mode it had.
            diffusion: the objective.
            device: the model's.
            precision: see `runtime.autocast`.

        Returns:
            `loss`, the mean hybrid loss, and `by_noise`, its means at each of `LEVELS` parts of the schedule, from the
            least noise to the most; `simple` and `simple_by_noise`, L_simple alone. The same in every process, and
            for any number of them: the values of the clips are gathered, and added up in their order in float64.
        """
        training = model.training
        model.eval()
        values: list[list[list[float]]] = []
        count = self._settings.validation_clips
        # Every process computes as many clips as the first: the parts of a sharded model meet in each forward pass.
        for turn in range(-(-count // self._team.count)):
            rows = self._losses(min(turn, len(self._latents) - 1), model, diffusion, device, precision)
            if turn < len(self._latents):
                values.append(rows)
        model.train(training)
        table = np.array(self._team.collect(values), dtype=np.float64)  # (clips, 2, LEVELS)
        total, simple = table.mean(0)
        return {
            "loss": float(total.mean()),
            "by_noise": total.tolist(),
            "simple": float(simple.mean()),
            "simple_by_noise": simple.tolist(),
        }

    def _losses(
        self,
        place: int,
        model: torch.nn.Module,
        diffusion: GaussianDiffusion,
        device: torch.device,
        precision: Precision,
    ) -> list[list[float]]:
        """The hybrid loss and L_simple of a clip at each level."""
        random = generator(self._settings.seed, "validation", self._mine[place], "noise")
        clip = self._latents[place]
        width = NUM_TIMESTEPS // LEVELS
        timesteps = torch.arange(LEVELS) * width + torch.randint(0, width, (LEVELS,), generator=random)
        noise = torch.randn((LEVELS, *clip.shape), generator=random)
        rows: list[list[float]] = [[], []]
        for first in range(0, LEVELS, TOGETHER):
            part = slice(first, first + TOGETHER)
            z, t, eps = (x.to(device) for x in (clip.expand(TOGETHER, *clip.shape), timesteps[part], noise[part]))
            label, embed = (
                None if table is None else table[place].expand(TOGETHER, *table[place].shape).to(device)
                for table in (self._labels, self._embeds)
            )
            with autocast(device, precision):
                output = model(diffusion.q_sample(z, t, eps), t, label, embed).sample
            losses = diffusion.losses(output, z, t, eps)
            rows[0] += losses.total.tolist()
            rows[1] += losses.mse.tolist()
        return rows


def _labels(held_out: Catalog, training: Catalog) -> list[int]:
    """The number that each held-out class has in training."""
    numbers = {name: number for number, name in enumerate(training.class_names)}
    for name in held_out.class_names:
        if name not in numbers:
            known = ", ".join(list(numbers)[:8]) + (", ..." if len(numbers) > 8 else "")
            raise ConfigError(f"{held_out.root}: has class {name!r}, which the training videos have not ({known})")
    return [numbers[name] for name in held_out.class_names]


def _check_held_out(held_out: Catalog, training: Catalog) -> None:
    here, there = held_out.root.resolve(), training.root.resolve()
    trained_on = {there / video.name for video in training.videos}
    for video in held_out.videos:
        if here / video.name in trained_on:
            raise ConfigError(f"data.validation is {held_out.root}, but its {video.name} is a training video, too")
