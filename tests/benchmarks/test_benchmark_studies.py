"""The studies of the evaluation in their shortest form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MakeTransformer
from tiny_data import write_videos

from benchmarks.evaluation import autoencoder_losses, continuation, coverage, drift, monotone, recipes
from benchmarks.speed import startup
from lavita.evaluation.distances.frechet import frechet_distance
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.recipes import Recipe
from lavita.training.autoencoder import discriminator
from lavita.video.writing import write_video


def test_the_exact_distance_of_the_gaussians() -> None:
    draw, truth = coverage.make_draw(4, 20_000, 1, alike=False)
    assert frechet_distance(*draw(np.random.default_rng(0))) == pytest.approx(truth, rel=0.05)
    assert coverage.make_draw(4, 10, 1, alike=True)[1] == 0.0
    assert coverage.covered([(0.0, 1.0), (2.0, 3.0)], 0.5) == "50.0%"


def test_coverage_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "CASES", ((4, 24, 1), (4, 12, 2), (64, 256, 1)))
    coverage.study_coverage(2, 4, tmp_path / "coverage.md")
    text = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    assert text.startswith("2 repeats per line.") and capsys.readouterr().out.strip() in text
    lines = text.strip().splitlines()[2:]
    assert len(lines) == 2 + 2 * 2, "the case of 64 features is left out"
    assert {line.count("|") for line in lines} == {len(coverage.HEADINGS) + 1}


def test_the_verdict_on_a_score() -> None:
    assert monotone.verdict([1, 2, 3, 4, 5], 1, 4) == "worsens"
    assert monotone.verdict([5, 4, 3, 2, 1], -1, 4) == "worsens"
    assert monotone.verdict([1, 3, 2, 4, 5], 1, 4) == "worsens in all"
    assert monotone.verdict([5, 4, 3, 2, 1], 1, 4) == "improves"
    assert monotone.verdict([1, 1.01, 1, 1, 1.01], 1, 4) == "blind"


def test_orders_of_degraded_frames() -> None:
    rng = np.random.default_rng(0)
    assert monotone.shuffled(0.0, rng).tolist() == monotone.frozen(0.0, rng).tolist() == list(range(16))
    half = monotone.shuffled(0.5, rng)
    assert sorted(half.tolist()) == list(range(16)) and (half != np.arange(16)).sum() <= 8
    assert monotone.frozen(0.5, rng).tolist() == [*range(8), *[8] * 8]
    assert set(monotone.frozen(1.0, rng).tolist()) == {0}


def test_the_spread_of_a_class_is_its_variance_relative_to_real_clips(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, scale in (("a", 0.5), ("b", 1.0)):
        mean = random.integers(100, 150, (4, 16, 16, 3))
        for number in range(40):
            for folder, deviation in (("real", 20), ("generated", 20 * scale)):
                clip = random.normal(mean, deviation).clip(0, 255).round().astype(np.uint8)
                write_video(tmp_path / folder / name / f"{number}.mkv", clip, 10)
    assert recipes.class_spread(tmp_path / "generated", tmp_path / "real") == pytest.approx((0.25 + 1) / 2, rel=0.03)


def test_recipes_are_timed_in_turn(
    pipeline: LavitaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(recipes, "GRID", {"slow": Recipe(steps=4), "taylor": Recipe(steps=4, cache="taylorseer")})
    neighbours = {"precision": 0.5, "recall": 0.125, "density": 1.0, "coverage": 0.75}
    scores = {"kernel-video": {"value": 1.0, "interval_95": [0.5, 2.0]}, "prdc": neighbours}
    report = {"scores": scores, "exact": 0.25, "spread": 0.9}
    (tmp_path / "slow.json").write_text(json.dumps(report), encoding="utf-8")
    recipes.compare_recipes(tmp_path, str(tmp_path / "pipeline"), rounds=2, quality=False)
    seconds = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))
    assert list(seconds) == ["slow", "taylor"] and all(len(values) == 2 for values in seconds.values())
    lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert lines[0] == "| recipe | steps | time | exact | kernel-video | recall | coverage | spread |"
    assert lines[2] == "| slow | 4 | 1.0000 | 0.250 | 1 (0.5 to 2) | 0.12 | 0.75 | 0.90 |"
    assert lines[3].startswith("| taylor | 4 | ") and lines[3].endswith(" |  |  |  |  |  |")


def test_only_recipes_that_fit_a_model_are_compared(make_transformer: MakeTransformer, tmp_path: Path) -> None:
    diffusion, flow = make_transformer(), make_transformer(prediction_type="flow", learn_sigma=False)
    for name, model in (("diffusion", diffusion), ("flow", flow)):
        model.save_pretrained(tmp_path / name)
    assert recipes.fitting(str(tmp_path / "diffusion")) == list(recipes.GRID)
    found = recipes.fitting(str(tmp_path / "flow"))
    assert {"unipc25", "unipc25-quadratic", "sde8-quadratic-interval"} <= set(found)
    assert not {"ddpm250", "ddim25", "unipc25-karras"} & set(found)


def test_arms_add_one_term_after_another() -> None:
    settings = {
        "steps": 9,
        "edge_weight": 0.7,
        "perceptual_weight": 0.2,
        "adversarial_weight": 1,
        "adversarial_start": 3,
    }
    arms = [autoencoder_losses.arm_settings(settings, arm) for arm in autoencoder_losses.ADDED]
    assert arms == [
        {"steps": 9, "edge_weight": 0, "motion_weight": 0},
        {"steps": 9, "edge_weight": 0.7},
        {"steps": 9, "edge_weight": 0.7, "perceptual_weight": 0.2},
        settings,
    ]


def test_terms_of_an_autoencoders_loss_are_compared_and_a_stopped_study_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(clips: torch.Tensor) -> torch.Tensor:
        """The pixels of the frames, as many as the features are, in place of a network of 128 pixels."""
        return clips.flatten(2).float().repeat(1, 1, 12)[..., :2280] / 255

    monkeypatch.setattr(autoencoder_losses, "load_network", lambda spec, device: SimpleNamespace(run=run))
    monkeypatch.setattr(discriminator, "WIDTHS", (8, 16, 16, 32))
    write_videos(tmp_path / "videos", [f"{number}.mp4" for number in range(4)], num_frames=16)
    overrides = [
        "steps=1",
        "resolution=8",
        "batch_size=2",
        "architecture=kl",
        "block_out_channels=[4,8]",
        "downsampling=2",
        "device=cpu",
    ]
    folders = [tmp_path / "videos"], [tmp_path / "videos"], tmp_path / "out", [8], overrides
    autoencoder_losses.compare_losses(*folders)
    found = json.loads((tmp_path / "out" / "losses.json").read_text(encoding="utf-8"))
    assert [row["arm"] for row in found["rows"]] == ["L1", "+ edges and motion", "+ perceptual", "+ adversarial"]
    assert all(row["frechet"] > 0 and row["floor"] > 0 and row["feature_distance"] > 0 for row in found["rows"])
    assert found["rows"][0]["psnr"] > 0 and found["rows"][0]["frames"] == 64
    metrics = [json.loads(line) for n in range(4) for line in (tmp_path / f"out/{n}/metrics.jsonl").open()]
    assert [{"perceptual", "adversarial"} & set(line) for line in metrics] == [
        set(),
        set(),
        {"perceptual"},
        {"perceptual", "adversarial"},
    ]
    text = (tmp_path / "out" / "losses.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith(text + "\n") and text.count("\n") == 6

    weights = (tmp_path / "out/3/autoencoder/diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out/3/autoencoder")
    autoencoder_losses.compare_losses(*folders)
    again = json.loads((tmp_path / "out" / "losses.json").read_text(encoding="utf-8"))
    assert [row | {"seconds": None} for row in found["rows"]] == again["rows"]
    assert (tmp_path / "out/3/autoencoder/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_times_of_help_and_of_loading(
    pipeline: LavitaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "COMMANDS", ("",))
    rows = startup.help_times(1)
    assert [row["command"] for row in rows] == ["lavita --help", "python -c pass"]
    assert rows[0]["processor_s"] > rows[1]["processor_s"]
    pipeline.save_pretrained(tmp_path)
    loaded = startup.measure_load("pipeline", str(tmp_path))
    assert loaded["seconds"] > 0 and set(loaded) == {"seconds", "peak_over_weights", "after_over_weights"}


def test_drift_is_seen_where_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long videos that are the real ones first and their negatives from then on: only the second stretch is far off."""

    class Known:
        def recognise(self, frames: npt.NDArray[np.uint8]) -> str:
            return "a" if frames[..., 0].mean() > frames[..., 2].mean() else "b"

    monkeypatch.setattr(drift, "cached_classifier", lambda *_: Known())
    random = np.random.default_rng(0)
    for name in "ab":
        for number in range(4):
            video = random.integers(0, 100, (16, 32, 32, 3), dtype=np.uint8)
            video[..., 0 if name == "a" else 2] += np.uint8(100)
            write_video(tmp_path / "real" / name / f"{number}.mkv", video, 8)
            write_video(tmp_path / "made" / name / f"{number}.mkv", np.concatenate([video[:8], 255 - video[8:]]), 8)
    drift.study_drift(tmp_path / "real", [tmp_path / "made"], 8, 8, 32, None, tmp_path / "rows.json")
    assert "frames" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "rows.json").read_text())[str(tmp_path / "made")]
    assert (first["start"], second["start"]) == (0, 8)
    assert (first["right_class"], second["right_class"]) == (1.0, 0.0)
    assert second["distance_interval"][0] > first["distance_interval"][1]
    assert first["motion"] == pytest.approx(1, abs=0.05)
    write_video(tmp_path / "made" / "no_class.mkv", video, 8)
    with pytest.raises(ValueError, match="holds videos without a class"):
        drift.study_drift(tmp_path / "real", [tmp_path / "made"], 8, 8, 32, None, None)


def test_continuations_are_compared_with_what_came_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ramp in time: the extrapolation is exact, and the repeated frame is wrong by as many steps as it is old."""
    steps = 5.0 * np.arange(6)[:, None, None, None]
    for name, start in (("a/one", 40), ("b/two", 90)):
        true = (start + np.broadcast_to(steps, (6, 16, 16, 3))).astype(np.uint8)
        write_video(tmp_path / "real" / f"{name}.mkv", true, 8)
        for seed, error in ((0, 10), (1, 2)):
            made = true.copy()
            made[2:] += np.uint8(error)
            write_video(tmp_path / "made" / f"{name}.mkv-{seed}.mkv", made, 8)
    clips = continuation.find_clips(tmp_path / "real", tmp_path / "made", 1)
    assert {name: len(made) for name, (_, made) in clips.items()} == {"a/one.mkv": 2, "b/two.mkv": 2}
    rows = continuation.compare(clips, 2)
    psnr = {name: row["all"][0] for name, row in rows.items()}
    expected: dict[str, float] = {
        "model, mean over the seeds": (10**2 + 2**2) / 2,
        "model, best seed": 2**2,
        "last given frame, repeated": 25 * (1 + 4 + 9 + 16) / 4,
    }
    for name, squared in expected.items():
        assert psnr[name] == pytest.approx(10 * np.log10(255**2 / squared))
        assert rows[name]["all"][1] == pytest.approx(psnr[name]), "no spread between equal videos"
    assert rows["last given frame, repeated"]["at"][0] == pytest.approx(10 * np.log10(255**2 / 25))
    continuation.study_continuation(tmp_path / "real", tmp_path / "made", 2, tmp_path / "rows.json")
    assert "PSNR in dB of 2 videos" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no continuation of a video in"):
        continuation.study_continuation(tmp_path / "made", tmp_path / "real", 2, None)
