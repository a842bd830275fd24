"""The transformer on clips of any shape: positions are coordinates, and squares stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavita.models.embeddings import sincos_positions
from lavita.models.fingerprint import fingerprint
from lavita.models.shapes import default_frames, grid_positions, largest_shape, parse_latent_size, shape_warning
from lavita.models.transformer import LavitaTransformer3DModel

FIELDS: dict[str, Any] = {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}


def build(seed: int = 0, **fields: Any) -> LavitaTransformer3DModel:
    """A small model whose every parameter is random, so that each part of it shows in the output."""
    torch.manual_seed(seed)
    model = LavitaTransformer3DModel(**{**FIELDS, "num_frames": 3, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model: LavitaTransformer3DModel, *shape: int) -> torch.Tensor:
    latents = torch.randn(1, shape[0], 4, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(latents, torch.tensor([500])).sample


def place(row: float, column: float) -> np.ndarray:
    """The position of one patch: the first half of the channels is its column's, the other its row's."""
    return np.concatenate([sincos_positions(np.array([value]), 16)[0] for value in (column, row)])


def test_positions_are_coordinates_in_every_shape() -> None:
    config = {**FIELDS, "sample_size": [8, 12], "num_frames": 3}  # 4 x 6 patches
    table = grid_positions(config, (4, 6))[0]
    for row in range(4):
        for column in range(6):
            np.testing.assert_allclose(table[row * 6 + column], place(row, column), atol=1e-6)
    smaller = grid_positions(config, (3, 2))[0]
    np.testing.assert_allclose(smaller[2 * 2 + 1], place(2, 1), atol=1e-6)
    taller = grid_positions(config, (7, 6))[0]  # 7 rows in the range of 4
    np.testing.assert_allclose(taller[3 * 6 + 5], place(3 * 3 / 6, 5), atol=1e-6)
    several = {**config, "trained_shapes": [[3, 8, 12], [1, 14, 8]]}
    np.testing.assert_allclose(grid_positions(several, (7, 6))[0][6 * 6 + 5], place(6, 5), atol=1e-6)


def test_a_rectangle_is_seen_as_its_patches(tmp_path: Path) -> None:
    """A model on a rectangle; one made for another shape, which computes the positions, gives the same numbers."""
    wide, square = build(sample_size=[8, 12]), build(sample_size=12)
    assert [*wide.state_dict()["pos_embed"].shape] == [1, 24, 32]
    out = run(wide, 3, 8, 12)
    assert out.shape == (1, 3, 8, 8, 12)
    assert torch.equal(run(square, 3, 8, 12), out)
    assert not torch.equal(out, run(build(sample_size=[8, 12], temporal_position="rope"), 3, 8, 12))
    wide.save_pretrained(tmp_path)
    loaded = LavitaTransformer3DModel.from_pretrained(str(tmp_path))
    assert loaded.config["sample_size"] == [8, 12] and torch.equal(run(loaded.eval(), 3, 8, 12), out)


def test_each_patch_comes_out_where_it_went_in() -> None:
    """Without attention and positions, a change of one patch of a rectangle changes this patch alone."""
    model = build(sample_size=[4, 10])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.proj.weight"):
                parameter.zero_()
    latents = torch.zeros(1, 2, 4, 4, 10)
    with torch.no_grad():
        before = model(latents, torch.tensor([5])).sample
        latents[:, 1, :, 2:4, 6:8] = 1
        changed = (model(latents, torch.tensor([5])).sample != before).any(2)
    expected = torch.zeros(1, 2, 4, 10, dtype=torch.bool)
    expected[:, 1, 2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_models_from_before_keep_their_fingerprints() -> None:
    model = build(sample_size=8)
    before = fingerprint(model)
    assert before == fingerprint(build(sample_size=8, trained_shapes=None))
    assert before != fingerprint(build(sample_size=8, trained_shapes=[[3, 8, 8]]))


def test_trained_frames_are_the_range_of_positions_in_time() -> None:
    several = build(sample_size=8, trained_shapes=[[3, 8, 8], [6, 8, 12]])
    assert several.state_dict()["temp_embed"].shape[1] == 6
    single = build(sample_size=8, num_frames=6)
    assert torch.equal(run(several, 6, 8, 8), run(single, 6, 8, 8)), "not squeezed into 3"
    assert torch.equal(run(several, 3, 8, 8), run(build(sample_size=8), 3, 8, 8))


def test_what_samples_are_told() -> None:
    config = {**FIELDS, "sample_size": 8, "num_frames": 3}
    several = {**config, "trained_shapes": [[3, 8, 8], [6, 8, 12], [1, 16, 16]]}
    assert [default_frames(several, grid) for grid in ((8, 8), (8, 12), (16, 16), (4, 4))] == [3, 6, 1, 3]
    assert largest_shape(several) == {**config, "num_frames": 6, "sample_size": [8, 12], "trained_shapes": None}
    assert largest_shape(config) == config
    assert shape_warning(config, (2, 8, 8), 8) is None and shape_warning(several, (6, 8, 12), 8) is None
    assert "2 x 64x64 was asked for" in str(shape_warning(several, (2, 8, 8), 8))
    assert "interpolated" not in str(shape_warning(several, (3, 16, 12), 8))
    assert "interpolated" in str(shape_warning(several, (3, 16, 18), 8))
    assert (parse_latent_size("12x20"), parse_latent_size("12")) == ([12, 20], 12)
    with pytest.raises(ValueError, match="sample_size is '12x', but"):
        parse_latent_size("12x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": [8]}, r"sample_size is \[8\], but must be a whole number, or a list"),
        ({"sample_size": "8"}, "sample_size is '8', but must be a whole number"),
        ({"sample_size": True}, "sample_size is True, but must be a whole number"),
        ({"sample_size": [8, 9]}, r"sample_size is \[8, 9\], but must be a multiple of patch_size"),
        ({"sample_size": 0}, "sample_size is 0, but must be at least 1"),
        ({"trained_shapes": []}, r"trained_shapes is \[\], but must be a list"),
        ({"trained_shapes": [[1, 8]]}, "trained_shapes is .* but must be a list of frames, height and width"),
        ({"trained_shapes": [[1, 8, 9]]}, r"trained_shapes has \[1, 8, 9\], but must have multiples of patch_size"),
        ({"trained_shapes": [[1, 2**20, 2**20]]}, "but a table of"),
    ],
)
def test_fields_from_elsewhere_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LavitaTransformer3DModel(**{**FIELDS, "sample_size": 8, "num_frames": 2, **fields})
