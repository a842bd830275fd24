"""Configuration of the transformer: the section `model` of a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lavita.core.config import StrictConfig
from lavita.models.cross_attention import LEAST_TEXT_TOKENS, MOST_TEXT_TOKENS
from lavita.models.given_frames import GivenKind

DEFAULT_TUBE_SIZE = 2


class ModelConfig(StrictConfig):
    """Configuration of the transformer; the preset gives the sizes."""

    preset: str = "S/2"
    """Size and patch: one of S, B, L, XL, or `tiny`, `mini`, `small` for laptops, then /1, /2, /4 or /8."""
    variant: Literal[1, 2, 3, 4] = 2
    """Order of spatial and temporal attention (Sec. 3.2 of the paper). 1: all spatial blocks, then all temporal ones;
    2: alternating blocks; 3: spatial, then temporal attention in each block; 4: both side by side, with half of the
    heads each."""
    patch_embedding: Literal["uniform", "compression"] = "uniform"
    """What becomes a token (Sec. 3.3): `uniform`: a patch of one frame; `compression`: a tube of several frames."""
    tube_size: int | None = Field(None, ge=2)
    """Frames per tube, with `compression`; 2 by default."""
    conditioning: Literal["s_adaln", "all_tokens"] = "s_adaln"
    """How timestep and label enter (Sec. 3.4): `s_adaln`: they modulate norms and gates; `all_tokens`: as tokens."""
    temporal_position: Literal["absolute", "absolute_input", "rope"] = "absolute"
    """Positions of the frames (Sec. 3.5): `absolute`: sin-cos, added to the tokens before the first temporal attention,
    in Variant 1 after half of the blocks, as in the published code; `absolute_input`: added at the input, as Sec. 3.3
    says; `rope`: rotary."""
    given_frames: list[GivenKind] = Field(default_factory=list)
    """Frames that may be given to the model, which fills in the rest: it then starts from an image, goes on with a
    video, or goes from one frame to another. Each training clip draws one of these kinds. `first`: the first frame;
    `start`: the first few; `last`: the last one; `ends`: the first and the last; `every`: every second, or third, and
    so on. Default: none, as in the paper."""
    given_dropout: float = Field(0.2, ge=0.0, lt=1.0)
    """With `given_frames`, the probability that a clip is trained without a given frame, so that the model still makes
    whole clips, and guidance towards the frames has a prediction without them."""
    action_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """With `data.actions`, the probability that a clip is trained without its actions, so that the model also makes
    videos without."""
    text_encoder: str | None = None
    """Path or hub id of the text encoder, with `data.captions`: any of transformers' with a pooled output; by default
    the CLIP of Stable Diffusion 1.4."""
    text_tokens: int | None = Field(None, ge=LEAST_TEXT_TOKENS, le=MOST_TEXT_TOKENS)
    """With `data.captions`, tokens of each caption that the model attends to by cross-attention, in every block that
    attends in space, besides its pooled embedding: texts are then understood word for word. Longer captions are cut,
    shorter ones padded. Default: the pooled embedding alone, as in the paper."""
    class_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Probability that a clip is trained without its label or caption, as classifier-free guidance needs."""
    learn_sigma: bool = True
    """Predict the variance in addition to the noise."""
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    """What the model predicts: `epsilon`, the noise, as in the paper; `v_prediction`, the velocity, with which it
    learns colours and layout in far fewer steps; or `flow`, the velocity of a rectified flow, along straight lines from
    noise to data, which needs `learn_sigma=false`."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> ModelConfig:
        if len(set(self.given_frames)) < len(self.given_frames):
            raise ValueError(f"given_frames is {self.given_frames}, but must name each kind once")
        if not self.given_frames and self.given_dropout != type(self).model_fields["given_dropout"].default:
            raise ValueError(f"given_dropout is {self.given_dropout}, but has no effect without given_frames")
        if self.tube_size is not None and self.patch_embedding == "uniform":
            raise ValueError(f"tube_size is {self.tube_size}, but has no effect with patch_embedding=uniform")
        if self.prediction_type == "flow" and self.learn_sigma:
            raise ValueError("learn_sigma is true, but must be false with prediction_type=flow: a flow has no variance")
        return self
