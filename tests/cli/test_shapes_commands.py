"""Rectangles and buckets on the command line: encode, train, sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tiny_data import write_videos

from lavita.video.reading import probe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    """Square and wide videos, and an autoencoder."""
    write_videos(tmp_path / "videos", ["0.mp4", "1.mp4"], 4, 20, 20)
    write_videos(tmp_path / "videos", ["2.mp4"], 4, 16, 28)
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def test_buckets_from_encoding_to_samples(run: Run, folder: Path) -> None:
    encode = ["encode", "--data", folder / "videos", "--out", folder / "cache", "--autoencoder", folder / "vae"]
    buckets = ["--fit", "bucket", "--bucket", "2x16x16", "--bucket", "3x16x24", "--frame-interval", 1]
    code, out, err = run(*encode, *buckets)
    assert code == 0 and "3 videos, 0 broken" in out and "buckets: 2x16x16 2 videos, 3x16x24 1 videos" in err
    code, _, err = run(*encode, *buckets[:-1], 2)
    assert code == 2 and "holds a cache with frame_interval=1, not 2" in err
    train = ["train", "--data", folder / "videos", "--run-dir", folder / "run", f"autoencoder={folder / 'vae'}"]
    train += [f"data.latent_cache={folder / 'cache'}", "data.frame_interval=1", "model.preset=tiny/4"]
    train += ["train.steps=2", "train.batch_size=2", "train.sample_every=0", "data.fit=bucket"]
    code, _, err = run(*train, "data.buckets=[2x16x16,3x16x24]")
    assert code == 0, err
    sample = ["sample", folder / "run/pipeline", "--seeds", 0, "--steps", 2, "--format", "mkv"]
    code, _, err = run(*sample, "--out", folder / "wide", "--size", "16x24")
    info = probe(folder / "wide/0.mkv")
    assert code == 0 and (info.num_frames, info.height, info.width) == (3, 16, 24), err
    code, _, err = run(*sample, "--out", folder / "wide", "--num-frames", 3)
    assert code == 2 and "holds videos made with size=16x24, not None" in err
    code, out, _ = run("info", folder / "run")
    assert code == 0 and "3 frames of 8 x 12 latents" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fit", "bucket"], "--fit bucket takes --bucket, once or more"),
        (["--bucket", "2x16x16"], "--fit bucket takes --bucket"),
        (["--fit", "bucket", "--bucket", "2x16x16", "--resolution", "16"], "instead of --resolution"),
        (["--fit", "bucket", "--bucket", "16x16"], "'16x16' is no bucket"),
        (["--frame-interval", 2], "frame_interval is 2, but has no effect without --fit bucket"),
        (
            ["--resolution", "16x17"],
            "resolution is 16x17, but this autoencoder needs a multiple of 2 in height",
        ),
        (["--resolution", "16y17"], "resolution is '16y17', but must be a side in pixels"),
        (["--fit", "bucket", "--bucket", "9x16x16"], "has 4 frames, but a clip needs 25"),
    ],
)
def test_encoding_in_a_wrong_shape(run: Run, folder: Path, options: list[object], message: str) -> None:
    encode = ["encode", "--data", folder / "videos", "--out", folder / "cache", "--autoencoder", folder / "vae"]
    code, _, err = run(*encode, *options)
    assert code == 2 and message in err, err


def test_sizes_of_the_other_commands(run: Run, folder: Path) -> None:
    code, _, err = run("sample", "--out", folder / "out", "--size", "7")
    assert (code, err) == (2, "error: size is 7, but each side must be in 8..16384 pixels\n")
    code, out, _ = run("info", "tiny/2", "--sample-size", "8x12", "--num-frames", 2)
    assert code == 0 and "2 frames of 8 x 12 latents, 48 tokens" in out
    timed = ["train", "--data", folder / "videos", "--run-dir", folder / "run", "--minutes", 5]
    code, _, err = run(*timed, "data.resolution=16x24")
    assert code == 2 and "a time is only kept with square clips of one shape" in err
