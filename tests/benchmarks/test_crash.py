"""The short form of `benchmarks/crash.py`: some kills, and an end that is equal to the bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_data import write_videos

from lavita.models.autoencoder import AutoencoderKL

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "robustness" / "crash.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crash"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_runs_end_as_quiet_ones(
    tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = _load()
    tiny_vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    videos = write_videos(tmp_path / "videos")
    hits = crash.crash(videos, tmp_path, 4, 30, 0, str(tmp_path / "vae"), 16)
    assert sum(hits.values()) >= 3
    assert crash.differences(tmp_path / "quiet", tmp_path / "crashed") == []
    weights = next((tmp_path / "crashed" / "run" / "pipeline").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert len(crash.differences(tmp_path / "quiet", tmp_path / "crashed")) == 1, "what differs is found"
