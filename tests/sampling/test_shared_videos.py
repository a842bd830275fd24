"""Processes that share videos sample those of one process, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, SavePipeline, make_tiny_vae, random_transformer
from models.passes import process_group
from torch.multiprocessing.spawn import spawn

from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.models import sequence_parallel
from lavita.models.sequence_parallel import SequenceGroup, open_group
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import make_pipeline
from lavita.sampling.recipes import RECIPES
from lavita.video.reading import read_clip

FRAMES = 5  # which two processes do not divide
SETTINGS: dict[str, Any] = {"seeds": "0-2", "batch_size": 2, "suffix": ".mkv", "device": "cpu"}
RECIPE = RECIPES["default"].changed(steps=4)


def calm_transformer(variant: int) -> LavitaTransformer3DModel:
    """A model with small weights that predicts velocities, so that the latents stay in the range of real ones."""
    model = random_transformer(
        num_frames=FRAMES, variant=variant, num_classes=3, num_blocks=4, prediction_type="v_prediction"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def sample_both(model: LavitaTransformer3DModel, group: SequenceGroup | None, **options: Any) -> list[torch.Tensor]:
    """Latents from one process, and from the group."""
    pipeline, found = make_pipeline(model, make_tiny_vae()), []
    pipeline.set_progress_bar_config(disable=True)
    for chosen in (None, group):
        model.sequence_group = chosen
        random = [generator(seed, "sample") for seed in range(2)]
        output = pipeline(
            [0, 1], num_inference_steps=8, generator=random, output_type="latent", precision="fp32", **options
        )
        found.append(torch.as_tensor(output.frames))
    return found


def compare_in_process(rank: int, folder: str, saved: str) -> None:
    with process_group(rank, f"{folder}/meeting", 4):
        team = Processes(rank, 4).grouped(2)
        written = generate(saved, Path(folder, "shared"), recipe=RECIPE, team=team, **SETTINGS)
        assert len(written) == 9 and all(path.exists() for path in written)
        sent: list[int] = []
        send = sequence_parallel.exchange

        def counting(parts: torch.Tensor, group: str) -> torch.Tensor:
            sent.append(len(parts))
            received: torch.Tensor = send(parts, group)
            return received

        sequence_parallel.exchange = counting  # type: ignore[assignment]
        group = open_group(team, torch.device("cpu"))
        for variant in (1, 3, 4):
            for options in ({}, {"cache": "pab"}, {"cache": "fastercache"}, {"cache": "taylorseer"}):
                sent.clear()
                alone, shared = sample_both(calm_transformer(variant), group, guidance_scale=1.5, **options)
                assert sent and set(sent) == {2}, "the processes work together"
                assert 1 < alone.abs().max() < 20
                torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4, msg=f"{variant} {options}")


@pytest.mark.slow
def test_two_groups_of_two_processes_sample_the_videos_of_one_process(
    tmp_path: Path, save_pipeline: SavePipeline
) -> None:
    saved = save_pipeline(calm_transformer(2))
    expected = generate(saved, tmp_path / "alone", recipe=RECIPE, **SETTINGS)
    spawn(compare_in_process, (str(tmp_path), saved), nprocs=4)
    for path in expected:
        shared = tmp_path / "shared" / path.relative_to(tmp_path / "alone")
        found, wanted = (read_clip(file, 0, FRAMES, 1).astype(int) for file in (shared, path))
        assert np.abs(found - wanted).max() <= 1, "the latents differ by rounding"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "sequence_parallel is 2, but must divide the processes (1); start several with torchrun"),
        (("--sequence-parallel", "0"), "--sequence-parallel"),
    ],
)
def test_groups_need_processes(run: Run, options: tuple[str, ...], message: str) -> None:
    code, _, stderr = run("sample", "--out", "videos", *(options or ("--sequence-parallel", "2")))
    assert code == 2
    assert message in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": True}, "has no effect on images"),
        ({"length": 64}, "has no effect on videos with a length"),
        ({"seconds": 8.0}, "has no effect on videos with a length"),
    ],
)
def test_what_fits_into_one_device_is_not_shared(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sequence_parallel is 2, but {message}"):
        generate("builtin", tmp_path, team=Processes(0, 2).grouped(2), **options)
