"""Fields and inputs that the transformer refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from models.passes import batch, fresh_model

from lavita.models.transformer import LavitaTransformer3DModel

CLASSES, TEXTS, NOTHING = {"num_classes": 3}, {"text_dim": 5}, dict[str, int]()


# ---- inputs


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 3, 8, 8), r"latents have shape \(1, 2, 3, 8, 8\), but this model takes \(B, F, 4, 8, 8\)"),
        ((1, 2, 4, 8, 15), r"latents have shape \(1, 2, 4, 8, 15\), but this model takes"),
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
    with pytest.raises(ValueError, match=r"latents have 3 frames, but must have a multiple of tube_size \(2\)"):
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


# ---- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": 5}, "variant is 5; allowed: 1, 2, 3, 4"),
        ({"variant": 0}, "variant is 0; allowed: 1, 2, 3, 4"),
        ({"patch_embedding": "tubes"}, "patch_embedding is 'tubes'; allowed: uniform, compression"),
        ({"conditioning": "adaln"}, "conditioning is 'adaln'; allowed: s_adaln, all_tokens"),
        ({"temporal_position": "none"}, "temporal_position is 'none'; allowed: absolute, absolute_input, rope"),
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
        # As a `config.json` from elsewhere may have them.
        ({"sample_size": 2**31}, r"sample_size is 2147483648, but a table of 1152921504606846976 x hidden_size \(32\)"),
        ({"num_frames": 2**40}, "num_frames is 1099511627776, but a table of"),
        ({"num_classes": 2**40}, "num_classes is 1099511627776, but a table of"),
        ({"hidden_size": 2**20}, "hidden_size is 1048576, but a table of"),
        ({"num_blocks": 2**40}, "num_blocks is 1099511627776, but must be at most 4096"),
        ({"sample_size": "8"}, "sample_size is '8', but must be a whole number"),
        ({"num_blocks": 2.0}, "num_blocks is 2.0, but must be a whole number"),
        ({"num_frames": True}, "num_frames is True, but must be a whole number"),
        ({"num_heads": None}, "num_heads is None, but must be a whole number"),
        ({"fps": "8"}, "fps is '8', but must be a number"),
        ({"learn_sigma": 1}, "learn_sigma is 1, but must be true or false"),
        ({"conditioning": ["s_adaln"]}, "conditioning is .*, but must be a text"),
        ({"num_classes": 2, "class_names": "ab"}, "class_names is 'ab', but must be a list"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh_model(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 36, "num_heads": 3, "variant": 3},
        {"hidden_size": 36, "num_heads": 4, "temporal_position": "absolute"},
        {"num_frames": 3, "tube_size": 2},
        {"num_blocks": 3, "variant": 4},
        {"hidden_size": 36, "num_heads": 4, "variant": 4, "temporal_position": "rope"},
    ],
)
def test_what_one_choice_refuses_another_takes(fields: dict[str, Any]) -> None:
    model = fresh_model(**fields)
    assert not model(**batch(model)).sample.any()
