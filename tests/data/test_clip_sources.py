"""Sources of clips: a latent cache gives what the videos give, reads no more than a clip, and refuses other runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_vae
from PIL import Image
from tiny_data import paint, write_broken, write_frames, write_videos

from lavita.data import clip_sources
from lavita.data.catalog import scan
from lavita.data.clip_sources import ClipSource, VideoSource
from lavita.data.clips import ClipDraw, ClipSampler, clip_span, read_pixels
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.manifest import read_manifest, write_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.data.latent_cache.shards import TENSORS, read_shard, write_shard
from lavita.models.autoencoder import AutoencoderKL, encode

RESOLUTION = 16
# The cache holds float16, and convolutions over other batches round differently in their last bits.
RTOL, ATOL = 2e-3, 1e-5


def make_vae() -> AutoencoderKL:
    vae = make_tiny_vae()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    return vae


@pytest.fixture
def vae() -> AutoencoderKL:
    return make_vae()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `videos`, their `cache`, and `plain`, the cache without mirrored frames; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    write_videos(folder / "videos")
    write_frames(folder / "videos", ["b/folder"], 9, "{:02}.png")
    encode_all(folder / "videos", folder / "cache", make_vae())
    encode_all(folder / "videos", folder / "plain", make_vae(), horizontal_flip=False)
    return folder


@pytest.fixture
def videos(made: Path, tmp_path: Path) -> Path:
    """The videos, to be changed, next to copies of their caches."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "videos"


def encode_all(root: Path, folder: Path, vae: AutoencoderKL, **options: Any) -> dict[str, Any]:
    fixed = {"resolution": RESOLUTION, "horizontal_flip": True, "precision": "fp32"}
    return encode_dataset(scan(root), folder, vae, **{**fixed, **options})


# --- round trip


def test_clips_of_the_cache_are_those_of_the_videos(made: Path, vae: AutoencoderKL) -> None:
    assert [row["num_frames"] for row in read_manifest(made / "cache")["videos"]] == [10, 10, 10, 9]
    straight = scan(made / "videos", class_folders=True)
    by_name = {video.name: video for video in straight.videos}
    from_videos = VideoSource(straight, vae, RESOLUTION, "fp32")
    flips = set()
    for num_frames, interval in ((1, 1), (4, 1), (3, 3), (2, 8)):
        cache = CacheSource(made / "cache", class_folders=True, min_frames=clip_span(num_frames, interval))
        sampler = ClipSampler(cache.catalog, num_frames, interval, True, seed=num_frames)
        for index in range(6):
            draw = sampler.draw(0, index)
            mean, std = cache.read(draw, num_frames, interval)
            assert mean.shape == std.shape == (num_frames, 4, 8, 8)
            assert mean.dtype == std.dtype == torch.float32
            source = ClipDraw(by_name[draw.video.name], draw.start, draw.flip)
            expected = encode(vae, read_pixels(source, num_frames, interval, RESOLUTION), "fp32")
            for other in (expected, from_videos.read(source, num_frames, interval)):
                torch.testing.assert_close((mean, std), other, rtol=RTOL, atol=ATOL)
            elsewhere = ClipDraw(source.video, source.start, not source.flip)
            mirrored, _ = encode(vae, read_pixels(elsewhere, num_frames, interval, RESOLUTION), "fp32")
            assert not torch.allclose(mean, mirrored, rtol=RTOL, atol=ATOL), "the tolerance tells clips apart"
            flips.add(draw.flip)
    assert flips == {True, False}


def test_videos_give_the_latents_of_their_cache_to_the_bit(made: Path, vae: AutoencoderKL) -> None:
    """Rounded as a cache stores them, so that a run with a cache trains on the numbers of a run without."""
    catalog = scan(made / "videos")
    by_name = {video.name: video for video in catalog.videos}
    cache, videos = CacheSource(made / "cache"), VideoSource(catalog, vae, RESOLUTION, "fp32")
    sampler = ClipSampler(cache.catalog, 3, 2, True, seed=0)
    for index in range(6):
        draw = sampler.draw(0, index)
        clip = videos.read(ClipDraw(by_name[draw.video.name], draw.start, draw.flip), 3, 2)
        for found, stored in zip(clip, cache.read(draw, 3, 2), strict=True):
            assert torch.equal(found, stored)
            assert torch.equal(found, torch.from_numpy(found.numpy().astype(np.float16).astype(np.float32)))


def test_the_catalog_of_a_cache_is_that_of_its_videos(made: Path) -> None:
    for class_folders in (False, True):
        cached, scanned = CacheSource(made / "plain", class_folders).catalog, scan(made / "videos", class_folders)
        assert cached.class_names == scanned.class_names
        facts = [
            [(video.name, video.label, video.info.num_frames, video.info.fps) for video in catalog.videos]
            for catalog in (cached, scanned)
        ]
        assert facts[0] == facts[1]


def test_broken_and_short_videos(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    write_broken(videos / "a" / "noise.mp4")
    capsys.readouterr()
    manifest = encode_all(videos, tmp_path / "plain", vae, horizontal_flip=False)
    assert [message.split(": ")[0] for message in manifest["broken"]] == ["a/noise.mp4"]
    assert "skipped: a/noise.mp4: " in capsys.readouterr().err

    catalog = CacheSource(tmp_path / "plain", True, min_frames=10).catalog
    assert [video.name for video in catalog.videos] == ["a/0.mp4", "a/1.mp4", "b/2.mp4"]
    assert "b/folder: has 9 frames, but a clip needs 10" in catalog.broken
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "skipped: b/folder: has 9 frames, but a clip needs 10",
        f"{tmp_path / 'plain'}: 3 of 5 videos are used, 2 are left out; the first: {catalog.broken[0]}",
    ]
    assert captured.out == ""
    with pytest.raises(ValueError, match="no video has the 11 frames"):
        CacheSource(tmp_path / "plain", min_frames=11)
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        CacheSource(tmp_path / "plain", broken="error")
    CacheSource(tmp_path / "plain").check(vae, RESOLUTION, False, videos)  # a broken video is no new one


def test_videos_outside_class_folders_are_refused(tmp_path: Path, vae: AutoencoderKL) -> None:
    encode_all(write_videos(tmp_path / "videos", ["stray.mp4"]), tmp_path / "cache", vae)
    with pytest.raises(ValueError, match="videos that are in no class folder"):
        CacheSource(tmp_path / "cache", class_folders=True)


# --- refusals


def another_autoencoder(root: Path, cache: Path, vae: AutoencoderKL) -> None:
    vae.encoder.conv_out.weight.data += 1


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
        (new_sources, 16, False, r"holds 2 videos that the cache .* lacks, the first: a/8\.mp4; `lavita enc"),
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
    cache = tmp_path / "plain"
    CacheSource(cache).check(vae, RESOLUTION, False, videos)
    CacheSource(cache).check(vae, RESOLUTION, False, None)
    change(videos, cache, vae)
    with pytest.raises(ValueError, match=message):
        CacheSource(cache).check(vae, resolution, flip, videos)


def test_only_the_videos_of_the_run_are_asked_for(videos: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    """Videos of another split below the same folder are not new ones."""
    cache = CacheSource(tmp_path / "plain")
    own = [video.name for video in cache.catalog.videos]
    write_videos(videos, ["test/9.mp4"])
    cache.check(vae, RESOLUTION, False, videos, own)
    with pytest.raises(ValueError, match=r"holds 1 videos that the cache .* lacks, the first: test/9\.mp4"):
        cache.check(vae, RESOLUTION, False, videos, [*own, "test/9.mp4"])
    with pytest.raises(ValueError, match=r"a/0\.mp4: is in the cache .* but not in data\.path"):
        cache.check(vae, RESOLUTION, False, videos, own[1:])


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "gone", "header", "another"])
def test_a_damaged_shard_is_named_when_the_cache_is_opened(
    videos: Path, tmp_path: Path, vae: AutoencoderKL, damage: str
) -> None:
    manifest = encode_all(videos, tmp_path / "small", vae, horizontal_flip=False, shard_bytes=1)  # one video per shard
    first, second = (tmp_path / "small" / row["shard"] for row in manifest["videos"][:2])
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
        "another": "lacks a/0.mp4, which the manifest lists",
    }[damage]
    with pytest.raises(ValueError) as caught:
        CacheSource(tmp_path / "small")
    assert str(caught.value) == f"{first}: {message}; run `lavita encode` again"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_damaged_later_is_named(videos: Path, tmp_path: Path, damage: str) -> None:
    source = CacheSource(tmp_path / "plain")
    video = source.catalog.videos[-1]
    file = video.info.path
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: damaged or missing .*; run `lavita encode` again"):
        source.read(ClipDraw(video, video.info.num_frames - 2, False), 2, 1)


def test_a_damaged_or_foreign_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished latent cache .no manifest\.json.; run `lavita encode`"):
        CacheSource(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        CacheSource(tmp_path)
    manifest.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="holds a cache of version 0, this is 2"):
        CacheSource(tmp_path)


@pytest.mark.parametrize(
    ("field", "name"),
    [("shard", "../../x.safetensors"), ("shard", "/x.safetensors"), ("name", "../up.mp4"), ("name", "a/../../up.mp4")],
)
def test_names_in_a_manifest_stay_below_their_folder(field: str, name: str, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "cache", tmp_path / "copy")
    manifest = read_manifest(folder)
    manifest["videos"][0][field] = name
    write_manifest(folder, manifest)
    for read in (read_manifest, CacheSource):
        with pytest.raises(ValueError, match=re.escape(f"copy: the name {name!r} does not stay inside the folder")):
            read(folder)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "[" * 100_000, '{"version": 2}', '{"version": 2, "videos": [3]}', '{"version": 2, "videos": 1}'),
        '{"version": 2, "videos": [], "broken": 0}',
        '{"version": 2, "videos": [{"name": "a.mp4", "shard": 3}], "broken": []}',
    ],
)
def test_a_manifest_of_another_form_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged; run `lavita encode` again"):
        CacheSource(tmp_path)


# --- reading


def test_several_clips_are_those_read_one_by_one(made: Path, vae: AutoencoderKL) -> None:
    sources: list[ClipSource] = [
        CacheSource(made / "cache"),
        VideoSource(scan(made / "videos"), vae, RESOLUTION, "fp32", workers=3),
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


def test_videos_are_decoded_at_the_same_time(made: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(3, timeout=30)  # broken unless three threads come to it

    def read(draw: ClipDraw, *options: Any) -> np.ndarray:
        meeting.wait()
        return read_pixels(draw, *options)

    monkeypatch.setattr(clip_sources, "read_pixels", read)
    catalog = scan(made / "videos")
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


def test_a_clip_reads_its_frames_and_no_others(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real, sizes = CacheSource(made / "cache"), os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(buffer.nbytes for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    source.read(ClipDraw(source.catalog.videos[1], 1, True), 3, 4)
    assert sum(sizes) == 2 * 3 * 4 * 8 * 8 * 2  # mean and std, 3 frames of 4 x 8 x 8, float16


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for this process's memory")
def test_memory_and_open_files_do_not_grow(made: Path, tmp_path: Path) -> None:
    """A cache of 24 MB in 6 shards: mapped, all of it would have become this process's memory."""
    folder = tmp_path / "cache"
    folder.mkdir()
    manifest = read_manifest(made / "cache")
    row, *_ = manifest["videos"]
    stored = read_shard(made / "cache" / row["shard"]).videos[row["name"]]
    manifest["videos"] = []
    for number in range(6):
        video = replace(stored, name=f"{number}.mp4", num_frames=2000)
        values = {key: torch.rand(2000, 4, 8, 8).half() for key in TENSORS}
        write_shard(folder / f"{number}.safetensors", {}, [(video, values)], [])
        manifest["videos"].append({**row, "name": video.name, "num_frames": 2000, "shard": f"{number}.safetensors"})
    write_manifest(folder, manifest)
    del values
    source = CacheSource(folder)
    sampler = ClipSampler(source.catalog, 4, 3, True, seed=0)

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    for step in range(200):
        source.read(sampler.draw(step, 0), 4, 3)
    before = memory(), files()
    for step in range(200, 4_000):
        source.read(sampler.draw(step, 0), 4, 3)
    assert memory() - before[0] < 4 * 2**20
    assert files() == before[1]
