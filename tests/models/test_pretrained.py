"""Weights of others: diffusers' DiT is the oracle, and a report leaves no tensor out."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from diffusers import AutoencoderKL, DiTTransformer2DModel
from typer.testing import CliRunner

from lavita import cli
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.latte_files import LoadReport, convert_latte, export_latte, latte_config
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.schedulers import make_scheduler

State = dict[str, torch.Tensor]
TIMESTEPS = torch.tensor([12, 1])
LABELS = torch.tensor([3, 5])
SIZES: dict[str, Any] = {"num_classes": 5, "num_frames": 4, "num_blocks": 4}


def make_dit(num_layers: int = 4, **fields: Any) -> DiTTransformer2DModel:
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
        dit = DiTTransformer2DModel(num_layers=num_layers, **{**config, **fields})
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    for block in dit.transformer_blocks:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return dit.eval().requires_grad_(False)


def layout(dit: DiTTransformer2DModel) -> State:
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


def write_pt(dit: DiTTransformer2DModel, path: Path) -> str:
    torch.save(layout(dit), path / "dit.pt")
    return str(path / "dit.pt")


def write_ema_of_a_run(dit: DiTTransformer2DModel, path: Path) -> str:
    state = {f"module.{name}": tensor for name, tensor in layout(dit).items()}
    torch.save({"ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, path / "run.pt")
    return str(path / "run.pt")


def write_folder(dit: DiTTransformer2DModel, path: Path) -> str:
    dit.save_pretrained(path / "dit")
    return str(path / "dit")


def write_old_pipeline(dit: DiTTransformer2DModel, path: Path) -> str:
    dit.save_pretrained(path / "pipeline" / "transformer", safe_serialization=False)
    file = path / "pipeline" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "Transformer2DModel"}))
    return str(path / "pipeline")


WRITERS = [write_pt, write_ema_of_a_run, write_folder, write_old_pipeline]


def clips(num_frames: int = 4) -> torch.Tensor:
    return torch.randn(2, num_frames, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def image_by_image(dit: DiTTransformer2DModel, latents: torch.Tensor) -> torch.Tensor:
    frames = [dit(frame, TIMESTEPS, LABELS).sample for frame in latents.unbind(1)]
    return torch.stack(frames, dim=1)


@torch.no_grad()
def frames_of(model: LavitaTransformer3DModel, latents: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(latents, TIMESTEPS, LABELS if model.config["num_classes"] else None, **options).sample


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def video_model(dit: DiTTransformer2DModel, source: str, **fields: Any) -> tuple[LavitaTransformer3DModel, LoadReport]:
    """A fresh model with a DiT's weights, and with its labels, which `initialize` leaves out."""
    sizes = {"sample_size": 8, "hidden_size": 32, "num_heads": 2, **SIZES}
    model = LavitaTransformer3DModel(**{**sizes, **fields}).eval()
    report = initialize(model, source)
    if model.config["num_classes"]:
        table = model.y_embedder.embedding_table.weight.data  # type: ignore[union-attr]
        assert not table.any()
        table.copy_(layout(dit)["y_embedder.embedding_table.weight"])
    return model, report


# --- an image model's weights


@pytest.mark.parametrize("write", WRITERS)
def test_a_dit_is_variant_3_without_time(write: Callable[..., str], tmp_path: Path) -> None:
    dit = make_dit()
    model, report = video_model(dit, write(dit, tmp_path), variant=3)
    assert_equal(frames_of(model, clips(), use_temporal=False), image_by_image(dit, clips()))
    assert ("t_embedder.mlp.0.weight" in report.adapted) == (write in (write_folder, write_old_pipeline))
    with torch.no_grad():  # and it is attention in time that the flag leaves out
        model.blocks[0].temporal_attn.proj.weight.normal_()  # type: ignore[union-attr]
    assert not torch.allclose(frames_of(model, clips()), image_by_image(dit, clips()), atol=0.1)


@pytest.mark.parametrize("variant", [1, 2])
def test_a_dit_of_the_spatial_blocks_is_the_variant_without_time(variant: int, tmp_path: Path) -> None:
    dit = make_dit()
    model, _ = video_model(dit, write_pt(dit, tmp_path), variant=variant)
    spatial = [0, 1] if variant == 1 else [0, 2]
    dit.transformer_blocks = torch.nn.ModuleList(dit.transformer_blocks[index] for index in spatial)
    assert_equal(frames_of(model, clips(), use_temporal=False), image_by_image(dit, clips()))


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_at_first_every_frame_is_the_image_models(variant: int, tmp_path: Path) -> None:
    """With rotary positions nothing tells frames apart; what cannot be kept of the DiT is taken from it, too."""
    dit = make_dit()
    model, _ = video_model(dit, write_folder(dit, tmp_path), variant=variant, temporal_position="rope")
    for index in {1: [2, 3], 2: [1, 3]}.get(variant, []):
        linear = dit.transformer_blocks[index].norm1.linear
        linear.weight[64:96], linear.bias[64:96] = 0, 0
    if variant == 4:
        for block in dit.transformer_blocks:
            block.attn1.to_out[0].weight[:, 16:] = 0
    assert_equal(frames_of(model, clips()), image_by_image(dit, clips()))


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("position", ["absolute", "rope"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_at_first_frames_do_not_see_each_other(
    variant: int, position: str, conditioning: str, tmp_path: Path, make_transformer: MakeTransformer
) -> None:
    fields = {**SIZES, "variant": variant, "temporal_position": position, "conditioning": conditioning}
    model = make_transformer(**fields)
    other = clips()
    other[:, 2] += 1
    seen = frames_of(model, other) - frames_of(model, clips())
    assert seen[:, [0, 1, 3]].abs().amax() > 1e-3  # random weights do see
    initialize(model, write_pt(make_dit(), tmp_path))
    if conditioning == "all_tokens":
        assert not frames_of(model, clips()).any()
        torch.nn.init.normal_(model.final_layer.linear.weight)
    seen = frames_of(model, other) - frames_of(model, clips())
    assert seen[:, 2].abs().amax() > 0.1
    assert seen[:, [0, 1, 3]].abs().amax() < 1e-5


def test_tubes_see_the_mean_of_their_frames(tmp_path: Path) -> None:
    dit = make_dit()
    fields = {"variant": 3, "patch_embedding": "compression", "temporal_position": "rope"}
    model, report = video_model(dit, write_pt(dit, tmp_path), **fields)
    mean = clips().unflatten(1, (2, 2)).mean(2)
    assert_equal(frames_of(model, clips()), image_by_image(dit, mean).repeat_interleave(2, dim=1))
    assert report.adapted["pos_embed"] == "replicated over 2 frames"


def test_the_variance_is_cut_off_or_starts_at_zero(tmp_path: Path) -> None:
    dit = make_dit()
    model, report = video_model(dit, write_pt(dit, tmp_path), variant=3, learn_sigma=False, temporal_position="rope")
    assert_equal(frames_of(model, clips()), image_by_image(dit, clips())[:, :, :4])
    assert "final_layer.linear.bias" in report.adapted
    dit = make_dit(out_channels=4)
    model, _ = video_model(dit, write_pt(dit, tmp_path), variant=3, temporal_position="rope")
    assert_equal(frames_of(model, clips())[:, :, :4], image_by_image(dit, clips()))
    assert not frames_of(model, clips())[:, :, 4:].any()


@pytest.mark.parametrize(("num_layers", "num_blocks", "picks"), [(6, 4, [0, 2, 3, 5]), (2, 4, [0, 0, 1, 1])])
def test_other_numbers_of_blocks_are_evenly_spaced(
    num_layers: int, num_blocks: int, picks: list[int], tmp_path: Path
) -> None:
    dit = make_dit(num_layers)
    source = write_pt(dit, tmp_path)
    model, report = video_model(dit, source, variant=3, num_blocks=num_blocks, temporal_position="rope")
    dit.transformer_blocks = torch.nn.ModuleList(dit.transformer_blocks[index] for index in picks)
    assert_equal(frames_of(model, clips()), image_by_image(dit, clips()))
    assert "blocks.3.mlp.fc1.weight" in report.adapted
    dropped = {int(name.split(".")[1]) for name in report.dropped if name.startswith("blocks.")}
    assert dropped == set(range(num_layers)) - set(picks)


def test_positions_of_another_grid_are_computed(tmp_path: Path) -> None:
    """diffusers computes the positions of 4 x 4 patches from the same formula, in a model of that size."""
    small = make_dit(sample_size=8)
    larger = make_dit(sample_size=16)
    model, report = video_model(small, write_pt(larger, tmp_path), variant=3, temporal_position="rope")
    assert_equal(frames_of(model, clips()), image_by_image(small, clips()))
    assert report.adapted["pos_embed"] == "recomputed: 16 places of a frame here, 64 there"
    state = layout(larger)
    state["pos_embed"] += torch.randn_like(state["pos_embed"])
    torch.save(state, tmp_path / "learned.pt")
    with pytest.raises(ValueError, match="pos_embed is not fixed sin-cos"):
        initialize(model, str(tmp_path / "learned.pt"))


@pytest.mark.parametrize("write", [write_pt, write_folder])
@pytest.mark.parametrize("condition", [{"num_classes": 3}, {"num_classes": 0, "text_dim": 6}, {"num_classes": 0}])
@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("embedding", ["uniform", "compression"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_the_report_leaves_nothing_out(
    variant: int,
    embedding: str,
    conditioning: str,
    condition: dict[str, int],
    write: Callable[..., str],
    tmp_path: Path,
    make_transformer: MakeTransformer,
) -> None:
    dit = make_dit()
    fields = {**SIZES, **condition, "variant": variant, "patch_embedding": embedding, "conditioning": conditioning}
    model = make_transformer(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialize(model, write(dit, tmp_path))
    after, state = model.state_dict(), layout(dit)
    assert sorted([*report.loaded, *report.adapted, *report.new]) == sorted(after)
    own = state if write is write_pt else dit.state_dict()
    assert sorted([*report.used, *report.dropped]) == sorted(own)
    for name in report.loaded:
        assert torch.equal(after[name], state[name]), name
    for name in report.new:  # random before: kept, or closed
        assert torch.equal(after[name], before[name]) or not after[name].any(), name
    for name in report.adapted:
        assert not torch.equal(after[name], before[name]) or name == "pos_embed", name
    zero = {name for name in report.new if not after[name].any()}
    expected = {"y_embedder.embedding_table.weight", "y_embedder.mlp.2.weight", "y_embedder.mlp.2.bias"} & set(after)
    if conditioning == "all_tokens":
        expected |= {"final_layer.linear.weight", "final_layer.linear.bias"}
    closed = ".temporal_attn.proj." if variant == 3 else ".attn.proj."
    assert expected <= zero
    assert all(closed in name for name in zero - expected)
    assert any("y_embedder" in name or "class_embedder" in name for name in report.dropped)


def test_another_prediction_starts_a_new_decoder(tmp_path: Path, make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SIZES, prediction_type="v_prediction")
    report = initialize(model, write_pt(make_dit(), tmp_path))
    assert "predicts epsilon, this model v_prediction" in report.new["final_layer.linear.weight"]
    assert "final_layer.linear.weight" in report.dropped
    assert not frames_of(model, clips()).any()


def test_a_report_fits_a_screen() -> None:
    blocks = [f"blocks.{index}.attn.qkv.weight" for index in range(28)]
    odd = {f"blocks.{index}.adaLN_modulation.1.weight": "gate closed" for index in range(1, 28, 2)}
    some = {f"blocks.{index}.mlp.fc1.bias": "left out" for index in (3, 4, 9)}
    text = str(LoadReport("dit.pt", loaded=[*blocks, "pos_embed"], adapted=odd, dropped=some, used=[]))
    assert text.splitlines() == [
        "weights of dit.pt",
        "loaded 29: blocks.{0..27}.attn.qkv.weight, pos_embed",
        "adapted 14:",
        "  blocks.{1,3..27}.adaLN_modulation.1.weight - gate closed",
        "dropped 3:",
        "  blocks.{3,4,9}.mlp.fc1.bias - left out",
    ]


# --- a video model's weights


@pytest.fixture
def save(tmp_path: Path, tiny_vae: AutoencoderKL) -> Callable[..., str]:
    """Saves a model as a pipeline, whose folder it returns."""

    def call(model: LavitaTransformer3DModel, name: str = "pipeline") -> str:
        scheduler = make_scheduler("unipc", model.config["learn_sigma"], model.config["prediction_type"])
        LavitaPipeline(model, tiny_vae, scheduler).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return call


@pytest.mark.parametrize("below", ["", "/transformer"])
@pytest.mark.parametrize(
    "fields",
    [
        {"variant": 1},
        {"variant": 2, "num_classes": 3},
        {"variant": 3, "conditioning": "all_tokens"},
        {"variant": 4, "patch_embedding": "compression"},
        {"text_dim": 6, "temporal_position": "rope"},
    ],
)
def test_our_own_weights_load_whole(
    fields: dict[str, Any], below: str, save: Callable[..., str], make_transformer: MakeTransformer
) -> None:
    theirs = make_transformer(**fields)
    model = make_transformer(**fields)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    report = initialize(model, save(theirs) + below)
    assert sorted(report.loaded) == sorted(report.used) == sorted(model.state_dict())
    assert not (report.adapted or report.dropped or report.new)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_builtin_model_is_a_source() -> None:
    theirs = load_pipeline(str(Path(str(files("lavita"))) / "weights" / "arcade")).transformer
    model = LavitaTransformer3DModel.from_config(theirs.config)
    report = initialize(model, "builtin")
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_what_differs_between_video_models_is_reported(
    save: Callable[..., str], make_transformer: MakeTransformer
) -> None:
    source = save(make_transformer(num_classes=3, class_names=["a", "b", "c"]))
    table = "y_embedder.embedding_table.weight"
    model = make_transformer(text_dim=6)
    report = initialize(model, source)
    assert table in report.dropped
    assert set(report.new) == {name for name in model.state_dict() if name.startswith("y_embedder")}
    assert not model.state_dict()["y_embedder.mlp.2.weight"].any()
    report = initialize(make_transformer(), source)
    assert (list(report.dropped), report.new) == ([table], {})

    model = make_transformer(num_classes=3, num_frames=6)
    report = initialize(model, source)
    assert report.adapted == {"temp_embed": "recomputed: 6 frames here, 2 there"}
    assert torch.equal(model.temp_embed, make_transformer(num_frames=6).temp_embed)
    report = initialize(make_transformer(num_classes=3, temporal_position="rope"), source)
    assert report.dropped == {"temp_embed": "positions in time are rope here"}
    model = make_transformer(num_classes=3, prediction_type="v_prediction")
    assert set(initialize(model, source).new) == {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert not model.final_layer.linear.weight.any()


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32, but this model's is 64"),
        ({"num_heads": 4}, "num_heads is 2, but this model's is 4"),
        ({"patch_size": 4}, "patch_size is 2, but this model's is 4"),
        ({"in_channels": 3}, "in_channels is 4, but this model's is 3"),
        ({"mlp_ratio": 2.0}, "width of the MLPs is 128, but this model's is 64"),
    ],
)
def test_other_sizes_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path, save: Callable[..., str], make_transformer: MakeTransformer
) -> None:
    dit = make_dit()
    model = make_transformer(**{**SIZES, **fields})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source in (write_pt(dit, tmp_path), write_folder(dit, tmp_path), save(make_transformer(**SIZES))):
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
    fields: dict[str, Any], tmp_path: Path, save: Callable[..., str], make_transformer: MakeTransformer
) -> None:
    theirs = make_transformer(**SIZES)
    torch.save({"ema": theirs.state_dict()}, tmp_path / "latte.pt")
    for source in (save(theirs), str(tmp_path / "latte.pt")):
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


def test_damaged_folders_are_refused(
    tmp_path: Path, save: Callable[..., str], tiny_transformer: LavitaTransformer3DModel, tiny_vae: AutoencoderKL
) -> None:
    weights = Path(save(tiny_transformer)) / "transformer" / "diffusion_pytorch_model.safetensors"
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
    assert torch.equal(model.x_embedder.proj.bias, averaged["x_embedder.proj.bias"])
    report = initialize(model, str(tmp_path / "both.pt"), "model")
    assert torch.equal(model.x_embedder.proj.bias, state["x_embedder.proj.bias"])
    assert report.source.endswith("both.pt (model)")


# --- Latte


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


def test_text_latte_is_refused(latte: Path) -> None:
    state = torch.load(latte, weights_only=True)["ema"]
    torch.save({"ema": {**state, "text_embedding_projection.1.bias": torch.zeros(32)}}, latte)
    with pytest.raises(ValueError, match=r"include the unknown text_embedding_projection\.1\.bias"):
        convert_latte(latte, latte.parent / "out", num_heads=2)
    assert not (latte.parent / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": 3}, "variant is 3, but Latte's files only hold 2"),
        ({"patch_embedding": "compression"}, "patch_embedding is 'compression'"),
        ({"conditioning": "all_tokens"}, "conditioning is 'all_tokens'"),
        ({"temporal_position": "rope"}, "temporal_position is 'rope'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"text_dim": 6}, "text_dim is 6"),
    ],
)
def test_what_latte_has_not_is_not_exported(
    fields: dict[str, Any], words: str, tmp_path: Path, save: Callable[..., str], make_transformer: MakeTransformer
) -> None:
    with pytest.raises(ValueError, match=words):
        export_latte(save(make_transformer(**fields)), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# --- the command


def test_the_command_converts_and_exports(latte: Path) -> None:
    folder, back = latte.parent / "pipeline", latte.parent / "back.pt"
    options = ["--weights", "model", "--autoencoder", str(latte.parent / "vae"), "--num-heads", "2", "--fps", "6"]
    result = CliRunner().invoke(cli.app, ["convert", str(latte), str(folder), *options, "--frame-interval", "4"])
    assert result.exit_code == 0, result.output
    assert "latte.pt (model)" in result.output
    assert "blocks.{0,1}.attn.qkv.weight" in result.output
    config = load_pipeline(folder).transformer.config
    assert (config["frame_interval"], config["fps"]) == (4, 6.0)
    result = CliRunner().invoke(cli.app, ["convert", str(folder), str(back)])
    assert result.exit_code == 0, result.output
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
def test_bad_input_is_one_line(
    line: str, words: str, latte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lavita", "convert", *line.format(latte.parent).split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error:") and words in last
    assert not (latte.parent / "out").exists() and not (latte.parent / "out.pt").exists()
