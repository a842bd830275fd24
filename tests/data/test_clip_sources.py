"""The latent cache gives what the videos give, reads no more than a clip, and refuses what it is not."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import paint, write_broken, write_videos

from lavita.data import clip_sources as latents
from lavita.data.catalog import scan
from lavita.data.clip_sources import CacheSource, ClipSource, VideoSource
from lavita.data.clips import ClipDraw, ClipSampler, clip_span, read_pixels
from lavita.data.latent_cache import shards
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.manifest import read_manifest, write_manifest
from lavita.data.latent_cache.shards import TENSORS, read_shard, write_shard
from lavita.models.autoencoder import AutoencoderKL, decode, encode, to_frames, to_pixels
from lavita.models.fingerprint import fingerprint

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
    return encode_dataset(scan(root), folder, vae, **{**fixed, **options})


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
    mean, std = encode(vae, frames, "fp32")
    posterior = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).double().float() / 127.5 - 1).latent_dist
    assert mean.shape == std.shape == (5, 4, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, (posterior.mean - 0.2) * 0.7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.7, rtol=1e-4, atol=1e-5)


def test_decoding_undoes_shift_and_scale(vae: AutoencoderKL) -> None:
    unscaled = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = decode(vae, (unscaled - 0.2) * 0.7, "fp32")
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
    assert [message.split(": ")[0] for message in manifest["broken"]] == ["a/noise.mp4"]
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
    CacheSource(tmp_path / "cache").check(vae, RESOLUTION, False, videos)  # a broken video is no new one


def test_videos_outside_class_folders_are_refused(tmp_path: Path, vae: AutoencoderKL) -> None:
    encode_all(write_videos(tmp_path / "videos", ["stray.mp4"]), tmp_path / "cache", vae)
    with pytest.raises(ValueError, match="videos that lie in no class folder"):
        CacheSource(tmp_path / "cache", class_folders=True)


# --- refusals


def another_autoencoder(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    vae.decoder.conv_out.bias.data += 1


def longer_source(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    write_videos(root, ["a/0.mp4"], num_frames=14)


def lost_source(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    (root / "a" / "1.mp4").unlink()


def more_frames(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    Image.fromarray(paint(1)[0]).save(root / "b" / "folder" / "99.png")


def new_sources(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    write_videos(root, ["z/9.mp4", "a/8.mp4"])


def nothing(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "resolution", "flip", "message"),
    [
        (another_autoencoder, 16, False, "another autoencoder"),
        (nothing, 32, False, r"resolution 16, but data\.resolution is 32"),
        (nothing, 16, True, "no mirrored frames"),
        (longer_source, 16, False, r"a/0\.mp4: has changed since the cache"),
        (lost_source, 16, False, r"a/1\.mp4: is in the cache .* but not in data\.path; `lavita encode` removes it"),
        (more_frames, 16, False, r"b/folder: has changed since the cache"),
        (new_sources, 16, False, r"holds videos that the cache .* lacks \(2, the first: a/8\.mp4\); `lavita enc"),
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


def test_only_the_videos_of_the_run_are_asked_for(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    """Of a split: others below the same folder are not new ones."""
    encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    cache = CacheSource(tmp_path / "cache")
    own = [video.name for video in cache.catalog.videos]
    write_videos(videos, ["test/9.mp4"])
    cache.check(vae, RESOLUTION, False, videos, own)
    with pytest.raises(ValueError, match=r"lacks \(1, the first: test/9\.mp4\)"):
        cache.check(vae, RESOLUTION, False, videos, [*own, "test/9.mp4"])
    with pytest.raises(ValueError, match=r"a/0\.mp4: is in the cache .* but not in data\.path"):
        cache.check(vae, RESOLUTION, False, videos, own[1:])


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "gone", "header", "another"])
def test_a_damaged_shard_is_named_when_the_cache_is_opened(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, damage: str
) -> None:
    # About one video a shard.
    manifest = encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False, shard_bytes=1)
    first, second = (tmp_path / "cache" / row["shard"] for row in manifest["videos"][:2])
    content = first.read_bytes()
    if damage == "gone":
        first.unlink()
    else:
        first.write_bytes(
            {
                "cut": content[:-1],
                "cut in the header": content[:40],
                "header": content[:8] + b"?" + content[9:],
                "another": second.read_bytes(),
            }[damage]
        )
    message = {
        "cut": f"cut off, {len(content) - 1} of {len(content)} bytes are there",
        "cut in the header": "cut off",
        "gone": "missing",
        "header": "damaged in its header",
        "another": "lacks a/0.mp4 of the manifest",
    }[damage]
    with pytest.raises(ValueError) as caught:
        CacheSource(tmp_path / "cache")
    assert str(caught.value) == f"{first}: {message}; run `lavita encode` again"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_damaged_later_is_named(videos: Path, tmp_path: Path, vae: AutoencoderKL, damage: str) -> None:
    encode_all(videos, tmp_path / "cache", vae, horizontal_flip=False)
    source = CacheSource(tmp_path / "cache")
    video = source.catalog.videos[-1]
    file = video.info.path
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: damaged or missing .*; run `lavita encode` again"):
        source.read(ClipDraw(video, video.info.num_frames - 2, False), 2, 1)


def test_a_damaged_or_foreign_manifest_is_named(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="no finished latent cache there"):
        CacheSource(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        CacheSource(tmp_path)
    manifest.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="a cache of version 0, this is 2"):
        CacheSource(tmp_path)


# --- reading


def test_several_clips_are_those_read_one_by_one(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    encode_all(videos, tmp_path / "cache", vae)
    straight = scan(videos)
    sources: list[ClipSource] = [
        CacheSource(tmp_path / "cache"),
        VideoSource(straight, vae, RESOLUTION, "fp32", workers=3),
    ]
    for source in sources:
        sampler = ClipSampler(source.catalog, 3, 2, True, seed=0)
        draws = [sampler.draw(0, index) for index in range(9)]
        assert len({draw.video.name for draw in draws}) > 2
        together = source.read_many(draws, 3, 2)
        assert len(together) == 9
        for draw, clip in zip(draws, together, strict=True):
            assert clip[0].shape == clip[1].shape == (3, 4, 8, 8)
            assert all(map(torch.equal, clip, source.read(draw, 3, 2))), "whatever it is read with"
        assert source.read_many([], 3, 2) == []


def test_videos_are_decoded_at_the_same_time(videos: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=30)  # broken unless three threads come to it

    def read(draw: ClipDraw, *options: int) -> np.ndarray:
        meeting.wait()
        return read_pixels(draw, *options)

    monkeypatch.setattr(latents, "read_pixels", read)
    catalog = scan(videos)
    draws = [ClipDraw(catalog.videos[0], start, False) for start in range(3)]
    assert len(VideoSource(catalog, vae, RESOLUTION, "fp32", workers=3).read_many(draws, 2, 1)) == 3
    with pytest.raises(threading.BrokenBarrierError):
        meeting.abort()
        VideoSource(catalog, vae, RESOLUTION, "fp32", workers=1).read_many(draws, 2, 1)


def test_an_unreadable_video_of_a_step_is_named(videos: Path, vae: AutoencoderKL) -> None:
    catalog = scan(videos)
    write_broken(videos / "a" / "1.mp4")
    source = VideoSource(catalog, vae, RESOLUTION, "fp32")
    with pytest.raises(ValueError, match=r"a/1\.mp4"):
        source.read_many([ClipDraw(video, 0, False) for video in catalog.videos], 2, 1)


def test_a_clip_reads_its_frames_and_no_others(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_all(videos, tmp_path / "cache", vae)
    source, real, sizes = CacheSource(tmp_path / "cache"), os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(buffer.nbytes for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(shards.os, "preadv", preadv)
    source.read(ClipDraw(source.catalog.videos[1], 1, True), 3, 4)
    assert sum(sizes) == 2 * 3 * 4 * 8 * 8 * 2  # mean and std, 3 frames of 4 x 8 x 8, float16


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for this process's memory")
def test_memory_and_open_files_do_not_grow(tmp_path: Path, vae: AutoencoderKL) -> None:
    """A cache of 24 MB in 6 shards: mapped, all of it would have become this process's memory."""
    folder = tmp_path / "cache"
    manifest = encode_all(write_videos(tmp_path / "videos", ["0.mp4"]), folder, vae)
    (row,) = manifest["videos"]
    own = read_shard(folder / row["shard"]).videos["0.mp4"]
    manifest["videos"] = []
    for number in range(6):
        video = replace(own, name=f"{number}.mp4", num_frames=2000)
        values = {key: torch.rand(2000, 4, 8, 8).half() for key in TENSORS}
        write_shard(folder / f"{number}.safetensors", {}, [(video, values)], [])
        manifest["videos"].append({**row, "name": video.name, "num_frames": 2000, "shard": f"{number}.safetensors"})
    write_manifest(folder, manifest)
    del values
    source = CacheSource(tmp_path / "cache")
    sampler = ClipSampler(source.catalog, 4, 3, True, seed=0)

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    for step in range(200):
        source.read(sampler.draw(step, 0), 4, 3)
    before = memory(), files()
    for step in range(200, 10_000):
        source.read(sampler.draw(step, 0), 4, 3)
    assert memory() - before[0] < 4 * 2**20
    assert files() == before[1]
