"""Adapters in the community's forms: against peft, against diffusers' own writer, and against singular values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lavita.models.adapter_files import Change, read_changes, write_changes
from lavita.models.adapters import apply_adapter, extract_changes
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import load_pipeline

LAYERS = ("blocks.0.attn.qkv", "blocks.1.mlp.fc2")


def some_changes(model: LavitaTransformer3DModel, ranks: tuple[int, int] = (2, 3)) -> dict[str, Change]:
    random = torch.Generator().manual_seed(0)
    changes = {}
    for layer, rank in zip(LAYERS, ranks, strict=True):
        out, inner = model.state_dict()[f"{layer}.weight"].shape
        changes[layer] = Change(
            torch.randn(rank, inner, generator=random), torch.randn(out, rank, generator=random), 0.25
        )
    return changes


def changed(model: LavitaTransformer3DModel, changes: dict[str, Change]) -> LavitaTransformer3DModel:
    copy = LavitaTransformer3DModel.from_config(dict(model.config))
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, change in changes.items():
            copy.state_dict()[f"{layer}.weight"] += change.factor * (change.high @ change.low)
    return copy.eval()


def inputs(model: LavitaTransformer3DModel) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    size = config["sample_size"]
    latents = torch.randn(1, config["num_frames"], config["in_channels"], size, size)
    return latents, torch.tensor([500])


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_what_is_written_is_read(name: str, tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    changes = some_changes(tiny_transformer)
    write_changes(tmp_path / name, changes)
    expected = changed(tiny_transformer, changes).state_dict()
    apply_adapter(tiny_transformer, tmp_path / name)
    for key, tensor in tiny_transformer.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])


def test_peft_reads_what_is_written(tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    """Layers of different ranks: peft has one for all."""
    changes = some_changes(tiny_transformer)
    write_changes(tmp_path / "folder", changes)
    latents, timesteps = inputs(tiny_transformer)
    labels = torch.tensor([1])
    with torch.no_grad():
        expected = changed(tiny_transformer, changes)(latents, timesteps, labels).sample
        plain = tiny_transformer(latents, timesteps, labels).sample
        wrapped: Any = PeftModel.from_pretrained(tiny_transformer.eval(), tmp_path / "folder")
        theirs = wrapped(latents, timesteps, labels).sample
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings", [None, {"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.bias": "none"}]
)
def test_files_of_diffusers(
    settings: dict[str, object] | None, tmp_path: Path, tiny_transformer: LavitaTransformer3DModel
) -> None:
    changes = some_changes(tiny_transformer, (2, 2))
    weights = {}
    for layer, change in changes.items():
        weights[f"transformer.{layer}.lora_A.weight"] = change.low
        weights[f"transformer.{layer}.lora_B.weight"] = change.high
    save_function: Any = None
    LoraBaseMixin.write_lora_layers(weights, str(tmp_path), True, "their.safetensors", save_function, True, settings)
    for source in (tmp_path, tmp_path / "their.safetensors"):
        read = read_changes(source)
        assert list(read) == list(LAYERS)
        assert {change.factor for change in read.values()} == {1.0 if settings is None else 4.0}
        assert torch.equal(read[LAYERS[0]].low, changes[LAYERS[0]].low)


def test_a_strength_for_each_layer(tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    write_changes(tmp_path / "one.safetensors", some_changes(tiny_transformer))
    weights = load_file(tmp_path / "one.safetensors")
    save_file({**weights, f"transformer.{LAYERS[1]}.alpha": torch.tensor(6.0)}, tmp_path / "one.safetensors")
    assert [change.factor for change in read_changes(tmp_path / "one.safetensors").values()] == [1.0, 2.0]


def test_extracted_adapters_are_the_ones_that_were_merged(tiny_transformer: LavitaTransformer3DModel) -> None:
    changes = some_changes(tiny_transformer)
    extracted, left_out = extract_changes(tiny_transformer, changed(tiny_transformer, changes), 4)
    assert set(extracted) == set(LAYERS)
    assert max(left_out.values()) < 1e-4
    for layer, change in changes.items():
        found = extracted[layer]
        torch.testing.assert_close(found.high @ found.low, 0.25 * change.high @ change.low, rtol=1e-4, atol=1e-5)


def test_what_a_small_rank_leaves_out(tiny_transformer: LavitaTransformer3DModel) -> None:
    """The best approximation of a rank leaves out the smaller singular values (Eckart & Young 1936)."""
    layer = LAYERS[0]
    weight = tiny_transformer.state_dict()[f"{layer}.weight"]
    difference = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    full = Change(torch.eye(weight.shape[1]), difference, 1.0)
    tuned = changed(tiny_transformer, {layer: full})
    _, left_out = extract_changes(tiny_transformer, tuned, 5)
    singular = np.linalg.svd(difference.numpy().astype(np.float64), compute_uv=False)
    expected = np.linalg.norm(singular[5:]) / np.linalg.norm(singular)
    assert left_out[layer] == pytest.approx(expected, rel=1e-4)


def test_models_that_adapters_cannot_explain(
    tiny_transformer: LavitaTransformer3DModel, make_transformer: MakeTransformer
) -> None:
    tuned = changed(tiny_transformer, {})
    with torch.no_grad():
        tuned.state_dict()["x_embedder.proj.bias"] += 1
    with pytest.raises(ValueError, match=r"differ in x_embedder\.proj\.bias, which no adapter changes"):
        extract_changes(tiny_transformer, tuned, 4)
    with pytest.raises(ValueError, match="the models are of different kinds"):
        extract_changes(tiny_transformer, make_transformer(hidden_size=64), 4)


def test_files_that_hold_no_adapters(tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    write_changes(tmp_path / "one.safetensors", some_changes(tiny_transformer))
    weights = load_file(tmp_path / "one.safetensors")
    low, high = (f"transformer.{LAYERS[0]}.lora_{side}.weight" for side in "AB")
    for content, words in (
        ({}, "holds an incomplete set of adapters"),
        ({low: weights[low]}, r"holds an incomplete set of adapters \(transformer.blocks.0"),
        ({low: weights[low], high: weights[high][:, :1].contiguous()}, "and do not fit"),
        ({**weights, "transformer.other.alpha": torch.ones(())}, r"incomplete set of adapters \(transformer.other"),
    ):
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=words):
            read_changes(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="cannot be read as adapters"):
        read_changes(tmp_path / "nothing.safetensors")


def test_the_commands(
    tmp_path: Path, tiny_transformer: LavitaTransformer3DModel, save_pipeline: SavePipeline, run: Run
) -> None:
    base = save_pipeline(tiny_transformer, "base")
    write_changes(tmp_path / "adapters", some_changes(tiny_transformer))
    assert run("lora", "convert", tmp_path / "adapters", "--out", tmp_path / "one.safetensors")[:2] == (
        0,
        f"{tmp_path / 'one.safetensors'}: 2 layers\n",
    )
    assert run("lora", "merge", base, tmp_path / "one.safetensors", "--out", tmp_path / "merged")[0] == 0
    expected = changed(tiny_transformer, some_changes(tiny_transformer)).state_dict()
    for key, tensor in load_pipeline(tmp_path / "merged").transformer.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])
    code, stdout, _ = run("lora", "extract", base, tmp_path / "merged", "--rank", "1", "--out", tmp_path / "small")
    assert code == 0 and "2 layers; left out" in stdout
    code, _, stderr = run("lora", "extract", base, base, "--out", tmp_path / "none")
    assert code == 2 and "there is nothing to extract" in stderr and not (tmp_path / "none").exists()
