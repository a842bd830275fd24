"""The transformer's blocks against diffusers' and torch's, then its sizes, files and refusals.

The whole model against a slow re-implementation: test_variants.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from lavita.models.blocks import PLAIN_ATTENTION_TOKENS, FrameLayout, Mixing, TransformerBlock, dot_product_attention
from lavita.models.presets import SIZES, block_plan, preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel

MakeTransformer = Callable[..., LavitaTransformer3DModel]

every_kind = pytest.mark.parametrize(
    ("variant", "conditioning", "temporal_position", "patch_embedding"),
    list(itertools.product((1, 2, 3, 4), ("s_adaln", "all_tokens"), ("absolute", "rope"), ("uniform", "compression"))),
)


# ---- parts


@pytest.mark.parametrize("mixing", ["space", "time"])
def test_a_block_equals_dits_in_diffusers(mixing: Mixing) -> None:
    class Condition(nn.Module):
        def forward(self, *_: Any, **__: Any) -> torch.Tensor:
            return rows

    width, heads = 32, 4
    torch.manual_seed(0)
    block = TransformerBlock(width, heads, 4.0, mixing)
    theirs = BasicTransformerBlock(
        width,
        heads,
        width // heads,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        attention_bias=True,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    theirs.norm1.emb = Condition()
    for mine, other in (
        (block.adaLN_modulation[1], theirs.norm1.linear),
        (block.attn.proj, theirs.attn1.to_out[0]),
        (block.mlp.fc1, theirs.ff.net[0].proj),
        (block.mlp.fc2, theirs.ff.net[2]),
    ):
        other.load_state_dict(mine.state_dict())
    with torch.no_grad():
        for index, other in enumerate((theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)):
            other.weight.copy_(block.attn.qkv.weight[index * width : (index + 1) * width])
            other.bias.copy_(block.attn.qkv.bias[index * width : (index + 1) * width])

        x, condition = torch.randn(2, 3, 5, width), torch.randn(2, width)
        output = block(x, condition[:, None, None], FrameLayout(3))
        if mixing == "space":
            rows = condition.repeat_interleave(3, dim=0)
            expected = theirs(x.reshape(6, 5, width)).reshape(2, 3, 5, width)
        else:
            rows = condition.repeat_interleave(5, dim=0)
            moved = x.transpose(1, 2).reshape(10, 3, width)
            expected = theirs(moved).reshape(2, 5, 3, width).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixing", ["space", "time"])
def test_a_plain_block_equals_torchs(mixing: Mixing) -> None:
    width, heads = 32, 4
    torch.manual_seed(0)
    block = TransformerBlock(width, heads, 4.0, mixing, "all_tokens")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = nn.TransformerEncoderLayer(
        width,
        heads,
        dim_feedforward=4 * width,
        dropout=0.0,
        activation=nn.GELU(approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        for mine, other in (
            (block.attn.proj, theirs.self_attn.out_proj),
            (block.mlp.fc1, theirs.linear1),
            (block.mlp.fc2, theirs.linear2),
            (block.norm1, theirs.norm1),
            (block.norm2, theirs.norm2),
        ):
            other.load_state_dict(mine.state_dict())
        x = torch.randn(2, 3, 5, width)
        output = block(x, None, FrameLayout(3))
        if mixing == "space":
            expected = theirs(x.flatten(0, 1)).unflatten(0, (2, 3))
        else:
            expected = theirs(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, PLAIN_ATTENTION_TOKENS, PLAIN_ATTENTION_TOKENS + 1])
def test_attention_equals_the_fused_kernel(tokens: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 2, tokens, 8, requires_grad=True) for _ in range(3)]
    output = dot_product_attention(*inputs)
    expected = nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(output.shape)
    for mine, theirs in zip(
        torch.autograd.grad((output * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


# ---- what mixes with what


@pytest.mark.parametrize(("variant", "first_temporal"), [(1, 2), (2, 1), (3, 0), (4, 0)])
@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
def test_frames_mix_in_temporal_blocks_only(
    conditioning: str, variant: int, first_temporal: int, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=variant, conditioning=conditioning, num_blocks=4, num_frames=3)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    torch.manual_seed(0)
    latents = torch.randn(1, 3, 4, 8, 8)
    other = latents.clone()
    other[:, 1] += 1
    with torch.no_grad():
        model(latents, torch.tensor([5]))
        model(other, torch.tensor([5]))
    for index in range(4):
        changed = (seen[index] != seen[4 + index]).flatten(2).any(dim=2)[0].tolist()
        assert changed == ([False, True, False] if index < first_temporal else [True, True, True]), index


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("changed_frame", [1, 2])
@pytest.mark.parametrize("num_video", [0, 2, 3])
@pytest.mark.parametrize("mixing", ["space", "time", "space_then_time", "space_and_time"])
def test_what_a_token_reaches(mixing: Mixing, num_video: int, changed_frame: int, conditioning: Any) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(32, 2, 4.0, mixing, conditioning)
    condition = torch.randn(1, 1, 1, 32)
    x = torch.randn(1, 3, 5, 32)
    other = x.clone()
    other[:, changed_frame, 2] += torch.randn(32)
    with torch.no_grad():
        frames = FrameLayout(num_video)
        changed = (block(x, condition, frames) != block(other, condition, frames)).any(dim=-1)[0]

    video = list(range(num_video)) if changed_frame < num_video else []
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[changed_frame, 2] = True
    if mixing != "time":
        expected[changed_frame, :] = True
    if mixing == "space_then_time":
        expected[video, :] = True
    if mixing in ("time", "space_and_time"):
        expected[video, 2] = True
    assert torch.equal(changed, expected)


def test_an_image_passes_a_temporal_block_untouched() -> None:
    block = TransformerBlock(32, 2, 4.0, "time")
    x = torch.randn(1, 3, 5, 32)
    output = block(x, torch.randn(1, 1, 1, 32), FrameLayout(2))
    assert torch.equal(output[:, 2:], x[:, 2:])
    assert not torch.equal(output[:, :2], x[:, :2])


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
def test_the_order_of_frames_and_the_conditions_matter(conditioning: str, make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3, conditioning=conditioning)
    torch.manual_seed(0)
    latents, t, label = torch.randn(1, 2, 4, 8, 8), torch.tensor([5]), torch.tensor([1])
    with torch.no_grad():
        output = model(latents, t, label).sample
        flipped = model(latents.flip(1), t, label).sample.flip(1)
        later = model(latents, t + 500, label).sample
        unlabelled = model(latents, t, torch.tensor([3])).sample
        one_frame = model(latents[:, :1], t, label).sample
        scalar = model(latents, torch.tensor(5), label).sample
    for other in (flipped, later, unlabelled):
        assert (output - other).abs().max() > 1e-3
    assert one_frame.shape == (1, 1, 8, 8, 8)
    assert torch.equal(scalar, output)


# ---- initialisation


def plain(**fields: Any) -> LavitaTransformer3DModel:
    sizes = {"sample_size": 8, "num_frames": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}
    return LavitaTransformer3DModel(**{**sizes, **fields})


def inputs(model: LavitaTransformer3DModel) -> dict[str, torch.Tensor]:
    given = {"latents": torch.randn(2, model.config["num_frames"], 4, 8, 8), "timesteps": torch.tensor([7, 999])}
    if model.config["num_classes"]:
        given["class_labels"] = torch.tensor([0, model.config["num_classes"]])
    if model.config["text_dim"]:
        given["text_embeds"] = torch.randn(2, model.config["text_dim"])
    return given


@pytest.mark.parametrize("given", [{"num_classes": 3}, {"text_dim": 5}, {}])
@every_kind
def test_starts_at_zero_and_trains_every_parameter_once_the_gates_open(
    variant: int, conditioning: str, temporal_position: str, patch_embedding: str, given: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = plain(
        variant=variant,
        conditioning=conditioning,
        temporal_position=temporal_position,
        patch_embedding=patch_embedding,
        num_frames=4,
        **given,
    )
    output = model(**inputs(model)).sample
    assert output.shape == (2, 4, 8, 8, 8)
    assert not output.any()

    for module in (*model.blocks, model.final_layer):
        if module.adaLN_modulation is not None:
            nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight)
    model(**inputs(model)).sample.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert not [name for name, _ in model.named_parameters() if "embed" in name and "embedder" not in name]


@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
def test_without_sigma_the_output_has_the_latents_shape(patch_embedding: str) -> None:
    model = plain(learn_sigma=False, patch_embedding=patch_embedding)
    (output,) = model(**inputs(model), return_dict=False)
    assert output.shape == (2, 2, 4, 8, 8)


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_a_fresh_block_is_the_identity(variant: int) -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(2, 3, 5, 32), torch.randn(2, 1, 1, 32)
    for block in plain(variant=variant).blocks:
        assert torch.equal(block(x, condition, FrameLayout(3)), x)


def test_a_fresh_tube_hands_out_the_decoders_channels_to_its_frames() -> None:
    patch, tube, channels = 2, 3, 8
    model = plain(patch_embedding="compression", tube_size=tube, num_frames=6, patch_size=patch)
    with torch.no_grad():
        bias = model.final_layer.linear.bias
        bias.copy_(torch.arange(len(bias)))
        output = model(torch.randn(1, 6, 4, 8, 8), torch.tensor([5])).sample
    for frame, channel, row, column in itertools.product(range(6), range(channels), range(8), range(8)):
        of_pixel = (row % patch) * patch + column % patch
        assert output[0, frame, channel, row, column] == (of_pixel * tube + frame % tube) * channels + channel


# ---- sizes


@pytest.mark.parametrize(("variant", "num_parameters"), [(1, 673_681_568), (2, 673_681_568), (4, 673_681_568)])
def test_xl_has_the_papers_673_68_million_parameters(variant: int, num_parameters: int) -> None:
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset("XL/2", variant=variant)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_parameters
    assert count // 10_000 == 67368  # Table 3 truncates
    assert [block.mixing for block in model.blocks] == block_plan(variant, 28)


def test_xl_of_variant_3_has_the_papers_676_33_million_parameters_but_for_the_patches() -> None:
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset("XL/2", variant=3)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (len(model.blocks), count) == (23, 676_355_360)
    patches = sum(parameter.numel() for parameter in model.x_embedder.parameters())
    assert (count - patches) // 10_000 == 67633


@pytest.mark.parametrize("size", SIZES)
def test_variant_3_has_as_many_blocks_as_bring_it_nearest_to_the_others(size: str) -> None:
    width, num_blocks, _ = SIZES[size]
    attention = 4 * width**2 + 4 * width
    rest = 14 * width**2 + 11 * width  # MLP: 8 D^2 + 5 D, modulation: 6 D^2 + 6 D
    others = num_blocks * (attention + rest)
    nearest = min(range(1, 2 * num_blocks), key=lambda blocks: abs(blocks * (2 * attention + rest) - others))
    assert preset_sizes(f"{size}/2", variant=3)["num_blocks"] == nearest
    assert all(preset_sizes(f"{size}/2", variant=variant)["num_blocks"] == num_blocks for variant in (1, 2, 4))


def test_block_plans() -> None:
    assert block_plan(1, 4) == ["space", "space", "time", "time"]
    assert block_plan(2, 4) == ["space", "time", "space", "time"]
    assert block_plan(3, 3) == ["space_then_time"] * 3
    assert block_plan(4, 3) == ["space_and_time"] * 3


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_dits(size: str, millions: int) -> None:
    # Peebles & Xie 2023, Table 4: 1000 classes, and the fixed positions counted too.
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset(f"{size}/2", num_classes=1000)
    count = sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.6)


def test_presets_fields_can_be_overruled() -> None:
    assert preset_sizes("B/4") == {"hidden_size": 768, "num_blocks": 12, "num_heads": 12, "patch_size": 4}
    model = LavitaTransformer3DModel.from_preset("tiny/2", sample_size=8, num_blocks=4)
    assert (model.config["hidden_size"], len(model.blocks)) == (64, 4)
    model = LavitaTransformer3DModel.from_preset("tiny/2", sample_size=8, num_blocks=5, variant=3)
    assert len(model.blocks) == 5


# ---- names and files


@pytest.mark.parametrize("given", [{"num_classes": 3}, {"text_dim": 5}, {}])
@every_kind
def test_names_are_dits_and_lattes(
    variant: int, conditioning: str, temporal_position: str, patch_embedding: str, given: dict[str, int]
) -> None:
    model = plain(
        variant=variant,
        conditioning=conditioning,
        temporal_position=temporal_position,
        patch_embedding=patch_embedding,
        **given,
    )
    steered = conditioning == "s_adaln"
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"] if steered else ["final_layer.norm"]
    layers += ["y_embedder.mlp.0", "y_embedder.mlp.2"] if "text_dim" in given else []
    layers += ["temporal_upsample"] if patch_embedding == "compression" else []
    for i in range(2):
        parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        parts += ["adaLN_modulation.1"] if steered else ["norm1", "norm2"]
        if variant == 3:
            parts += ["temporal_attn.qkv", "temporal_attn.proj"] + ([] if steered else ["norm_temporal"])
        layers += [f"blocks.{i}.{part}" for part in parts]
    expected = {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")} | {"pos_embed"}
    expected |= {"temp_embed"} if temporal_position == "absolute" else set()
    expected |= {"y_embedder.embedding_table.weight"} if "num_classes" in given else set()
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 3, "class_names": ["boxing", "enduro", "pong"], "fps": 4.0},
        {
            "variant": 3,
            "patch_embedding": "compression",
            "tube_size": 3,
            "num_frames": 6,
            "conditioning": "all_tokens",
            "temporal_position": "rope",
            "text_dim": 5,
            "text_encoder": "openai/clip-vit-large-patch14",
            "prediction_type": "v_prediction",
            "frame_interval": 3,
        },
        {"variant": 4, "patch_embedding": "compression", "temporal_position": "rope", "learn_sigma": False},
        {"variant": 1, "conditioning": "all_tokens", "num_blocks": 4, "num_classes": 2},
    ],
)
def test_round_trip_through_a_folder(fields: dict[str, Any], tmp_path: Path, make_transformer: MakeTransformer) -> None:
    model = make_transformer(**fields)
    model.save_pretrained(tmp_path)
    loaded = LavitaTransformer3DModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in fields} == fields
    assert not loaded.training
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(**given).sample, model(**given).sample)


# ---- refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 3, 8, 8), r"latents have shape \(1, 2, 3, 8, 8\), but this model takes \(B, F, 4, 8, 8\)"),
        ((1, 2, 4, 8, 16), r"latents have shape \(1, 2, 4, 8, 16\), but this model takes"),
        ((2, 4, 8, 8), r"latents have shape \(2, 4, 8, 8\), but this model takes"),
    ],
)
def test_latents_of_another_shape_are_refused(
    shape: tuple[int, ...], message: str, tiny_transformer: LavitaTransformer3DModel
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_transformer(torch.zeros(shape), torch.tensor([1]), torch.tensor([0]))


def test_tubes_are_whole_and_hold_no_images(make_transformer: MakeTransformer) -> None:
    model, t = make_transformer(patch_embedding="compression", tube_size=2), torch.tensor([1])
    with pytest.raises(ValueError, match="latents have 3 frames, but must have a multiple of 2"):
        model(torch.zeros(1, 3, 4, 8, 8), t)
    for options in ({"num_images": 2}, {"use_temporal": False}):
        with pytest.raises(
            ValueError, match=r"patch_embedding is compression.*num_images must be 0, and use_temporal true"
        ):
            model(torch.zeros(1, 4, 4, 8, 8), t, **options)


@pytest.mark.parametrize("num_images", [-1, 2, 3])
def test_a_clip_has_fewer_images_than_frames(num_images: int, make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match=rf"num_images is {num_images}, but must be in 0\.\.1"):
        make_transformer()(torch.zeros(1, 2, 4, 8, 8), torch.tensor([1]), num_images=num_images)


CLASSES, TEXTS, NOTHING = {"num_classes": 3}, {"text_dim": 5}, dict[str, int]()


@pytest.mark.parametrize(
    ("fields", "given", "num_images", "message"),
    [
        (CLASSES, {}, 0, "class_labels are missing, but this model has 3 classes"),
        (TEXTS, {}, 0, "text_embeds are missing, but this model has texts"),
        (NOTHING, {"class_labels": (2,)}, 0, "class_labels were given, but this model is unconditional"),
        (NOTHING, {"text_embeds": (2, 5)}, 0, "text_embeds were given, but this model is unconditional"),
        (CLASSES, {"text_embeds": (2, 5)}, 0, "text_embeds were given, but this model has 3 classes"),
        (CLASSES, {"class_labels": (2,), "text_embeds": (2, 5)}, 0, "text_embeds were given, but this model has 3"),
        (TEXTS, {"class_labels": (2,)}, 0, "class_labels were given, but this model has texts"),
        (CLASSES, {"class_labels": (1,)}, 0, r"class_labels have shape \(1,\), but must have \(2,\)"),
        (CLASSES, {"class_labels": (2, 1)}, 0, r"class_labels have shape \(2, 1\), but must have \(2,\)"),
        (CLASSES, {"class_labels": (2,)}, 1, r"class_labels have shape \(2,\), but must have \(2, 2\)"),
        (CLASSES, {"class_labels": (2, 3)}, 1, r"class_labels have shape \(2, 3\), but must have \(2, 2\)"),
        (TEXTS, {"text_embeds": (2, 4)}, 0, r"text_embeds have shape \(2, 4\), but must have \(2, 5\)"),
        (TEXTS, {"text_embeds": (2, 5)}, 1, r"text_embeds have shape \(2, 5\), but must have \(2, 2, 5\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    fields: dict[str, int],
    given: dict[str, tuple[int, ...]],
    num_images: int,
    message: str,
    make_transformer: MakeTransformer,
) -> None:
    dtypes = {"class_labels": torch.long, "text_embeds": torch.float32}
    tensors = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        make_transformer(**fields)(torch.zeros(2, 2, 4, 8, 8), torch.tensor([1, 2]), **tensors, num_images=num_images)


@pytest.mark.parametrize("preset", ["XL/3", "M/2", "XL", "", "xl/2", "S/2/2"])
def test_an_unknown_preset_is_named(preset: str) -> None:
    with pytest.raises(ValueError, match=f"preset is '{preset}'; allowed: .*XL.*1 2 4 8"):
        LavitaTransformer3DModel.from_preset(preset)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": 5}, "variant is 5; allowed: 1, 2, 3, 4"),
        ({"variant": 0}, "variant is 0; allowed: 1, 2, 3, 4"),
        ({"patch_embedding": "tubes"}, "patch_embedding is 'tubes'; allowed: uniform, compression"),
        ({"conditioning": "adaln"}, "conditioning is 'adaln'; allowed: s_adaln, all_tokens"),
        ({"temporal_position": "none"}, "temporal_position is 'none'; allowed: absolute, rope"),
        ({"num_classes": 3, "text_dim": 5}, "num_classes is 3 and text_dim 5, but a model has classes or texts"),
        ({"num_blocks": 3}, "num_blocks is 3, but must be even for variant 2"),
        ({"num_blocks": 3, "variant": 1}, "num_blocks is 3, but must be even for variant 1"),
        ({"num_blocks": 0}, "num_blocks is 0, but must be at least 1"),
        ({"num_blocks": 0, "variant": 3}, "num_blocks is 0, but must be at least 1"),
        ({"hidden_size": 36, "num_heads": 3, "variant": 4}, "num_heads is 3, but must be even for variant 4"),
        (
            {"hidden_size": 36, "num_heads": 4, "temporal_position": "rope"},
            "hidden_size / num_heads is 9, but must be even for rope",
        ),
        (
            {"num_frames": 3, "patch_embedding": "compression"},
            r"num_frames is 3, but must be a multiple of tube_size \(2\)",
        ),
        ({"tube_size": 0, "patch_embedding": "compression"}, "tube_size is 0, but must be at least 1"),
        ({"patch_size": 3}, r"sample_size is 8, but must be a multiple of patch_size \(3\)"),
        ({"num_heads": 3}, "hidden_size is 32, but must be a multiple of 4 and of num_heads"),
        ({"hidden_size": 30}, "hidden_size is 30"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names has 1 names, but num_classes is 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 36, "num_heads": 3, "variant": 3},
        {"hidden_size": 36, "num_heads": 4, "temporal_position": "absolute"},
        {"num_frames": 3, "tube_size": 2},
        {"num_blocks": 3, "variant": 4},
    ],
)
def test_what_one_choice_refuses_another_takes(fields: dict[str, Any]) -> None:
    model = plain(**fields)
    assert not model(**inputs(model)).sample.any()
