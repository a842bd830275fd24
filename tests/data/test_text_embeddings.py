"""Text embeddings on disk are those of the encoder, until it or the texts change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_text import BERT, save_text_encoder
from transformers import BertModel

from lavita.data import text_embeddings
from lavita.data.text_embeddings import embed_texts, texts_folder
from lavita.models.text_encoder import load_text_encoder

TEXTS = ["", "a game of boxing", "freeway"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders were loaded."""
    names: list[str] = []

    def load(source: str, device: str) -> object:
        names.append(source)
        return load_text_encoder(source, device)

    monkeypatch.setattr(text_embeddings, "load_text_encoder", load)
    return names


def save(folder: Path, seed: int = 0, subfolders: bool = False) -> str:
    torch.manual_seed(seed)
    save_text_encoder(BertModel(BERT), folder, subfolders)
    if subfolders:
        (folder / "model_index.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("subfolders", [False, True])
def test_embeddings_are_computed_once(tmp_path: Path, loads: list[str], subfolders: bool) -> None:
    source, cache = save(tmp_path / "encoder", subfolders=subfolders), tmp_path / "new" / "cache"
    expected = load_text_encoder(source)(TEXTS)
    for _ in range(2):
        assert torch.equal(embed_texts(TEXTS, source, cache), expected)
    assert loads == [source]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(embed_texts(TEXTS, source, cache), expected)
    assert torch.equal(embed_texts(TEXTS, source, cache), expected)
    assert loads == [source] * 2 and [*cache.iterdir()] == [file]


def test_other_texts_and_other_encoders_have_their_own(tmp_path: Path, loads: list[str]) -> None:
    source = save(tmp_path / "encoder")
    before = embed_texts(TEXTS, source, tmp_path)
    assert torch.equal(embed_texts(TEXTS[::-1], source, tmp_path), load_text_encoder(source)(TEXTS[::-1]))
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    mean = embed_texts(TEXTS, source, tmp_path)
    assert torch.equal(mean, load_text_encoder(source)(TEXTS)) and not torch.equal(mean, before)
    save(tmp_path / "encoder", seed=1)  # other weights in the same files
    other = embed_texts(TEXTS, source, tmp_path)
    assert torch.equal(other, load_text_encoder(source)(TEXTS)) and not torch.equal(other, mean)
    assert len(loads) == len(list(tmp_path.glob("texts-*.safetensors"))) == 4


def test_an_encoder_from_the_hub_is_known_by_its_weights(tmp_path: Path) -> None:
    digests = [load_text_encoder(save(tmp_path / name, seed)).digest() for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]


def test_text_embeddings_are_kept_with_the_latents_if_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    assert texts_folder(None, run) == run
    assert texts_folder(cache, run) == cache
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert texts_folder(cache, run) == run
