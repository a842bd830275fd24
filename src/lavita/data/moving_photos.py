"""Renders videos from photographs: a camera that pans, zooms and turns, and a piece of another photograph that passes.

Few people have hours of varied footage at hand, but many have photographs. An autoencoder sees single frames and small
changes between them, for which such videos serve as well as filmed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lavita.core.files import check_outside
from lavita.core.progress import Progress, say
from lavita.core.seeds import numpy_generator
from lavita.data.catalog import scan
from lavita.video.formats import Frames
from lavita.video.reading import iter_frames
from lavita.video.writing import write_video

FPS = 25
_SPEED = 0.02
"""Scale of the camera's movement per frame, in sides of the picture (log-scale and radians for zoom and turn)."""
_SMALLEST_SIDE = 64


def render_moving_photos(
    photos: Path, out: Path, videos_per_photo: int = 4, num_frames: int = 16, resolution: int = 128, seed: int = 0
) -> int:
    """Writes `<out>/<place>-<photo>-<number>.mp4` for each photograph below a folder.

    Args:
        photos: folder of images; those smaller than 64 pixels and those that cannot be read are left out and counted.
        out: folder to write to, outside of `photos`.
        videos_per_photo: videos of each photograph, with different movements.
        num_frames: frames of a video, at 25 per second.
        resolution: side of the frames in pixels.
        seed: seed of the movements; a video depends on it, its number, and the photographs.

    Returns:
        The number of videos.

    Raises:
        ValueError: if there is no photograph to use.
        VideoError: if one of them turns out to be damaged; it is named.
    """
    check_outside("out", out, photos)
    found = scan(photos, images=True).videos
    paths = [image.info.path for image in found if min(image.info.width, image.info.height) >= _SMALLEST_SIDE]
    if not paths:
        raise ValueError(f"{photos}: holds no image of at least {_SMALLEST_SIDE} x {_SMALLEST_SIDE} pixels")
    if len(paths) < len(found):
        say(f"{photos}: left out: {len(found) - len(paths):,} images of less than {_SMALLEST_SIDE} pixels on a side")
    progress = Progress("rendering video", len(paths) * videos_per_photo)
    for place, path in enumerate(paths):
        picture = _read(path)
        for number in range(videos_per_photo):
            rng = numpy_generator(seed, "moving-photos", place, number)
            other = _read(paths[int(rng.integers(len(paths)))])
            frames = moving_photo(picture, other, rng, num_frames, resolution)
            # The place keeps apart photographs of one name in several folders or formats.
            write_video(out / f"{place:04d}-{path.stem}-{number}.mp4", frames, FPS)
            progress.update(place * videos_per_photo + number + 1)
    return len(paths) * videos_per_photo


def moving_photo(
    picture: Image.Image, other: Image.Image, rng: np.random.Generator, num_frames: int, resolution: int
) -> Frames:
    """Films a picture with a moving camera, while an elliptic piece of another picture passes in front of it.

    Args:
        picture: RGB picture behind.
        other: RGB picture that the piece in front is cut from.
        rng: where all choices come from.
        num_frames: frames F.
        resolution: side S of the frames in pixels.

    Returns:
        uint8 `(F, S, S, 3)`.
    """
    side = 2 * resolution  # drawn twice as large, then shrunk, against jagged edges
    background = _films(picture, rng, num_frames, side)
    front = _films(other, rng, num_frames, side)
    mask = Image.new("L", (side, side))
    reach = rng.uniform(0.1, 0.3, 2) * side
    ImageDraw.Draw(mask).ellipse([*(side / 2 - reach), *(side / 2 + reach)], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(side / 128))
    start, step = rng.uniform(-0.4, 0.4, 2) * side, rng.normal(0, 1.5 * _SPEED, 2) * side
    turn, spin = rng.uniform(0, 360), rng.normal(0, 4)
    frames = []
    for number, (behind, before) in enumerate(zip(background, front, strict=True)):
        offset = start + number * step
        moved = mask.rotate(turn + number * spin, Image.Resampling.BILINEAR, translate=tuple(offset))
        frame = Image.composite(before, behind, moved).resize((resolution, resolution), Image.Resampling.BOX)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def _films(picture: Image.Image, rng: np.random.Generator, num_frames: int, side: int) -> Sequence[Image.Image]:
    """Views of a picture from a camera of constant speed, `num_frames` RGB images of the given side."""
    shorter = min(picture.size)
    share = np.exp(rng.uniform(np.log(min(0.8, max(0.15, side / 2 / shorter))), np.log(0.8)))  # of the shorter side
    still = rng.random() < 0.1
    speed = np.zeros(4) if still else rng.normal(0, _SPEED, 4) * (1, 1, 0.5, 0.5)
    # The picture is shrunk first, so that the views have about its pixels' size: no moire.
    shrink = max(1.0, share * shorter / side)
    small = picture.resize(
        (max(2, round(picture.width / shrink)), max(2, round(picture.height / shrink))), Image.Resampling.BOX
    )
    size = np.array(small.size, dtype=np.float64)
    width = share * min(small.size)
    centre = rng.uniform(width / 2, np.maximum(size - width / 2, width / 2 + 1e-6))
    angle = rng.normal(0, 0.1)
    surrounded = _mirrored(small)
    views = []
    for number in range(num_frames):
        scale = width / side * np.exp(number * speed[2])
        turned = angle + number * speed[3]
        cos, sin = scale * np.cos(turned), scale * np.sin(turned)
        at = centre + number * speed[:2] * width
        # Reflected at the borders, as in a mirror, rather than black beyond them.
        at = size - np.abs(size - np.mod(at, 2 * size))
        left, top = at - np.array([cos - sin, sin + cos]) * side / 2
        affine = (cos, -sin, left + small.width, sin, cos, top + small.height)
        views.append(surrounded.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    return views


def _mirrored(picture: Image.Image) -> Image.Image:
    """The picture with its mirror images around it, three times as wide and high."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    return Image.fromarray(np.pad(pixels, ((height, height), (width, width), (0, 0)), mode="symmetric"))


def _read(path: Path) -> Image.Image:
    return Image.fromarray(next(iter_frames(path)))
