"""Pooled embeddings of captions (Sec. 4.4), by any text encoder of transformers with a pooled output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, hub_options

DEFAULT_TEXT_ENCODER = "CompVis/stable-diffusion-v1-4"
BATCH_SIZE = 64


@dataclass
class TextEncoder:
    """A frozen text encoder with its tokenizer; call it with texts."""

    source: str
    """Path or hub id that it was loaded from."""
    tokenizer: Any
    model: Any
    mean_pooling: bool
    """Whether to average over the tokens, as sentence-transformers may ask for, rather than use the pooled output."""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings of B texts, float32 (B, text_dim); texts of more than `max_length` tokens are truncated."""
        parts = []
        for first in range(0, len(texts), BATCH_SIZE):
            tokens = self.tokenizer(
                list(texts[first : first + BATCH_SIZE]),
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
        """Maximum number of tokens per text."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def digest(self) -> str:
        """SHA-256 of weights, configuration, vocabulary and pooling: encoders with equal embeddings have equal ones."""
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
        source: path or hub id of a text model with its tokenizer, or of a diffusers pipeline that contains one; by
            default Stable Diffusion 1.4, whose CLIP the paper uses. Code in it is not run.
        device: device to load it to.

    Raises:
        ValueError: if transformers is not installed, the source cannot be loaded, or it has no pooled output.
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
    model_folder, tokenizer_folder = ("text_encoder", "tokenizer") if pipeline else ("", "")
    options = hub_options(source)
    try:
        logging.set_verbosity_error()  # missing weights are checked below
        logging.disable_progress_bar()
        options["trust_remote_code"] = False  # transformers would ask on the console whether to run it
        config = AutoConfig.from_pretrained(source, subfolder=model_folder, **options)
        has_projection = "CLIPTextModelWithProjection" in (config.architectures or ())
        # AutoModel would load a CLIP's image tower, too, and leave out a text tower's projection.
        is_clip = has_projection or config.model_type == "clip"
        model_class: Any = CLIPTextModelWithProjection if is_clip else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=tokenizer_folder, **options)
        if is_clip:
            del options["trust_remote_code"]
        model, loading = model_class.from_pretrained(
            source, subfolder=model_folder, output_loading_info=True, **options
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged file
        raise cannot_load(source, "a text encoder", error, options) from error
    check_finite(source, model.state_dict())
    model = model.float().eval().requires_grad_(False).to(device)
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
    """SHA-256 of the names and contents of all files of a text encoder's folder or pipeline."""
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
    """Whether a sentence-transformers folder declares its embedding to be the mean over the tokens."""
    file = folder / "1_Pooling" / "config.json"
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"))
