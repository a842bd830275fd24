"""Checks of the transformer's fields, when it is built, and of its inputs, when it is called.

Legend: B batch, F frames, C channels, H W latent size, I images after a video, S frames per tube.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch

from lavita.models.blocks import Conditioning
from lavita.models.cross_attention import check_text_tokens, text_shape
from lavita.models.given_frames import KINDS
from lavita.models.presets import block_plan
from lavita.models.shapes import check_shapes, sample_grid, trained_range

PATCH_EMBEDDINGS = ("uniform", "compression")
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)
TEMPORAL_POSITIONS = ("absolute", "absolute_input", "rope")


MOST_BLOCKS, MOST_VALUES = 2**12, 2**31
"""Limits that no real model comes near; a model is refused before memory is taken for what it claims."""
_FIELDS_BY_TYPE: dict[type, tuple[str, ...]] = {
    int: (
        *("num_frames", "in_channels", "patch_size", "hidden_size", "num_blocks", "num_heads"),
        *("variant", "tube_size", "num_classes", "text_dim", "text_tokens", "frame_interval"),
    ),
    float: ("mlp_ratio", "fps"),
    bool: ("learn_sigma",),
    str: ("patch_embedding", "conditioning", "temporal_position", "text_encoder", "prediction_type"),
    list: ("class_names", "given_frames", "action_names"),
}
"""The fields of the constructor; a `config.json` from elsewhere may hold anything."""
_OPTIONAL = ("class_names", "text_encoder", "given_frames", "action_names", "text_tokens")
_TYPES: dict[type, Any] = {float: (int, float), list: (list, tuple)}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


def frames_per_tube(config: Mapping[str, Any]) -> int:
    """S, the number of frames that become one token in time: 1 with the uniform patch embedding."""
    return int(config["tube_size"]) if config["patch_embedding"] == "compression" else 1


def check_fields(config: Mapping[str, Any]) -> None:
    """Checks the fields of the transformer's constructor.

    Raises:
        ValueError: if one is of another type or out of range, or two do not fit together.
    """
    for field_type, names in _FIELDS_BY_TYPE.items():
        for name in names:
            value = config[name]
            fits = isinstance(value, _TYPES.get(field_type, field_type))
            if isinstance(value, bool) and field_type is not bool:  # which is a kind of int
                fits = False
            if not fits and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name} is {value!r}, but must be {_TYPE_NAMES[field_type]}")
    for name in ("num_frames", "in_channels", "patch_size", "hidden_size", "num_heads", "tube_size"):
        if config[name] < 1:
            raise ValueError(f"{name} is {config[name]}, but must be at least 1")
    for name in ("mlp_ratio", "fps"):
        if not math.isfinite(config[name]):
            raise ValueError(f"{name} is {config[name]}, but must be a finite number")
    num_classes, text_dim, class_names = config["num_classes"], config["text_dim"], config["class_names"]
    if num_classes < 0 or text_dim < 0:
        raise ValueError(f"num_classes is {num_classes} and text_dim {text_dim}, but must be at least 0")
    check_shapes(config, frames_per_tube(config))
    trained_frames, trained_height, trained_width = trained_range(config)
    places = trained_height * trained_width // config["patch_size"] ** 2
    check_text_tokens(config)
    hidden_size, num_heads = config["hidden_size"], config["num_heads"]
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size is {hidden_size}, but must be a multiple of 4 and of num_heads ({num_heads})")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
    for field in ("class_names", "action_names"):
        names = config[field] or ()
        for position, name in enumerate(names):
            if not isinstance(name, str) or name in names[:position]:
                raise ValueError(f"{field} has {name!r} at {position}, but must be a list of different texts")
    for name, allowed in (
        ("patch_embedding", PATCH_EMBEDDINGS),
        ("conditioning", CONDITIONINGS),
        ("temporal_position", TEMPORAL_POSITIONS),
    ):
        if config[name] not in allowed:
            raise ValueError(f"{name} is {config[name]!r}; allowed: {', '.join(allowed)}")
    for kind in config["given_frames"] or ():
        if kind not in KINDS:
            raise ValueError(f"given_frames has {kind!r}; allowed: {', '.join(KINDS)}")
    if config["prediction_type"] == "flow" and config["learn_sigma"]:
        raise ValueError("learn_sigma is true, but must be false with prediction_type flow: a flow has no variance")
    if config["flow_shift"] is not None and (config["prediction_type"] != "flow" or config["flow_shift"] <= 0):
        raise ValueError(f"flow_shift is {config['flow_shift']}, but must be above 0, and None for a model of no flow")
    statistics = [config["latent_mean"], config["latent_std"]]
    if statistics != [None, None]:
        channels = config["in_channels"]
        if any(values is None or len(values) != channels for values in statistics) or min(statistics[1]) <= 0:
            raise ValueError(
                f"latent_mean is {statistics[0]} and latent_std {statistics[1]}, but latent_mean and latent_std are "
                f"lists of one number for each of the {channels} channels, and deviations are above 0"
            )
    if num_classes and text_dim:
        raise ValueError(f"num_classes is {num_classes} and text_dim {text_dim}, but a model has classes or texts")
    if config["num_blocks"] > MOST_BLOCKS:
        raise ValueError(f"num_blocks is {config['num_blocks']}, but must be at most {MOST_BLOCKS}")
    block_plan(config["variant"], config["num_blocks"])
    for name, rows in (
        *(("sample_size", places), ("num_frames", trained_frames)),
        *(("num_classes", num_classes), ("text_dim", text_dim), ("hidden_size", hidden_size)),
    ):
        if rows * hidden_size > MOST_VALUES:
            raise ValueError(
                f"{name} is {config[name]}, but a table of {rows} x hidden_size ({hidden_size}) must have at most "
                f"{MOST_VALUES} values"
            )
    if config["variant"] == 4 and num_heads % 2:
        raise ValueError(f"num_heads is {num_heads}, but must be even for variant 4: half of them attend in time")
    is_odd = config["variant"] != 4 and hidden_size // num_heads % 2  # of Variant 4 the heads are twice as wide
    if config["temporal_position"] == "rope" and is_odd:
        raise ValueError(
            f"hidden_size / num_heads is {hidden_size // num_heads}, but must be even for rope, which rotates pairs"
        )
    if config["num_frames"] % frames_per_tube(config):
        raise ValueError(
            f"num_frames is {config['num_frames']}, but must be a multiple of tube_size ({config['tube_size']})"
        )


def check_whole(config: Mapping[str, Any], missing: Iterable[str], is_reported: bool = False) -> None:
    """Checks that a model's saved weights were all there, but for the fixed positions, which are computed.

    Args:
        config: the model's fields.
        missing: names of the tensors that were not.
        is_reported: whether the caller looks at these names itself.

    Raises:
        ValueError: naming the first of them.
    """
    names = sorted(set(missing) - {"pos_embed", "temp_embed"})
    if config["variant"] == 4 and "blocks.0.temporal_attn.qkv.weight" in names:
        raise ValueError(
            "it is a variant 4 of an earlier version, one attention whose heads were split between space and time; "
            "this version's has two attentions, so train it again"
        )
    if names and not is_reported:
        raise ValueError(f"its weights lack {', '.join(names[:3])}{' and more' if names[3:] else ''}")


def check_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None,
    text_embeds: torch.Tensor | None,
    num_images: int,
    use_temporal: bool,
) -> None:
    """Checks the inputs of the transformer's forward pass.

    Args:
        config: the model's fields.
        latents: must be (B, F, C, H, W).
        timesteps: must be (B,) or a scalar.
        class_labels: must be (B,), or (B, 1 + I) with images, for a model with classes; None for another.
        text_embeds: must be (B, text_dim), or (B, 1 + I, text_dim), for a model with texts, with 1 + L before text_dim
            if it has `text_tokens`; None for another.
        num_images: I; must be less than F, and 0 for tubes.
        use_temporal: must be true for tubes.

    Raises:
        ValueError: if one of them does not fit the model or the others.
    """
    channels, tube, patch = config["in_channels"], frames_per_tube(config), config["patch_size"]
    fits = latents.ndim == 5 and latents.shape[2] == channels and all(latents.shape)
    if not fits or latents.shape[3] % patch or latents.shape[4] % patch:
        height, width = sample_grid(config)
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, but this model takes (B, F, {channels}, {height}, {width}), "
            f"or another height and width that {patch} divides"
        )
    if timesteps.ndim:
        _check_shape("timesteps", timesteps, (latents.shape[0],))
    if config["patch_embedding"] == "compression":
        if num_images or not use_temporal:
            raise ValueError(
                "patch_embedding is compression: its tokens hold several frames of a video, so there are no images "
                "among them (num_images must be 0, and use_temporal true)"
            )
        if latents.shape[1] % tube:
            raise ValueError(f"latents have {latents.shape[1]} frames, but must have a multiple of tube_size ({tube})")
    if not 0 <= num_images < latents.shape[1]:
        raise ValueError(f"num_images is {num_images}, but must be in 0..{latents.shape[1] - 1}: fewer than frames")
    num_classes, text_dim = config["num_classes"], config["text_dim"]
    if class_labels is not None and not num_classes:
        kind = "has texts" if text_dim else "is unconditional"
        raise ValueError(f"class_labels were given, but this model {kind}")
    if text_embeds is not None and not text_dim:
        kind = f"has {num_classes} classes" if num_classes else "is unconditional"
        raise ValueError(f"text_embeds were given, but this model {kind}")
    expected: tuple[int, ...] = (latents.shape[0], 1 + num_images) if num_images else (latents.shape[0],)
    if num_classes:
        if class_labels is None:
            raise ValueError(f"class_labels are missing, but this model has {num_classes} classes")
        _check_shape("class_labels", class_labels, expected)
    if text_dim:
        if text_embeds is None:
            raise ValueError("text_embeds are missing, but this model has texts")
        _check_shape("text_embeds", text_embeds, (*expected, *text_shape(config)))


def check_given(config: Mapping[str, Any], given: torch.Tensor, shape: Sequence[int]) -> None:
    """Checks which frames are said to be given.

    Args:
        config: the model's fields.
        given: must be bool and of the shape (B, F).
        shape: (B, F).

    Raises:
        ValueError: if it is not, or the model makes whole clips only.
    """
    if not config["given_frames"]:
        raise ValueError(
            "frames were given, but this model was trained to make whole clips; train it with model.given_frames"
        )
    if given.dtype != torch.bool:
        raise ValueError(f"given is {given.dtype}, but must be torch.bool")
    _check_shape("given", given, tuple(shape))


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} have shape {tuple(tensor.shape)}, but must have {expected}")
