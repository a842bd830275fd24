"""Frames that are given: which masks are drawn, and what the model makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest
import torch
from conftest import MakeTransformer

from lavita.models.given_frames import KINDS, GivenKind, GivenMasks, kinds_of
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel

FRAMES = 4
SIZES: dict[str, Any] = {"num_frames": FRAMES, "num_blocks": 4}


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(batch, FRAMES, 4, 8, 8, generator=random), torch.tensor([500] * batch)


def masks(*given: set[int]) -> torch.Tensor:
    return torch.tensor([[place in places for place in range(FRAMES)] for places in given])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_frames", [2, 3, 16])
def test_masks_of_a_kind_are_of_this_kind_and_leave_a_frame(kind: GivenKind, num_frames: int) -> None:
    random = torch.Generator().manual_seed(0)
    drawn = [GivenMasks([kind], 0.0).draw(num_frames, random) for _ in range(200)]
    for mask in drawn:
        assert mask.any() and not mask.all()
        assert kind in kinds_of(mask)
    numbers = {int(mask.sum()) for mask in drawn}
    expected = {
        "first": {1},
        "last": {1},
        "ends": {2} if num_frames > 2 else {1},
        "start": set(range(1, num_frames)),
        "every": {-(-num_frames // step) for step in range(2, max(2, num_frames // 2) + 1)},
    }
    assert numbers == expected[kind]


def test_kinds_are_drawn_equally_often_and_dropout_is_a_share() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = [GivenMasks(["first", "last"], 0.25).draw(8, random) for _ in range(4000)]
    counts = Counter(tuple(torch.nonzero(mask)[:, 0].tolist()) for mask in drawn)
    assert set(counts) == {(), (0,), (7,)}
    # Binomial with n = 4000: five standard deviations are at most 0.04 of n.
    for places, share in {(): 0.25, (0,): 0.375, (7,): 0.375}.items():
        assert abs(counts[places] / 4000 - share) < 0.04
    assert not GivenMasks(["first"], 0.0).draw(1, random).any()


def test_how_much_is_drawn_does_not_depend_on_it() -> None:
    left = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        GivenMasks(KINDS, 0.5).draw(16, random)
        again = torch.Generator().manual_seed(seed)
        torch.rand(3, generator=again, dtype=torch.float64)
        left.append(torch.equal(random.get_state(), again.get_state()))
    assert all(left)


def test_masks_that_no_kind_draws_are_of_none() -> None:
    for places in ({1}, {0, 2, 3}, {1, 3}, {0, 1, 2, 3}):
        assert not kinds_of(masks(places)[0])
    assert kinds_of(masks({0})[0]) == {"first", "start"}
    assert kinds_of(masks({0, 2})[0]) == {"every"}
    assert kinds_of(masks({0, 3})[0]) == {"ends"}


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("embedding", ["uniform", "compression"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_given_frames_matter_and_none_change_nothing(
    variant: int, embedding: str, conditioning: str, make_transformer: MakeTransformer
) -> None:
    fields = {**SIZES, "variant": variant, "patch_embedding": embedding, "conditioning": conditioning}
    model = make_transformer(**fields, given_frames=list(KINDS))
    latents, timesteps = inputs()
    with torch.no_grad():
        plain = model(latents, timesteps).sample
        none = model(latents, timesteps, given=masks(set(), set())).sample
        first = model(latents, timesteps, given=masks(set(), {0})).sample
        last = model(latents, timesteps, given=masks(set(), {3})).sample
    assert torch.equal(plain, none)
    assert torch.equal(plain[:1], first[:1]), "a clip's mask is its own"
    for one, other in ((first, plain), (last, plain), (first, last)):
        assert (one[1] - other[1]).abs().max() > 1e-3


def test_images_after_a_clip_are_never_given(make_transformer: MakeTransformer) -> None:
    """The mask is of frames and images; without one for the images, they pass as before."""
    model = make_transformer(**SIZES, given_frames=["first"])
    latents, timesteps = inputs()
    with torch.no_grad():
        plain = model(latents, timesteps, num_images=1).sample
        given = model(latents, timesteps, num_images=1, given=masks({0}, {0})).sample
    assert torch.equal(plain[:, -1], given[:, -1])
    assert not torch.equal(plain[:, :-1], given[:, :-1])


@pytest.mark.parametrize("embedding", ["uniform", "compression"])
def test_a_finetuned_model_starts_as_it_was(
    embedding: str, make_transformer: MakeTransformer, save_pipeline: Any
) -> None:
    """The vectors that mark given frames are zero at first, so a mask changes nothing before the first step."""
    fields = {**SIZES, "patch_embedding": embedding}
    before = make_transformer(**fields)
    model = LavitaTransformer3DModel(**{**before.config, "given_frames": list(KINDS)})
    report = initialize(model, save_pipeline(before))
    assert set(report.new) == {"given_embed"}
    latents, timesteps = inputs()
    with torch.no_grad():
        expected = before(latents, timesteps).sample
        assert torch.equal(model(latents, timesteps, given=masks({0}, {0, 3})).sample, expected)


def test_masks_that_do_not_fit_are_refused(make_transformer: MakeTransformer) -> None:
    latents, timesteps = inputs()
    with pytest.raises(ValueError, match="trained to make whole clips"):
        make_transformer(**SIZES)(latents, timesteps, given=masks({0}, {0}))
    model = make_transformer(**SIZES, given_frames=["first"])
    with pytest.raises(ValueError, match=r"given have shape \(1, 4\), but must have \(2, 4\)"):
        model(latents, timesteps, given=masks({0}))
    with pytest.raises(ValueError, match=r"given is torch.float32, but must be torch.bool"):
        model(latents, timesteps, given=masks({0}, {0}).float())
    with pytest.raises(ValueError, match="given_frames has 'middle'; allowed: first, start, last, ends, every"):
        make_transformer(given_frames=["middle"])


def test_the_kinds_are_those_of_their_type() -> None:
    assert get_args(GivenKind) == KINDS
