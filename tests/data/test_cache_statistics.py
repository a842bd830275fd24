"""Statistics of the latents of a data set, with a cache, with one of an earlier version, and without one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_data import write_broken, write_videos

from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.reading import CacheSource
from lavita.data.latent_cache.statistics import spread_frames
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.latent_statistics import LatentStatistics


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "videos", ["a/0.mp4", "a/1.mp4", "b/2.mp4"])


@pytest.fixture
def cache(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    encode_dataset(scan(videos), tmp_path / "cache", tiny_vae, 16, True, "fp32", shard_bytes=1)
    return tmp_path / "cache"


def test_frames_are_spread_over_the_videos() -> None:
    assert list(spread_frames([2, 3], 100)) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert list(spread_frames([10], 2)) == [(0, 2), (0, 7)]
    found = list(spread_frames([100, 1, 300], 40))
    assert len(set(found)) == 40 and found == sorted(found)
    assert [video for video, _ in found].count(0) == 10


def test_a_cache_records_them(cache: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in cache.glob("*.safetensors"):
        tensors |= load_file(shard)
    names = ["a/0.mp4", "a/1.mp4", "b/2.mp4"]
    mean, std = (np.concatenate([tensors[f"{name}/{key}"].double() for name in names]) for key in ("mean", "std"))
    found = LatentStatistics.of(json.loads((cache / "manifest.json").read_text()))
    assert found is not None and found == CacheSource(cache).statistics()
    np.testing.assert_allclose(found.mean, mean.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found.std, np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))), rtol=1e-9)


def test_a_cache_of_before_is_measured_and_completed(
    videos: Path, cache: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    shards = {path: path.read_bytes() for path in cache.glob("*.safetensors")}
    before = {key: value for key, value in manifest.items() if not key.startswith("latent_")}
    (cache / "manifest.json").write_text(json.dumps(before))
    assert CacheSource(cache).statistics() == LatentStatistics.of(manifest)
    monkeypatch.setattr("lavita.data.latent_cache.encode.encode", lambda *_: pytest.fail("nothing is encoded again"))
    assert encode_dataset(scan(videos), cache, tiny_vae, 16, True, "fp32", shard_bytes=1) == manifest
    assert {path: path.read_bytes() for path in cache.glob("*.safetensors")} == shards


def test_videos_without_a_cache_have_the_same(
    videos: Path, cache: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = scan(videos)
    found, cached = VideoSource(catalog, tiny_vae, 16, "fp32").statistics(), CacheSource(cache).statistics()
    np.testing.assert_allclose(found.mean, cached.mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.std, cached.std, rtol=1e-3)
    write_broken(videos / "a" / "0.mp4")
    fewer = VideoSource(catalog, tiny_vae, 16, "fp32").statistics()
    assert fewer != found and np.isfinite(fewer.std).all()
