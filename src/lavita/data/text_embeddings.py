"""Text embeddings that are computed once and stored: if they are there, the encoder is not even loaded."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lavita.core.files import replacing
from lavita.core.processes import Processes
from lavita.models.text_encoder import DEFAULT_TEXT_ENCODER, folder_digest, load_text_encoder


@overload
def embed_texts(
    texts: Sequence[str],
    source: str | None,
    folder: Path,
    device: torch.device | str = "cpu",
    team: Processes | None = None,
) -> torch.Tensor: ...


@overload
def embed_texts(
    texts: Sequence[str],
    source: str | None,
    folder: Path,
    device: torch.device | str = "cpu",
    team: Processes | None = None,
    num_tokens: int | None = None,
) -> TextTable: ...


def embed_texts(
    texts: Sequence[str],
    source: str | None,
    folder: Path,
    device: torch.device | str = "cpu",
    team: Processes | None = None,
    num_tokens: int | None = None,
) -> TextTable:
    """Reads the embeddings of texts from `texts-<key>.safetensors` in a folder, and writes that file if it is missing.

    The key is a digest of the encoder (its files, or its weights if it comes from the hub), of the texts in order, and
    of the number of tokens.

    Args:
        texts: the texts.
        source: the encoder, see `load_text_encoder`.
        folder: folder of the file; created if missing.
        device: device of the encoder.
        team: processes that all need the embeddings; the first one computes them.
        num_tokens: L, the model's `text_tokens`; None for pooled embeddings alone.

    Returns:
        float32 (texts, text_dim), or with `num_tokens` what stands for (texts, 1 + L, text_dim), on the CPU.

    Raises:
        ValueError: if the encoder cannot be loaded, or has no such tokens (see `TextEncoder.encode`).
    """
    team = team or Processes()
    table: TextTable = team.first_says(_embed(texts, source, folder, device, num_tokens) if team.is_first else None)
    return table


@dataclass(frozen=True)
class TokenTable:
    """Texts with their tokens, kept in float16 without padding; indexed like the tensor that it stands for."""

    rows: torch.Tensor
    """float16 (rows, text_dim): of each text its pooled embedding, then the states of its tokens."""
    counts: torch.Tensor
    """int64 (texts,): rows of each text, in 2..1 + L."""
    num_tokens: int
    """L."""

    @classmethod
    def pack(cls, texts: torch.Tensor) -> TokenTable:
        """Packs texts (texts, 1 + L, text_dim) whose padding is zero, as `TextEncoder.encode` returns them."""
        seen = (texts != 0).any(-1)
        seen[:, 0] = True
        return cls(texts[seen].half(), seen.sum(1), texts.shape[1] - 1)

    @property
    def shape(self) -> torch.Size:
        """(texts, 1 + L, text_dim)."""
        return torch.Size((len(self.counts), 1 + self.num_tokens, self.rows.shape[1]))

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.counts)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """The texts with some indices, int64 (...): float32 (..., 1 + L, text_dim), padded with zeros."""
        ends = self.counts.cumsum(0)
        texts = [self.rows[ends[index] - self.counts[index] : ends[index]].float() for index in indices.flatten()]
        padded = [F.pad(text, (0, 0, 0, 1 + self.num_tokens - len(text))) for text in texts]
        return torch.stack(padded).unflatten(0, indices.shape)

    def cpu(self) -> TokenTable:
        """The table itself, which is on the CPU."""
        return self


TextTable = torch.Tensor | TokenTable


def texts_folder(latent_cache: Path | None, run_dir: Path) -> Path:
    """Folder of the text embeddings of a run: its latent cache, so that other runs can use them, or else its own."""
    return latent_cache if latent_cache is not None and os.access(latent_cache, os.W_OK) else run_dir


def _embed(
    texts: Sequence[str], source: str | None, folder: Path, device: torch.device | str, num_tokens: int | None
) -> TextTable:
    source = source or DEFAULT_TEXT_ENCODER
    encoder = None
    if Path(source).is_dir():
        identity = folder_digest(Path(source))
    else:
        encoder = load_text_encoder(source, device)
        identity = encoder.digest()
    facts = [identity, list(texts)] if num_tokens is None else [identity, list(texts), num_tokens]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    file = folder / f"texts-{key}.safetensors"
    if file.exists():
        try:
            with safe_open(file, framework="pt") as stored:
                found: torch.Tensor = stored.get_tensor("embeddings")
                counts = None if num_tokens is None else stored.get_tensor("counts")
            if counts is None and len(found) == len(texts):
                return found
            if counts is not None and num_tokens is not None and len(counts) == len(texts):
                return TokenTable(found, counts, num_tokens)
        except (SafetensorError, OSError):
            pass
        print(f"{file}: damaged, is written again", file=sys.stderr)
    embeds = (encoder or load_text_encoder(source, device)).encode(texts, num_tokens).cpu().contiguous()
    table = embeds if num_tokens is None else TokenTable.pack(embeds)
    with replacing(file, durable=True) as partial:
        if isinstance(table, TokenTable):
            save_file({"embeddings": table.rows, "counts": table.counts}, partial)
        else:
            save_file({"embeddings": table}, partial)
    return table
