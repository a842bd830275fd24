"""Actions: what a player did in each frame, as a condition per frame.

The action of a frame is the one that led to it from the frame before. Its embedding is added to the tokens of its
frame, so all variants and both ways of conditioning have it alike. Embeddings are zero at first: a model that is
fine-tuned to actions starts as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

Actions = Sequence[Sequence[str | int | None]]
"""The action of each frame, by name or number, for each video; None for no action."""


class ActionEmbedder(nn.Module):
    """One vector per action, and a last one for "no action"; tubes have a table for each of their frames."""

    def __init__(self, num_actions: int, tube_size: int, hidden_size: int) -> None:
        """Builds tables of `num_actions + 1` rows for each of the `tube_size` frames of a tube."""
        super().__init__()
        self.tables = nn.Parameter(torch.zeros(tube_size, num_actions + 1, hidden_size))

    def forward(self, actions: torch.Tensor | None, num_frames: int) -> torch.Tensor:
        """Actions (B, F) in 0..num_actions, or None for "no action" in F frames, to vectors (B or 1, F / S, 1, D)."""
        tube, rows, _ = self.tables.shape
        if actions is None:
            actions = torch.full((1, num_frames), rows - 1, device=self.tables.device)
        tubes = actions.unflatten(1, (-1, tube))  # (B, T, S)
        return sum(table[tubes[:, :, frame]] for frame, table in enumerate(self.tables))[:, :, None]


def check_actions(config: Mapping[str, Any], actions: torch.Tensor, shape: Sequence[int]) -> None:
    """Checks the actions of a forward pass.

    Args:
        config: the model's fields.
        actions: must be int64 and of the shape (B, F).
        shape: (B, F).

    Raises:
        ValueError: if they are not, or the model has no actions.
    """
    if not config["action_names"]:
        raise ValueError("actions were given, but this model was trained without; train it with data.actions")
    if actions.dtype != torch.int64:
        raise ValueError(f"actions are {actions.dtype}, but must be torch.int64")
    if actions.shape != tuple(shape):
        raise ValueError(f"actions have shape {tuple(actions.shape)}, but must have {tuple(shape)}")


def action_numbers(config: Mapping[str, Any], actions: Actions) -> torch.Tensor:
    """The numbers of the actions of some videos, int64 (B, F).

    Args:
        config: the model's fields.
        actions: names or numbers, one list per video, all of one length; None for no action.

    Raises:
        ValueError: for an action that the model does not have, or lists of different lengths.
    """
    names = config["action_names"]
    if not names:
        raise ValueError("actions were given, but this model was trained without; train it with data.actions")
    if len({len(row) for row in actions}) > 1:
        raise ValueError(f"actions have {sorted({len(row) for row in actions})} frames, but must be of one length")
    return torch.tensor([[_number(names, action) for action in row] for row in actions], dtype=torch.int64)


def _number(names: Sequence[str], action: str | int | None) -> int:
    if action is None:
        return len(names)
    if isinstance(action, str) and action in names:
        return names.index(action)
    if isinstance(action, int) and not isinstance(action, bool) and 0 <= action < len(names):
        return action
    raise ValueError(f"{action!r} is no action of this model; allowed: {', '.join(names)}, or 0 to {len(names) - 1}")
