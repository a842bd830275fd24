"""Recipes: sampler, steps, guidance, and what makes sampling faster at a price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lavita.core.names import CacheName, Spacing
from lavita.core.precision import low_precision, store_linear_weights
from lavita.models.compilation import compile_blocks
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.sampling.denoiser import Guidance
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.step_cache import check_cache

DEFAULT_GUIDANCE = 1.5
Quantization = Literal["int8"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a video besides the model, the class or prompt, the length and the seed."""

    sampler: str = "unipc"
    """One of `schedulers.SAMPLERS`."""
    steps: int | None = None
    """Number of steps; by default 25, with ddpm 250."""
    spacing: Spacing = "trailing"
    """Positions of the steps (see `schedulers.make_scheduler`)."""
    guidance_scale: float | None = None
    """1 for none; by default 1.5 for a class- or text-conditional model."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest timestep with guidance; by default all."""
    cache: CacheName | None = None
    """Step cache that reuses parts of earlier evaluations (see `step_cache.StepCache`); by default none."""
    quantize: Quantization | None = None
    """`int8` computes the linear layers of the blocks in 8 bits, on a CPU (see `int8`)."""
    compiled: bool = False
    """Compile the blocks first (see `models.compilation`); this changes videos by rounding."""

    def __post_init__(self) -> None:
        """Checks the fields that need no model.

        Raises:
            ValueError: for an unknown name, a guidance that cannot be, or a cache that does not work with compiled
                blocks.
        """
        Guidance(
            DEFAULT_GUIDANCE if self.guidance_scale is None else self.guidance_scale,
            (0, NUM_TIMESTEPS) if self.guidance_interval is None else self.guidance_interval,
        )
        if self.quantize not in (None, *get_args(Quantization)):
            raise ValueError(f"quantize is {self.quantize!r}; allowed: {', '.join(get_args(Quantization))}")
        if self.cache is not None:
            check_cache(self.cache, self.compiled)

    def changed(self, **fields: Any) -> Recipe:
        """A copy with some fields replaced, those that are not None."""
        return replace(self, **{name: value for name, value in fields.items() if value is not None})

    @property
    def num_steps(self) -> int:
        """Number of steps, with the default filled in."""
        return self.steps if self.steps is not None else 250 if self.sampler == "ddpm" else 25

    def scale(self, config: Mapping[str, Any]) -> float:
        """Guidance scale for a transformer with this configuration, with the default filled in."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return DEFAULT_GUIDANCE if config["num_classes"] or config["text_dim"] else 1.0

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The record in a folder of samples: sampler, steps and guidance always, the rest if it is not the default."""
        optional = {
            "spacing": self.spacing if self.spacing != "trailing" else None,
            "guidance_interval": self.guidance_interval and list(self.guidance_interval),
            "cache": self.cache,
            "quantize": self.quantize,
            "compiled": self.compiled or None,
        }
        always = {"sampler": self.sampler, "steps": self.num_steps, "guidance_scale": self.scale(config)}
        return always | {name: value for name, value in optional.items() if value is not None}

    def prepare(self, pipeline: LavitaPipeline) -> dict[str, Any]:
        """Prepares a pipeline for sampling with this recipe in precision `auto`.

        Args:
            pipeline: changed in place, for good.

        Returns:
            Arguments for each call of the pipeline.

        Raises:
            ValueError: if a field does not suit the model or the machine.
        """
        pipeline.use_sampler(self.sampler, self.spacing)
        if self.quantize is not None:
            quantize_int8(pipeline.transformer)
        store_linear_weights(pipeline.transformer.blocks, low_precision(pipeline.transformer.device, "auto"))
        if self.compiled:
            compile_blocks(pipeline.transformer)
        return {
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.scale(pipeline.transformer.config),
            "guidance_interval": self.guidance_interval,
            "cache": self.cache,
        }


# Of `paper`, the sampler and the number of steps are the public code's: the paper names none, and no guidance either.
RECIPES = {
    "default": Recipe(),
    "paper": Recipe(sampler="ddpm", steps=250, guidance_scale=1.0),
    "fast": Recipe(sampler="sde-dpm++", steps=8, guidance_interval=(100, 800)),
}


def find_recipe(name: str) -> Recipe:
    """Looks up one of `RECIPES`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
