"""Tiny text encoders with random weights, and a tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path

from transformers import BertConfig, BertTokenizer, CLIPTextConfig, PreTrainedModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "game", "of", "boxing", "freeway"]
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


def save_text_encoder(model: PreTrainedModel, folder: Path, subfolders: bool = False) -> PreTrainedModel:
    """Saves a model with a tokenizer of a few words, in one folder or in the subfolders of a diffusers pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    model.eval().save_pretrained(folder / "text_encoder" if subfolders else folder)
    tokenizer.save_pretrained(folder / "tokenizer" if subfolders else folder)
    return model
