"""diffusers' `AutoencoderTiny` wherever an autoencoder is used: files, frames, caches, pipelines, memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer
from tiny_data import paint, write_videos

from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.clips import ClipDraw
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.reading import CacheSource
from lavita.models.autoencoder import AutoencoderTiny, decode, downsampling, encode, load_autoencoder, to_pixels
from lavita.models.fingerprint import fingerprint
from lavita.sampling.pipeline import load_pipeline, make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.studies.memory import autoencoder_config, sampling_memory


def make_tiny(levels: int = 2, **fields: Any) -> AutoencoderTiny:
    """From frames of 16 pixels to latents of 4 x 8 x 8, as `tiny_vae`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderTiny(
            **{
                "encoder_block_out_channels": (8,) * levels,
                "decoder_block_out_channels": (8,) * levels,
                "num_encoder_blocks": (1,) * levels,
                "num_decoder_blocks": (1,) * levels,
                "latent_channels": 4,
                "scaling_factor": 1.7,
                "shift_factor": 0.2,
                **fields,
            }
        )
    return vae.eval().requires_grad_(False)


@pytest.fixture
def vae() -> AutoencoderTiny:
    return make_tiny()


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_latents_and_frames_are_those_of_diffusers(levels: int) -> None:
    vae, frames = make_tiny(levels), paint(3, height=16, width=16)
    assert downsampling(vae) == 2 ** (levels - 1)
    mean, std = encode(vae, frames, "fp32")
    raw = vae.encode(to_pixels(frames)).latents
    torch.testing.assert_close(mean, (raw - 0.2) * 1.7, rtol=1e-5, atol=1e-6)
    assert mean.shape == std.shape == (3, 4, 16 // 2 ** (levels - 1), 16 // 2 ** (levels - 1))
    assert not std.any()
    expected = vae.decode(raw).sample.add(1).mul(127.5).round().clamp(0, 255).movedim(1, -1).numpy()
    assert np.abs(decode(vae, mean, "fp32").astype(float) - expected).max() <= 1


def test_it_loads_as_it_was_saved(vae: AutoencoderTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)  # diffusers' loggers do not propagate
    loaded = load_autoencoder(str(tmp_path))
    logger.removeHandler(caplog.handler)
    assert type(loaded) is AutoencoderTiny
    assert fingerprint(loaded) == fingerprint(vae)
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"_class_name": "VQModel"}, "names the class 'VQModel'; allowed: AutoencoderKL, AutoencoderTiny"),
        ({"_class_name": ["AutoencoderTiny"]}, r"names the class \['AutoencoderTiny'\]; allowed"),
        ({"upsampling_scaling_factor": 3}, "shrinks frames by 2, but its decoder enlarges latents by 3"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
    ],
    ids=["class", "class_list", "sides", "scale"],
)
def test_what_does_not_load_is_said(fields: dict[str, Any], problem: str, vae: AutoencoderTiny, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as caught:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_cache_and_videos_hold_latents_without_deviation(vae: AutoencoderTiny, tmp_path: Path) -> None:
    videos = scan(write_videos(tmp_path / "videos"))
    encode_dataset(videos, tmp_path / "cache", vae, 16, True)
    cache, source = CacheSource(tmp_path / "cache"), VideoSource(videos, vae, 16)
    for flip in (False, True):
        cached = cache.read(ClipDraw(cache.catalog.videos[1], 2, flip), 3, 2)
        made = source.read(ClipDraw(videos.videos[1], 2, flip), 3, 2)
        assert torch.equal(cached[0], made[0])
        assert not cached[1].any()
        assert not made[1].any()
    found = cache.statistics()
    expected = torch.cat([cache.read(ClipDraw(video, 0, False), 10, 1)[0] for video in cache.catalog.videos]).double()
    assert found.mean == pytest.approx(expected.mean((0, 2, 3)).tolist(), rel=1e-4, abs=1e-6)
    assert found.std == pytest.approx(expected.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


def test_a_pipeline_is_saved_and_loaded(
    vae: AutoencoderTiny, make_transformer: MakeTransformer, tmp_path: Path
) -> None:
    pipeline = make_pipeline(make_transformer(), vae)
    save_pipeline(pipeline, tmp_path / "pipeline")
    loaded = load_pipeline(tmp_path / "pipeline")
    assert type(loaded.vae) is AutoencoderTiny
    options: dict[str, Any] = {"num_inference_steps": 2, "precision": "fp32"}
    first, second = (each(generator=torch.Generator().manual_seed(0), **options).frames for each in (pipeline, loaded))
    np.testing.assert_array_equal(first, second)
    assert first.shape[2:] == (16, 16, 3)
    fields = autoencoder_config(str(tmp_path / "pipeline" / "transformer"), 4)
    assert fields["_class_name"] == "AutoencoderTiny"
    sizes = sampling_memory(loaded.transformer.config, autoencoder=fields).parts
    assert sizes["autoencoder"] == sum(tensor.nbytes for tensor in vae.state_dict().values())
