"""Which network a run of `lavita autoencoder train` starts from: its architecture, `init_from`, and frozen parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoder_runs import PATCH, STRUCTURES, TINY, tiny_run
from run_folders import last_checkpoint
from tiny_data import write_videos

from lavita.core.config import ConfigError, read_yaml
from lavita.data.catalog import scan
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.manifest import write_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.models.autoencoder import AutoencoderTiny, decode, encode, load_autoencoder, to_pixels
from lavita.training.autoencoder.frames import draw_frames, load_frames
from lavita.training.autoencoder.losses import autoencoder_losses
from lavita.training.autoencoder.network import build_autoencoder
from lavita.training.autoencoder.train import train_autoencoder
from lavita.training.checkpoint import list_checkpoints


def files_of(folder: Path) -> dict[str, bytes]:
    """All files in a folder but those of checkpoints."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "checkpoints" not in file.parts
    }


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, Path]:
    """An autoencoder of each architecture, after a step, and the videos for more."""
    write_videos(tmp_path / "videos")
    return {
        name: train_autoencoder(tiny_run(tmp_path, name=name, steps=1, **structure))
        for name, structure in STRUCTURES.items()
    }


# --- the tiny architecture


def test_a_tiny_autoencoder_has_the_asked_for_shape(tmp_path: Path) -> None:
    vae = build_autoencoder(tiny_run(tmp_path, **TINY))
    assert isinstance(vae, AutoencoderTiny)
    assert tuple(vae.config["num_encoder_blocks"]) == (1, 1, 2)
    assert tuple(vae.config["num_decoder_blocks"]) == (2, 1, 1)
    latents = vae.encode(torch.zeros(2, 3, 16, 24)).latents
    assert latents.shape == (2, 3, 4, 6)
    assert vae.decode(latents).sample.shape == (2, 3, 16, 24)

    default = tiny_run(tmp_path, architecture="tiny", downsampling=8)
    assert (default.widths, default.blocks) == ([64] * 4, [1, 3, 3, 3])


def test_a_tiny_autoencoder_pays_for_the_size_of_its_latents(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, kl_weight=0.3, edge_weight=0.0, motion_weight=0.0, **TINY)
    vae = build_autoencoder(config).double()
    assert isinstance(vae, AutoencoderTiny)
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    losses = autoencoder_losses(vae, pixels, torch.full((4, 3, 2, 2), torch.nan), config)

    latents = vae.encode(pixels).latents.detach().numpy()
    output = vae.decode(torch.from_numpy(latents)).sample.detach().numpy().astype(np.float32)
    assert losses.parts["kl"] == pytest.approx(np.square(latents).mean() / 2, rel=1e-5)
    assert losses.parts["reconstruction"] == pytest.approx(np.abs(output - pixels.numpy()).mean(), rel=1e-5)
    assert losses.total.item() == pytest.approx(losses.parts["reconstruction"] + 0.3 * losses.parts["kl"], rel=1e-5)


def test_a_tiny_autoencoder_is_saved_with_unit_variance(trained: dict[str, Path], tmp_path: Path) -> None:
    vae = load_autoencoder(str(trained["tiny"]))
    assert isinstance(vae, AutoencoderTiny)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    mean, std = encode(vae, frames, "fp32")
    raw = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    scale, shift = vae.config["scaling_factor"], vae.config["shift_factor"]
    torch.testing.assert_close(mean, (raw - shift) * scale)
    assert not std.any()
    assert scale != 1.0 and shift != 0.0
    assert decode(vae, mean, "fp32").shape == frames.shape


def test_training_lowers_the_loss_of_a_tiny_autoencoder(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = tiny_run(tmp_path, steps=60, learning_rate=1e-2, checkpoint_every=1000, **TINY)
    train_autoencoder(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "kl", "blocks_per_level": [1, 3, 3]}, "no effect with architecture=kl"),
        ({"architecture": "kl", "num_decoder_blocks": 2}, "num_decoder_blocks is 2, but has no effect"),
        ({"architecture": "patch", "block_out_channels": [8] * 3}, "no effect with architecture=patch"),
        ({"architecture": "tiny", "layers_per_block": 2}, "layers_per_block is 2, but has no effect"),
        ({"architecture": "tiny", "blocks_per_level": [1, 3]}, r"blocks_per_level has 2 numbers.*needs 3"),
        ({"architecture": "tiny", "block_out_channels": [8, 8, 16]}, "must be the same width at each resolution"),
        ({"freeze": "encoder"}, "needs init_from"),
        ({"freeze": "encoder", "init_from": "builtin", "kl_weight": 0.1}, "kl_weight is 0.1, but has no effect"),
    ],
    ids=[
        "kl-blocks",
        "kl-decoder",
        "patch-widths",
        "tiny-layers",
        "number-of-blocks",
        "unequal-widths",
        "freeze",
        "freeze-kl-weight",
    ],
)
def test_structures_that_do_not_exist_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **values)


# --- the architecture on patches


def test_an_autoencoder_on_patches_starts_from_the_principal_components_of_the_videos(tmp_path: Path) -> None:
    """The best linear autoencoder: what is lost are the components with the least variance, by numpy's SVD."""
    write_videos(tmp_path / "videos")
    config = tiny_run(tmp_path, steps=1, learning_rate=1e-12, kl_weight=0, **PATCH)
    vae: Any = load_autoencoder(str(train_autoencoder(config)))
    frames = draw_frames([load_frames(scan(config.data[0]), 8, 1.0, 0)], config)
    pixels = to_pixels(frames)
    patches = pixels.double().numpy().reshape(-1, 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    lost = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)[2:]
    with torch.no_grad():
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    assert (output - pixels).square().sum().item() == pytest.approx((lost**2).sum(), rel=1e-3)


# --- init_from


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_a_run_starts_from_the_weights_of_another_and_resumes_without_them(
    architecture: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    start = load_autoencoder(str(trained[architecture]))
    config = tiny_run(tmp_path, init_from=str(trained[architecture]), learning_rate=1e-9, name="first")
    folder = train_autoencoder(config)
    vae = load_autoencoder(str(folder))
    assert type(vae) is type(start)
    for name, weight in vae.named_parameters():
        torch.testing.assert_close(weight, start.get_parameter(name), rtol=0, atol=1e-7)
    saved = read_yaml(config.run_dir / "config.yaml")
    assert saved["init_from"] == str(trained[architecture])
    for key, value in STRUCTURES[architecture].items():
        assert saved[key] == value

    expected, files = last_checkpoint(config).read_all(), files_of(config.run_dir)
    shutil.rmtree(list_checkpoints(config.run_dir / "checkpoints")[-1])
    shutil.rmtree(trained[architecture])
    assert train_autoencoder(config) == folder
    for name, tensor in last_checkpoint(config).read_all().items():
        assert torch.equal(tensor, expected[name]), name
    assert files_of(config.run_dir) == files
    assert str(trained[architecture]) not in (folder / "config.json").read_text()


def test_the_packaged_autoencoder_is_a_start(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    config = tiny_run(tmp_path, init_from="builtin", steps=1, latent_channels=8, downsampling=4)
    folder = train_autoencoder(config)
    assert load_autoencoder(str(folder)).config["num_decoder_blocks"] == 8


def test_a_saved_configuration_starts_the_same_run(trained: dict[str, Path], tmp_path: Path) -> None:
    """It names every key, also those of the other architecture."""
    for name in STRUCTURES:
        config = tiny_run(tmp_path, init_from=str(trained[name]), steps=1, name=f"of-{name}")
        train_autoencoder(config)
        again = tiny_run(tmp_path, **read_yaml(config.run_dir / "config.yaml") | {"run_dir": str(tmp_path / "again")})
        train_autoencoder(again)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize(
    ("start", "values", "message"),
    [
        ("kl", {"latent_channels": 3}, r"latent_channels is 3, but that of init_from=.*kl/autoencoder is 2; leave it"),
        ("kl", {"architecture": "tiny"}, r"architecture is tiny, but that of init_from=.* is kl"),
        ("kl", {"blocks_per_level": [1, 1]}, r"blocks_per_level is \[1, 1\], but init_from=.* is of architecture=kl"),
        ("patch", {"width": 16}, r"width is 16, but that of init_from=.* is 8"),
        ("tiny", {"layers_per_block": 2}, r"layers_per_block is 2, but init_from=.* is of architecture=tiny"),
        ("tiny", {"resolution": 10}, r"resolution is 10, but must be a multiple of downsampling \(4\)"),
        ("none", {}, "no such folder"),
    ],
    ids=["channels", "architecture", "blocks", "width", "layers", "resolution", "missing"],
)
def test_a_start_that_contradicts_the_configuration_is_refused(
    start: str, values: dict[str, Any], message: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    init_from = str(trained.get(start, tmp_path / "none"))
    config = tiny_run(tmp_path, init_from=init_from, name="refused", **values)
    with pytest.raises(ValueError, match=message):
        train_autoencoder(config)
    assert not config.run_dir.exists()


def test_a_run_is_not_resumed_from_another_start(trained: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_run(tmp_path, init_from=str(trained["kl"]), steps=1)
    train_autoencoder(config)
    with pytest.raises(ConfigError, match=r"was started with .*; use another run_dir"):
        train_autoencoder(tiny_run(tmp_path, steps=1))
    shutil.copytree(trained["kl"], tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"started with init_from=.*, but .*copy was asked for"):
        train_autoencoder(tiny_run(tmp_path, init_from=str(tmp_path / "copy"), steps=1))


# --- freeze


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_a_frozen_encoder_keeps_its_latents(architecture: str, trained: dict[str, Path], tmp_path: Path) -> None:
    file = trained[architecture] / "config.json"
    scale = {"scaling_factor": 0.5, "shift_factor": 0.25}  # not what these videos would give
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | scale), encoding="utf-8")
    start = load_autoencoder(str(trained[architecture]))
    config = tiny_run(tmp_path, init_from=str(trained[architecture]), freeze="encoder", learning_rate=1e-2)
    vae = load_autoencoder(str(train_autoencoder(config)))
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for ours, before in zip(encode(vae, frames, "fp32"), encode(start, frames, "fp32"), strict=True):
        assert torch.equal(ours, before)
    assert {key: vae.config[key] for key in scale} == scale
    changed = {name for name, weight in vae.named_parameters() if not torch.equal(weight, start.get_parameter(name))}
    decoder = {name for name, _ in vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))}
    assert changed == decoder
    learning = {name.split(".")[1] for name in last_checkpoint(config).outlines if name.startswith("optimizer.")}
    assert learning <= {"decoder", "post_quant_conv"}


def test_a_cache_fits_an_autoencoder_whose_decoder_alone_is_another(trained: dict[str, Path], tmp_path: Path) -> None:
    start = load_autoencoder(str(trained["kl"]))
    cache = tmp_path / "cache"
    manifest = encode_dataset(scan(tmp_path / "videos"), cache, start, 8, horizontal_flip=False, precision="fp32")
    tuned = load_autoencoder(
        str(train_autoencoder(tiny_run(tmp_path, init_from=str(trained["kl"]), freeze="encoder", name="decoder")))
    )
    CacheSource(cache).check(tuned, 8, False, tmp_path / "videos")

    other = load_autoencoder(str(train_autoencoder(tiny_run(tmp_path, init_from=str(trained["kl"]), name="whole"))))
    scaled = load_autoencoder(str(trained["kl"]))
    scaled.register_to_config(scaling_factor=2.0)
    for vae in (other, scaled):
        with pytest.raises(ValueError, match="was made with another autoencoder"):
            CacheSource(cache).check(vae, 8, False, tmp_path / "videos")

    write_manifest(cache, {key: value for key, value in manifest.items() if key != "encoder"})  # an older cache
    CacheSource(cache).check(start, 8, False, tmp_path / "videos")
    with pytest.raises(ValueError, match="was made with another autoencoder"):
        CacheSource(cache).check(tuned, 8, False, tmp_path / "videos")


def test_a_frozen_encoder_is_not_rounded(trained: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_run(tmp_path, init_from=str(trained["kl"]), freeze="encoder", save_dtype="float16", name="rounded")
    with pytest.raises(ConfigError, match=r"save_dtype is float16, but would change the frozen encoder"):
        train_autoencoder(config)
    assert not config.run_dir.exists()
