"""Attention to a text's tokens in a model that starts from another's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch


def transfer_words(
    targets: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    take: Callable[[str], None],
    new: Callable[[str, str, bool], None],
    drop: Callable[[str, str], None],
) -> None:
    """Takes the source's attention to the tokens of texts, or leaves the model's new, so that it adds nothing at first.

    It is the source's only together with the layer that reads the text encoder's states.

    Args:
        targets: the model's tensors.
        tensors: the source's.
        take: takes the source's tensor of a name.
        new: leaves the model's tensor of a name as it is, for a reason, or sets it to zero.
        drop: records why the source's tensor of a name is not used.
    """
    here, there = _words_in(targets), _words_in(tensors)
    first = "text_proj.proj.weight"
    if not here:
        return
    if first in there and tensors[first].shape == targets[first].shape:
        for name in here:
            take(name)
        return
    why = "attention to texts, which the source does not have"
    if first in there:
        why = f"tokens have {tensors[first].shape[1]} numbers there, {targets[first].shape[1]} here"
    for name in here:
        new(name, f"{why}; it adds nothing at first", ".cross_attn.proj." in name)
    for name in there:
        drop(name, why)


def _words_in(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("text_proj.") or ".cross_attn." in name]
