"""Configuration of the transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lavita.core.config import StrictConfig

DEFAULT_TUBE_SIZE = 2


class ModelConfig(StrictConfig):
    """The transformer; fields left out come from the preset."""

    preset: str = "S/2"
    """Size and patch: one of S, B, L, XL, or `tiny`, `mini`, `small` for laptops, then /2, /4 or /8."""
    variant: Literal[1, 2, 3, 4] = 2
    """1: all spatial blocks, then all temporal ones; 2: alternating; 3: spatial, then temporal attention in each block;
    4: half of the heads spatial, half temporal (Sec. 3.2 of the paper)."""
    patch_embedding: Literal["uniform", "compression"] = "uniform"
    """`uniform`: patches of each frame; `compression`: tubes of several frames (Sec. 3.3)."""
    tube_size: int | None = Field(None, ge=2)
    """Frames of a tube, with `compression`; 2 by default."""
    conditioning: Literal["s_adaln", "all_tokens"] = "s_adaln"
    """How timestep and label enter: they steer norms and gates, or are tokens (Sec. 3.4)."""
    temporal_position: Literal["absolute", "rope"] = "absolute"
    """Sin-cos positions of the frames, or rotary ones (Sec. 3.5)."""
    text_encoder: str | None = None
    """With `data.captions`: path or hub id of the text encoder, any of transformers' with a pooled output; by default
    the CLIP of Stable Diffusion 1.4."""
    class_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Probability of training a clip without its label or caption, which classifier-free guidance needs."""
    learn_sigma: bool = True
    """Predict the variance beside the noise."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What is predicted: the noise, as in the paper, or the velocity, which learns colours and layout in far fewer
    steps."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> ModelConfig:
        if self.tube_size is not None and self.patch_embedding == "uniform":
            raise ValueError(f"tube_size is {self.tube_size}, but has no effect with patch_embedding=uniform")
        return self
