"""Long videos in windows: how they are divided, what a window is given, and what a stopped command goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, Run

from lavita.core.seeds import generator
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.given_frames import KINDS
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.sampling.roll_out import Windows, roll_out
from lavita.video.reading import probe, read_clip

WINDOW = 4
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "precision": "fp32"}


@pytest.fixture
def pipeline(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> LavitaPipeline:
    return make_pipeline(make_transformer(num_frames=WINDOW, given_frames=list(KINDS), fps=4.0), tiny_vae)


def noise(seed: int) -> Any:
    return lambda window: [generator(seed, "sample", *([window] if window else []))]


def rolled(pipeline: LavitaPipeline, windows: Windows, seed: int = 1, **options: Any) -> list[torch.Tensor]:
    return list(roll_out(pipeline, windows, noise(seed), **OPTIONS, **options))


@pytest.mark.parametrize(
    ("length", "overlap", "pieces"),
    [(4, 2, [4]), (3, 1, [3]), (5, 2, [4, 1]), (6, 2, [4, 2]), (8, 2, [4, 2, 2]), (9, 3, [4, 1, 1, 1, 1, 1])],
)
def test_windows_add_up_to_the_length(length: int, overlap: int, pieces: list[int], pipeline: LavitaPipeline) -> None:
    windows = Windows(length, WINDOW, overlap)
    assert windows.count == len(pieces)
    assert [latents.shape[1] for latents in rolled(pipeline, windows)] == pieces


def test_a_window_goes_on_from_the_latents_of_the_one_before(pipeline: LavitaPipeline) -> None:
    seen: list[torch.Tensor] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda network, args, kwargs: seen.append(kwargs["given"].clone()) if "given" in kwargs else None,
        with_kwargs=True,
    )
    first, second, third = rolled(pipeline, Windows(8, WINDOW, 2))
    handle.remove()
    assert torch.cat(seen).tolist() == [[True, True, False, False]] * 4, "two steps of two windows"

    def sampled(window: int, **given: Any) -> torch.Tensor:
        latents = pipeline(generator=noise(1)(window), output_type="latent", **given, **OPTIONS).frames
        assert isinstance(latents, torch.Tensor)
        return latents

    assert torch.equal(first, sampled(0)), "the first window is the video without roll-out"
    assert torch.equal(second, sampled(1, given_latents=first[:, 2:])[:, 2:])
    assert torch.equal(third, sampled(2, given_latents=second)[:, 2:])
    assert not torch.equal(second, third)


def test_a_stopped_roll_out_goes_on(pipeline: LavitaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(10, WINDOW, 2)
    whole = rolled(pipeline, windows)
    parts = roll_out(pipeline, windows, noise(1), tmp_path / "journal", **OPTIONS)
    next(parts), next(parts)
    parts.close()
    (tmp_path / "journal" / "window-00001.safetensors").write_bytes(b"cut off")
    calls: list[int] = []
    real = LavitaPipeline.__call__

    def count(self: LavitaPipeline, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(LavitaPipeline, "__call__", count)
    again = list(roll_out(pipeline, windows, noise(1), tmp_path / "journal", **OPTIONS))
    assert len(calls) == windows.count - 1, "the window that was whole is not made again"
    assert all(torch.equal(one, two) for one, two in zip(whole, again, strict=True))


def test_windows_that_do_not_fit_are_refused(
    pipeline: LavitaPipeline, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    for overlap in (0, 4):
        with pytest.raises(ValueError, match=f"overlap is {overlap}, but must be in 1..3: a window has 4 frames"):
            Windows(8, WINDOW, overlap)
    with pytest.raises(ValueError, match=r"length is 0, but must be in 1\.\.1048576"):
        Windows(0, WINDOW, 1)
    first = make_pipeline(make_transformer(num_frames=WINDOW, given_frames=["first"]), tiny_vae)
    with pytest.raises(ValueError, match="frames 0, 1 of 4 are given, but this model was trained with"):
        rolled(first, Windows(8, WINDOW, 2))
    assert len(rolled(first, Windows(5, WINDOW, 1))) == 2
    with pytest.raises(
        ValueError, match=r"given_latents have shape \(1, 5, 4, 8, 8\), but must have 1 videos and 1 to 4"
    ):
        pipeline(given_latents=torch.zeros(1, 5, 4, 8, 8), **OPTIONS)


@pytest.fixture
def model(pipeline: LavitaPipeline, tmp_path: Path) -> Path:
    save_pipeline(pipeline, tmp_path / "model")
    return tmp_path / "model"


def test_long_videos_by_the_command(model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sample", model, "--steps", 2, "--seeds", "0-2", "--batch-size", 2, "--format", "mkv", "--overlap", 2]
    code, out, errors = run(*command, "--out", "whole", "--length", 9)
    assert code == 0 and out.strip() == "whole: 3 videos", errors
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.mkv")}
    assert len(whole) == 3 and probe(tmp_path / "whole" / "0.mkv").num_frames == 9
    assert not (tmp_path / "whole" / ".windows").exists()
    assert run(*command[:-2], "--out", "short")[0] == 0
    start = read_clip(tmp_path / "short" / "0.mkv", 0, WINDOW)
    assert np.array_equal(read_clip(tmp_path / "whole" / "0.mkv", 0, WINDOW), start)

    made = LavitaPipeline.__call__
    calls: list[int] = []

    def stops(self: LavitaPipeline, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return made(self, *args, **options)

    monkeypatch.setattr(LavitaPipeline, "__call__", stops)
    assert run(*command, "--out", "parts", "--length", 9)[0] != 0
    assert {path.name for path in (tmp_path / "parts").glob("*.mkv")} == {"0.mkv", "1.mkv"}
    code, _, errors = run(*command, "--out", "parts", "--length", 9)
    assert code == 0, errors
    assert len(calls) == 6 + 3, "the second batch goes on after its first window, which was finished"
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.mkv")} == whole
    code, _, errors = run(*command, "--out", "parts", "--length", 10)
    assert code == 2 and "holds videos made with num_frames=9, not 10" in errors


def test_seconds_are_frames(model: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("sample", model, "--out", "out", "--steps", 1, "--seeds", 0, "--seconds", 1.6, "--overlap", 1)
    assert code == 0, errors
    assert probe(tmp_path / "out" / "0.mp4").num_frames == 6  # 1.6 s at 4 frames per second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--length", "8", "--seconds", "2"), "length is 8 and seconds 2; give one of them"),
        (("--overlap", "2"), "overlap is 2, but has no effect without --length or --seconds"),
        (("--length", "8", "--num-frames", "4"), "num_frames is 4, but the length of the videos is given, too"),
        (("--length", "8", "--images"), "length has no effect on images"),
        (("--seconds", "0"), "seconds is 0, but must be above 0"),
        (("--seconds", "1e9"), "seconds is 1e+09, but must be above 0 and give at most 1048576 frames"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str, model: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("sample", model, "--out", "out", "--steps", 1, "--seeds", 0, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors
