"""Captions -> pooled text embeddings (Sec. 4.4), by any text encoder of transformers with a pooled output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEFAULT_TEXT_ENCODER = "CompVis/stable-diffusion-v1-4"
BATCH = 64  # texts encoded at once


@dataclass
class TextEncoder:
    """A frozen text encoder and its tokenizer; call it with texts."""

    source: str
    tokenizer: Any
    model: Any
    mean_pooling: bool
    """Average over the tokens, as sentence-transformers asks for, instead of the model's own pooled output."""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings of texts, float32 (B, text_dim); longer ones are cut at what the encoder takes."""
        parts = []
        for first in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model(**{key: tokens[key] for key in ("input_ids", "attention_mask")})
            if self.mean_pooling:
                mask = tokens["attention_mask"][..., None].float()
                pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            else:
                pooled = getattr(output, "text_embeds", None)
                pooled = output.pooler_output if pooled is None else pooled
            parts.append(pooled.float())
        return torch.cat(parts)

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def digest(self) -> str:
        """SHA-256 of weights, configuration, vocabulary and pooling: equal where embeddings are."""
        config = {key: value for key, value in self.model.config.to_dict().items() if not key.startswith("_")}
        facts = [config, self.mean_pooling, self.max_length, sorted(self.tokenizer.get_vocab().items())]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_text_encoder(source: str | None = None, device: torch.device | str = "cpu") -> TextEncoder:
    """Loads a text encoder in float32.

    Args:
        source: path or hub id of a text model with its tokenizer, or of a diffusers pipeline that holds one; by default
            Stable Diffusion 1.4, whose CLIP the paper takes.
        device: where it runs.

    Raises:
        ValueError: where transformers is missing, the source cannot be loaded, or it has no pooled output.
    """
    source = source or DEFAULT_TEXT_ENCODER
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError('captions need the extra "text": pip install "lavita[text]"') from error
    folder = Path(source)
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"{source}: no such folder; a text encoder is a folder or a hub id")
    pipeline = source == DEFAULT_TEXT_ENCODER or _is_pipeline(folder)
    of_model, of_tokenizer = ("text_encoder", "tokenizer") if pipeline else ("", "")
    try:
        logging.set_verbosity_error()  # what is missing is checked below
        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(source, subfolder=of_model)
        projects = "CLIPTextModelWithProjection" in (config.architectures or ())
        # Of text and image towers the text's alone, with its projection.
        kind: Any = CLIPTextModelWithProjection if projects or config.model_type == "clip" else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=of_tokenizer)
        model, loading = kind.from_pretrained(source, dtype=torch.float32, subfolder=of_model, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: cannot load a text encoder ({' '.join(str(error).split())[:200]})") from error
    model = model.eval().requires_grad_(False).to(device)
    encoder = TextEncoder(source, tokenizer, model, _asks_for_mean_pooling(folder))
    if missing := [key for key in loading["missing_keys"] if not (encoder.mean_pooling and "pooler" in key)]:
        raise ValueError(f"{source}: its weights lack {sorted(missing)[0]}")
    with torch.no_grad():
        output = model(input_ids=tokenizer("a", return_tensors="pt")["input_ids"].to(device))
    pooled = getattr(output, "text_embeds", None)
    if not encoder.mean_pooling and pooled is None and getattr(output, "pooler_output", None) is None:
        raise ValueError(f"{source}: {type(model).__name__} has no pooled output; use a CLIP, BERT or sentence encoder")
    return encoder


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files that a text encoder is loaded from."""
    roots = [folder / "text_encoder", folder / "tokenizer"] if _is_pipeline(folder) else [folder]
    files = {file.relative_to(folder).as_posix(): file for root in roots for file in root.rglob("*") if file.is_file()}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").exists()


def _asks_for_mean_pooling(folder: Path) -> bool:
    """Whether a sentence-transformers folder says that its embedding is the mean over the tokens."""
    file = folder / "1_Pooling" / "config.json"
    return file.exists() and bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))
