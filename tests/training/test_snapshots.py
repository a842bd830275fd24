"""Samples during training: the same seeds, classes and captions, whatever the size of a batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lavita.core.config import load_config
from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.training import snapshots
from lavita.training.config import RunConfig


class Pipeline:
    """Makes frames of one value, the number of the video; remembers what it was asked for."""

    def __init__(self) -> None:
        self.transformer = SimpleNamespace(config={"fps": 5.5, "num_frames": 2, "sample_size": 4})
        self.vae = SimpleNamespace(config={})
        self.labels: list[int] = []
        self.embeds: list[torch.Tensor] = []
        self.seeds: list[int] = []

    def __call__(self, *, class_labels: Any, prompt_embeds: Any, num_videos: int, generator: Any, **_: Any) -> Any:
        first = len(self.seeds)
        self.labels += class_labels or []
        self.embeds += [] if prompt_embeds is None else [*prompt_embeds]
        self.seeds += [each.initial_seed() for each in generator]
        assert len(generator) == num_videos == len(class_labels or prompt_embeds)
        values = np.arange(first, first + num_videos, dtype=np.uint8)
        return SimpleNamespace(frames=np.broadcast_to(values[:, None, None, None, None], (num_videos, 2, 8, 8, 3)))


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("condition", ["classes", "captions"])
def test_every_sample_has_its_own_seed_and_condition(
    condition: str, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, tuple[int, float]] = {}
    monkeypatch.setattr(
        snapshots,
        "write_video",
        lambda path, frames, fps: written.update({path.relative_to(tmp_path).as_posix(): (frames[0, 0, 0, 0], fps)}),
    )
    monkeypatch.setattr(snapshots, "downsampling", lambda vae: 2)
    table = torch.arange(7.0)[:, None].repeat(1, 3)
    batches: Any = SimpleNamespace(
        class_names=("a", "b", "c") if condition == "classes" else (),
        example_embeds=lambda count: table[:count] if condition == "captions" else None,
    )
    settings = load_config(RunConfig, {}, ["train.num_samples=7", f"train.batch_size={batch_size}"]).train
    pipeline: Any = Pipeline()
    sheet = snapshots.write_samples(tmp_path, pipeline, batches, settings, 12, Processes())
    assert pipeline.seeds == [generator(number, "sample").initial_seed() for number in range(7)]
    assert pipeline.labels == ([0, 1, 2, 0, 1, 2, 0] if condition == "classes" else [])
    assert [float(embed[0]) for embed in pipeline.embeds] == (list(range(7)) if condition == "captions" else [])
    assert written == {f"step-00000012/{number}.mp4": (number, 5.5) for number in range(7)}
    assert sheet == tmp_path / "step-00000012.png" and sheet.exists()
