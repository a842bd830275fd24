"""Latte's files: conversion to a pipeline and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from models.dit import layout, make_dit

from lavita.models.autoencoder import AutoencoderKL
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.latte_files import convert_latte, export_latte, latte_config
from lavita.sampling.pipeline import load_pipeline

LATTE_NAMES = {
    *("pos_embed", "temp_embed", "y_embedder.embedding_table.weight", "x_embedder.proj.weight", "x_embedder.proj.bias"),
    *("t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias"),
    *("final_layer.linear.weight", "final_layer.linear.bias"),
    *("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"),
    *(
        f"blocks.{index}.{layer}.{part}"
        for index in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for part in ("weight", "bias")
    ),
}


@pytest.fixture
def latte(tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> Path:
    """`latte.pt`, both sets of weights of a model with 3 classes, and its autoencoder in `vae`."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    state = make_transformer(num_classes=3).state_dict()
    assert set(state) == LATTE_NAMES
    torch.save({"model": {key: -tensor for key, tensor in state.items()}, "ema": state}, tmp_path / "latte.pt")
    return tmp_path / "latte.pt"


def test_there_and_back(latte: Path) -> None:
    folder, back = latte.parent / "pipeline", latte.parent / "back.pt"
    names = ["x", "y", "z"]
    report = convert_latte(latte, folder, "ema", str(latte.parent / "vae"), 2, names, frame_interval=2, fps=5.0)
    assert set(report.loaded) == set(report.used) == LATTE_NAMES
    pipeline = load_pipeline(folder)
    config = pipeline.transformer.config
    facts = {"variant": 2, "num_classes": 3, "num_frames": 2, "num_heads": 2, "class_names": names, "sample_size": 8}
    facts |= {"frame_interval": 2, "fps": 5.0, "learn_sigma": True, "prediction_type": "epsilon", "mlp_ratio": 4.0}
    assert {key: config[key] for key in facts} == facts
    assert pipeline(class_labels=["y"], num_inference_steps=2).frames.shape == (1, 2, 16, 16, 3)
    export_latte(folder, back)
    before, after = (torch.load(file, weights_only=True) for file in (latte, back))
    assert list(after) == ["ema"]
    assert after["ema"].keys() == before["ema"].keys()
    assert all(torch.equal(after["ema"][name], tensor) for name, tensor in before["ema"].items())
    for taken in (folder, back):
        with pytest.raises(ValueError, match="exists"):
            (convert_latte(latte, taken, "ema") if taken is folder else export_latte(folder, taken))


def test_the_configuration_is_read_off_the_tensors(make_transformer: MakeTransformer) -> None:
    fields: dict[str, Any] = {"sample_size": 12, "patch_size": 4, "in_channels": 3, "num_frames": 5, "num_blocks": 4}
    fields |= {"hidden_size": 64, "mlp_ratio": 2.5, "learn_sigma": False, "num_classes": 7}
    config = latte_config(make_transformer(**fields).state_dict())
    assert {key: config[key] for key in fields} == fields
    assert config["num_heads"] == 2  # of `tiny`, whose width is 64
    assert latte_config(make_transformer(**fields).state_dict(), num_heads=8)["num_heads"] == 8
    assert latte_config(make_transformer(**{**fields, "num_classes": 0}).state_dict())["num_classes"] == 0
    with pytest.raises(ValueError, match="hidden_size is 32, not that of a known size"):
        latte_config(make_transformer().state_dict())
    with pytest.raises(ValueError, match="no temp_embed"):
        latte_config(layout(make_dit()))


def test_a_file_without_positions_needs_the_size_of_its_latents(latte: Path, run: Run) -> None:
    state = torch.load(latte, weights_only=True)["ema"]
    positions = state.pop("pos_embed")
    torch.save({"ema": state}, latte)
    arguments = ["convert", latte, latte.parent / "out", "--autoencoder", latte.parent / "vae", "--num-heads", "2"]
    code, _, stderr = run(*arguments)
    assert code == 2 and "latte.pt: has no pos_embed, so sample_size must be given" in stderr
    code, stdout, stderr = run(*arguments, "--sample-size", "8")
    assert code == 0, stderr
    assert "pos_embed - fixed sin-cos, computed; the source stores no positions" in stdout
    assert torch.equal(load_pipeline(latte.parent / "out").transformer.state_dict()["pos_embed"], positions)
    with pytest.raises(ValueError, match="sample_size is 16, but its pos_embed has places for 8"):
        latte_config({**state, "pos_embed": positions}, 2, 16)


def test_text_latte_is_refused(latte: Path) -> None:
    state = torch.load(latte, weights_only=True)["ema"]
    torch.save({"ema": {**state, "text_embedding_projection.1.bias": torch.zeros(32)}}, latte)
    with pytest.raises(ValueError, match=r"include the unknown text_embedding_projection\.1\.bias"):
        convert_latte(latte, latte.parent / "out", num_heads=2)
    assert not (latte.parent / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": 3}, "variant is 3, but Latte's format only holds 2"),
        ({"patch_embedding": "compression"}, "patch_embedding is 'compression'"),
        ({"conditioning": "all_tokens"}, "conditioning is 'all_tokens'"),
        ({"temporal_position": "rope"}, "temporal_position is 'rope'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"text_dim": 6}, "text_dim is 6"),
        ({"given_frames": ["first"]}, "given_frames is "),
    ],
)
def test_what_latte_has_not_is_not_exported(
    fields: dict[str, Any], words: str, tmp_path: Path, save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    with pytest.raises(ValueError, match=words):
        export_latte(save_pipeline(make_transformer(**fields)), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# ---- the command


def test_the_command_converts_and_exports(latte: Path, run: Run) -> None:
    folder, back = latte.parent / "pipeline", latte.parent / "back.pt"
    options = ["--weights", "model", "--autoencoder", latte.parent / "vae", "--num-heads", "2", "--fps", "6"]
    code, stdout, stderr = run("convert", latte, folder, *options, "--frame-interval", "4")
    assert code == 0, stderr
    assert "latte.pt (model)" in stdout
    assert "blocks.{0,1}.attn.qkv.weight" in stdout
    config = load_pipeline(folder).transformer.config
    assert (config["frame_interval"], config["fps"]) == (4, 6.0)
    code, _, stderr = run("convert", folder, back)
    assert code == 0, stderr
    before, after = torch.load(latte, weights_only=True)["model"], torch.load(back, weights_only=True)["ema"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{0}/none.pt {0}/out", "none.pt: no such file"),
        ("{0}/latte.pt {0}/out", "weights must be given: ema or model"),
        ("{0}/latte.pt {0}/out --weights ema --autoencoder {0}/vae", "num_heads must be given"),
        ("{0}/latte.pt {0}/out --weights ema --autoencoder {0}/no --num-heads 2", "no: no such folder"),
        ("{0}/latte.pt {0}/vae --weights ema", "vae: exists and is not an empty folder"),
        ("{0}/vae {0}/out", "vae: is a folder, not a Latte file"),
        ("{0}/latte.pt {0}/out.pt", "latte.pt: is a file, not a pipeline"),
        ("{0}/none {0}/out.pt", "none: no such file or folder"),
        ("{0}/vae {0}/out.pt", "vae: holds a AutoencoderKL"),
        ("builtin {0}/out.pt", "prediction_type is 'v_prediction'"),
    ],
)
def test_bad_input_is_one_line(line: str, words: str, latte: Path, run: Run) -> None:
    code, stdout, stderr = run("convert", *line.format(latte.parent).split())
    assert (code, stdout) == (2, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("error:") and words in last
    assert not (latte.parent / "out").exists() and not (latte.parent / "out.pt").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"sample_size": [4, 8]}, "has squares only"), ({"trained_shapes": [[2, 4, 4]]}, r"trained_shapes is \[\[2, 4")],
)
def test_shapes_that_latte_has_no_place_for(
    fields: dict[str, Any], message: str, tmp_path: Path, save_pipeline: SavePipeline
) -> None:
    small = {"num_frames": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}
    folder = save_pipeline(LavitaTransformer3DModel(**{"sample_size": 4, **small, **fields}))
    with pytest.raises(ValueError, match=message):
        export_latte(folder, tmp_path / "out.pt")
