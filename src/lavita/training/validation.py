"""The loss on held-out clips, by noise level: the same clips, noise and timesteps every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lavita.core.config import ConfigError
from lavita.core.precision import Precision, autocast
from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.data.buckets import validation_sampler
from lavita.data.captions import CaptionSampler, match_captions
from lavita.data.catalog import Catalog
from lavita.data.clip_sources import ClipSource, open_validation
from lavita.data.clips import ClipSampler
from lavita.data.config import DataConfig
from lavita.data.text_embeddings import TextTable
from lavita.models.autoencoder import Autoencoder
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.flow import Objective
from lavita.models.latent_statistics import LatentStatistics
from lavita.training.config import TrainConfig

LEVELS = 10
"""Noise levels: equal parts of the schedule, the least noisy first."""
LEVELS_AT_ONCE = 2
"""Levels per forward pass: without gradients this takes less memory than a training step on one clip."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out videos of a run, checked against the training videos."""

    source: ClipSource
    captions: Mapping[str, tuple[str, ...]] | None
    """The captions of each video by its name; None without captions."""
    labels: list[int]
    """The label that each held-out class has in training; empty without classes."""

    @classmethod
    def open(cls, data: DataConfig, precision: Precision, vae: Autoencoder, training: Catalog) -> HeldOut:
        """Opens `data.validation`.

        Args:
            data: the configuration of the data.
            precision: precision of the autoencoder.
            vae: the autoencoder of the run.
            training: the training videos; none of them may be held out.

        Raises:
            ValueError: if held-out and training videos, captions and autoencoder do not fit together.
        """
        source, captions = open_validation(data, vae, precision), None
        if data.validation_captions is not None:
            captions, source.catalog = match_captions(data.validation_captions, source.catalog, data.broken)
        labels = _labels(source.catalog, training)
        _check_held_out(source.catalog, training)
        return cls(source, captions, labels)


class Validation:
    """The model's loss on held-out clips.

    Each clip is noised once within every tenth of the schedule, so the mean over clips and levels estimates the
    training loss on these videos (clips only: without images, dropped labels or mirroring). Because clips, noise and
    timesteps stay the same, a change of the loss is a change of the model.
    """

    def __init__(
        self,
        data: DataConfig,
        settings: TrainConfig,
        vae: Autoencoder,
        training: Catalog,
        embed: Callable[[Sequence[str]], TextTable] | None = None,
        team: Processes | None = None,
        statistics: LatentStatistics | None = None,
    ) -> None:
        """Chooses the clips and reads the latents of this process's share of them, once.

        Args:
            data: the configuration of the data, with `validation`.
            settings: the number of clips, the seed, and the precision of the autoencoder.
            vae: the autoencoder of the run.
            training: the training videos, for their classes; none of them may be held out.
            embed: turns texts into embeddings; needed with captions.
            team: the processes, which share the clips.
            statistics: the statistics that the model's latents are normalised with, if they are.

        Raises:
            ValueError: if held-out and training videos, captions and autoencoder do not fit together.
        """
        self._settings, self._team = settings, team or Processes()
        seed, count = settings.seed, settings.validation_clips
        if count < self._team.count:
            raise ConfigError(f"train.validation_clips is {count}, but each of {self._team.count} processes needs one")
        held_out = HeldOut.open(data, settings.precision, vae, training)
        catalog = held_out.source.catalog
        sampler = validation_sampler(catalog, data, seed)
        self._own = self._team.share(range(count))
        if isinstance(sampler, ClipSampler):
            draws = [sampler.draw(0, index) for index in range(count)]
            own = [draws[index] for index in self._own]
            clips = held_out.source.read_many(own, data.num_frames, data.frame_interval)
        else:  # each clip has its own shape
            shapes = [sampler.at(index) for index in range(count)]
            draws = [shape.draw(0, index) for index, shape in enumerate(shapes)]
            clips = [
                held_out.source.read(draws[index], shapes[index].num_frames, data.frame_interval) for index in self._own
            ]
        sampled = (
            mean + std * torch.randn(mean.shape, generator=generator(seed, "validation", index))
            for index, (mean, std) in zip(self._own, clips, strict=True)
        )
        self.latents = [clip if statistics is None else statistics.normalize(clip) for clip in sampled]
        """z_0 of each clip of this process, (F, C, h, w)."""
        self._labels: torch.Tensor | None = None
        self._embeds: torch.Tensor | None = None
        if held_out.labels:
            rows = [draws[index].video.label for index in self._own]
            self._labels = torch.tensor([held_out.labels[row] for row in rows if row is not None], dtype=torch.int64)
        elif held_out.captions is not None:
            assert embed is not None, "captions need their encoder"
            captions = CaptionSampler([(held_out.captions, catalog)], seed)
            chosen = [captions.draw(catalog.root, draw.video.name, 0, index) for index, draw in enumerate(draws)]
            # The texts of all clips in every process: one of them may embed the texts for all.
            self._embeds = embed([captions.texts[row] for row in chosen]).cpu()[torch.tensor(self._own)]

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, diffusion: Objective, device: torch.device, precision: Precision
    ) -> dict[str, Any]:
        """The loss of a model; all processes of the team call this together.

        Args:
            model: the transformer, which may be sharded; its mode (training or not) is restored.
            diffusion: the objective.
            device: the device of the model.
            precision: precision of the matrix products.

        Returns:
            `loss`, the mean hybrid loss, and `by_noise`, its means at each of `LEVELS` parts of the schedule, from the
            least noise to the most; `simple` and `simple_by_noise`, L_simple alone. The values are the same in every
            process and for any number of processes: those of the clips are gathered and added in order, in float64.
        """
        training = model.training
        model.eval()
        values: list[list[list[float]]] = []
        count = self._settings.validation_clips
        # Every process makes as many forward passes as the first one: the shards of a model take part in each.
        for turn in range(-(-count // self._team.count)):
            rows = self._losses(min(turn, len(self.latents) - 1), model, diffusion, device, precision)
            if turn < len(self.latents):
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
        index: int,
        model: torch.nn.Module,
        diffusion: Objective,
        device: torch.device,
        precision: Precision,
    ) -> list[list[float]]:
        """The hybrid loss and L_simple of this process's `index`-th clip at each level."""
        random = generator(self._settings.seed, "validation", self._own[index], "noise")
        clip = self.latents[index]
        width = NUM_TIMESTEPS // LEVELS
        timesteps = torch.arange(LEVELS) * width + torch.randint(0, width, (LEVELS,), generator=random)
        noise = torch.randn((LEVELS, *clip.shape), generator=random)
        rows: list[list[float]] = [[], []]
        for first in range(0, LEVELS, LEVELS_AT_ONCE):
            part = slice(first, first + LEVELS_AT_ONCE)
            z, t, eps = (x.to(device) for x in (clip.expand(LEVELS_AT_ONCE, *clip.shape), timesteps[part], noise[part]))
            label, embed = (
                None if table is None else table[index].expand(LEVELS_AT_ONCE, *table[index].shape).to(device)
                for table in (self._labels, self._embeds)
            )
            with autocast(device, precision):
                output = model(diffusion.q_sample(z, t, eps), t, label, embed).sample
            losses = diffusion.losses(output, z, t, eps)
            rows[0] += losses.total.tolist()
            rows[1] += losses.mse.tolist()
        return rows


def _labels(held_out: Catalog, training: Catalog) -> list[int]:
    """The label that each held-out class has in training."""
    labels = {name: label for label, name in enumerate(training.class_names)}
    for name in held_out.class_names:
        if name not in labels:
            known = ", ".join(list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
            raise ConfigError(f"{held_out.root}: has class {name!r}, which the training videos do not have ({known})")
    return [labels[name] for name in held_out.class_names]


def _check_held_out(held_out: Catalog, training: Catalog) -> None:
    """Refuses videos that are trained on."""
    held_out_root, training_root = held_out.root.resolve(), training.root.resolve()
    trained_on = {training_root / video.name for video in training.videos}
    for video in held_out.videos:
        if held_out_root / video.name in trained_on:
            raise ConfigError(f"data.validation is {held_out.root}, but its {video.name} is a training video, too")
