"""Initial weights of the transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lavita.models.embeddings import LabelEmbedder, TextEmbedder, TimestepEmbedder


def initialize_weights(model: Any) -> None:
    """DiT's initialisation: Xavier for linear layers, small embeddings, zeros where a block or the model ends.

    Args:
        model: a `LavitaTransformer3DModel`, which imports this module; its weights are changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    nn.init.zeros_(projection.bias)
    if isinstance(model.y_embedder, LabelEmbedder):
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for embedder in (model.t_embedder, model.y_embedder):
        if isinstance(embedder, (TimestepEmbedder, TextEmbedder)):
            for layer in embedder.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
    # With closed gates every block is the identity, and with a zero decoder the model predicts zero noise.
    for module in (*model.blocks, model.final_layer):
        if module.adaLN_modulation is not None:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)
    if model.temporal_upsample is not None:
        # At first, frame s of a tube is the s-th group of the decoder's channels.
        channels, tube = model.out_channels, model.tube_size
        identity = torch.eye(channels).repeat(tube, 1).view(tube, channels, channels)
        weight = torch.zeros(tube, channels, channels, tube)
        weight[range(tube), :, :, range(tube)] = identity
        with torch.no_grad():
            model.temporal_upsample.weight.copy_(weight.view(tube * channels, channels, tube, 1, 1))
        nn.init.zeros_(model.temporal_upsample.bias)
