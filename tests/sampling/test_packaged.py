"""The models in the package."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from lavita.models.autoencoder import load_autoencoder
from lavita.models.fingerprint import fingerprint
from lavita.models.packaged import autoencoder_source, model_source
from lavita.models.patch_autoencoder import LavitaPatchAutoencoder
from lavita.sampling.pipeline import load_pipeline

ARCADE = Path(model_source("builtin"))


def test_the_package_holds_each_weight_once() -> None:
    """Everything below `src/lavita` is in the wheel."""
    files = [file for file in ARCADE.parent.rglob("*") if file.is_file()]
    assert sorted(file.relative_to(ARCADE.parent).as_posix() for file in files) == [
        "arcade/README.md",
        "arcade/model_index.json",
        "arcade/scheduler/scheduler_config.json",
        "arcade/training.json",
        "arcade/transformer/config.json",
        "arcade/transformer/diffusion_pytorch_model.safetensors",
        "arcade/vae/README.md",
        "arcade/vae/config.json",
        "arcade/vae/diffusion_pytorch_model.safetensors",
        "autoencoder/README.md",
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
    ]
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == len(files)
    assert sum(file.stat().st_size for file in files) < 33e6
    for file in ARCADE.parent.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8")), f"{file}: a path of some machine"


def test_the_packaged_autoencoder_is_for_videos_of_all_kinds() -> None:
    source = autoencoder_source("builtin", 256)
    assert autoencoder_source("auto", 64) == source != autoencoder_source("arcade", 64)
    vae = load_autoencoder(source)
    assert isinstance(vae, LavitaPatchAutoencoder) and vae.dtype == torch.float32
    sizes = {file.suffix: file.stat().st_size for file in Path(source).iterdir()}
    assert sum(sizes.values()) < 8e6
    assert set(sizes) == {".json", ".md", ".safetensors"}


def test_the_arcade_models_autoencoder_has_a_name_of_its_own() -> None:
    assert autoencoder_source("arcade", 64) == str(ARCADE / "vae")
    expected = fingerprint(load_pipeline(ARCADE).vae)
    # Latent caches and folders of samples made with the first release record this.
    assert expected == "648ea696f26a88bba4c42117f8a529b3a558178cfa1c21f48e5e35809d5dcd87"
    for source in (autoencoder_source("arcade", 64), str(ARCADE)):
        vae = load_autoencoder(source)
        assert fingerprint(vae) == expected and vae.dtype == torch.float32


def test_a_copy_of_the_arcade_models_folder_is_complete(tmp_path: Path) -> None:
    shutil.copytree(ARCADE, tmp_path / "copy")
    found, expected = load_pipeline(tmp_path / "copy"), load_pipeline(ARCADE)
    for name in ("transformer", "vae"):
        assert fingerprint(getattr(found, name)) == fingerprint(getattr(expected, name))
