"""What a run begins with."""

from __future__ import annotations

import torch
from conftest import MakeConfig

from lavita.models.autoencoder import AutoencoderKL
from lavita.training.batches import BatchMaker
from lavita.training.setup import build_model


def test_the_seed_alone_decides_the_first_weights(make_config: MakeConfig, tiny_vae: AutoencoderKL) -> None:
    def weights(seed: int, before: int) -> dict[str, torch.Tensor]:
        config = make_config("run", f"train.seed={seed}")
        batches = BatchMaker(config.data, config.train, tiny_vae, config.model.class_dropout)
        torch.manual_seed(before)  # what else the process has drawn does not matter
        return build_model(config, tiny_vae, batches).state_dict()

    one, again, other = weights(3, before=0), weights(3, before=1), weights(4, before=0)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    for name in ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "y_embedder.embedding_table.weight"):
        assert not torch.equal(one[name], other[name]), name
