"""Pooled embeddings of captions (Sec. 4.4) and the states of their tokens, by a text encoder of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavita.core.progress import say
from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, hub_options

DEFAULT_TEXT_ENCODER = "CompVis/stable-diffusion-v1-4"
BATCH_SIZE = 64
ENCODERS_WITH_DECODERS = ("t5", "mt5", "umt5")
"""Types of models whose decoder is left out, and whose pooled embedding is the mean over the tokens."""
MOST_TOKENS = 4096
"""Most tokens of a text for encoders that have no limit themselves."""


@dataclass
class TextEncoder:
    """A frozen text encoder with its tokenizer; call it with texts."""

    source: str
    """Path or hub id that it was loaded from."""
    tokenizer: Any
    model: Any
    mean_pooling: bool
    """Whether to average over the tokens, as sentence-transformers may ask for, rather than use the pooled output."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings of B texts, float32 (B, text_dim); texts of more than `max_length` tokens are truncated."""
        return torch.cat([pooled for pooled, _, _ in self._batches(texts, padding=True, max_length=self.max_length)])

    def encode(self, texts: Sequence[str], num_tokens: int | None = None) -> torch.Tensor:
        """Encodes B texts for a model with the field `text_tokens`.

        Args:
            texts: the texts; those of more than `num_tokens` tokens are cut to as many, with their special ones.
            num_tokens: L, the model's `text_tokens`; None for pooled embeddings alone.

        Returns:
            Float32 (B, text_dim), or (B, 1 + L, text_dim): the pooled embedding, then the last states of the tokens,
            then zeros. These are rounded to float16, as stored ones are. Every text is padded to L tokens, so that its
            states do not depend on the texts beside it.

        Raises:
            ValueError: if the encoder takes fewer than L tokens, its tokens have another width than its pooled output,
                or values are beyond float16.
        """
        if num_tokens is None:
            return self(texts)
        if num_tokens > self.max_length:
            raise ValueError(f"text_tokens is {num_tokens}, but {self.source} takes at most {self.max_length}")
        long = sum(len(ids) > num_tokens for ids in self.tokenizer(list(texts), verbose=False)["input_ids"])
        if long:
            say(f"{long:,} of {len(texts):,} texts have more than {num_tokens} tokens and are cut (model.text_tokens)")
        parts = []
        for pooled, states, mask in self._batches(texts, padding="max_length", max_length=num_tokens):
            if pooled.shape[-1] != states.shape[-1]:
                widths = f"{states.shape[-1]} numbers, but its pooled output {pooled.shape[-1]}"
                raise ValueError(f"{self.source}: its tokens have {widths}; model.text_tokens needs them to be equal")
            parts.append(torch.cat([pooled[:, None], states.masked_fill(~mask[..., None], 0.0)], dim=1).half())
        packed = torch.cat(parts).float()
        if not torch.isfinite(packed).all():
            raise ValueError(f"{self.source}: has states beyond the range of float16")
        return packed

    @torch.no_grad()
    def _batches(
        self, texts: Sequence[str], padding: bool | str, max_length: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Pooled embeddings (b, text_dim), last states (b, L, D) and the mask of the tokens (b, L) of some texts."""
        for first in range(0, len(texts), BATCH_SIZE):
            tokens = self.tokenizer(
                list(texts[first : first + BATCH_SIZE]),
                padding=padding,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model(**{key: tokens[key] for key in ("input_ids", "attention_mask")})
            if self.mean_pooling:
                mask = tokens["attention_mask"][..., None].float()
                pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            else:
                pooled = getattr(output, "text_embeds", None)
                pooled = output.pooler_output if pooled is None else pooled
            yield pooled.float(), output.last_hidden_state.float(), tokens["attention_mask"].bool()

    @property
    def max_length(self) -> int:
        """Maximum number of tokens per text; an encoder with relative positions, as T5, has only its tokenizer's."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return int(min(self.tokenizer.model_max_length, positions or MOST_TOKENS))

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
        source: path or hub id of a text model with its tokenizer, or of a diffusers pipeline that contains one; of a
            T5, the encoder; by default Stable Diffusion 1.4, whose CLIP the paper uses. Code in it is not run.
        device: device to load it to.

    Raises:
        ValueError: if transformers is not installed, the source cannot be loaded, or it has no pooled output.
    """
    source = source or DEFAULT_TEXT_ENCODER
    try:
        from transformers import (
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
            CLIPTextModelWithProjection,
        )
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
        is_t5 = config.model_type in ENCODERS_WITH_DECODERS
        model_class: Any = AutoModelForTextEncoding if is_t5 else AutoModel
        if is_clip:
            model_class = CLIPTextModelWithProjection
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
    encoder = TextEncoder(source, tokenizer, model, is_t5 or _asks_for_mean_pooling(folder))
    if missing := [key for key in loading["missing_keys"] if not (encoder.mean_pooling and "pooler" in key)]:
        raise ValueError(f"{source}: its weights lack {sorted(missing)[0]}")
    with torch.no_grad():
        output = model(input_ids=tokenizer("a", return_tensors="pt")["input_ids"].to(device))
    pooled = getattr(output, "text_embeds", None)
    if not encoder.mean_pooling and pooled is None and getattr(output, "pooler_output", None) is None:
        raise ValueError(
            f"{source}: {type(model).__name__} has no pooled output; use a CLIP, BERT, T5 or sentence encoder"
        )
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
