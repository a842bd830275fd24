"""Text encoders: pooled embeddings, by the encoder's own pooling or the mean that it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import BERT, CLIP, WORDS, save_text_encoder
from transformers import (
    BertModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DistilBertConfig,
    DistilBertModel,
)

from lavita.models.text_encoder import load_text_encoder

TEXTS = ["a game of boxing", "freeway", ""]


def tokens(text: str) -> dict[str, torch.Tensor]:
    ids = [2, *(WORDS.index(word) for word in text.split()), 3]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@pytest.mark.parametrize("subfolders", [False, True])
@pytest.mark.parametrize("kind", ["bert", "clip", "clip_with_projection"])
def test_the_pooled_output_of_the_model(kind: str, subfolders: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"bert": BertModel(BERT), "clip": CLIPTextModel(CLIP)}
    model = save_text_encoder(models.get(kind) or CLIPTextModelWithProjection(CLIP), tmp_path, subfolders)
    if subfolders:
        (tmp_path / "model_index.json").write_text("{}")
    embeds = load_text_encoder(str(tmp_path))(TEXTS)
    assert embeds.shape == (3, 12 if kind == "clip_with_projection" else 16) and embeds.dtype == torch.float32
    for text, mine in zip(TEXTS, embeds, strict=True):
        with torch.no_grad():
            output = model(**tokens(text))
        expected = output.text_embeds if kind == "clip_with_projection" else output.pooler_output
        torch.testing.assert_close(mine, expected[0], atol=1e-5, rtol=1e-4)


def test_the_mean_that_a_sentence_encoder_asks_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save_text_encoder(BertModel(BERT), tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    for text, mine in zip(TEXTS, load_text_encoder(str(tmp_path))(TEXTS), strict=True):
        with torch.no_grad():
            expected = model(**tokens(text)).last_hidden_state[0].mean(0)
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    save_text_encoder(CLIPTextModel(CLIP), tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    assert encoder.max_length == 8
    assert torch.equal(encoder(["a " * 50]), encoder(["a " * 6]))


def test_what_is_no_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; a text encoder is a folder or a hub id"):
        load_text_encoder(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: cannot load a text encoder"):
        load_text_encoder(str(tmp_path / "empty"))
    small = DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    save_text_encoder(DistilBertModel(small), tmp_path / "distil")
    with pytest.raises(ValueError, match="DistilBertModel has no pooled output"):
        load_text_encoder(str(tmp_path / "distil"))
    bare: Any = save_text_encoder(BertModel(BERT, add_pooling_layer=False), tmp_path / "bare")
    assert bare.pooler is None
    with pytest.raises(ValueError, match=r"bare: its weights lack pooler\.dense\.bias"):
        load_text_encoder(str(tmp_path / "bare"))


def test_code_in_a_text_encoder_is_not_run(tmp_path: Path) -> None:
    save_text_encoder(BertModel(BERT), tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).mkdir()\n"
    (tmp_path / "encoder" / "trap.py").write_text(trap)
    maps = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model", "AutoTokenizer": ["trap.Tokenizer", None]}
    for kind in ("bert", "unheard-of"):
        changed = {**config, "model_type": kind, "auto_map": maps}
        (tmp_path / "encoder" / "config.json").write_text(json.dumps(changed))
        try:
            load_text_encoder(str(tmp_path / "encoder"))  # where the library has the class, it is used
        except ValueError as error:
            assert "cannot load a text encoder" in str(error) and "\n" not in str(error)
        assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match="cannot load a text encoder"):
        load_text_encoder(str(tmp_path / "encoder"))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model: Any = BertModel(BERT)
    with torch.no_grad():
        model.pooler.dense.bias[3] = float("nan")
    save_text_encoder(model, tmp_path)
    with pytest.raises(ValueError, match=r"pooler\.dense\.bias holds 1 of 16 values that are not finite"):
        load_text_encoder(str(tmp_path))
