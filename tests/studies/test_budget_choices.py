"""What a budget chooses: from lengths and rates, from what the machine does, and around what is given."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_vae
from tiny_data import write_videos

from lavita.core.config import ConfigError
from lavita.data.catalog import scan
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.presets import SIZES
from lavita.studies.budget import choose as module
from lavita.studies.budget import sizes, table
from lavita.studies.budget.choose import Choice, choose
from lavita.studies.budget.measure import AutoencoderTrial, StepTrial
from lavita.studies.budget.run import budget_seconds
from lavita.studies.budget.sizes import for_tokens, row_of
from lavita.studies.budget.videos import are_classes, choose_cache, choose_clips, choose_patch, choose_side
from lavita.training.config import RunConfig

# --- from numbers alone


@pytest.mark.parametrize(
    ("lengths", "fps", "given", "expected"),
    [
        ([75] * 10, 25.0, {}, (16, 3)),
        ([200] * 10, 30.0, {}, (16, 3)),
        ([200] * 10, 60.0, {}, (16, 7)),
        ([200] * 10, 10.0, {}, (16, 1)),
        ([40] * 10, 25.0, {}, (16, 2)),
        ([16] * 10, 25.0, {}, (16, 1)),
        ([75] * 9 + [3], 25.0, {}, (16, 3)),
        ([75] * 6 + [3] * 4, 25.0, {}, (16, 1)),
        ([11], 25.0, {}, (11, 1)),
        ([2], 25.0, {}, (2, 1)),
        ([75] * 10, 25.0, {"num_frames": 8}, (8, 3)),
        ([12] * 10, 25.0, {"num_frames": 8}, (8, 1)),
        ([75] * 10, 25.0, {"frame_interval": 4}, (16, 4)),
        ([30] * 10, 25.0, {"frame_interval": 4}, (8, 4)),
        ([12] * 10, 25.0, {"num_frames": 14, "frame_interval": 1}, (14, 1)),
    ],
)
def test_clips_fit_the_videos(lengths: list[int], fps: float, given: dict[str, int], expected: tuple[int, int]) -> None:
    clips = choose_clips(lengths, [fps] * len(lengths), **given)
    assert (clips.num_frames, clips.frame_interval) == expected
    if lengths[-1] == 3:
        assert "of the videos are too short and are left out" in clips.why


def test_videos_of_one_frame_are_refused() -> None:
    with pytest.raises(ConfigError, match="most have 1 frames, and a clip needs at least 2"):
        choose_clips([1, 1], [25.0, 25.0])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4"], True),
        (["x/a/0.mp4", "x/a/1.mp4", "x/b/2.mp4", "x/b/3.mp4"], True),
        (["a/0.mp4", "a/1.mp4", "b/2.mp4", "3.mp4"], False),
        (["train/0.mp4", "train/1.mp4", "heldout/2.mp4", "heldout/3.mp4"], False),
        (["a/0.mp4", "b/1.mp4", "c/2.mp4", "d/3.mp4"], False),
        (["a/0.mp4", "a/1.mp4"], False),
    ],
    ids=["classes", "deeper", "one-outside", "splits", "one-each", "one-folder"],
)
def test_folders_are_classes_if_they_look_like_them(names: list[str], expected: bool) -> None:
    assert are_classes(names) == expected


def test_patch_and_resolution() -> None:
    assert [choose_patch(side, 64) for side in (4, 8, 16, 32, 64)] == [1, 1, 2, 4, 8]
    assert [choose_patch(side, 16) for side in (4, 8, 16, 32, 64)] == [1, 2, 4, 8, 8]
    assert choose_side(videos_side=720, most=64, unit=8) == 64
    assert choose_side(videos_side=100, most=128, unit=8) == 96
    assert choose_side(videos_side=100, most=128, unit=64) == 64
    with pytest.raises(ConfigError, match=r"12 pixels on the shorter side.*multiple of 16"):
        choose_side(videos_side=12, most=64, unit=16)


def test_a_cache_takes_its_share_at_most() -> None:
    lengths = [100] * 400  # 40,000 frames
    everything = choose_cache(lengths, 0.001, 400.0, flip=True, may_drop=True)
    assert (everything.videos, everything.flip, everything.seconds) == (tuple(range(400)), True, 80.0)
    plain = choose_cache(lengths, 0.002, 400.0, flip=True, may_drop=True)
    assert (plain.videos, plain.flip, plain.seconds) == (tuple(range(400)), False, 80.0)
    some = choose_cache(lengths, 0.02, 400.0, flip=True, may_drop=True)
    assert some.videos is not None and len(some.videos) == 50 and not some.flip and some.seconds == 100.0
    assert some.videos[0] == 4 and some.videos[-1] == 396, "spread over the list"
    mirrored = choose_cache(lengths, 0.02, 400.0, flip=True, may_drop=False)
    assert mirrored.videos is not None and len(mirrored.videos) == 25 and mirrored.flip
    assert choose_cache(lengths, 0.2, 400.0, flip=False, may_drop=True).videos is None, "too few for a data set"
    assert choose_cache([90_000], 0.02, 400.0, flip=False, may_drop=True).videos is None
    assert choose_cache([90], 0.02, 400.0, flip=False, may_drop=True).videos == (0,)


def test_more_tokens_take_more_steps() -> None:
    mini, large = table.ROWS[0], table.ROWS[-1]
    assert for_tokens(mini, 16) is mini and for_tokens(mini, 4) is mini
    found = for_tokens(mini, 64)
    assert found.steps == 4 * mini.steps and found.measured.endswith("times 4 for 64 tokens, an estimate")
    assert for_tokens(large, 64) is large, "which was not measured at all"


def test_rows_that_are_missing_follow_from_the_width() -> None:
    assert [row.size for row in table.ROWS] == sorted((row.size for row in table.ROWS), key=lambda size: SIZES[size])
    assert all(row.steps < later.steps for row, later in zip(table.ROWS, table.ROWS[1:], strict=False))
    assert row_of("mini") is table.ROWS[0]
    assert row_of("tiny").learning_rate == 6e-3 and row_of("tiny").steps == table.ROWS[0].steps
    assert row_of("XL").learning_rate == 3.3e-4 and row_of("XL").steps == table.ROWS[-1].steps


@pytest.mark.parametrize(
    ("minutes", "hours", "message"),
    [
        (1.0, 2.0, "--minutes is 1 and --hours is 2: give one of them"),
        (0.0, None, "--minutes is 0, but must be at least 2 minutes"),
        (-3.0, None, "--minutes is -3, but must be at least 2 minutes"),
        (None, 0.01, "--hours is 0.01, but must be at least 2 minutes"),
        (None, 1e9, "at most 366 days"),
    ],
)
def test_budgets_that_make_no_sense(minutes: float | None, hours: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget_seconds(minutes, hours)


def test_budgets() -> None:
    assert (budget_seconds(2, None), budget_seconds(None, 8), budget_seconds(None, None)) == (120, 28800, None)


# --- from a machine that is simulated


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine whose steps and frames take the seconds that the test says, by the size of the model."""
    seconds = {"mini": 0.2, "small": 0.6, "S": 2.0, "B": 9.0, "tiny": 0.1, "encode": 0.001, "clip": 0.01, "psnr": 30.2}

    def trial(vae: Any, videos: Any, resolution: int) -> AutoencoderTrial:
        return AutoencoderTrial(seconds["psnr"], seconds["encode"], 0.001)

    monkeypatch.setattr(module, "try_autoencoder", trial)

    def step(config: RunConfig, *_: Any) -> StepTrial:
        return StepTrial(seconds[config.model.preset.partition("/")[0]], seconds["clip"])

    monkeypatch.setattr(sizes, "time_step", step)
    return seconds


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Thirty videos of 90 frames: 150 clips of 16 at interval 1."""
    folder = write_videos(tmp_path / "videos", ["0.mp4"], 90, 64, 80)
    for number in range(1, 30):
        shutil.copyfile(folder / "0.mp4", folder / f"{number}.mp4")
    return folder


def chosen(videos: Path, seconds: float, **given: Any) -> tuple[Choice, dict[str, str]]:
    values = {**given, "data": {"path": str(videos), **given.get("data", {})}}
    found = choose(values, seconds, lambda: 5.0)
    return found, dict(line.split(maxsplit=1) for line in found.lines)


def test_more_time_gives_a_larger_model(machine: dict[str, float], videos: Path) -> None:
    short, lines = chosen(videos, 600.0)
    assert short.config.model.preset == "mini/4" and short.config.data.resolution == 64
    assert "small would get " in lines["model"] and " of 1,080" in lines["model"]
    assert short.config.train.learning_rate == 3e-3 and short.config.train.optimizer == "muon"
    assert short.config.model.prediction_type == "flow" and short.config.data.normalize_latents
    assert short.config.data.horizontal_flip and short.videos is not None and len(short.videos) == 30
    assert short.config.data.latent_cache == short.config.run_dir / "latents"
    expected = (600 - 5 - 5.4 - table.PAGE_SECONDS - short.output_seconds) / 0.2
    assert short.config.train.steps == pytest.approx(expected, abs=2)
    assert "useful samples from about 1,000 steps" in lines["expect"]
    assert "30.2 dB" in lines["autoencoder"] and "fine detail will be missing" in lines["autoencoder"]

    longer, lines = chosen(videos, 3600.0)
    assert longer.config.model.preset == "small/4"
    assert "large enough for 150 clips without common frames" in lines["model"]
    assert longer.config.train.learning_rate == 1.5e-3
    assert "docs/results.md, Real footage" in lines["training"] and "docs/results.md" in lines["expect"]


def test_a_slow_machine_is_told_what_to_expect(machine: dict[str, float], videos: Path) -> None:
    machine.update(mini=2.0, psnr=23.0, encode=0.1, clip=0.5)
    found, lines = chosen(videos, 600.0)
    assert found.config.model.preset == "mini/4" and "the smallest one" in lines["model"]
    assert lines["expect"].startswith("blurred samples: useful ones take about 1,000 steps")
    assert "poor" in lines["autoencoder"] and "lavita autoencoder train" in lines["autoencoder"]
    assert found.videos is None and lines["latents"].startswith("encoded while training")
    assert found.step_seconds == pytest.approx(2.0 + 8 * 16 * 0.1)
    assert found.config.train.num_samples == 4, "8 samples would take 82 s, more than a tenth"
    assert found.config.train.sample_every > found.config.train.steps, "only at the end"
    machine["mini"] = 1e4
    with pytest.raises(ConfigError, match="no time is left to train; give more"):
        chosen(videos, 600.0)


def test_some_of_the_videos_are_encoded_if_all_take_too_long(machine: dict[str, float], videos: Path) -> None:
    machine["encode"] = 0.07  # 189 s for all 2,700 frames, of at most 150
    found, lines = chosen(videos, 600.0, data={"class_folders": False})
    assert found.videos is not None and len(found.videos) == 23 and found.config.data.path is None
    assert "7 of 30 videos are left out, as all would take 3:09 of 10:00" in lines["latents"]
    assert not found.config.data.horizontal_flip


def test_what_is_given_is_kept(machine: dict[str, float], videos: Path) -> None:
    found, lines = chosen(
        videos,
        600.0,
        run_dir="elsewhere",
        data={"resolution": 32, "num_frames": 8, "horizontal_flip": False, "latent_cache": None},
        model={"preset": "tiny/4", "variant": 3, "prediction_type": "v_prediction"},
        train={"learning_rate": 1e-4, "accumulation": 3, "keep_every": 50, "sample_every": 7, "decay_steps": 9},
    )
    config = found.config
    assert (config.data.resolution, config.data.num_frames, config.data.horizontal_flip) == (32, 8, False)
    assert (config.model.preset, config.model.variant, config.model.prediction_type) == ("tiny/4", 3, "v_prediction")
    assert config.model.learn_sigma and config.train.timestep_sampling == "uniform", "the recipe's are for a flow"
    assert (config.train.learning_rate, config.train.sample_every, config.train.decay_steps) == (1e-4, 7, 9)
    assert (config.train.batch_size, config.train.accumulation) == (9, 3)
    assert config.train.keep_every == config.train.checkpoint_every == 50
    assert found.videos is None and config.data.latent_cache is None
    assert lines["resolution"].endswith("as given") and lines["latents"] == "encoded while training, as given"


def test_a_cache_that_is_given_is_used(machine: dict[str, float], tmp_path: Path) -> None:
    """Its resolution and its mirrored frames are those of the run; the videos themselves may be missing."""
    vae, videos = make_tiny_vae(), write_videos(tmp_path / "videos", num_frames=20)
    vae.save_pretrained(tmp_path / "vae")
    encode_dataset(scan(videos), tmp_path / "cache", vae, 32, horizontal_flip=False)
    cached = {"latent_cache": str(tmp_path / "cache")}
    for path in (str(videos), None):
        found, lines = chosen(videos, 600.0, autoencoder=str(tmp_path / "vae"), data={**cached, "path": path})
        assert found.videos is None and found.config.data.latent_cache == tmp_path / "cache"
        assert found.config.data.resolution == 32 and not found.config.data.horizontal_flip
        assert lines["latents"] == f"from {tmp_path / 'cache'}, not mirrored"
        assert "about 0:00 to encode" in lines["time"] and found.step_seconds == 0.2


def test_a_long_time_gets_more_pixels(machine: dict[str, float], tmp_path: Path) -> None:
    large = write_videos(tmp_path / "large", ["0.mp4"], 20, 128, 160)
    assert chosen(large, 3600.0)[0].config.data.resolution == 64
    found, lines = chosen(large, 3 * 3600.0)
    assert found.config.data.resolution == 128 and found.config.model.preset == "mini/4"
    assert "from 2:00:00 on" in lines["resolution"]
    assert "memorise this video" in lines["expect"] and not found.config.data.horizontal_flip


def test_classes_and_captions_are_found(machine: dict[str, float], tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set" / "train", ["a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4"], 20, 32, 40)
    found, lines = chosen(folder, 600.0)
    assert found.config.data.class_folders and lines["conditions"].startswith("the 2 folders of the videos are classes")
    assert found.config.data.resolution == 32 and "32 on the shorter side" in lines["resolution"]
    (tmp_path / "set" / "captions.csv").write_text("file,caption\n", encoding="utf-8")
    found, lines = chosen(folder, 600.0, data={"class_folders": False})
    assert not found.config.data.class_folders and found.config.data.captions is None
    assert f"add data.captions={tmp_path / 'set' / 'captions.csv'}" in lines["conditions"]
