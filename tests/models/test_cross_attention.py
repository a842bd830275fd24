"""Attention to the tokens of texts, against float64, a model without it, and each image on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from models.passes import backward, fresh_model, gradients

from lavita.models import cross_attention
from lavita.models.compilation import compile_blocks
from lavita.models.cross_attention import CrossAttention, Words, masked_attention
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.presets import VARIANTS, block_plan
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.finetune import temporal_parameters

WIDTH, TOKENS = 5, 6
TEXTS: dict[str, Any] = {"text_dim": WIDTH, "text_tokens": TOKENS}


def texts(*lengths: int, num_tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Texts of some numbers of tokens, each the same whatever the others are, (len(lengths), 1 + L, WIDTH)."""
    packed = torch.zeros(len(lengths), 1 + num_tokens, WIDTH)
    for row, length in enumerate(lengths):
        random = torch.Generator().manual_seed(seed + row)
        packed[row, : 1 + length] = torch.randn(1 + TOKENS, WIDTH, generator=random)[: 1 + length]
    return packed


def inputs(model: LavitaTransformer3DModel, embeds: torch.Tensor, num_images: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(7)
    frames = model.config["num_frames"] + num_images
    return {
        "latents": torch.randn(len(embeds), frames, 4, 8, 8, generator=random),
        "timesteps": torch.tensor([3, 900])[: len(embeds)],
        "text_embeds": embeds,
        "num_images": num_images,
    }


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("rows", [None, [0, 0, 1, 2]])
def test_the_layer_against_float64(plain: bool, rows: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame by frame, token by token, head by head."""
    if not plain:
        monkeypatch.setattr(cross_attention, "PLAIN_TEXT_TOKENS", 0)
    torch.manual_seed(0)
    layer = CrossAttention(8, 2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, words = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[5, 2, 1], [3, 5, 4]])[..., None] > torch.arange(5)
    found = layer(x, Words(words, mask), None if rows is None else torch.tensor(rows))
    state = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    for clip in range(2):
        for frame in range(4):
            row = 0 if rows is None else rows[frame]
            own = words[clip, row][mask[clip, row]].double()  # without padding
            key, value = (own @ state["kv.weight"].T + state["kv.bias"]).chunk(2, dim=-1)
            for place in range(3):
                token = x[clip, frame, place].double()
                normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-6).sqrt()
                query = state["q.weight"] @ normed + state["q.bias"]
                heads = []
                for part in (slice(0, 4), slice(4, 8)):
                    weights = torch.softmax(key[:, part] @ query[part] / 2, dim=0)
                    heads.append(weights @ value[:, part])
                expected = state["proj.weight"] @ torch.cat(heads) + state["proj.bias"]
                torch.testing.assert_close(found[clip, frame, place].double(), expected, atol=2e-5, rtol=1e-4)


def test_both_kernels_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[[True, True, False]], [[True, False, False]]])
    found = []
    for most in (128, 0):
        monkeypatch.setattr(cross_attention, "PLAIN_TEXT_TOKENS", most)
        random = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 1, size, 2, 4, generator=random).requires_grad_() for size in (7, 3, 3))
        masked_attention(query, key, value, mask).square().sum().backward()
        found.append([query.grad, key.grad, value.grad])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-4)
    assert not found[0][1][~mask].any(), "padding has no gradient"  # type: ignore[index]


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_closed_at_first_and_changes_no_other_initial_weight(variant: int, conditioning: str) -> None:
    models = []
    for fields in ({"text_dim": WIDTH}, TEXTS):
        torch.manual_seed(3)
        models.append(fresh_model(variant=variant, conditioning=conditioning, **fields))
    pooled, words = models
    own = words.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in pooled.state_dict().items())
    added = own.keys() - pooled.state_dict().keys()
    blocks = [index for index, mixing in enumerate(block_plan(variant, 2)) if mixing != "time"]
    assert {name.rpartition(".cross_attn.")[0] for name in added} == {"", *(f"blocks.{index}" for index in blocks)}
    assert not added & temporal_parameters(words), "images pass them, too"
    with torch.no_grad():  # everything but the new parts is trained
        for name, parameter in words.named_parameters():
            if name not in added:
                parameter.normal_(std=0.2)
                pooled.get_parameter(name).copy_(parameter)
    embeds = texts(6, 2)
    expected = pooled(**inputs(pooled, embeds[:, 0])).sample
    assert torch.equal(words(**inputs(words, embeds)).sample, expected)
    backward(words, inputs(words, embeds))
    for index in blocks:
        assert gradients_of(words, f"blocks.{index}.cross_attn.proj.weight").any(), "it opens in the first step"


def gradients_of(model: LavitaTransformer3DModel, name: str) -> torch.Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_other_texts_change_nothing(variant: int, make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=variant, **TEXTS)
    given = inputs(model, texts(3, 6))
    found = model(**given).sample
    shorter = model(**{**given, "text_embeds": texts(3, 2)}).sample
    assert torch.equal(found[0], shorter[0]), "the length of another text"
    assert (found[1] - shorter[1]).abs().max() > 1e-3, "all of its own tokens count"
    longer = make_transformer(variant=variant, text_dim=WIDTH, text_tokens=2 * TOKENS)
    longer.load_state_dict(model.state_dict())
    padded = longer(**{**given, "text_embeds": texts(3, 6, num_tokens=2 * TOKENS)}).sample
    torch.testing.assert_close(padded, found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_attend_to_their_own_texts(variant: int, make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=variant, num_frames=2, **TEXTS)
    embeds = torch.stack([texts(3, 6, 1, seed=0), texts(2, 4, 5, seed=9)])  # (B, 1 + I, 1 + L, text_dim)
    given = inputs(model, embeds, num_images=2)
    found = model(**given).sample
    alone = {"timesteps": given["timesteps"], "num_images": 0}
    video = model(latents=given["latents"][:, :2], text_embeds=embeds[:, 0], **alone).sample
    torch.testing.assert_close(found[:, :2], video, atol=1e-5, rtol=1e-4)
    for image in range(2):
        latents = given["latents"][:, 2 + image : 3 + image]
        own = model(latents=latents, text_embeds=embeds[:, 1 + image], use_temporal=False, **alone).sample
        torch.testing.assert_close(found[:, 2 + image : 3 + image], own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
@pytest.mark.parametrize("kind", [True, "cheap"])
def test_checkpointing_has_the_same_gradients(
    kind: Any, patch_embedding: str, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=3, patch_embedding=patch_embedding, **TEXTS).train()
    given = inputs(model, texts(3, 6))
    output, expected = backward(model, given), gradients(model)
    checkpoint_blocks(model, kind)
    assert torch.equal(backward(model, given), output)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_compiled_blocks_take_words(make_transformer: MakeTransformer, traced_blocks: None) -> None:
    model = make_transformer(variant=2, **TEXTS)
    expected = model(**inputs(model, texts(3, 6))).sample
    compile_blocks(model)
    torch.testing.assert_close(model(**inputs(model, texts(3, 6))).sample, expected, atol=1e-5, rtol=1e-4)


def test_bf16_is_near_float32(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**TEXTS)
    expected = model(**inputs(model, texts(3, 6))).sample
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs(model, texts(3, 6))).sample.float()
    assert torch.isfinite(found).all()
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_tokens": 8}, "text_tokens is 8, but this model has no texts: text_dim is 0"),
        ({"text_dim": 5, "text_tokens": 2}, r"text_tokens is 2, but must be in 4\.\.4096"),
        ({"text_dim": 5, "text_tokens": 8.5}, "text_tokens is 8.5, but must be a whole number"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh_model(**fields)


def test_texts_of_another_shape_are_refused(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**TEXTS)
    with pytest.raises(ValueError, match=r"text_embeds have shape \(2, 5\), but must have \(2, 7, 5\)"):
        model(**inputs(model, texts(1, 1)[:, 0]))
