"""Initialisation with pretrained weights: diffusers' DiT is the oracle, and the report leaves no tensor out."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, SavePipeline
from models.dit import layout, make_dit, write_ema_of_a_run, write_folder, write_old_pipeline, write_pt

from lavita.models.pretrained.load_report import LoadReport
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import load_pipeline

TIMESTEPS = torch.tensor([12, 1])
LABELS = torch.tensor([3, 5])
SIZES: dict[str, Any] = {"num_classes": 5, "num_frames": 4, "num_blocks": 4}
WRITERS = [write_pt, write_ema_of_a_run, write_folder, write_old_pipeline]


def clips(num_frames: int = 4) -> torch.Tensor:
    return torch.randn(2, num_frames, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def image_by_image(dit: Any, latents: torch.Tensor) -> torch.Tensor:
    frames = [dit(frame, TIMESTEPS, LABELS).sample for frame in latents.unbind(1)]
    return torch.stack(frames, dim=1)


@torch.no_grad()
def frames_of(model: LavitaTransformer3DModel, latents: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(latents, TIMESTEPS, LABELS if model.config["num_classes"] else None, **options).sample


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def video_model(dit: Any, source: str, **fields: Any) -> tuple[LavitaTransformer3DModel, LoadReport]:
    """A fresh model with a DiT's weights, and with its labels, which `initialize` leaves out."""
    sizes = {"sample_size": 8, "hidden_size": 32, "num_heads": 2, **SIZES}
    model = LavitaTransformer3DModel(**{**sizes, **fields}).eval()
    report = initialize(model, source)
    if model.config["num_classes"]:
        table = model.y_embedder.embedding_table.weight.data
        assert not table.any()
        table.copy_(layout(dit)["y_embedder.embedding_table.weight"])
    return model, report


# ---- an image model's weights


@pytest.mark.parametrize("write", WRITERS)
def test_a_dit_is_variant_3_without_time(write: Callable[..., str], tmp_path: Path) -> None:
    dit = make_dit()
    model, report = video_model(dit, write(dit, tmp_path), variant=3)
    assert_equal(frames_of(model, clips(), use_temporal=False), image_by_image(dit, clips()))
    assert ("t_embedder.mlp.0.weight" in report.adapted) == (write in (write_folder, write_old_pipeline))
    with torch.no_grad():  # and it is attention in time that the flag leaves out
        model.get_parameter("blocks.0.temporal_attn.proj.weight").normal_()
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
        for block in dit.transformer_blocks:  # an attention has half of the heads: two of the DiT's become one
            block.attn1.heads = 1
    assert_equal(frames_of(model, clips()), image_by_image(dit, clips()))


@pytest.mark.parametrize("position", ["absolute", "absolute_input", "rope"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_which_models_start_as_the_image_model(variant: int, position: str, tmp_path: Path) -> None:
    """Applied to every frame, without changes: Variant 3 alone, with rotary positions or without time."""
    dit = make_dit()
    model, _ = video_model(dit, write_folder(dit, tmp_path), variant=variant, temporal_position=position)
    expected = image_by_image(dit, clips())
    for use_temporal in (True, False):
        same = (frames_of(model, clips(), use_temporal=use_temporal) - expected).norm() < 1e-5 * expected.norm()
        assert same == (variant == 3 and (position == "rope" or not use_temporal))


@pytest.mark.parametrize("write", [write_pt, write_folder])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_the_papers_start_adapts_positions_and_labels_only(
    variant: int, write: Callable[..., str], tmp_path: Path, make_transformer: MakeTransformer
) -> None:
    dit = make_dit()
    model = make_transformer(**SIZES, variant=variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialize(model, write(dit, tmp_path), closed=False)
    after, state = model.state_dict(), layout(dit)
    for name in after:
        if ".temporal_attn." in name or name == "temp_embed":
            assert torch.equal(after[name], before[name]) and name in report.new
        elif name == "y_embedder.embedding_table.weight":
            assert not after[name].any() and name in report.new
        else:
            assert torch.equal(after[name], state[name]), name
    other = clips()
    other[:, 2] += 1
    seen = frames_of(model, other) - frames_of(model, clips())
    assert seen[:, [0, 1, 3]].abs().amax() > 1e-3, "frames see each other from the start"


def test_a_video_model_has_nothing_to_close(save_pipeline: SavePipeline, make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    with pytest.raises(ValueError, match="is a video model, whose attention in time init_closed=false would not"):
        initialize(model, save_pipeline(make_transformer()), closed=False)


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
    closed = ".temporal_attn.proj." if variant >= 3 else ".attn.proj."
    assert expected <= zero
    assert all(closed in name for name in zero - expected)
    assert any("y_embedder" in name or "class_embedder" in name for name in report.dropped)


def test_another_prediction_starts_a_new_decoder(tmp_path: Path, make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SIZES, prediction_type="v_prediction")
    report = initialize(model, write_pt(make_dit(), tmp_path))
    assert "predicts epsilon, this model v_prediction" in report.new["final_layer.linear.weight"]
    assert "final_layer.linear.weight" in report.dropped
    assert not frames_of(model, clips()).any()


@pytest.mark.parametrize("embedding", ["uniform", "compression"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_latents_of_another_autoencoder_get_new_first_and_last_layers(
    kind: str, embedding: str, tmp_path: Path, save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    sizes = {**SIZES, "patch_embedding": embedding}
    theirs = make_transformer(**sizes)
    source = write_pt(make_dit(), tmp_path) if kind == "image" else save_pipeline(theirs)
    model = make_transformer(**sizes, in_channels=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialize(model, source)
    ends = [f"{layer}.{part}" for layer in ("x_embedder.proj", "final_layer.linear") for part in ("weight", "bias")]
    for name in ends:
        assert report.new[name].startswith("latents of another autoencoder: 4 channels there, 6 here")
        assert name in report.dropped
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ends[:2])
    assert not after[ends[2]].any() and not after[ends[3]].any()
    assert "blocks.0.attn.qkv.weight" in report.used
    if kind == "video":
        same = theirs.state_dict()
        assert all(torch.equal(after[name], same[name]) for name in after if name not in {*ends, *report.new})


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


# ---- a video model's weights


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
    fields: dict[str, Any], below: str, save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    theirs = make_transformer(**fields)
    model = make_transformer(**fields)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    report = initialize(model, save_pipeline(theirs) + below)
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


def test_classes_are_taken_by_name(save_pipeline: SavePipeline, make_transformer: MakeTransformer) -> None:
    """In another order, and with one that the source does not know, which starts as its "no label"."""
    theirs = make_transformer(num_classes=3, class_names=["a", "b", "c"])
    model = make_transformer(num_classes=3, class_names=["c", "new", "a"])
    table = "y_embedder.embedding_table.weight"
    torch.nn.init.zeros_(model.get_parameter(table))
    report = initialize(model, save_pipeline(theirs))
    assert torch.equal(model.state_dict()[table], theirs.state_dict()[table][[2, 3, 0, 3]])
    assert report.adapted[table] == (
        "3 classes there, 3 here; by name: c, a; new, starting as the source's `no label`: new"
    )
    assert report.partly_new == [table]


def test_what_differs_between_video_models_is_reported(
    save_pipeline: SavePipeline, make_transformer: MakeTransformer
) -> None:
    source = save_pipeline(make_transformer(num_classes=3, class_names=["a", "b", "c"]))
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
