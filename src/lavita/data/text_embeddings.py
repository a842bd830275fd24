"""Text embeddings, computed once and kept: the encoder is not even loaded where they are at hand."""

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

from lavita.core.processes import Processes
from lavita.models.text_encoder import DEFAULT_TEXT_ENCODER, folder_digest, load_text_encoder


def embed_texts(
    texts: Sequence[str],
    source: str | None,
    folder: Path,
    device: torch.device | str = "cpu",
    team: Processes | None = None,
) -> torch.Tensor:
    """Embeddings of texts, from `texts-<key>.safetensors` in a folder, which is written where it is missing.

    The key is of the encoder's files, or of the weights of one from the hub, and of the texts and their order.

    Args:
        texts: what to embed.
        source: of the encoder, see `load_text_encoder`.
        folder: where the file is; made if missing.
        device: where the encoder runs.
        team: processes that all need the embeddings; the first computes them.

    Returns:
        float32 (texts, text_dim) on the CPU.

    Raises:
        ValueError: where the encoder cannot be loaded.
    """
    team = team or Processes()
    table: torch.Tensor = team.first_says(_embed(texts, source, folder, device) if team.is_first else None)
    return table


def texts_folder(latent_cache: Path | None, run_dir: Path) -> Path:
    """Where a run keeps its text embeddings: with the latents, for other runs to use, or else with the run."""
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
        print(f"{file}: damaged: made again", file=sys.stderr)
    table = (encoder or load_text_encoder(source, device))(texts).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    # Runs that share the folder may write the same file at the same time.
    partial = file.with_suffix(f".partial-{os.getpid()}")
    save_file({"embeddings": table}, partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)
    return table
