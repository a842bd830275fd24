"""Kind `files`: video and image files that are damaged, cut off, or not what they claim to be."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.containers import boxes, claim_sizes, png_bomb, png_text_bomb
from benchmarks.robustness.fuzz.material import NUM_FRAMES, Material, corrupt

DECLARES_LENGTH = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif"}
"""Suffixes of files whose missing end must be noticed (docs/data.md)."""


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """One bad file, alone or beside a good one, and a command that reads it."""
    as_image = rng.random() < 0.25
    contents = material.images if as_image else material.videos
    suffix = rng.choice(list(contents))
    data, what, is_cut = _mutate(rng, contents[suffix], suffix, material)
    named = suffix if rng.random() < 0.93 else rng.choice([*material.videos, ".MP4", ".Gif"])
    alone = rng.random() < 0.5
    home = folder / "in" / "frames" if as_image else folder / "in"
    home.mkdir(parents=True)
    (home / f"fuzzed{named}").write_bytes(data)
    is_video = not as_image or named != suffix
    if not alone and as_image and not is_video:
        (home / "good.png").write_bytes(material.images[".png"])
    elif not alone:
        material.write_video(home / "good.mp4")
    # Two images in a folder are one video.
    num_videos = 1 if alone or (as_image and not is_video) else 2
    arguments = _command(rng, folder, material, as_image and not is_video)
    if "--images" in arguments:
        num_videos = 1 if alone else 2
    return Case(
        arguments=arguments,
        what=f"a {suffix} file named {named}: {what}",
        num_videos=num_videos,
        num_frames=NUM_FRAMES if is_cut and alone and named == suffix in DECLARES_LENGTH else None,
    )


def _mutate(rng: random.Random, data: bytes, suffix: str, material: Material) -> tuple[bytes, str, bool]:
    """The content of a bad file, what is bad about it, and whether only its end is missing."""
    kind = rng.choice(
        ["cut", "cut", "cut", "claim", "claim", "claim", "head", "swap", "twice", "other", "corrupt", "bomb"]
    )
    places = [at for at in boxes(data, suffix) if 0 < at < len(data)] or [1]
    at = rng.choice(places)
    if kind == "cut":
        end = min(len(data) - 1, at + rng.choice([0, 0, 0, 4, 8, 12]))
        return data[:end], f"cut off at {end} of {len(data)}", True
    if kind == "claim":
        return *claim_sizes(rng, data, suffix), False
    if kind == "head":
        return data[:at] + rng.randbytes(rng.choice([10, 500, 5000])), f"random bytes from {at} on", False
    if kind == "swap":
        first, second = sorted([at, rng.choice(places)])
        third = rng.choice([place for place in (*places, len(data)) if place >= second])
        return data[:first] + data[second:third] + data[first:second] + data[third:], "boxes in another order", False
    if kind == "twice":
        until = rng.choice([place for place in (*places, len(data)) if place >= at])
        return data[:until] + data[at:until] * rng.choice([1, 50]) + data[until:], "boxes repeated", False
    if kind == "other":
        others = {**material.videos, **material.images}
        inside = rng.choice(list(others))
        return others[inside], f"holds {inside}", False
    if kind == "bomb" and suffix in (".png", ".apng"):
        width, height = rng.choice([(20_000, 20_000), (13_000, 13_000), (6_000, 6_000)])
        if rng.random() < 0.3:
            return png_text_bomb(material.images[".png"]), "a compressed text of 100 MB", False
        return png_bomb(width, height), f"a bomb of {width} x {height} pixels", False
    return *corrupt(rng, data), False


def _command(rng: random.Random, folder: Path, material: Material, images: bool) -> tuple[str, ...]:
    command = rng.choice(["inspect"] * 5 + ["sheet"] * 2 + ["encode"] * 3)
    if command == "inspect":
        return "data", "inspect", "in", "--json", "--num-frames", "2"
    if command == "sheet":
        return "data", "inspect", "in", "--json", "--out", "out", "--num-frames", "2", "--frame-interval", "1"
    material.copy("vae", folder / "vae")
    encode = ("encode", "--data", "in", "--out", "out", "--autoencoder", "vae", "--resolution", "16")
    return (*encode, "--images") if images and rng.random() < 0.5 else encode
