"""Presets and variants of the transformer: its sizes, and what each of its blocks attends to.

Legend: D width.
"""

from __future__ import annotations

from lavita.models.blocks import Mixing

# Width, number of blocks (spatial and temporal together, as the paper counts them), number of heads.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (64, 2, 2),
    "mini": (128, 8, 2),
    "small": (256, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
VARIANTS = (1, 2, 3, 4)


def block_plan(variant: int, num_blocks: int) -> list[Mixing]:
    """Lists what each block's attention mixes (Sec. 3.2, Fig. 2).

    Variant 1, late fusion: spatial blocks, then as many temporal ones. Variant 2, interleaved fusion: they alternate.
    Variant 3: each block attends in space, then in time. Variant 4: each block attends in space and, side by side, in
    time, with half of the heads each.

    Raises:
        ValueError: for an unknown variant, or a number of blocks that does not fit it.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed: {', '.join(map(str, VARIANTS))}")
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}, but must be at least 1")
    if variant == 3:
        return ["space_then_time"] * num_blocks
    if variant == 4:
        return ["space_and_time"] * num_blocks
    if num_blocks % 2:
        raise ValueError(
            f"num_blocks is {num_blocks}, but must be even for variant {variant}: as many temporal as spatial blocks"
        )
    space: list[Mixing] = ["space"]
    time: list[Mixing] = ["time"]
    half = num_blocks // 2
    return space * half + time * half if variant == 1 else (space + time) * half


def preset_sizes(preset: str, variant: int = 2) -> dict[str, int]:
    """Fields of the transformer's constructor for a preset such as `XL/2`.

    A block of Variants 3 and 4 has a second attention, and so 22 D^2 weights instead of 18 D^2. These variants get
    fewer blocks, so that their number of parameters is as close as possible to the others' (23 blocks for XL, as in
    Table 3).

    Raises:
        ValueError: for an unknown size or patch.
    """
    size, _, patch = preset.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise ValueError(
            f"preset is {preset!r}; allowed: one of {' '.join(SIZES)}, then /, "
            f"then one of {' '.join(map(str, PATCH_SIZES))}"
        )
    hidden_size, num_blocks, num_heads = SIZES[size]
    return {
        "hidden_size": hidden_size,
        "num_blocks": round(num_blocks * 18 / 22) if variant in (3, 4) else num_blocks,
        "num_heads": num_heads,
        "patch_size": int(patch),
    }
