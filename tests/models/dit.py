"""A tiny DiT of diffusers, and the files and folders that its weights are published in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

State = dict[str, torch.Tensor]


def make_dit(num_layers: int = 4, **fields: Any) -> Any:
    """A random DiT as facebookresearch defines it: diffusers' class differs in two constants."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
        "norm_eps": 1e-6,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        dit: Any = DiTTransformer2DModel(num_layers=num_layers, **{**config, **fields})
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    for block in dit.transformer_blocks:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return dit.eval().requires_grad_(False)


def layout(dit: Any) -> State:
    """The names that facebookresearch/DiT gives the same tensors."""
    state, first = dit.state_dict(), "transformer_blocks.0.norm1.emb."
    pairs = [
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", f"{first}timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", f"{first}timestep_embedder.linear_2"),
        ("final_layer.linear", "proj_out_2"),
        ("final_layer.adaLN_modulation.1", "proj_out_1"),
    ]
    out = {
        "pos_embed": dit.pos_embed.pos_embed.clone(),
        "y_embedder.embedding_table.weight": state[f"{first}class_embedder.embedding_table.weight"],
    }
    for index in range(len(dit.transformer_blocks)):
        there, here = f"transformer_blocks.{index}", f"blocks.{index}"
        pairs += [
            (f"{here}.attn.proj", f"{there}.attn1.to_out.0"),
            (f"{here}.mlp.fc1", f"{there}.ff.net.0.proj"),
            (f"{here}.mlp.fc2", f"{there}.ff.net.2"),
            (f"{here}.adaLN_modulation.1", f"{there}.norm1.linear"),
        ]
        for part in ("weight", "bias"):
            qkv = [state[f"{there}.attn1.to_{name}.{part}"] for name in ("q", "k", "v")]
            out[f"{here}.attn.qkv.{part}"] = torch.cat(qkv)
    return out | {f"{new}.{part}": state[f"{old}.{part}"] for new, old in pairs for part in ("weight", "bias")}


def write_pt(dit: Any, path: Path) -> str:
    torch.save(layout(dit), path / "dit.pt")
    return str(path / "dit.pt")


def write_ema_of_a_run(dit: Any, path: Path) -> str:
    state = {f"module.{name}": tensor for name, tensor in layout(dit).items()}
    torch.save({"ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, path / "run.pt")
    return str(path / "run.pt")


def write_folder(dit: Any, path: Path) -> str:
    dit.save_pretrained(path / "dit")
    return str(path / "dit")


def write_old_pipeline(dit: Any, path: Path) -> str:
    dit.save_pretrained(path / "pipeline" / "transformer", safe_serialization=False)
    file = path / "pipeline" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "Transformer2DModel"}))
    return str(path / "pipeline")
