"""The model's part of a sampling loop: guidance, vectors computed ahead of their steps, and step caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lavita.core.names import CacheName
from lavita.core.precision import Precision, autocast
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.flow import make_objective
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.given import GivenLatents
from lavita.sampling.step_cache import StepCache

# Memory for S-AdaLN's vectors computed ahead: enough for 40 steps of two clips at XL/2.
MODULATION_BYTES = 64 * 2**20
# Far beyond what is of use; far below what makes numbers infinite.
LARGEST_GUIDANCE = 1000.0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022), at all timesteps or in an interval of them."""

    scale: float = 1.0
    """1 for none; w gives `uncond + w (cond - uncond)`."""
    interval: tuple[float, float] = (0, NUM_TIMESTEPS)
    """Lowest and highest timestep with guidance; a step without it costs half (Kynkaanniemi et al. 2024)."""

    def __post_init__(self) -> None:
        """Checks scale and interval.

        Raises:
            ValueError: for a scale that is not a number or too large, or an interval that is not two rising timesteps
                of the schedule.
        """
        if not -LARGEST_GUIDANCE <= self.scale <= LARGEST_GUIDANCE:
            raise ValueError(
                f"guidance_scale is {self.scale:g}, but must be in {-LARGEST_GUIDANCE:g}..{LARGEST_GUIDANCE:g}"
            )
        low, high = self.interval
        if not 0 <= low < high <= NUM_TIMESTEPS:
            raise ValueError(
                f"guidance_interval is {low:g} to {high:g}, but must be two timesteps in 0..{NUM_TIMESTEPS}, rising"
            )

    def at(self, timestep: float) -> bool:
        """Whether there is guidance at a timestep."""
        return self.scale != 1.0 and self.interval[0] <= timestep <= self.interval[1]


class Denoiser:
    """Evaluates a model at the steps of one sampling loop, in their order."""

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
        given: GivenLatents | None = None,
        given_noise: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
    ) -> None:
        """Prepares a loop.

        Args:
            model: the transformer.
            timesteps: timesteps of the loop, falling, (S,).
            class_labels: int64 (B,), or with guidance (2 B,), whose second half is "no label".
            text_embeds: float32 (B, text_dim), or with guidance (2 B, text_dim), whose second half is the negative one.
            guidance: guidance of the loop.
            use_temporal: see `LavitaTransformer3DModel.forward`.
            precision: see `core.precision.autocast`.
            cache: see `StepCache`; by default none.
            given: frames that are given to the model at every step; by default none.
            given_noise: noise (B, F, C, H, W) that the unconditional half of a guided step has in their place, so that
                guidance is towards the frames, too; by default both halves are given them.
            actions: int64 (B, F), the actions of the frames, which both halves of a guided step have; by default none.

        Raises:
            ValueError: for a cache that is unknown or does not work with this model.
        """
        self._model, self._timesteps = model, timesteps
        self._labels, self._texts = class_labels, text_embeds
        self._use_temporal, self._precision = use_temporal, precision
        self._given, self._given_noise, self._actions = given, given_noise, actions
        self._cache = None if cache is None else StepCache(cache, model)
        self._times: list[float] = timesteps.tolist()
        self._scale = guidance.scale
        self._guided = [guidance.at(timestep) for timestep in self._times]
        self._window = range(0)
        self._modulation: list[torch.Tensor] | None = None

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Surrounds the evaluations of the loop; afterwards the model is as before."""
        try:
            yield
        finally:
            if self._cache is not None:
                self._cache.end()

    def __call__(self, index: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts the noise (or velocity) of latents at a step, and its variance.

        The conditional and unconditional halves of a guided step are one batch; the variance is the conditional one's.

        Args:
            index: number of the step.
            latents: noisy latents (B, F, C, H, W).

        Returns:
            Prediction and variance, float32 (B, F, C, H, W); the variance has C = 0 if the model predicts none.
        """
        batch, channels, guided = latents.shape[0], latents.shape[2], self._guided[index]
        cache, timestep = self._cache, self._times[index]
        if cache is not None and (index == 0 or guided != self._guided[index - 1]):
            cache.begin(timestep, guided)
        options: dict[str, Any] = {"use_temporal": self._use_temporal}
        inputs = self._inputs(index, latents, guided, options)
        timesteps = self._timesteps[index].expand(len(inputs))
        if self._actions is not None:
            options["actions"] = self._actions.repeat(len(inputs) // batch, 1)
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

    def _inputs(self, index: int, latents: torch.Tensor, guided: bool, options: dict[str, Any]) -> torch.Tensor:
        """The model's latents at a step, with the given frames in their places; adds `given` to its options."""
        given = self._given
        if given is None:
            return torch.cat([latents, latents]) if guided else latents
        placed = given.placed(latents)
        mask = given.mask.expand(len(latents), -1)
        if not guided:
            options["given"] = mask
            return placed
        if self._given_noise is None:
            options["given"] = torch.cat([mask, mask])
            return torch.cat([placed, placed])
        options["given"] = torch.cat([mask, torch.zeros_like(mask)])
        timesteps = self._timesteps[index].expand(len(latents))
        objective = make_objective(self._model.config["prediction_type"])
        noised = objective.q_sample(given.latents, timesteps, self._given_noise)
        return torch.cat([placed, GivenLatents(noised, given.mask).placed(latents)])

    def _modulation_at(self, index: int) -> list[torch.Tensor] | None:
        """S-AdaLN's vectors at a step, computed for as many steps at a time as MODULATION_BYTES allows."""
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
