"""Step caches: diffusers' hooks that let a step of the sampling loop reuse what earlier steps computed.

Only caches that decide by the timestep or the number of the step are offered: a video then depends on its seed and
condition alone. FirstBlockCache and SeaCache decide by a mean over the batch, so that a video would depend on the
others in its batch; MagCache needs magnitudes measured for each checkpoint and sampler.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, get_args

import torch
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

from lavita.core.names import CacheName
from lavita.models.blocks import TransformerBlock
from lavita.models.transformer import LavitaTransformer3DModel

_BATCHED = ("class_labels", "text_embeds", "given", "actions")
"""Inputs of the model with one row per clip, besides its latents and timesteps."""

# FasterCache warns at every use that it is experimental, and that it calls torch.meshgrid in an old way.
logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="torch.meshgrid")


def check_cache(name: str, compiled: bool = False) -> None:
    """Checks the name of a cache.

    Raises:
        ValueError: if it is unknown, or does not work with compiled blocks: the hooks of `pab` and `fastercache` are on
            the attention modules, inside the compiled part of a block; those of `taylorseer` are outside.
    """
    if name not in get_args(CacheName):
        raise ValueError(f"cache is {name!r}; allowed: {', '.join(get_args(CacheName))}")
    if compiled and name != "taylorseer":
        raise ValueError(f"cache is {name}, which does not work with compiled blocks; allowed: taylorseer")


class StepCache:
    """One cache on one model during one sampling loop.

    - `pab`: Pyramid Attention Broadcast (Zhao et al. 2024). Between timesteps 850 and 100, spatial attention is
      computed at every 2nd step, temporal attention at every 4th; their outputs are reused in between.
    - `fastercache`: FasterCache (Lyu et al. 2024). Below timestep 641, with guidance, the unconditional half of the
      batch is estimated from the conditional one in 4 of 5 steps. In those steps, and without guidance in all steps
      below 681, every other attention is extrapolated from its last two outputs.
    - `taylorseer`: TaylorSeer (Liu et al. 2025) in its light form. After 3 steps, the output of the decoder is computed
      at every 2nd step and extrapolated linearly in between, without evaluating any block.
    """

    def __init__(self, name: CacheName, model: LavitaTransformer3DModel) -> None:
        """Chooses the cache; hooks are on the model only between `begin` and `end`.

        Raises:
            ValueError: for an unknown name, or a cache that does not work with the model's compiled blocks.
        """
        check_cache(name, any(block.compiled for block in model.blocks))
        self._name, self._model = name, model
        self._timestep = 0.0
        self._guided = False
        self._enabled = False

    @property
    def splits_batch(self) -> bool:
        """Whether the model may get only half of a guided batch, so that `modulation` for all of it would not fit."""
        return self._name == "fastercache" and self._guided

    def begin(self, timestep: float, guided: bool) -> None:
        """Starts with nothing to reuse: at the start of the loop, and at each step where guidance starts or ends.

        Args:
            timestep: timestep of the next step.
            guided: whether it and the following steps have guidance.

        Raises:
            ValueError: if the caller has enabled another cache on the model.
        """
        self.end()
        self._guided = guided
        self._model.enable_cache(self._config(timestep))
        self._enabled = True

    def end(self) -> None:
        """Removes the hooks and what they keep."""
        if self._enabled:
            self._model.disable_cache()
            self._enabled = False

    def evaluate(self, timestep: float, latents: torch.Tensor, timesteps: torch.Tensor, **options: Any) -> torch.Tensor:
        """Evaluates the model like `LavitaTransformer3DModel.forward`, with all conditions by name."""
        self._timestep = timestep
        if self.splits_batch:  # for diffusers, the unconditional half is the first one
            options |= {name: swap_halves(options[name]) for name in _BATCHED if name in options}
        with self._model.cache_context("sampling"):
            output: torch.Tensor = self._model(latents, timesteps, **options, return_dict=False)[0]
        return swap_halves(output) if self.splits_batch else output

    def _current_timestep(self) -> Any:
        return self._timestep

    def _config(self, timestep: float) -> TaylorSeerCacheConfig | FasterCacheConfig | PyramidAttentionBroadcastConfig:
        if self._name == "taylorseer":
            return TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=3,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=["final_layer"],
                skip_predict_identifiers=[r"blocks\.\d+"],
            )
        if self._name == "fastercache":
            return FasterCacheConfig(
                # Without guidance, the hook tries to reuse at its first step, too, unless that is outside of the range.
                spatial_attention_timestep_skip_range=(-1, 681 if self._guided else min(681, int(timestep))),
                attention_weight_callback=lambda _: 0.5,
                tensor_format="BFCHW",
                is_guidance_distilled=not self._guided,
                current_timestep_callback=self._current_timestep,
                _unconditional_conditional_input_kwargs_identifiers=list(_BATCHED),
            )
        names: dict[bool, list[str]] = {False: [], True: []}
        for index, block in enumerate(self._model.blocks):
            assert isinstance(block, TransformerBlock)
            names[block.mixing == "time"].append(rf"^blocks\.{index}\.attn$")
            names[True].append(rf"^blocks\.{index}\.temporal_attn$")
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=4,
            spatial_attention_timestep_skip_range=(100, 850),
            temporal_attention_timestep_skip_range=(100, 850),
            spatial_attention_block_identifiers=tuple(names[False]),
            temporal_attention_block_identifiers=tuple(names[True]),
            current_timestep_callback=self._current_timestep,
        )


def swap_halves(batch: torch.Tensor) -> torch.Tensor:
    """(2 B, ...) with its second half first."""
    return torch.cat(batch.chunk(2)[::-1])
