"""Sizes of the presets: parameters of the paper and of DiT."""

from __future__ import annotations

import pytest
import torch

from lavita.models.presets import SIZES, block_plan, preset_sizes
from lavita.models.transformer import LavitaTransformer3DModel


@pytest.mark.parametrize(("variant", "num_parameters"), [(1, 673_681_568), (2, 673_681_568)])
def test_xl_has_the_papers_673_68_million_parameters(variant: int, num_parameters: int) -> None:
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset("XL/2", variant=variant)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_parameters
    assert count // 10_000 == 67368  # Table 3 truncates
    assert [block.mixing for block in model.blocks] == block_plan(variant, 28)


@pytest.mark.parametrize(
    ("variant", "preset", "without_patches", "printed"),
    [(3, "XL/2", 676_335_776, 67633), (4, "XL/2", 676_335_776, 67633), (4, "XL/4", 676_446_464, 67644)],
)
def test_xl_of_variants_3_and_4_has_the_papers_parameters_but_for_the_patches(
    variant: int, preset: str, without_patches: int, printed: int
) -> None:
    with torch.device("meta"):
        model = LavitaTransformer3DModel.from_preset(preset, variant=variant)
    count = sum(parameter.numel() for parameter in model.parameters())
    patches = sum(parameter.numel() for parameter in model.x_embedder.parameters())
    assert (len(model.blocks), count - patches) == (23, without_patches)
    assert without_patches // 10_000 == printed


@pytest.mark.parametrize("size", SIZES)
def test_two_attentions_have_as_many_blocks_as_bring_them_nearest_to_the_others(size: str) -> None:
    width, num_blocks, _ = SIZES[size]
    attention = 4 * width**2 + 4 * width
    rest = 14 * width**2 + 11 * width  # MLP: 8 D^2 + 5 D, modulation: 6 D^2 + 6 D
    others = num_blocks * (attention + rest)
    nearest = min(range(1, 2 * num_blocks), key=lambda blocks: abs(blocks * (2 * attention + rest) - others))
    assert all(preset_sizes(f"{size}/2", variant=variant)["num_blocks"] == nearest for variant in (3, 4))
    assert all(preset_sizes(f"{size}/2", variant=variant)["num_blocks"] == num_blocks for variant in (1, 2))


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


@pytest.mark.parametrize("preset", ["XL/3", "M/2", "XL", "", "xl/2", "S/2/2"])
def test_an_unknown_preset_is_named(preset: str) -> None:
    with pytest.raises(ValueError, match=f"preset is '{preset}'; allowed: .*XL.*1 2 4 8"):
        LavitaTransformer3DModel.from_preset(preset)
