"""Which bucket a video goes to, and caches of frames of several sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tiny_data import write_videos

from lavita.core.sizes import Bucket, Size
from lavita.data.buckets import assign_buckets, nearest_bucket
from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.clips import ClipDraw
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.reading import CacheSource
from lavita.data.latent_cache.shards import read_shard
from lavita.video.formats import VideoInfo


def parsed(*texts: str) -> list[Bucket]:
    return [Bucket.parse(text) for text in texts]


@pytest.mark.parametrize(
    ("height", "width", "length", "buckets", "expected"),
    [
        (64, 64, 16, ("16x64x64", "16x48x80"), "16x64x64"),
        (480, 854, 16, ("16x64x64", "16x48x80", "16x80x48"), "16x48x80"),
        (854, 480, 16, ("16x64x64", "16x48x80", "16x80x48"), "16x80x48"),
        (64, 64, 15, ("16x64x64", "16x48x80", "1x128x64"), "1x128x64"),  # all others are too short
        (64, 64, 16, ("1x128x128", "16x64x64"), "16x64x64"),  # equally near: more values
        (64, 64, 9, ("1x128x128", "16x64x64"), "1x128x128"),
        (64, 64, 16, ("16x48x80", "16x80x48"), "16x48x80"),  # equally near and large: the first
        (64, 64, 16, ("16x80x48", "16x48x80"), "16x80x48"),
        (60, 120, 4, ("4x64x64", "4x64x256"), "4x64x256"),  # factors of 2 either way, not differences: the larger
        (60, 119, 4, ("4x64x64", "4x64x256"), "4x64x64"),
        (60, 121, 4, ("4x64x64", "4x64x256"), "4x64x256"),
        (64, 64, 0, ("1x64x64",), None),
    ],
)
def test_a_video_goes_to_the_nearest_bucket_that_it_fills(
    height: int, width: int, length: int, buckets: tuple[str, ...], expected: str | None
) -> None:
    found = nearest_bucket(VideoInfo(Path("x"), length, width, height, 25.0), parsed(*buckets), 1)
    assert (None if found is None else str(found)) == expected


def test_the_interval_counts() -> None:
    info = VideoInfo(Path("x"), 16, 64, 64, 25.0)
    buckets = parsed("6x64x64", "5x32x32")
    assert [str(nearest_bucket(info, buckets, interval)) for interval in (1, 3, 4)] == ["6x64x64", "6x64x64", "None"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Squares and wide videos, whose names alternate."""
    write_videos(tmp_path / "videos", ["0.mp4", "2.mp4"], 5, 16, 16)
    return write_videos(tmp_path / "videos", ["1.mp4", "3.mp4"], 4, 16, 28)


def test_a_cache_holds_frames_of_several_sizes(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    buckets = parsed("2x16x16", "3x16x24")
    catalog = assign_buckets(scan(videos), buckets, 1)
    options = {"fit": "bucket", "buckets": buckets, "frame_interval": 1}
    manifest = encode_dataset(catalog, tmp_path / "cache", tiny_vae, 16, True, "fp32", **options)  # type: ignore[arg-type]
    assert [row["size"] for row in manifest["videos"]] == ["16x16", "16x24", "16x16", "16x24"]
    shards = {row["size"]: read_shard(tmp_path / "cache" / row["shard"]) for row in manifest["videos"]}
    assert {size: shard.frame_shape for size, shard in shards.items()} == {"16x16": (4, 8, 8), "16x24": (4, 8, 12)}
    cache, source = CacheSource(tmp_path / "cache"), VideoSource(catalog, tiny_vae, 16, "fp32")
    for mine, theirs in zip(cache.catalog.videos, catalog.videos, strict=True):
        assert (mine.info.height, mine.info.width) == (16, 24 if mine.name in ("1.mp4", "3.mp4") else 16)
        for flip in (False, True):
            found = cache.read(ClipDraw(mine, 1, flip), 2, 2)
            torch.testing.assert_close(found, source.read(ClipDraw(theirs, 1, flip), 2, 2), rtol=0, atol=2e-3)
    assert assign_buckets(cache.catalog, buckets, 1, sized=True).videos[1].bucket == buckets[1]
    cached, measured = cache.statistics(), source.statistics()
    torch.testing.assert_close(torch.tensor(cached.mean), torch.tensor(measured.mean), rtol=1e-3, atol=1e-3)

    again = encode_dataset(catalog, tmp_path / "cache", tiny_vae, 16, True, "fp32", **options)  # type: ignore[arg-type]
    assert again == manifest
    one_by_one = encode_dataset(
        catalog,
        tmp_path / "small",
        tiny_vae,
        16,
        True,
        "fp32",
        shard_bytes=1,
        **options,  # type: ignore[arg-type]
    )
    assert len({row["shard"] for row in one_by_one["videos"]}) == 4
    with pytest.raises(ValueError, match="holds a cache with resolution=16x16, 16x24, not 16; use another"):
        encode_dataset(scan(videos), tmp_path / "cache", tiny_vae, 16, True, "fp32")


def test_a_cache_of_rectangles(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    catalog, size = scan(videos), Size(16, 24)
    encode_dataset(catalog, tmp_path / "cache", tiny_vae, size, False, "fp32", fit="pad")
    cache, source = CacheSource(tmp_path / "cache"), VideoSource(catalog, tiny_vae, size, "fp32", fit="pad")
    for mine, theirs in zip(cache.catalog.videos, catalog.videos, strict=True):
        found = cache.read(ClipDraw(mine, 0, False), 3, 1)
        assert found[0].shape == (3, 4, 8, 12)
        torch.testing.assert_close(found, source.read(ClipDraw(theirs, 0, False), 3, 1), rtol=0, atol=2e-3)
    cache.check(tiny_vae, size, False, videos, fit="pad")
    with pytest.raises(ValueError, match=r"made with fit=pad, but data\.fit is crop"):
        cache.check(tiny_vae, size, False, videos)
    with pytest.raises(ValueError, match=r"made at resolution 16x24, but data\.resolution is 24x16"):
        cache.check(tiny_vae, Size(24, 16), False, videos, fit="pad")
    with pytest.raises(ValueError, match="holds a cache with fit=pad, not None"):
        encode_dataset(catalog, tmp_path / "cache", tiny_vae, size, False, "fp32")
    with pytest.raises(ValueError, match="resolution is 16x19, but this autoencoder needs a multiple of"):
        encode_dataset(catalog, tmp_path / "other", tiny_vae, Size(16, 19), False, "fp32")
