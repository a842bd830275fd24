"""The short form of the crash benchmark: a few kills, and an end that is equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_data import write_videos

from benchmarks.robustness.crash import crash, differences
from lavita.models.autoencoder import AutoencoderKL


@pytest.mark.slow
def test_killed_runs_end_like_quiet_ones(
    tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    videos = write_videos(tmp_path / "videos")
    hits = crash(videos, tmp_path, 3, 16, 0, str(tmp_path / "vae"), 16)  # encoding, in a step, in a checkpoint
    assert sum(hits.values()) >= 2
    assert differences(tmp_path / "quiet", tmp_path / "crashed") == []
    weights = next((tmp_path / "crashed" / "run" / "pipeline").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert len(differences(tmp_path / "quiet", tmp_path / "crashed")) == 1, "a difference is found"
