"""Conditions of sampled videos: classes by name or number, and embeddings of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lavita.core.text import normal_name
from lavita.models.cross_attention import text_shape


def class_numbers(config: Mapping[str, Any], class_labels: Sequence[int | str | None] | None) -> list[int] | None:
    """Numbers of classes by name or number; None, "no class", is the number after the last one.

    Args:
        config: the model's fields.
        class_labels: one per video; None for a model without classes.

    Raises:
        ValueError: for a class that the model does not have, or a model without classes.
    """
    num_classes, names = config["num_classes"], config["class_names"]
    if not num_classes:
        if class_labels is not None:
            raise ValueError("class_labels were given, but this model is unconditional")
        return None
    if class_labels is None or isinstance(class_labels, str):
        raise ValueError(f"class_labels is {class_labels!r}, but this model needs a list, one class per video")
    known = ", ".join(names) if names else f"0..{num_classes - 1}"
    forms = [normal_name(name) for name in names or ()]
    labels = []
    for label in class_labels:
        if label is None:
            labels.append(num_classes)
            continue
        number: int | str = label
        if isinstance(label, str) and normal_name(label) in forms:
            number = forms.index(normal_name(label))
        if not isinstance(number, int) or not 0 <= number < num_classes:
            raise ValueError(f"class label is {label!r}; allowed: {known}")
        labels.append(number)
    return labels


def text_embeddings(
    config: Mapping[str, Any],
    encode: Callable[[Sequence[str]], torch.Tensor],
    prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt: str | Sequence[str],
    negative_prompt_embeds: torch.Tensor | None,
    guided: bool,
) -> list[torch.Tensor] | None:
    """Embeddings of the prompts, and with guidance of the negative prompts; None without texts.

    Args:
        config: the model's fields.
        encode: embeds texts.
        prompt: see `LavitaPipeline`, as for all others.
        prompt_embeds: instead of `prompt`.
        negative_prompt: with guidance.
        negative_prompt_embeds: instead of `negative_prompt`.
        guided: whether there is guidance.

    Returns:
        (B, text_dim) each, or (B, 1 + L, text_dim) for a model of `text_tokens`.

    Raises:
        ValueError: if they do not fit the model or each other.
    """
    if not config["text_dim"]:
        if prompt is not None or prompt_embeds is not None:
            raise ValueError("a prompt was given, but this model has no texts")
        return None
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("this model has texts: give either prompt or prompt_embeds")
    if prompt_embeds is None:
        prompt_embeds = encode([prompt] if isinstance(prompt, str) else list(prompt or ()))
    batch = len(prompt_embeds)
    embeds = [prompt_embeds]
    if guided:
        if negative_prompt_embeds is None:
            texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else list(negative_prompt)
            negative_prompt_embeds = encode(texts)
        embeds.append(negative_prompt_embeds)
    for name, tensor in zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=False):
        expected = (batch, *text_shape(config))
        if tensor.shape != expected:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, but must have {expected}")
        if len(expected) == 3 and not (tensor[:, 1:] != 0).any(-1).any(-1).all():
            raise ValueError(f"{name} have a text without a token: all of its rows after the first are 0")
    return embeds
