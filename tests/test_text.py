"""Text encoders: pooled embeddings, by the encoder's own pooling or the mean that it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
)
from transformers import BertTokenizerFast as Tokenizer

from lavita.text import load_text_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "game", "of", "boxing", "freeway"]
TEXTS = ["a game of boxing", "freeway", ""]
BERT = BertConfig(
    vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
CLIP = CLIPTextConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    projection_dim=12,
    max_position_embeddings=8,
    eos_token_id=3,
)


def save(model: PreTrainedModel, folder: Path, subfolders: bool = False) -> PreTrainedModel:
    """Saves a model and a tokenizer of a few words, as transformers or as a diffusers pipeline lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = Tokenizer(vocab=str(folder / "vocab.txt"))
    model.eval().save_pretrained(folder / "text_encoder" if subfolders else folder)
    tokenizer.save_pretrained(folder / "tokenizer" if subfolders else folder)
    return model


def tokens(text: str) -> dict[str, torch.Tensor]:
    ids = [2, *(WORDS.index(word) for word in text.split()), 3]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@pytest.mark.parametrize("subfolders", [False, True])
@pytest.mark.parametrize("kind", ["bert", "clip", "clip_with_projection"])
def test_the_pooled_output_of_the_model(kind: str, subfolders: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"bert": BertModel(BERT), "clip": CLIPTextModel(CLIP)}
    model = save(models.get(kind) or CLIPTextModelWithProjection(CLIP), tmp_path, subfolders)
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
    model = save(BertModel(BERT), tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    for text, mine in zip(TEXTS, load_text_encoder(str(tmp_path))(TEXTS), strict=True):
        with torch.no_grad():
            expected = model(**tokens(text)).last_hidden_state[0].mean(0)
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    save(CLIPTextModel(CLIP), tmp_path)
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
    save(DistilBertModel(small), tmp_path / "distil")
    with pytest.raises(ValueError, match="DistilBertModel has no pooled output"):
        load_text_encoder(str(tmp_path / "distil"))
    bare = save(BertModel(BERT, add_pooling_layer=False), tmp_path / "bare")
    assert bare.pooler is None
    with pytest.raises(ValueError, match=r"bare: its weights lack pooler\.dense\.bias"):
        load_text_encoder(str(tmp_path / "bare"))
