"""The model's part of a sampler's loop: guidance, conditions known ahead, and what is reused from earlier steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lavita.core.precision import Precision, autocast
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.step_cache import CacheName, StepCache

# Of the conditions' vectors that are computed ahead: 40 steps of two clips at XL/2.
MODULATION_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022), over all of the schedule or a part of it."""

    scale: float = 1.0
    """1 for none; w gives `uncond + w (cond - uncond)`."""
    interval: tuple[float, float] = (0, NUM_TIMESTEPS)
    """Timesteps, least and most, between which there is guidance; elsewhere half of the work is saved
    (Kynkaanniemi et al. 2024)."""

    def __post_init__(self) -> None:
        """Checks the interval.

        Raises:
            ValueError: where it is no part of the schedule.
        """
        low, high = self.interval
        if not 0 <= low < high <= NUM_TIMESTEPS:
            raise ValueError(
                f"guidance_interval is {low:g} to {high:g}, but must be two timesteps in 0..{NUM_TIMESTEPS}, rising"
            )

    def at(self, timestep: float) -> bool:
        """Whether a timestep is guided."""
        return self.scale != 1.0 and self.interval[0] <= timestep <= self.interval[1]


class Denoiser:
    """Evaluates a model at the steps of one loop, in their order."""

    def __init__(
        self,
        model: LavitaTransformer3DModel,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
        guidance: Guidance,
        use_temporal: bool = True,
        precision: Precision = "auto",
        cache: CacheName | None = None,
    ) -> None:
        """Prepares a loop.

        Args:
            model: the transformer.
            timesteps: (S,), falling.
            class_labels: (B,), or with guidance (2 B,), the second half "no label".
            text_embeds: the same for texts.
            guidance: of the loop.
            use_temporal: see `LavitaTransformer3DModel.forward`.
            precision: see `runtime.autocast`.
            cache: what steps reuse.
        """
        self._model, self._timesteps = model, timesteps
        self._labels, self._texts = class_labels, text_embeds
        self._use_temporal, self._precision = use_temporal, precision
        self._cache = None if cache is None else StepCache(cache, model)
        self._times = timesteps.tolist()
        self._scale = guidance.scale
        self._guided = [guidance.at(timestep) for timestep in self._times]
        self._window = range(0)
        self._modulation: list[torch.Tensor] | None = None

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Surrounds the evaluations; what a cache keeps is freed at the end."""
        try:
            yield
        finally:
            if self._cache is not None:
                self._cache.end()

    @property
    def samples(self) -> int:
        """Samples that the transformer evaluates for each video in all: 2 a guided step, 1 another."""
        return sum(2 if guided else 1 for guided in self._guided)

    def __call__(self, index: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction for noisy latents (B, F, C, H, W) at step `index`, and its variance, which may be empty.

        Both halves of a guided step go through the network as one batch; the variance is the conditional one's.
        """
        batch, channels, guided = latents.shape[0], latents.shape[2], self._guided[index]
        cache, timestep = self._cache, self._times[index]
        if cache is not None and (index == 0 or guided != self._guided[index - 1]):
            cache.begin(timestep, guided)
        inputs = torch.cat([latents, latents]) if guided else latents
        timesteps = self._timesteps[index].expand(len(inputs))
        options: dict[str, Any] = {"use_temporal": self._use_temporal}
        for name, given in (("class_labels", self._labels), ("text_embeds", self._texts)):
            if given is not None:
                options[name] = given[: len(inputs)]
        modulation = None if cache is not None and cache.splits_batch else self._modulation_at(index)
        if modulation is not None:
            options["modulation"] = [vectors[: len(inputs)] for vectors in modulation]
        with autocast(latents.device, self._precision):
            if cache is None:
                output = self._model(inputs, timesteps, **options).sample.float()
            else:
                output = cache.evaluate(timestep, inputs, timesteps, **options).float()
        prediction, variance = output[:, :, :channels], output[:, :, channels:]
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + self._scale * (conditional - unconditional)
        return prediction, variance[:batch]

    def _modulation_at(self, index: int) -> list[torch.Tensor] | None:
        """The conditions' vectors of a step; they are computed for many steps at a time."""
        if index not in self._window:
            config = self._model.config
            given = next((given for given in (self._labels, self._texts) if given is not None), None)
            values = (6 * config["num_blocks"] + 2) * config["hidden_size"] * (1 if given is None else len(given))
            steps = max(1, MODULATION_BYTES // (4 * values))
            self._window = range(index, min(index + steps, len(self._times)))
            with autocast(self._timesteps.device, self._precision):
                self._modulation = self._model.modulate(
                    self._timesteps[self._window.start : self._window.stop], self._labels, self._texts
                )
        if self._modulation is None:
            return None
        return [vectors[index - self._window.start] for vectors in self._modulation]
