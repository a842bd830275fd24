"""The embeddings of actions in a model that starts from another's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lavita.models.pretrained.load_report import listed

TABLES = "action_embed.tables"


def transfer_actions(model: Mapping[str, Any], source: Mapping[str, Any], take: Callable[..., None]) -> None:
    """Takes the source's rows of actions by their names, if both have actions, but not the same.

    Equal numbers need not mean equal actions. An action that the source does not know starts as its "no action".

    Args:
        model: the fields of the model.
        source: those of the source.
        take: takes a tensor of the source, see `transfer`.
    """
    here, there = model.get("action_names"), source.get("action_names")
    if not here or not there or here == there:
        return
    null = len(there)
    new = [name for name in here if name not in there]
    rows = [*(there.index(name) if name in there else null for name in here), null]
    how = f"{null} actions there, {len(here)} here, by name"
    if new:
        how += f"; new, starting as the source's `no action`: {listed(new)}"

    def pick(tables: torch.Tensor) -> torch.Tensor:
        return tables[:, rows]  # (S, actions + 1, D)

    take(TABLES, how, pick, partly_new=bool(new))
