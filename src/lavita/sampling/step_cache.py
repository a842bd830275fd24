"""What a sampler's step reuses from the steps before: attentions (PAB), or whole spatial-temporal pairs.

Both say at the start which step computes what, from the timesteps alone: a video still depends on its seed and
condition only, not on those that share its batch.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.hooks import HookRegistry
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

from lavita.models.transformer import LavitaTransformer3DModel, Residuals

CALIBRATION = "step_cache.json"
PYRAMID_HOOK = "lavita_pyramid_attention_broadcast"


class StepCache(ABC):
    """Saves work in a sampler's loop."""

    @abstractmethod
    @contextmanager
    def sampling(self, model: LavitaTransformer3DModel, timesteps: Sequence[float]) -> Iterator[None]:
        """Around one loop over `timesteps`, from the noisiest on.

        Raises:
            ValueError: where it does not suit the model.
        """

    @abstractmethod
    def step(self, index: int, fresh: bool) -> dict[str, Any]:
        """Before the evaluation of step `index`: what it has to be given.

        `fresh` says that its batch has samples that the step before did not have, so that nothing may be reused.
        """


class PyramidCache(StepCache):
    """Pyramid Attention Broadcast (Zhao et al. 2024): an attention's output serves several steps.

    Through diffusers' hook. Attention changes least in the middle of the schedule, and along time less than in space.
    """

    def __init__(self, space_every: int = 2, time_every: int = 4, timesteps: tuple[float, float] = (100, 850)) -> None:
        """Attentions in space and in time are computed at every n-th step while the timestep is between two.

        Raises:
            ValueError: for a period below 1.
        """
        for name, every in (("space_every", space_every), ("time_every", time_every)):
            if every < 1:
                raise ValueError(f"{name} is {every}, but must be at least 1")
        self.space_every, self.time_every, self.range = space_every, time_every, timesteps
        self._timesteps: Sequence[float] = ()
        self._timestep = 0.0
        self._registries: list[HookRegistry] = []

    @contextmanager
    def sampling(self, model: LavitaTransformer3DModel, timesteps: Sequence[float]) -> Iterator[None]:
        """Hooks the attentions for the time of the loop; both halves of Variant 4's heads go by `space_every`."""
        if any(block.compiled for block in model.blocks):
            raise ValueError("cache is pab, which works on models that are not compiled")
        self._timesteps = timesteps
        for block in model.blocks:
            for attention, in_time in ((block.attn, block.mixing == "time"), (block.temporal_attn, True)):
                if attention is not None:
                    every = self.time_every if in_time else self.space_every
                    hook = PyramidAttentionBroadcastHook(self.range, every, lambda: self._timestep)
                    registry = HookRegistry.check_if_exists_or_initialize(attention)
                    registry.register_hook(hook, PYRAMID_HOOK)
                    self._registries.append(registry)
        try:
            yield
        finally:
            for registry in self._registries:
                registry.remove_hook(PYRAMID_HOOK)
            self._registries.clear()

    def step(self, index: int, fresh: bool) -> dict[str, Any]:
        """Tells the hooks the timestep."""
        self._timestep = self._timesteps[index]
        if fresh:
            for registry in self._registries:
                registry.reset_stateful_hooks(recurse=False)
        return {}


@dataclass(frozen=True)
class Calibration:
    """How far each group of blocks moves along the schedule.

    A group is a spatial-temporal pair; what it adds to the tokens is its residual.
    """

    timesteps: list[float]
    """Of the run it was measured in, falling."""
    path: list[list[float]]
    """At each of them, for each group: the sum so far of the relative L1 changes of its residual from step to step."""
    made_with: dict[str, Any]
    """Sampler, steps, guidance, clips: for people."""

    def at(self, timesteps: Sequence[float]) -> np.ndarray:
        """The path at other timesteps, (timesteps, groups), float64, between and beyond those measured by lines."""
        known = np.asarray(self.timesteps)[::-1]
        columns = np.asarray(self.path, dtype=np.float64)[::-1].T
        return np.stack([np.interp(np.asarray(timesteps, dtype=np.float64), known, column) for column in columns], 1)

    def save(self, folder: Path) -> Path:
        """Writes it into a pipeline's folder."""
        path = folder / CALIBRATION
        partial = path.with_name(f".{CALIBRATION}")
        facts = {"made_with": self.made_with, "timesteps": self.timesteps, "path": self.path}
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(path)
        return path


def load_calibration(folder: Path) -> Calibration:
    """Reads the calibration of a pipeline.

    Raises:
        ValueError: where there is none, or none that can be read.
    """
    path = folder / CALIBRATION
    if not path.exists():
        raise ValueError(
            f"{folder}: has no {CALIBRATION}, which --cache residual needs; make it: lavita calibrate {folder}"
        )
    try:
        return Calibration(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no calibration ({error}); make it again: lavita calibrate {folder}") from error


class ResidualCache(StepCache):
    """Reuses what a spatial-temporal pair added to the tokens, until it is expected to have changed too much.

    After TeaCache (Liu et al. 2024), which looks at the first block's input and decides for the whole model. Here a
    calibration says how far each pair moves between two timesteps, so each has its own rhythm. What it keeps are the
    tokens of a batch once a pair, in the precision of the evaluation.
    """

    def __init__(self, calibration: Calibration, threshold: float) -> None:
        """`threshold` is the relative change of a residual below which the old one is taken; 0 reuses nothing.

        Raises:
            ValueError: for a negative one.
        """
        if not threshold >= 0:
            raise ValueError(f"threshold is {threshold}, but must be at least 0")
        self.calibration, self.threshold = calibration, threshold
        self._plan: list[frozenset[int]] = []
        self._residuals = Residuals()

    def plan(self, timesteps: Sequence[float]) -> list[frozenset[int]]:
        """The groups that each step reuses; the first and the last step compute all."""
        path = self.calibration.at(timesteps)
        last = path[0].copy()
        steps: list[frozenset[int]] = [frozenset()]
        for now in path[1:]:
            still = now - last < self.threshold
            last = np.where(still, last, now)
            steps.append(frozenset(np.flatnonzero(still).tolist()))
        steps[-1] = frozenset()
        return steps

    @contextmanager
    def sampling(self, model: LavitaTransformer3DModel, timesteps: Sequence[float]) -> Iterator[None]:
        """Plans the loop, and forgets what it kept afterwards."""
        groups = len(self.calibration.path[0])
        if groups != len(model.block_groups):
            raise ValueError(
                f"{CALIBRATION} has {groups} pairs of blocks, but the model {len(model.block_groups)}: calibrate anew"
            )
        self._plan = self.plan(timesteps)
        self._residuals = Residuals()
        try:
            yield
        finally:
            self._residuals = Residuals()

    def step(self, index: int, fresh: bool) -> dict[str, Any]:
        """The residuals, and which of them to take."""
        self._residuals.reuse = frozenset() if fresh else self._plan[index]
        return {"residuals": self._residuals}


class Recorder(StepCache):
    """Reuses nothing and measures how far residuals move: what makes a `Calibration`."""

    def __init__(self) -> None:
        """Starts with nothing recorded; every loop it is used for counts alike."""
        self._timesteps: list[float] = []
        self._loops: list[list[list[float]]] = []
        self._now, self._before = Residuals(), Residuals()

    @contextmanager
    def sampling(self, model: LavitaTransformer3DModel, timesteps: Sequence[float]) -> Iterator[None]:
        """Records one loop."""
        self._timesteps = [float(timestep) for timestep in timesteps]
        self._now = Residuals()
        self._loops.append([[0.0] * len(model.block_groups)])
        yield
        self._loops[-1].append(self._change())

    def step(self, index: int, fresh: bool) -> dict[str, Any]:
        """Measures the step before, now that it is computed."""
        if index > 1:
            self._loops[-1].append(self._change())
        self._before, self._now = self._now, Residuals()
        return {"residuals": self._now}

    def _change(self) -> list[float]:
        pairs = [(self._before.kept[group], self._now.kept[group]) for group in sorted(self._now.kept)]
        return [((new - old).abs().sum() / old.abs().sum().clamp(min=1e-12)).item() for old, new in pairs]

    def calibration(self, made_with: dict[str, Any]) -> Calibration:
        """The mean path of all loops."""
        path = np.cumsum(np.mean(np.asarray(self._loops), axis=0), axis=0)
        return Calibration(self._timesteps, np.round(path, 6).tolist(), made_with)
