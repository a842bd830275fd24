"""Text encoders: the states of the tokens of texts, as models of `text_tokens` take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import BERT, CLIP, WORDS, save_text_encoder
from transformers import BertModel, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Model

from lavita.models.text_encoder import load_text_encoder

TEXTS = ["a game of boxing", "freeway", ""]


def inputs(text: str) -> dict[str, torch.Tensor]:
    ids = [2, *(WORDS.index(word) for word in text.split()), 3]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        sizes["decoder_start_token_id"] = 0
        return T5Model(T5Config(vocab_size=len(WORDS), pad_token_id=0, **sizes))
    return BertModel(BERT) if kind == "bert" else CLIPTextModel(CLIP)


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_the_pooled_embedding_the_states_and_zeros(kind: str, tmp_path: Path) -> None:
    model = save_text_encoder(build(kind), tmp_path)
    if isinstance(model, T5Model):  # only its encoder is loaded, though the decoder is in the file
        model = T5EncoderModel.from_pretrained(tmp_path).eval()
    encoder = load_text_encoder(str(tmp_path))
    packed = encoder.encode(TEXTS, 8)
    assert packed.shape == (3, 9, 16) and packed.dtype == torch.float32
    assert torch.equal(packed.half().float(), packed), "as float16 holds them"
    for text, found in zip(TEXTS, packed, strict=True):
        given = inputs(text)
        with torch.no_grad():
            output: Any = model(**given)
        states = output.last_hidden_state[0]
        pooled = states.mean(0) if kind == "t5" else output.pooler_output[0]
        assert len(states) == len(text.split()) + 2, "the special tokens are kept"
        torch.testing.assert_close(found[0], pooled, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found[1 : 1 + len(states)], states, atol=2e-3, rtol=2e-3)
        assert not found[1 + len(states) :].any()


def test_a_text_is_encoded_alike_whatever_is_beside_it(tmp_path: Path) -> None:
    save_text_encoder(build("bert"), tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    together = encoder.encode(["a game of boxing freeway a game", *TEXTS, *TEXTS], 12)
    for row, text in enumerate(TEXTS, start=1):
        assert torch.equal(encoder.encode([text], 12)[0], together[row])


def test_longer_texts_are_cut_with_a_line_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_text_encoder(build("bert"), tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    found = encoder.encode(["a " * 20, "freeway"], 5)
    assert capsys.readouterr().err == "1 of 2 texts have more than 5 tokens and are cut (model.text_tokens)\n"
    assert torch.equal(found[0], encoder.encode(["a a a"], 5)[0]), "the last of them is the special one"
    assert capsys.readouterr().err == ""


def test_encoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_text_encoder(build("clip"), tmp_path / "clip")
    with pytest.raises(ValueError, match=r"text_tokens is 9, but .*clip takes at most 8"):
        load_text_encoder(str(tmp_path / "clip")).encode(TEXTS, 9)
    save_text_encoder(CLIPTextModelWithProjection(CLIP), tmp_path / "projected")
    with pytest.raises(ValueError, match="its tokens have 16 numbers, but its pooled output 12"):
        load_text_encoder(str(tmp_path / "projected")).encode(TEXTS, 8)
    huge = build("bert")
    with torch.no_grad():
        huge.encoder.layer[0].output.LayerNorm.weight.mul_(1e6)
    save_text_encoder(huge, tmp_path / "huge")
    with pytest.raises(ValueError, match="has states beyond the range of float16"):
        load_text_encoder(str(tmp_path / "huge")).encode(TEXTS, 8)
