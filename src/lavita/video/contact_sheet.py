"""Contact sheets: clips drawn as one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavita.video.formats import Frames, PathLike, check_frames


def contact_sheet(
    rows: Sequence[Sequence[Frames]],
    path: PathLike,
    row_labels: Sequence[str] | None = None,
    num_columns: int = 8,
    scale: int = 1,
) -> None:
    """Draws rows of clips, each clip as evenly spaced frames from its first to its last.

    Args:
        rows: The clips of each row, uint8 (F, H, W, 3), RGB; sizes and lengths may differ.
        path: The PNG to write. Missing folders are created.
        row_labels: One line of text above each row.
        num_columns: Number of frames shown of each clip; shorter clips show every frame.
        scale: Enlargement, by repeating pixels.

    Raises:
        ValueError: No rows, an empty row, clips of another dtype or shape, too few labels, or another suffix.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path is {path}; the name of a contact sheet ends in .png")
    if not rows or not all(len(row) for row in rows):
        raise ValueError("rows is empty or has an empty row; each row needs at least one clip")
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"row_labels has {len(row_labels)} labels; there are {len(rows)} rows")
    if num_columns < 1 or scale < 1:
        raise ValueError(f"num_columns is {num_columns} and scale is {scale}; both must be at least 1")
    lines = []
    for i, row in enumerate(rows):
        tiles = []
        for j, clip in enumerate(row):
            check_frames(f"rows[{i}][{j}]", clip)
            picked = np.linspace(0, len(clip) - 1, min(num_columns, len(clip))).round().astype(int)
            tiles += [Image.fromarray(clip[k].repeat(scale, 0).repeat(scale, 1)) for k in picked]
        if row_labels is not None:
            lines.append(_draw_text(row_labels[i]))
        lines.append(_join(tiles, across=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    _join(lines, across=False).save(path)


def _draw_text(text: str) -> Image.Image:
    font = ImageFont.load_default(12)
    image = Image.new("RGB", (4 + int(font.getlength(text)), 16), "white")
    ImageDraw.Draw(image).text((2, 1), text, fill="black", font=font)
    return image


def _join(images: Sequence[Image.Image], across: bool, gap: int = 2) -> Image.Image:
    widths, heights = [image.width for image in images], [image.height for image in images]
    length = sum(widths if across else heights) + gap * (len(images) - 1)
    joined = Image.new("RGB", (length, max(heights)) if across else (max(widths), length), "white")
    offset = 0
    for image in images:
        joined.paste(image, (offset, 0) if across else (0, offset))
        offset += (image.width if across else image.height) + gap
    return joined
