"""The four variants, against a slow float64 re-implementation and masked full attention; images and positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from models.passes import every_condition, every_kind
from models.reference import SlowTransformer, assert_near, masked_attention

from lavita.models.blocks import Attention, FrameLayout, Mixing
from lavita.models.transformer import LavitaTransformer3DModel


def random_latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conditions(model: LavitaTransformer3DModel, *shape: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Labels or texts of the given shape, or nothing, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    if model.config["num_classes"]:
        return {"class_labels": torch.randint(model.config["num_classes"] + 1, shape, generator=generator)}
    if model.config["text_dim"]:
        return {"text_embeds": torch.randn(*shape, model.config["text_dim"], generator=generator)}
    return {}


# ---- against the slow model


def check_against_the_slow_model(
    model: LavitaTransformer3DModel, latents: torch.Tensor, num_images: int = 0, use_temporal: bool = True
) -> None:
    batch, num_frames = latents.shape[:2]
    given = conditions(model, batch, 1 + num_images) if num_images else conditions(model, batch)
    timesteps = [3, 40]  # of large ones float32 does not know the sinusoids to 1e-5
    with torch.no_grad():
        output = model(
            latents, torch.tensor(timesteps), **given, num_images=num_images, use_temporal=use_temporal
        ).sample
    slow = SlowTransformer(model)
    num_tokens = num_frames // slow.tube
    num_video = num_tokens - num_images
    for b, timestep in enumerate(timesteps):
        givens: list[np.ndarray | None] = [None] * num_tokens
        for values in given.values():
            rows = list(values[b].double().numpy()) if num_images else [values[b].double().numpy()]
            givens = rows[:1] * num_video + rows[1:]
        expected = slow(latents[b].double().numpy(), timestep, givens, num_video if use_temporal else 0)
        assert_near(output[b].double(), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "embedding",
    [
        {"patch_embedding": "uniform", "num_classes": 3},
        {"patch_embedding": "compression", "num_frames": 4, "text_dim": 5},
    ],
    ids=["uniform", "compression"],
)
@every_kind
def test_equals_the_slow_model(
    kind: dict[str, Any], embedding: dict[str, Any], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(**{"num_blocks": 4, "num_frames": 3, **kind, **embedding})
    check_against_the_slow_model(model, random_latents(2, model.config["num_frames"]))


@every_condition
@every_kind
def test_images_equal_the_slow_model(
    kind: dict[str, Any], given: dict[str, int], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **given, **kind)
    latents = random_latents(2, 5)
    check_against_the_slow_model(model, latents, num_images=2)
    check_against_the_slow_model(model, latents[:, :2], use_temporal=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"learn_sigma": False, "patch_size": 4, "mlp_ratio": 2.0},
        {"learn_sigma": False, "patch_size": 4, "patch_embedding": "compression", "tube_size": 3, "num_frames": 3},
        {"variant": 4, "num_heads": 4, "conditioning": "all_tokens"},
        {"variant": 3, "num_blocks": 3, "patch_embedding": "compression", "tube_size": 1, "temporal_position": "rope"},
    ],
)
def test_other_sizes_equal_the_slow_model(fields: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(**fields)
    check_against_the_slow_model(model, random_latents(2, model.config["num_frames"]))


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_positions_at_the_input_equal_the_slow_model(
    variant: int, conditioning: str, make_transformer: MakeTransformer
) -> None:
    fields = {"variant": variant, "conditioning": conditioning, "num_blocks": 4, "num_frames": 3, "num_classes": 3}
    model = make_transformer(**fields, temporal_position="absolute_input")
    latents = random_latents(2, 5)
    check_against_the_slow_model(model, latents, num_images=2)
    check_against_the_slow_model(model, latents, use_temporal=False)
    late, given = make_transformer(**fields), conditions(model, 2)
    with torch.no_grad():
        found, other = (each(latents[:, :3], torch.tensor([3, 40]), **given).sample for each in (model, late))
    # In Variants 3 and 4, the first block has temporal attention.
    assert torch.equal(found, other) == (variant >= 3)


@pytest.mark.parametrize("num_frames", [2, 6, 8, 12])
@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
@pytest.mark.parametrize("variant", [2, 4])
def test_clips_of_any_length_equal_the_slow_model(
    variant: int, temporal_position: str, patch_embedding: str, num_frames: int, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(
        variant=variant, temporal_position=temporal_position, patch_embedding=patch_embedding, num_frames=6
    )
    check_against_the_slow_model(model, random_latents(2, num_frames))


@every_kind
def test_every_variant_is_masked_full_attention(
    kind: dict[str, Any], make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def masked(self: Attention, x: torch.Tensor, mixing: Mixing, frames: FrameLayout) -> torch.Tensor:
        calls.append(mixing)
        return masked_attention(self, x, mixing, frames.num_video, frames.rotation is not None)

    model = make_transformer(num_blocks=4, num_frames=3, num_classes=3, **kind)
    latents, t, given = random_latents(2, 5), torch.tensor([3, 40]), conditions(model, 2, 3)
    with torch.no_grad():
        output = model(latents, t, **given, num_images=2).sample
        monkeypatch.setattr(Attention, "forward", masked)
        expected = model(latents, t, **given, num_images=2).sample
    assert_near(output, expected)
    one_block = {1: ["space"], 2: ["space"], 3: ["space", "time"], 4: ["space", "time"]}
    assert calls[: len(one_block[kind["variant"]])] == one_block[kind["variant"]]
    assert len(calls) == (8 if kind["variant"] >= 3 else 4)


# ---- images after a video


@every_condition
@every_kind
def test_images_and_video_do_not_touch(
    kind: dict[str, Any], given: dict[str, int], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **given, **kind)
    latents, t, own = random_latents(2, 5), torch.tensor([3, 400]), conditions(model, 2, 3)

    def changed(part: slice, labels: slice) -> torch.Tensor:
        """The output where some frames and their labels or texts are others."""
        other_latents, other = latents.clone(), {name: values.clone() for name, values in own.items()}
        other_latents[:, part] += 1
        for name, values in other.items():
            values[:, labels] = (values[:, labels] + 1) % 4 if name == "class_labels" else values[:, labels] + 1
        return model(other_latents, t, **other, num_images=2).sample

    with torch.no_grad():
        output = model(latents, t, **own, num_images=2).sample
        other_images = changed(slice(3, 5), slice(1, 3))
        other_video = changed(slice(0, 3), slice(0, 1))
        assert torch.equal(other_images[:, :3], output[:, :3])
        assert torch.equal(other_video[:, 3:], output[:, 3:])
        assert (other_images[:, 3:] - output[:, 3:]).abs().amax(dim=(2, 3, 4)).min() > 1e-3
        assert (other_video[:, :3] - output[:, :3]).abs().amax(dim=(2, 3, 4)).min() > 1e-3

        of_video = {name: values[:, 0] for name, values in own.items()}
        alone = model(latents[:, :3], t, **of_video).sample
        assert_near(output[:, :3], alone)
        assert torch.equal(model(latents[:, :3], t, **of_video, num_images=0, use_temporal=True).sample, alone)
        for image in range(2):
            of_image = {name: values[:, 1 + image] for name, values in own.items()}
            frame = latents[:, 3 + image : 4 + image]
            alone = model(frame, t, **of_image, use_temporal=False).sample
            assert_near(output[:, 3 + image : 4 + image], alone)


@every_kind
def test_each_image_follows_its_own_label(kind: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3, **kind)
    latents, t = random_latents(1, 4), torch.tensor([5])
    with torch.no_grad():
        output = model(latents, t, torch.tensor([[0, 1, 2]]), num_images=2).sample
        for column, frames in enumerate(([0, 1], [2], [3])):
            labels = torch.tensor([[0, 1, 2]])
            labels[0, column] = 3
            other = model(latents, t, labels, num_images=2).sample
            different = (other != output).flatten(2).any(dim=2)[0]
            assert different.nonzero().flatten().tolist() == frames


@pytest.mark.parametrize("kind", [{"variant": 1}, {"variant": 2}])
def test_without_temporal_blocks_the_spatial_ones_are_a_model(
    kind: dict[str, Any], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(num_blocks=4, num_frames=3, **kind)
    latents, t = random_latents(1, 3), torch.tensor([5])
    with torch.no_grad():
        output = model(latents, t, use_temporal=False).sample
        temporal = [block for block in model.blocks if block.mixing == "time"]
        assert len(temporal) == 2
        for block in temporal:
            block.register_forward_hook(lambda _, inputs, __: inputs[0])
        model.temp_embed.zero_()
        assert torch.equal(model(latents, t).sample, output)


# ---- positions in time


@pytest.mark.parametrize("patch_embedding", ["uniform", "compression"])
@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
def test_a_shorter_clip_is_that_of_a_model_of_its_length(
    temporal_position: str, patch_embedding: str, make_transformer: MakeTransformer
) -> None:
    long, short = (
        make_transformer(num_frames=frames, temporal_position=temporal_position, patch_embedding=patch_embedding)
        for frames in (8, 4)
    )
    latents, t = random_latents(2, 4), torch.tensor([3, 40])
    with torch.no_grad():
        assert torch.equal(long(latents, t).sample, short(latents, t).sample)
        assert not torch.equal(long(random_latents(2, 8), t).sample[:, :4], short(latents, t).sample)


@every_kind
def test_the_order_of_frames_matters(kind: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_frames=3, **kind)
    latents, t = random_latents(1, 3), torch.tensor([5])
    with torch.no_grad():
        output, flipped = model(latents, t).sample, model(latents.flip(1), t).sample.flip(1)
    assert (output - flipped).abs().max() > 1e-3


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
def test_timestep_and_label_matter(conditioning: str, make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3, conditioning=conditioning)
    latents, t, label = random_latents(1, 2), torch.tensor([5]), torch.tensor([1])
    with torch.no_grad():
        output = model(latents, t, label).sample
        later = model(latents, t + 500, label).sample
        unlabelled = model(latents, t, torch.tensor([3])).sample
        one_frame = model(latents[:, :1], t, label).sample
        scalar = model(latents, torch.tensor(5), label).sample
    for other in (later, unlabelled):
        assert (output - other).abs().max() > 1e-3
    assert one_frame.shape == (1, 1, 8, 8, 8)
    assert torch.equal(scalar, output)
