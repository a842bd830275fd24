"""Hub ids where there is no hub: one clear answer, at once, and the cache where it has the model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from huggingface_hub import constants

from lavita.models import hub
from lavita.models.autoencoder import AutoencoderKL, load_autoencoder
from lavita.models.pretrained.reading import open_source
from lavita.models.text_encoder import load_text_encoder
from lavita.sampling.pipeline import load_pipeline

LOADERS: list[Callable[[str], Any]] = [
    load_pipeline,
    load_autoencoder,
    load_text_encoder,
    lambda source: open_source(source, None),
]


@pytest.fixture(params=["offline", "no connection"])
def why(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the message says about a hub that cannot be reached."""
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return "HF_HUB_OFFLINE is set"

    def refuse() -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_session", refuse)
    return "https://.* cannot be reached"


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_that_cannot_be_reached_is_said_at_once(load: Callable[[str], Any], why: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"nobody/nothing: cannot load .*{why}, and the cache .* lacks it") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value) and "config.json" not in str(caught.value)
    assert time.monotonic() - start < 15  # asking six times with pauses takes 23 s


def test_the_command_says_it_in_one_line(why: str, run: Run, tmp_path: Path) -> None:
    code, _, stderr = run("sample", "nobody/nothing", "--out", tmp_path / "out")
    assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("error: nobody/nothing: cannot load a pipeline")


def test_a_model_in_the_cache_is_used(
    why: str, tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    stored = tmp_path / "hub" / "models--somebody--vae"
    tiny_vae.save_pretrained(stored / "snapshots" / revision)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    options = hub.hub_options("somebody/vae")
    vae = AutoencoderKL.from_pretrained("somebody/vae", cache_dir=tmp_path / "hub", **options)
    assert options == {"local_files_only": True} and vae.config["latent_channels"] == 4
    shutil.rmtree(stored)


def test_a_folder_needs_no_hub(tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("the hub was asked"))
    tiny_vae.save_pretrained(tmp_path / "vae")
    load_autoencoder(str(tmp_path / "vae"))
