"""Pretrained weights that are refused: other sizes, damaged files, code in files."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from models.dit import layout, make_dit, write_folder, write_pt
from safetensors.torch import load_file, save_file

from lavita.models.autoencoder import AutoencoderKL
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.latte_files import convert_latte
from lavita.sampling.pipeline import load_pipeline

SIZES: dict[str, Any] = {"num_classes": 5, "num_frames": 4, "num_blocks": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32, but this model's is 64"),
        ({"num_heads": 4}, "num_heads is 2, but this model's is 4"),
        ({"patch_size": 4}, "patch_size is 2, but this model's is 4"),
        ({"mlp_ratio": 2.0}, "width of the MLPs is 128, but this model's is 64"),
    ],
)
def test_other_sizes_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path, save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    dit = make_dit()
    model = make_transformer(**{**SIZES, **fields})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source in (write_pt(dit, tmp_path), write_folder(dit, tmp_path), save_pipeline(make_transformer(**SIZES))):
        if "num_heads" in fields and source.endswith(".pt"):
            continue  # which no tensor tells
        with pytest.raises(ValueError, match=words):
            initialize(model, source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [{"variant": 1}, {"num_blocks": 6}, {"patch_embedding": "compression"}, {"conditioning": "all_tokens"}],
    ids=str,
)
def test_other_video_models_are_refused(
    fields: dict[str, Any], tmp_path: Path, save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    theirs = make_transformer(**SIZES)
    torch.save({"ema": theirs.state_dict()}, tmp_path / "latte.pt")
    for source in (save_pipeline(theirs), str(tmp_path / "latte.pt")):
        with pytest.raises(ValueError, match=rf"{next(iter(fields))} is \w+, but this model's is \w+; they must"):
            initialize(make_transformer(**{**SIZES, **fields}), source)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [torch.save, lambda trap, file: file.write_bytes(pickle.dumps(trap))])
def test_code_in_a_file_does_not_run(
    write: Callable[[Any, Path], None], tmp_path: Path, tiny_transformer: LavitaTransformer3DModel
) -> None:
    write({"ema": {"pos_embed": Trap(tmp_path / "sprung")}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt: cannot be read as weights \(it holds more than tensors") as caught:
        initialize(tiny_transformer, str(tmp_path / "evil.pt"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match=r"evil\.pt"):
        convert_latte(tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # it is a trap


def test_files_that_are_no_weights_are_refused(tmp_path: Path, tiny_transformer: LavitaTransformer3DModel) -> None:
    def refuse(source: Path | str, words: str, weights: Any = None) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            initialize(tiny_transformer, str(source), weights)
        assert "\n" not in str(caught.value)

    def saved(value: Any) -> Path:
        torch.save(value, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    state = layout(make_dit(2))
    whole = saved(state).read_bytes()
    refuse(tmp_path / "none.pt", "none.pt: no such file")
    refuse("nowhere.pt", "nowhere.pt: no such file")
    refuse(tmp_path, "holds no model")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "cut.pt", "cut.pt: cannot be read as weights")
    (tmp_path / "empty.pt").touch()
    refuse(tmp_path / "empty.pt", "empty.pt: cannot be read as weights")
    refuse(saved([1, 2]), "holds a list, not tensors by name")
    refuse(saved({"model": 3}), "'model' is a int, not a tensor")
    refuse(saved({"weight": torch.zeros(1)}), "neither a DiT nor a Latte, but 1 tensors such as weight")
    refuse(saved({**state, "clip.weight": torch.zeros(1)}), "include the unknown clip.weight")
    refuse(saved({**state, "blocks.7.mlp.fc1.bias": torch.zeros(1)}), "lack blocks.2.adaLN_modulation.1.bias")
    refuse(saved({key: state[key] for key in list(state)[:-1]}), f"lack {list(state)[-1]}")
    refuse(saved({**state, "blocks.0.attn.qkv.bias": torch.zeros(7)}), r"blocks.0.attn.qkv.bias has the shape \(7,\)")
    refuse(saved({**state, "pos_embed": torch.zeros(1, 15, 32)}), "15 places, which do not form a square")
    refuse(saved({"model": state, "ema": state}), "weights must be given: ema or model")
    refuse(saved({"ema": state}), "weights is 'model', but .* only holds 'ema'", "model")
    refuse(saved(state), "weights is 'ema', but .* holds one set", "ema")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_tensor_that_is_not_finite_is_named(
    value: float, tmp_path: Path, make_transformer: MakeTransformer
) -> None:
    state = make_transformer(**SIZES).state_dict()
    state["blocks.1.mlp.fc2.weight"][3, 4] = value
    torch.save({"ema": state}, tmp_path / "latte.pt")
    words = r"latte\.pt \(ema\): blocks\.1\.mlp\.fc2\.weight holds 1 of 4,096 values that are not finite"
    with pytest.raises(ValueError, match=words):
        initialize(make_transformer(**SIZES), str(tmp_path / "latte.pt"))
    with pytest.raises(ValueError, match=words):
        convert_latte(tmp_path / "latte.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_names_that_wrappers_give_are_read(tmp_path: Path, make_transformer: MakeTransformer) -> None:
    state = make_transformer(**SIZES).state_dict()
    wrapped = {
        "ddp": {f"module.{name}": tensor for name, tensor in state.items()},
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "both": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        "other": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        "blocks": {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in state.items()},
    }
    for tensors in wrapped.values():
        torch.save({"ema": tensors}, tmp_path / "latte.pt")
        model = make_transformer(**SIZES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = initialize(model, str(tmp_path / "latte.pt"))
        assert set(report.loaded) == set(state)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    torch.save({**state, "_orig_mod.x_embedder.proj.bias": torch.zeros(32)}, tmp_path / "latte.pt")
    with pytest.raises(ValueError, match=r"has x_embedder\.proj\.bias twice, once as _orig_mod\."):
        initialize(make_transformer(**SIZES), str(tmp_path / "latte.pt"))


def test_weights_without_the_table_of_positions_are_read(
    tmp_path: Path, make_transformer: MakeTransformer, save_pipeline: SavePipeline
) -> None:
    theirs = make_transformer(**SIZES)
    positions = theirs.state_dict()["pos_embed"]
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "pos_embed"}
    torch.save({"ema": state}, tmp_path / "latte.pt")
    folder = Path(save_pipeline(theirs))
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for source in (tmp_path / "latte.pt", folder):
        model = make_transformer(**SIZES)
        report = initialize(model, str(source))
        assert torch.equal(model.state_dict()["pos_embed"], positions)
        assert set(report.loaded) >= set(state)


def test_damaged_folders_are_refused(
    tmp_path: Path, save_pipeline: SavePipeline, tiny_transformer: LavitaTransformer3DModel, tiny_vae: AutoencoderKL
) -> None:
    weights = Path(save_pipeline(tiny_transformer)) / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"weights is 'ema', but .* holds one set"):
        initialize(tiny_transformer, str(weights.parent), "ema")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="pipeline: cannot load its weights"):
        initialize(tiny_transformer, str(weights.parents[1]))
    weights.unlink()
    with pytest.raises(ValueError, match="pipeline: cannot load its weights"):
        initialize(tiny_transformer, str(weights.parents[1]))
    tiny_vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae: holds a AutoencoderKL; allowed"):
        initialize(tiny_transformer, str(tmp_path / "vae"))
    dit = make_dit(2)
    dit.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias += 1
    with pytest.raises(ValueError, match=r"timestep_embedder.linear_2.bias differs from block 0"):
        initialize(tiny_transformer, write_folder(dit, tmp_path))


def test_a_file_with_two_sets_gives_the_one_asked_for(tmp_path: Path, make_transformer: MakeTransformer) -> None:
    state = layout(make_dit(2))
    averaged = {**state, "x_embedder.proj.bias": torch.full((32,), 7.0)}
    torch.save({"model": state, "ema": averaged}, tmp_path / "both.pt")
    model = make_transformer()
    initialize(model, str(tmp_path / "both.pt"), "ema")
    assert torch.equal(model.get_parameter("x_embedder.proj.bias"), averaged["x_embedder.proj.bias"])
    report = initialize(model, str(tmp_path / "both.pt"), "model")
    assert torch.equal(model.get_parameter("x_embedder.proj.bias"), state["x_embedder.proj.bias"])
    assert report.source.endswith("both.pt (model)")


def drop_tensors(folder: Path, part: str) -> None:
    """Removes the tensors whose names contain a text from a saved model."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if part not in name}, file, {"format": "pt"})


def test_a_variant_4_of_an_earlier_version_is_refused(
    save_pipeline: SavePipeline, make_transformer: MakeTransformer, run: Run
) -> None:
    """It had one attention of the same name and size, so that its tensors would all fit."""
    folder = save_pipeline(make_transformer(variant=4))
    drop_tensors(Path(folder) / "transformer", "temporal_attn")
    words = "it is a variant 4 of an earlier version, one attention whose heads were split between space and time"
    for load in (
        LavitaTransformer3DModel.from_pretrained,
        lambda source: initialize(make_transformer(variant=4), source),
    ):
        with pytest.raises(ValueError, match=words):
            load(f"{folder}/transformer")
    code, _, error = run("sample", folder, "--out", "samples")
    assert code == 2 and words in error and "train it again" in error and len(error.splitlines()) == 1
    assert not Path("samples").exists()


def test_a_model_that_lacks_tensors_is_refused(save_pipeline: SavePipeline, make_transformer: MakeTransformer) -> None:
    folder = save_pipeline(make_transformer())
    drop_tensors(Path(folder) / "transformer", "temp_embed")  # computed
    load_pipeline(folder)
    drop_tensors(Path(folder) / "transformer", "blocks.1.mlp.fc1.bias")
    with pytest.raises(ValueError, match=r"its weights lack blocks\.1\.mlp\.fc1\.bias"):
        load_pipeline(folder)
