"""Batches: clips, image frames, their labels or captions, noise and timesteps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.data.actions import ActionTable, match_actions
from lavita.data.buckets import clip_sampler, image_sampler
from lavita.data.captions import CaptionSampler, match_captions
from lavita.data.catalog import Catalog
from lavita.data.clip_sources import ClipSource, open_images, open_videos
from lavita.data.clips import ClipDraw, ClipSampler
from lavita.data.config import DataConfig
from lavita.data.latent_cache.reading import LatentClip
from lavita.data.text_embeddings import TextTable
from lavita.models.autoencoder import Autoencoder, temporal_downsampling
from lavita.models.cross_attention import text_shape
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.given_frames import GivenMasks
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.shapes import sample_grid
from lavita.training.config import TrainConfig
from lavita.training.data_record import Contents, video_facts
from lavita.training.timesteps import Timesteps
from lavita.video.formats import VideoError

MOST_ATTEMPTS = 20
"""Clips that are drawn in place of an unreadable one before the data set itself is considered broken."""


@dataclass
class Batch:
    """Clips of one optimizer step, with the noise that is added to them and their conditions."""

    latents: torch.Tensor
    """z_0, (B, F + I, C, h, w): clips of F frames, each followed by I images."""
    noise: torch.Tensor
    """Standard normal, like `latents`."""
    timesteps: torch.Tensor
    """int64 (B,) in 0..T-1, or for a flow float32 (B,) in 0..T."""
    class_labels: torch.Tensor | None
    """int64 (B,) or, with images, (B, 1 + I); a dropped label is the null class. None without classes."""
    text_embeds: torch.Tensor | None
    """float32 (B, text_dim) or (B, 1 + I, text_dim), with 1 + L before text_dim for a model of `text_tokens`; a dropped
    caption is the empty text. None without captions."""
    num_images: int = 0
    """I, images that follow each clip."""
    given: torch.Tensor | None = None
    """bool (B, F + I), the frames that the model is given without noise; None for a model without `given_frames`."""
    actions: torch.Tensor | None = None
    """int64 (B, F + I), the action of each frame; images, and clips whose actions are dropped, have none, the last
    number. None for a model without actions."""
    draws: Sequence[ClipDraw] = ()
    """Where the clips come from; empty in a random batch."""

    def part(self, first: int, size: int, device: torch.device) -> Batch:
        """`size` clips from `first` on, on a device."""
        chosen = slice(first, first + size)
        # Pinned memory is copied while the device works; other memory must not change before the copy is done.
        return self._with(lambda tensor: tensor[chosen].to(device, non_blocking=tensor.is_pinned()), self.draws[chosen])

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, from which a GPU copies without waiting."""
        return self._with(lambda tensor: tensor.pin_memory(), self.draws)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor], draws: Sequence[ClipDraw]) -> Batch:
        return Batch(
            latents=change(self.latents),
            noise=change(self.noise),
            timesteps=change(self.timesteps),
            class_labels=None if self.class_labels is None else change(self.class_labels),
            text_embeds=None if self.text_embeds is None else change(self.text_embeds),
            num_images=self.num_images,
            given=None if self.given is None else change(self.given),
            actions=None if self.actions is None else change(self.actions),
            draws=draws,
        )


def random_batch(
    config: Mapping[str, Any], batch_size: int, num_frames: int | None = None, num_images: int = 0, seed: int = 0
) -> Batch:
    """A batch of random numbers that fits a model, to measure a training step without data.

    Args:
        config: the model's configuration: its sizes and conditions.
        batch_size: B.
        num_frames: F; by default that of the configuration.
        num_images: I.
        seed: seed of the numbers.

    Returns:
        The batch, on torch's default device.
    """
    random = torch.Generator().manual_seed(seed)
    length = (num_frames or config["num_frames"]) + num_images
    shape = (batch_size, length, config.get("in_channels", 4), *sample_grid(config))
    conditions = (batch_size, 1 + num_images) if num_images else (batch_size,)
    num_classes, text_dim = config.get("num_classes", 0), config.get("text_dim", 0)
    return Batch(
        latents=torch.randn(shape, generator=random),
        noise=torch.randn(shape, generator=random),
        timesteps=torch.randint(0, NUM_TIMESTEPS, (batch_size,), generator=random),
        class_labels=torch.randint(0, num_classes, conditions, generator=random) if num_classes else None,
        text_embeds=torch.randn(*conditions, *text_shape(config), generator=random) if text_dim else None,
        num_images=num_images,
        given=torch.zeros(shape[:2], dtype=torch.bool) if config.get("given_frames") else None,
        actions=torch.zeros(shape[:2], dtype=torch.int64) if config.get("action_names") else None,
    )


class BatchMaker:
    """Reads the clips of a step and draws all that is random in it."""

    def __init__(
        self,
        data: DataConfig,
        settings: TrainConfig,
        vae: Autoencoder,
        class_dropout: float,
        timesteps: Timesteps | None = None,
        masks: GivenMasks | None = None,
        action_dropout: float = 0.0,
    ) -> None:
        """Opens the videos or the cache, the images, and the tables of captions.

        Args:
            data: the configuration of the data.
            settings: batch size, seed, and the precision of the autoencoder.
            vae: the autoencoder of the run.
            class_dropout: probability of dropping a clip's label or caption.
            timesteps: the distribution of the timesteps; by default all integers alike.
            masks: which frames of the clips are given; by default none.
            action_dropout: probability of dropping a clip's actions.

        Raises:
            ValueError: if data, configuration and autoencoder do not fit together.
        """
        seed = settings.seed
        self.seed, self.batch_size, self.broken = seed, settings.batch_size, data.broken
        self._unreadable: set[Path] = set()
        self.num_images, self.dropout = data.num_images, class_dropout
        self.timesteps, self.masks = timesteps or Timesteps(), masks or GivenMasks()
        self.statistics: LatentStatistics | None = None
        """The statistics that latents are normalised with, once they are known; None leaves latents as they are."""
        self.source = open_videos(data, vae, settings.precision)
        tables: list[tuple[Mapping[str, tuple[str, ...]], Catalog]] = []
        if data.captions is not None:
            captions, self.source.catalog = match_captions(data.captions, self.source.catalog, data.broken)
            tables.append((captions, self.source.catalog))
        self.actions: ActionTable | None = None
        self.action_dropout = action_dropout
        if data.actions is not None:
            if (factor := temporal_downsampling(vae.config)) > 1:
                raise ConfigError(f"actions are set, but the autoencoder merges groups of {factor} frames")
            self.actions, self.source.catalog = match_actions(data.actions, self.source.catalog, data.broken)
        catalog = self.source.catalog
        self.class_names = catalog.class_names
        self.sampler = clip_sampler(catalog, data, seed)
        self.image_source = self.source if data.images is None else open_images(data, vae, settings.precision)
        if data.image_captions is not None:
            captions, self.image_source.catalog = match_captions(
                data.image_captions, self.image_source.catalog, data.broken
            )
            tables.append((captions, self.image_source.catalog))
        images = self.image_source.catalog
        self.image_sampler = image_sampler(images, data, seed, self.sampler)
        if unknown := sorted(set(images.class_names) - set(self.class_names)):
            raise ConfigError(f"{images.root}: has class {unknown[0]!r}, which the videos do not have")
        self._captions = [captions for captions, _ in tables]
        self.captions = CaptionSampler(tables, seed) if tables else None
        self.text_table: TextTable | None = None
        """Embeddings of `captions.texts`, (texts, text_dim) or (texts, 1 + L, text_dim), once `embed_captions` was
        called."""

    def contents(self) -> Contents:
        """What the clips and images are drawn from, to recognise it when the run is resumed."""
        sources = {"videos": self.source}
        if self.image_source is not self.source:
            sources["images"] = self.image_source
        tables: list[Mapping[str, tuple[str, ...]] | None] = [*self._captions] or [None] * len(sources)
        if self.actions is not None:
            texts = tables[0] or {}
            tables[0] = {name: (*texts.get(name, ()), text) for name, text in self.actions.texts().items()}
        return {
            kind: video_facts(source.catalog, source.num_bytes, captions)
            for (kind, source), captions in zip(sources.items(), tables, strict=True)
        }

    def embed_captions(self, encoder: Callable[[Sequence[str]], TextTable]) -> None:
        """Encodes every text once; with captions this comes before the first `make`."""
        assert self.captions is not None
        self.text_table = encoder(self.captions.texts).cpu()

    def example_embeds(self, count: int) -> torch.Tensor | None:
        """Embeddings of captions, evenly spaced through the table, count rows of it; None without captions."""
        if self.text_table is None:
            return None
        return self.text_table[torch.linspace(1, len(self.text_table) - 1, count).round().long()]

    def make_all(self, steps: range, team: Processes, device: torch.device) -> Iterator[Batch]:
        """This process's share of the batch of each step, in pinned memory if the device is a GPU."""
        share = self.batch_size // team.count
        for step in steps:
            batch = self.make(step, range(team.rank * share, (team.rank + 1) * share))
            yield batch.pin_memory() if device.type == "cuda" else batch

    def make(self, step: int, indices: range | None = None) -> Batch:
        """The clips with some indices (from 0) in the batch of a step; by default all of them.

        All clips of a step have one shape, see `buckets.BucketSampler`.

        A clip, its noise, timestep and label are pure functions of (seed, step, index): processes that share a batch
        or cut it into micro-batches train on the same clips as a single process. They do not depend on the images that
        follow, whose numbers come from a generator of their own, so that joint training sees the same clips with the
        same noise at the same timesteps as training on videos alone.

        Raises:
            VideoError: if a video cannot be read and `data.broken` is `error`, or no clip in place of it can be read.
        """
        indices = range(self.batch_size) if indices is None else indices
        count = self.num_images
        clips, clip_latents = self._read(self.source, self.sampler.at(step), step, indices)
        image_indices = range(indices.start * count, indices.stop * count)
        images, image_latents = self._read(self.image_source, self.image_sampler.at(step), step, image_indices)
        latents, noises, timesteps, drops = [], [], [], []
        for row, index in enumerate(indices):
            drawn = [self._noised([clip_latents[row]], random := generator(self.seed, "step", step, index))]
            timesteps.append(self.timesteps.draw(random))
            drop = [torch.rand(1, generator=random)]
            if count:
                own = image_latents[row * count : (row + 1) * count]
                drawn.append(self._noised(own, random := generator(self.seed, "images", step, index)))
                drop.append(torch.rand(count, generator=random))
            sampled, noise = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))  # (F + I, C, h, w)
            latents.append(sampled)
            noises.append(noise)
            drops.append(torch.cat(drop) < self.dropout)
        batch = Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noises),
            timesteps=torch.stack(timesteps),
            class_labels=None,
            text_embeds=None,
            num_images=count,
            given=self._draw_given(step, indices, latents[0].shape[0] - count),
            actions=self._actions_of(step, indices, clips),
            draws=clips,
        )
        if not self.class_names and self.captions is None:
            return batch
        dropped = torch.stack(drops) if count else torch.stack(drops)[:, 0]
        conditions: list[
            tuple[tuple[int, ...], ClipDraw, Catalog]
        ] = []  # each clip, then its images, with their places
        for row, (index, draw) in enumerate(zip(indices, clips, strict=True)):
            conditions.append(((index,), draw, self.source.catalog))
            for number, image in enumerate(images[row * count : (row + 1) * count]):
                conditions.append(((index, number), image, self.image_source.catalog))
        if self.captions is None:
            labels = torch.tensor([self._label(draw, catalog) for _, draw, catalog in conditions]).view(dropped.shape)
            batch.class_labels = labels.masked_fill(dropped, len(self.class_names))
            return batch
        assert self.text_table is not None, "the table of text embeddings comes before the first batch"
        rows = [self.captions.draw(catalog.root, draw.video.name, step, *place) for place, draw, catalog in conditions]
        batch.text_embeds = self.text_table[torch.tensor(rows).view(dropped.shape).masked_fill(dropped, 0)]
        return batch

    def _draw_given(self, step: int, indices: range, num_frames: int) -> torch.Tensor | None:
        """Which frames of the clips are given, from a generator of its own; images never are."""
        if not self.masks.kinds:
            return None
        masks = [self.masks.draw(num_frames, generator(self.seed, "given", step, index)) for index in indices]
        return torch.nn.functional.pad(torch.stack(masks), (0, self.num_images))

    def _actions_of(self, step: int, indices: range, clips: Sequence[ClipDraw]) -> torch.Tensor | None:
        """The actions of the frames of clips, dropped by generators of their own."""
        if self.actions is None:
            return None
        rows, none = [], len(self.actions.names)
        for index, draw in zip(indices, clips, strict=True):
            dropped = torch.rand(1, generator=generator(self.seed, "actions", step, index)).item() < self.action_dropout
            own = self.actions.of_clip(draw.video.name, draw.start, self.sampler.at(step).num_frames)
            rows.append(torch.full_like(own, none) if dropped else own)
        return torch.nn.functional.pad(torch.stack(rows), (0, self.num_images), value=none)

    def _noised(
        self, posteriors: Sequence[tuple[torch.Tensor, torch.Tensor]], random: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples latents (F, C, h, w) of frames with the given means and deviations, and draws noise for them."""
        mean, std = (torch.cat(tensors) for tensors in zip(*posteriors, strict=True))
        sampled = mean + std * torch.randn(mean.shape, generator=random)
        if self.statistics is not None:
            sampled = self.statistics.normalize(sampled)
        return sampled, torch.randn(mean.shape, generator=random)

    def _read(
        self, source: ClipSource, sampler: ClipSampler, step: int, indices: range
    ) -> tuple[list[ClipDraw], list[LatentClip]]:
        """Draws clips and reads their latents; with `data.broken=skip`, others are drawn for unreadable ones."""
        draws = [sampler.draw(step, index) for index in indices]
        try:
            return draws, source.read_many(draws, sampler.num_frames, sampler.frame_interval)
        except VideoError:
            if self.broken == "error":
                raise
        latents = []
        for row, index in enumerate(indices):
            for attempt in range(MOST_ATTEMPTS):
                draws[row] = sampler.draw(step, index, attempt)
                try:
                    latents.append(source.read(draws[row], sampler.num_frames, sampler.frame_interval))
                    break
                except VideoError as error:
                    if attempt == MOST_ATTEMPTS - 1:
                        raise
                    if error.path not in self._unreadable:
                        self._unreadable.add(error.path)
                        broken = f"{draws[row].video.name}: {error.problem}"
                        print(f"step {step + 1:,}: another clip is drawn in place of one of {broken}", file=sys.stderr)
        return draws, latents

    def _label(self, draw: ClipDraw, catalog: Catalog) -> int:
        """The label among the classes of the videos, which may be more than those of the images."""
        assert draw.video.label is not None
        return self.class_names.index(catalog.class_names[draw.video.label])
