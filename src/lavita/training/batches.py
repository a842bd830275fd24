"""What an optimizer step is made of: clips, image frames, their labels or captions, noise, timesteps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lavita.core.config import ConfigError
from lavita.core.seeds import generator
from lavita.data.captions import CaptionSampler, match_captions
from lavita.data.catalog import Catalog
from lavita.data.clip_sources import ClipSource, LatentClip, open_images, open_videos
from lavita.data.clips import ClipDraw, ClipSampler
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.training.config import RunConfig
from lavita.video.formats import VideoError

MOST_ATTEMPTS = 20  # clips drawn for a place, before the data set itself is at fault


@dataclass
class Batch:
    """Clips of one optimizer step; everything in it is a pure function of the seed, the step and the clip's place."""

    latents: torch.Tensor
    """z_0, (B, F + I, C, h, w): clips of F frames, each followed by I images."""
    noise: torch.Tensor
    timesteps: torch.Tensor
    """int64 (B,)."""
    class_labels: torch.Tensor | None
    """int64 (B,) or, with images, (B, 1 + I), the null class where a label was dropped; None without classes."""
    text_embeds: torch.Tensor | None
    """float32 (B, text_dim) or (B, 1 + I, text_dim), the empty text's where a caption was dropped; None without."""
    draws: list[ClipDraw]
    """Where the clips come from."""

    def part(self, first: int, size: int, device: torch.device) -> Batch:
        """`size` clips from `first` on, on a device."""
        chosen = slice(first, first + size)
        parts = (self.latents, self.noise, self.timesteps, self.class_labels, self.text_embeds)
        tensors = [None if t is None else t[chosen].to(device, non_blocking=True) for t in parts]
        return Batch(*tensors, self.draws[chosen])  # type: ignore[call-arg, arg-type]


class BatchMaker:
    """Reads the clips of a step and draws all that is random in it."""

    def __init__(self, config: RunConfig, vae: AutoencoderKL) -> None:
        """Opens the videos or the cache, the images, and the tables of captions.

        Raises:
            ValueError: where data, configuration and autoencoder do not fit together.
        """
        data, seed = config.data, config.train.seed
        self.seed, self.batch_size, self.broken = seed, config.train.batch_size, data.broken
        self._unreadable: set[Path] = set()
        self.num_images, self.dropout = data.num_images, config.model.class_dropout
        self.source = open_videos(data, vae, config.train.precision)
        tables = []
        if data.captions is not None:
            captions, self.source.catalog = match_captions(data.captions, self.source.catalog, data.broken)
            tables.append((captions, self.source.catalog))
        catalog = self.source.catalog
        self.class_names = catalog.class_names
        self.sampler = ClipSampler(catalog, data.num_frames, data.frame_interval, data.horizontal_flip, seed)
        self.image_source = self.source if data.images is None else open_images(data, vae, config.train.precision)
        if data.image_captions is not None:
            captions, self.image_source.catalog = match_captions(
                data.image_captions, self.image_source.catalog, data.broken
            )
            tables.append((captions, self.image_source.catalog))
        images = self.image_source.catalog
        self.image_sampler = ClipSampler(images, 1, 1, data.horizontal_flip, seed, "image")
        if unknown := sorted(set(images.class_names) - set(self.class_names)):
            raise ConfigError(f"{images.root}: has class {unknown[0]!r}, which the videos have not")
        self.captions = CaptionSampler(tables, seed) if tables else None
        self.text_table: torch.Tensor | None = None
        """Embeddings of `captions.texts`, float32 (texts, text_dim), once `embed_captions` was called."""

    def embed_captions(self, encoder: Callable[[Sequence[str]], torch.Tensor]) -> None:
        """Encodes every text once; to be called before `make` where there are captions."""
        assert self.captions is not None
        self.text_table = encoder(self.captions.texts).cpu()

    def example_embeds(self, count: int) -> torch.Tensor | None:
        """Embeddings of captions, evenly spaced through the table, (count, text_dim); None without captions."""
        if self.text_table is None:
            return None
        return self.text_table[torch.linspace(1, len(self.text_table) - 1, count).round().long()]

    def make(self, step: int, places: range | None = None) -> Batch:
        """The clips at some places of a step's batch (from 0), by default at all.

        A clip, its noise, timestep and label are functions of (seed, step, place): processes that share a batch, or
        cut it into parts, train on what one process would have.
        """
        places = range(self.batch_size) if places is None else places
        count = self.num_images
        clips, clip_latents = self._read(self.source, self.sampler, step, places)
        image_places = range(places.start * count, places.stop * count)
        images, image_latents = self._read(self.image_source, self.image_sampler, step, image_places)
        latents, noises, timesteps, drops = [], [], [], []
        for index, place in enumerate(places):
            parts = [clip_latents[index], *image_latents[index * count : (index + 1) * count]]
            mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # (F + I, C, h, w)
            random = generator(self.seed, "step", step, place)
            latents.append(mean + std * torch.randn(mean.shape, generator=random))
            noises.append(torch.randn(mean.shape, generator=random))
            timesteps.append(torch.randint(0, NUM_TIMESTEPS, (), generator=random))
            drops.append(torch.rand(1 + count, generator=random) < self.dropout)
        batch = Batch(torch.stack(latents), torch.stack(noises), torch.stack(timesteps), None, None, clips)
        if not self.class_names and self.captions is None:
            return batch
        dropped = torch.stack(drops) if count else torch.stack(drops)[:, 0]
        own: list[tuple[int, ClipDraw, Catalog]] = []  # each clip, then its images, with its place among them all
        for index, (place, draw) in enumerate(zip(places, clips, strict=True)):
            first = place * (1 + count)
            own.append((first, draw, self.source.catalog))
            for number, image in enumerate(images[index * count : (index + 1) * count], 1):
                own.append((first + number, image, self.image_source.catalog))
        if self.captions is None:
            labels = torch.tensor([self._label(draw, catalog) for _, draw, catalog in own]).view(dropped.shape)
            batch.class_labels = labels.masked_fill(dropped, len(self.class_names))
            return batch
        assert self.text_table is not None, "the table of text embeddings comes before the first batch"
        rows = [self.captions.draw(catalog.root, draw.video.name, step, number) for number, draw, catalog in own]
        batch.text_embeds = self.text_table[torch.tensor(rows).view(dropped.shape).masked_fill(dropped, 0)]
        return batch

    def _read(
        self, source: ClipSource, sampler: ClipSampler, step: int, places: range
    ) -> tuple[list[ClipDraw], list[LatentClip]]:
        """The clips of places, and their latents; with `data.broken=skip`, another clip for one that is unreadable."""
        draws = [sampler.draw(step, place) for place in places]
        try:
            return draws, source.read_many(draws, sampler.num_frames, sampler.frame_interval)
        except VideoError:
            if self.broken == "error":
                raise
        latents = []
        for index, place in enumerate(places):
            for attempt in range(MOST_ATTEMPTS):
                draws[index] = sampler.draw(step, place, attempt)
                try:
                    latents.append(source.read(draws[index], sampler.num_frames, sampler.frame_interval))
                    break
                except VideoError as error:
                    if attempt == MOST_ATTEMPTS - 1:
                        raise
                    if error.path not in self._unreadable:
                        self._unreadable.add(error.path)
                        print(f"step {step + 1:,}: another clip is taken for one of {error}", file=sys.stderr)
        return draws, latents

    def _label(self, draw: ClipDraw, catalog: Catalog) -> int:
        """The label among the videos' classes, which may be more than the images'."""
        assert draw.video.label is not None
        return self.class_names.index(catalog.class_names[draw.video.label])
