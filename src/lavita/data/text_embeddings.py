"""Text embeddings that are computed once and stored: if they are there, the encoder is not even loaded."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lavita.core.files import replacing
from lavita.core.processes import Processes
from lavita.models.text_encoder import DEFAULT_TEXT_ENCODER, folder_digest, load_text_encoder


def embed_texts(
    texts: Sequence[str],
    source: str | None,
    folder: Path,
    device: torch.device | str = "cpu",
    team: Processes | None = None,
) -> torch.Tensor:
    """Reads the embeddings of texts from `texts-<key>.safetensors` in a folder, and writes that file if it is missing.

    The key is a digest of the encoder (its files, or its weights if it comes from the hub) and of the texts in order.

    Args:
        texts: the texts.
        source: the encoder, see `load_text_encoder`.
        folder: folder of the file; created if missing.
        device: device of the encoder.
        team: processes that all need the embeddings; the first one computes them.

    Returns:
        float32 (texts, text_dim) on the CPU.

    Raises:
        ValueError: if the encoder cannot be loaded.
    """
    team = team or Processes()
    table: torch.Tensor = team.first_says(_embed(texts, source, folder, device) if team.is_first else None)
    return table


def texts_folder(latent_cache: Path | None, run_dir: Path) -> Path:
    """Folder of the text embeddings of a run: its latent cache, so that other runs can use them, or else its own."""
    return latent_cache if latent_cache is not None and os.access(latent_cache, os.W_OK) else run_dir


def _embed(texts: Sequence[str], source: str | None, folder: Path, device: torch.device | str) -> torch.Tensor:
    source = source or DEFAULT_TEXT_ENCODER
    encoder = None
    if Path(source).is_dir():
        identity = folder_digest(Path(source))
    else:
        encoder = load_text_encoder(source, device)
        identity = encoder.digest()
    key = hashlib.sha256(json.dumps([identity, list(texts)]).encode()).hexdigest()[:24]
    file = folder / f"texts-{key}.safetensors"
    if file.exists():
        try:
            with safe_open(file, framework="pt") as stored:
                table: torch.Tensor = stored.get_tensor("embeddings")
            if len(table) == len(texts):
                return table
        except (SafetensorError, OSError):
            pass
        print(f"{file}: damaged, is written again", file=sys.stderr)
    table = (encoder or load_text_encoder(source, device))(texts).cpu().contiguous()
    with replacing(file, durable=True) as partial:
        save_file({"embeddings": table}, partial)
    return table
