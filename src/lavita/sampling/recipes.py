"""How a model is sampled: sampler, steps and guidance, and what makes it faster at a price."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from diffusers import ConfigMixin

from lavita.core.precision import low_precision, store_linear_weights
from lavita.models.compilation import compile_blocks
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.schedulers import Spacing
from lavita.sampling.step_cache import CacheName, check_cache

DEFAULT_GUIDANCE = 1.5
Quantization = Literal["int8"]


@dataclass(frozen=True)
class Recipe:
    """All that decides a video beside model, class or prompt, length and seed."""

    sampler: str = "unipc"
    """One of `pipeline.SAMPLERS`."""
    steps: int | None = None
    """Network evaluations; by default 25, and 250 for ddpm."""
    spacing: Spacing = "trailing"
    """Where the steps lie (see `pipeline.make_scheduler`)."""
    guidance_scale: float | None = None
    """1 for none; by default 1.5 for a model with classes or texts."""
    guidance_interval: tuple[float, float] | None = None
    """Timesteps between which there is guidance; by default all."""
    cache: CacheName | None = None
    """What steps reuse of earlier ones (see `step_cache`); by default nothing."""
    quantize: Quantization | None = None
    """`int8` computes the blocks' linear layers in 8 bits (see `quantization`), on a CPU."""
    compiled: bool = False
    """Compile the blocks first (see `compiled`); changes videos by rounding."""

    def __post_init__(self) -> None:
        """Checks what needs no model.

        Raises:
            ValueError: for an unknown name, or a cache that does not work with compiled blocks.
        """
        if self.quantize not in (None, *get_args(Quantization)):
            raise ValueError(f"quantize is {self.quantize!r}; allowed: {', '.join(get_args(Quantization))}")
        if self.cache is not None:
            check_cache(self.cache, self.compiled)

    def changed(self, **given: Any) -> Recipe:
        """Another one with the values that are not None."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})

    @property
    def num_steps(self) -> int:
        """Network evaluations."""
        return self.steps if self.steps is not None else 250 if self.sampler == "ddpm" else 25

    def scale(self, config: ConfigMixin) -> float:
        """The guidance scale for a transformer of that configuration."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return DEFAULT_GUIDANCE if config["num_classes"] or config["text_dim"] else 1.0

    def settings(self, config: ConfigMixin) -> dict[str, Any]:
        """What a folder of samples records: the usual values always, the others where they are not the usual ones."""
        optional = {
            "spacing": self.spacing if self.spacing != "trailing" else None,
            "guidance_interval": self.guidance_interval and list(self.guidance_interval),
            "cache": self.cache,
            "quantize": self.quantize,
            "compiled": self.compiled or None,
        }
        always = {"sampler": self.sampler, "steps": self.num_steps, "guidance_scale": self.scale(config)}
        return always | {key: value for key, value in optional.items() if value is not None}

    def prepare(self, pipeline: LavitaPipeline) -> dict[str, Any]:
        """Makes a pipeline ready for calls of precision `auto`, and returns what each of its calls is given.

        Args:
            pipeline: changed in place, for good.

        Raises:
            ValueError: for what does not suit the model or the machine.
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


RECIPES = {
    "default": Recipe(),
    "paper": Recipe(sampler="ddpm", steps=250),
    "fast": Recipe(sampler="sde-dpm++", steps=8, guidance_interval=(100, 800)),
}


def find_recipe(name: str) -> Recipe:
    """One of `RECIPES`; ValueError for another name."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
