"""Publishing a pipeline and sampling from what was published, through a hub on this machine, with its faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
from conftest import MakeTransformer, Run
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from fake_hub import FakeHub
from huggingface_hub import constants

from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.model_card import KEPT_BELOW, CardFacts, read_facts
from lavita.sampling.pipeline import load_pipeline, make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline

CLASSES = {"num_classes": 2, "class_names": ["cat", "dog"]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub, the token of somebody who may write, and an empty cache."""
    with fake_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        yield running


@pytest.fixture
def folder(tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> Path:
    """The folder of a run with a pipeline."""
    facts = CardFacts(training={"Videos": "3"})
    save_pipeline(make_pipeline(make_transformer(**CLASSES), tiny_vae), tmp_path / "our-run" / "pipeline", facts=facts)
    return tmp_path / "our-run"


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_published_is_what_others_sample_from(hub: FakeHub, folder: Path, run: Run, tmp_path: Path) -> None:
    code, stdout, stderr = run("push", folder, "me/cats", "--license", "apache-2.0")
    assert code == 0 and f"{hub.url}/me/cats/commit/" in stdout, stderr
    published = hub.repositories["me/cats"]
    assert not published.private
    assert published.files == tree(folder / "pipeline")
    card = published.files["README.md"].decode()
    assert "license: apache-2.0" in card and "# our-run" in card and "| Videos | 3 |" in card and '"cat"' in card
    arguments = ("--classes", "dog", "--seeds", "3", "--steps", "2", "--format", "mkv", "--out")
    assert run("sample", folder / "pipeline", *arguments, tmp_path / "here")[0] == 0
    # On another machine, with nothing in its cache, as a process of its own.
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "elsewhere"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_reader",
    }
    command = [sys.executable, "-m", "lavita", "sample", "me/cats", *arguments, str(tmp_path / "there")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here, there = tree(tmp_path / "here" / "dog"), tree(tmp_path / "there" / "dog")
    assert here == there and list(here) == ["3.mkv"]
    assert not list((tmp_path / "elsewhere").rglob("*.py")), "code of the repository is not even downloaded"


def test_a_private_repository(hub: FakeHub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("push", folder, "me/secret", "--private")[0] == 0
    assert hub.repositories["me/secret"].private
    load_pipeline("me/secret")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "empty"))
    with pytest.raises(ValueError, match=r"me/secret: cannot load a pipeline \(there is no such repository, or it is"):
        load_pipeline("me/secret")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "the token is wrong"),
        ("hf_reader", "the token has no right to do that"),
        (None, "a token is needed: set HF_TOKEN, or run `hf auth login`"),
    ],
)
def test_tokens(
    token: str | None, message: str, hub: FakeHub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, stderr = run("push", folder, "me/cats")
    assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert not hub.repositories


def test_an_interrupted_upload_goes_on(hub: FakeHub, folder: Path, run: Run) -> None:
    hub.refuse_after = 1
    code, _, stderr = run("push", folder, "me/cats")
    last = stderr.splitlines()[-1]  # below the progress bars
    assert code == 2 and last.startswith("error: me/cats: cannot be uploaded") and "same command goes on" in last
    assert not hub.repositories["me/cats"].files, "a repository is never half-updated"
    assert len(hub.uploads) == 1
    hub.refuse_after = None
    assert run("push", folder, "me/cats")[0] == 0
    assert hub.repositories["me/cats"].files == tree(folder / "pipeline")
    assert len(set(hub.uploads)) == len(hub.uploads), "what was uploaded is not uploaded again"


def test_files_that_are_there(hub: FakeHub, folder: Path, run: Run) -> None:
    assert run("push", folder, "me/cats")[0] == 0
    files = hub.repositories["me/cats"].files
    files["vae/old.safetensors"] = b"of an older autoencoder"
    files["notes.txt"] = b"mine"
    card = folder / "pipeline" / "README.md"
    card.write_text(card.read_text() + "\nTrained on my cats.\n")
    assert run("push", folder, "me/cats", "--title", "Cats")[0] == 0
    files = hub.repositories["me/cats"].files
    assert files == {**tree(folder / "pipeline"), "notes.txt": b"mine"}
    assert b"# Cats\n" in files["README.md"] and files["README.md"].endswith(b"\n\nTrained on my cats.\n")
    hub.repositories["me/other"] = fake_hub.Repository(files={"config.json": b"{}", "model.safetensors": b""})
    code, _, stderr = run("push", folder, "me/other")
    assert code == 2 and "me/other: exists and holds something else (config.json, model.safetensors" in stderr
    assert set(hub.repositories["me/other"].files) == {"config.json", "model.safetensors"}


def test_a_download_that_breaks_off(hub: FakeHub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("push", folder, "me/cats")[0] == 0
    hub.break_downloads = True
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None, raising=False)
    with pytest.raises(ValueError, match="me/cats: cannot load a pipeline") as caught:
        load_pipeline("me/cats")
    assert "\n" not in str(caught.value)
    hub.break_downloads = False
    load_pipeline("me/cats")


def test_what_cannot_be_published(hub: FakeHub, folder: Path, run: Run, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "nothing", "me/cats"), "nothing: no such folder"),
        ((folder, "me/cats/again"), "repository is 'me/cats/again', but must be a hub id such as name/model"),
        ((folder, "me/cats", "--scores", folder / "none.json"), "cannot be read as a report of lavita evaluate"),
    ):
        code, _, stderr = run("push", *arguments)
        assert code == 2 and message in stderr.splitlines()[-1], stderr
    weights = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, stderr = run("push", folder, "me/cats")
    assert code == 2 and "cannot load a pipeline" in stderr
    assert not hub.repositories


def test_scores_of_an_evaluation(hub: FakeHub, folder: Path, run: Run, tmp_path: Path) -> None:
    report = {
        "protocol": {"num_frames": 16, "frame_interval": 3, "resolution": 64},
        "scores": {
            "fvd": {"value": 123.456, "interval_95": [110.0, 140.0], "floor": 20.5, "num_real": 9, "num_generated": 8}
        },
        "accuracy": {"accuracy": 0.75, "interval_95": [0.5, 0.9]},
    }
    (tmp_path / "scores.json").write_text(json.dumps(report))
    assert run("push", folder, "me/cats", "--scores", tmp_path / "scores.json")[0] == 0
    card = hub.repositories["me/cats"].files["README.md"].decode()
    assert "| fvd | 123.5 | 110 to 140 | 20.5 | 8 generated and 9 real clips of 16 frames at interval 3, 64" in card
    assert "| class accuracy | 75.0% | 50.0% to 90.0% |" in card


def test_plain_diffusers_loads_a_pipeline(folder: Path) -> None:
    source = str(folder / "pipeline")
    plain = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)
    own = load_pipeline(source)
    assert type(plain) is type(own)
    assert (plain(class_labels=["dog"], num_inference_steps=1).frames.shape) == (1, 2, 16, 16, 3)


def test_a_card_is_written_again_with_what_was_stated(
    folder: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    pipeline = folder / "pipeline"
    card = pipeline / "README.md"
    assert card.read_text().endswith(f"{KEPT_BELOW}\n")
    (pipeline / "card.json").write_text(json.dumps({"license": "mit", "title": "Cats | dogs"}))
    card.write_text(card.read_text() + "By hand.\n")
    save_pipeline(make_pipeline(make_transformer(), tiny_vae), pipeline, facts=CardFacts(training={"Videos": "4"}))
    text = card.read_text()
    assert "license: mit" in text and "# Cats | dogs" in text and text.endswith("By hand.\n")
    assert "| Videos | 4 |" in text and "without a label" in text
    (pipeline / "card.json").write_text('{"licence": 1}')
    with pytest.raises(ValueError, match="cannot be read as the facts of a card"):
        read_facts(pipeline)
