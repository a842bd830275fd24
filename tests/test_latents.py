"""The latent cache gives what the videos give, goes on where it stopped, and refuses what it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_data import paint, write_broken, write_videos

from lavita.autoencoder import decode, encode, to_frames, to_pixels
from lavita.checkpoint import fingerprint
from lavita.data import latents
from lavita.data.catalog import scan
from lavita.data.clips import ClipDraw, ClipSampler, clip_span, read_pixels
from lavita.data.latents import CacheSource, VideoSource, encode_dataset, read_manifest

RESOLUTION = 16
# The cache holds float16, and convolutions over other batches round differently in their last bits.
TOLERANCE = {"rtol": 2e-3, "atol": 1e-5}


@pytest.fixture
def vae(tiny_vae: AutoencoderKL) -> AutoencoderKL:
    tiny_vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    return tiny_vae


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    root = write_videos(tmp_path / "videos")
    frames = root / "b" / "folder"
    frames.mkdir()
    for number, frame in enumerate(paint(9, seed=8)):
        Image.fromarray(frame).save(frames / f"{number:02}.png")
    return root


def encode_all(root: Path, folder: Path, vae: AutoencoderKL, **options: Any) -> dict[str, Any]:
    fixed = {"resolution": RESOLUTION, "horizontal_flip": True, "precision": "fp32"}
    return encode_dataset(root, folder, vae, **{**fixed, **options})


# --- frames <-> latents


def test_pixels_and_frames_are_inverse() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 8, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    np.testing.assert_array_equal(to_frames(pixels), frames)
    assert to_frames(torch.full((3, 2, 2), 7.0)).tolist() == [[[255] * 3] * 2] * 2
    assert to_frames(torch.full((3, 2, 2), -7.0)).tolist() == [[[0] * 3] * 2] * 2


def test_latents_are_shifted_and_scaled(vae: AutoencoderKL) -> None:
    frames = paint(5, width=16)
    mean, std = encode(vae, frames, "fp32", chunk=2)
    posterior = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).double().float() / 127.5 - 1).latent_dist
    assert mean.shape == std.shape == (5, 4, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, (posterior.mean - 0.2) * 0.7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.7, rtol=1e-4, atol=1e-5)


def test_decoding_undoes_shift_and_scale(vae: AutoencoderKL) -> None:
    unscaled = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = decode(vae, (unscaled - 0.2) * 0.7, "fp32", chunk=4)
    assert frames.shape == (2, 3, 16, 16, 3)
    assert frames.dtype == np.uint8
    expected = torch.stack([vae.decode(video).sample for video in unscaled])
    exact = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 1, 3, 4, 2).numpy()
    assert np.abs(frames - exact).max() <= 0.51


def test_the_fingerprint_is_of_weights_and_configuration(vae: AutoencoderKL, tmp_path: Path) -> None:
    before = fingerprint(vae)
    vae.save_pretrained(tmp_path)
    assert fingerprint(AutoencoderKL.from_pretrained(tmp_path)) == before
    vae.register_to_config(scaling_factor=0.71)
    rescaled = fingerprint(vae)
    vae.register_to_config(scaling_factor=0.7)
    vae.encoder.conv_in.bias.data[0] += 1e-3
    assert len({before, rescaled, fingerprint(vae)}) == 3


# --- round trip


def test_clips_of_the_cache_are_those_of_the_videos(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    manifest = encode_all(videos, tmp_path / "cache", vae)
    assert [row["num_frames"] for row in manifest["videos"]] == [10, 10, 10, 9]
    assert manifest == read_manifest(tmp_path / "cache")
    straight = scan(videos, class_folders=True)
    by_name = {video.name: video for video in straight.videos}
    from_videos = VideoSource(straight, vae, RESOLUTION, "fp32")
    flips = set()
    for num_frames, interval in ((1, 1), (4, 1), (3, 3), (2, 8)):
        cache = CacheSource(tmp_path / "cache", class_folders=True, min_frames=clip_span(num_frames, interval))
        sampler = ClipSampler(cache.catalog, num_frames, interval, True, seed=num_frames)
        for index in range(6):
            draw = sampler.draw(0, index)
            mean, std = cache.read(draw, num_frames, interval)
            assert mean.shape == std.shape == (num_frames, 4, 8, 8)
            assert mean.dtype == std.dtype == torch.float32
            source = ClipDraw(by_name[draw.video.name], draw.start, draw.flip)
            expected = encode(vae, read_pixels(source, num_frames, interval, RESOLUTION), "fp32")
            torch.testing.assert_close((mean, std), expected, **TOLERANCE)
            torch.testing.assert_close((mean, std), from_videos.read(source, num_frames, interval), **TOLERANCE)
            elsewhere = ClipDraw(source.video, source.start, not source.flip)
            other = encode(vae, read_pixels(elsewhere, num_frames, interval, RESOLUTION), "fp32")[0]
            assert not torch.allclose(mean, other, **TOLERANCE), "the tolerance tells clips apart"
            flips.add(draw.flip)
    assert flips == {True, False}


def test_the_catalog_of_a_cache_is_that_of_its_videos(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    for class_folders in (False, True):
        cached, scanned = CacheSource(tmp_path / "cache", class_folders).catalog, scan(videos, class_folders)
        assert cached.class_names == scanned.class_names
        facts = [
            [(video.name, video.label, video.info.num_frames, video.info.fps) for video in catalog.videos]
            for catalog in (cached, scanned)
        ]
        assert facts[0] == facts[1]


def test_broken_and_short_videos(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = write_broken(videos / "a" / "noise.mp4")
    manifest = encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    assert [message.split(": ")[0] for message in manifest["broken"]] == [str(noise)]
    assert f"skipped: {noise}: " in capsys.readouterr().err

    catalog = CacheSource(tmp_path / "cache", True, min_frames=10).catalog
    assert [video.name for video in catalog.videos] == ["a/0.mp4", "a/1.mp4", "b/2.mp4"]
    assert "b/folder: has 9 frames, but a clip needs 10" in catalog.broken
    captured = capsys.readouterr()
    assert captured.err == "skipped: b/folder: has 9 frames, but a clip needs 10\n"
    assert captured.out == ""
    with pytest.raises(ValueError, match="none of its videos has the 11 frames"):
        CacheSource(tmp_path / "cache", min_frames=11)
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        CacheSource(tmp_path / "cache", broken="error")
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        encode_all(videos, tmp_path / "other", vae, broken="error")


def test_videos_outside_class_folders_are_refused(tmp_path: Path, vae: AutoencoderKL) -> None:
    encode_all(write_videos(tmp_path / "videos", ["stray.mp4"]), tmp_path / "cache", vae)
    with pytest.raises(ValueError, match="videos that lie in no class folder"):
        CacheSource(tmp_path / "cache", class_folders=True)


# --- interruption


def test_an_interrupted_encode_goes_on(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    encode_all(videos, whole, vae)
    real, calls = latents._encode_video, []

    def interrupted(vae: AutoencoderKL, path: Path, *options: Any) -> dict[str, torch.Tensor]:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(vae, path, *options)

    monkeypatch.setattr(latents, "_encode_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_all(videos, cache, vae)
    with pytest.raises(ValueError, match=r"no finished latent cache there .no manifest\.json.; run `lavita encode`"):
        CacheSource(cache)
    finished = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    assert len(finished) == 2

    manifest = encode_all(videos, cache, vae)

    assert calls == ["0.mp4", "1.mp4", "2.mp4", "2.mp4", "folder"]
    assert {name: (cache / name).stat().st_mtime_ns for name in finished} == finished
    assert manifest == read_manifest(whole)
    for row in manifest["videos"]:
        assert (cache / row["file"]).read_bytes() == (whole / row["file"]).read_bytes()
    assert not list(cache.glob("*.partial"))


def test_a_lost_file_is_made_again(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    cache = tmp_path / "cache"
    files = [cache / row["file"] for row in encode_all(videos, cache, vae)["videos"]]
    lost = files.pop(1)
    before = lost.read_bytes(), {file: file.stat().st_mtime_ns for file in files}
    lost.unlink()
    (cache / "manifest.json").unlink()
    encode_all(videos, cache, vae)
    assert (lost.read_bytes(), {file: file.stat().st_mtime_ns for file in files}) == before


@pytest.mark.parametrize("change", [{"resolution": 8}, {"horizontal_flip": False}, {"precision": "bf16"}])
def test_a_cache_of_other_settings_is_not_mixed(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, change: dict[str, Any]
) -> None:
    write_videos(tmp_path / "few", ["0.mp4"], num_frames=2)
    encode_all(tmp_path / "few", tmp_path / "cache", vae)
    (key, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"holds a cache with {key}=.*, not {value}; use another folder"):
        encode_all(tmp_path / "few", tmp_path / "cache", vae, **change)


# --- refusals


def another_autoencoder(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    vae.decoder.conv_out.bias.data += 1


def longer_source(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    write_videos(root, ["a/0.mp4"], num_frames=14)


def lost_source(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    (root / "a" / "1.mp4").unlink()


def nothing(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "resolution", "flip", "message"),
    [
        (another_autoencoder, 16, False, "another autoencoder"),
        (nothing, 32, False, r"resolution 16, but data\.resolution is 32"),
        (nothing, 16, True, "no mirrored frames"),
        (longer_source, 16, False, r"a/0\.mp4: has changed since the cache"),
        (lost_source, 16, False, r"a/1\.mp4: is in the cache .* but not in data\.path"),
    ],
)
def test_a_cache_that_does_not_fit_the_run_is_refused(
    videos: Path,
    tmp_path: Path,
    vae: AutoencoderKL,
    change: Callable[[Path, Path, AutoencoderKL], None],
    resolution: int,
    flip: bool,
    message: str,
) -> None:
    cache = tmp_path / "cache"
    encode_all(videos, cache, vae, horizontal_flip=False)
    CacheSource(cache).check(vae, RESOLUTION, False, videos)
    CacheSource(cache).check(vae, RESOLUTION, False, None)
    change(videos, cache, vae)
    with pytest.raises(ValueError, match=message):
        CacheSource(cache).check(vae, resolution, flip, videos)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named(videos: Path, tmp_path: Path, vae: AutoencoderKL, damage: str) -> None:
    encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    source = CacheSource(tmp_path / "cache")
    video = source.catalog.videos[0]
    file = video.info.path
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: damaged or missing .*; encode again"):
        source.read(ClipDraw(video, 0, False), 2, 1)


def test_a_damaged_or_foreign_manifest_is_named(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="no finished latent cache there"):
        CacheSource(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        CacheSource(tmp_path)
    manifest.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="a cache of version 0, this is 1"):
        CacheSource(tmp_path)


def test_a_video_that_breaks_while_it_is_decoded_is_skipped(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = latents._encode_video

    def breaks(vae: AutoencoderKL, path: Path, *options: Any) -> dict[str, torch.Tensor]:
        if path.name == "1.mp4":
            raise ValueError(f"{path}: breaks off")
        return real(vae, path, *options)

    monkeypatch.setattr(latents, "_encode_video", breaks)
    manifest = encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    assert manifest["broken"] == [f"{videos / 'a/1.mp4'}: breaks off"]
    assert [row["name"] for row in manifest["videos"]] == ["a/0.mp4", "b/2.mp4", "b/folder"]
    with pytest.raises(ValueError, match="breaks off"):
        encode_all(videos, tmp_path / "other", vae, broken="error")
