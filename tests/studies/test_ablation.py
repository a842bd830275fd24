"""Studies: arms that differ in what they name only, through the real commands, going on where they were."""

from __future__ import annotations

import json
from importlib.resources import files
from io import StringIO
from pathlib import Path

import pytest
from conftest import make_tiny_vae
from PIL import Image
from rich.console import Console
from tiny_data import write_videos

from lavita.cli import app
from lavita.core.commands import CommandFailed
from lavita.core.config import load_config, read_yaml
from lavita.models.autoencoder import AutoencoderKL
from lavita.studies import ablation
from lavita.studies.ablation import (
    STUDIES,
    StudyPlan,
    commands,
    frame_interval_arms,
    headline,
    pretraining_arms,
    print_study,
    run_study,
    summarize,
    variant_arms,
    write_curves,
)
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig, TrainConfig


def test_every_arm_of_every_study_is_a_configuration_of_its_own() -> None:
    intervals = frame_interval_arms(load_config(RunConfig, {}))
    studies = {
        **STUDIES,
        "pretraining": pretraining_arms("dit.pt"),
        "frame-interval": intervals,
    }
    for name, arms in studies.items():
        configs = [load_config(RunConfig, {}, fields) for fields in arms.values()]
        assert len(arms) >= 2
        for index, config in enumerate(configs):
            assert config not in configs[:index], f"{name}: two arms are the same"


def test_the_recipes_are_those_of_their_files() -> None:
    """`lavita train --recipe`: but for the rates of the modern one, and what a short run cannot have."""
    for name, most in (("modern", set()), ("paper", {"timestep_sampling", "timestep_shift"})):
        file = read_yaml(Path(str(files("lavita") / "configs" / "recipes" / f"{name}.yaml")))
        arm = load_config(RunConfig, {}, STUDIES["recipe"][name]).model_dump()
        for field in STUDIES["recipe"][name]:
            section, _, key = field.partition("=")[0].partition(".")
            if key not in most:
                assert arm[section][key] == load_config(RunConfig, file).model_dump()[section][key], field


def test_the_combinations_are_all_of_them() -> None:
    models = [load_config(RunConfig, {}, fields).model for fields in STUDIES["combinations"].values()]
    kinds = {(m.variant, m.patch_embedding, m.conditioning, m.temporal_position) for m in models}
    assert len(kinds) == len(models) == 4 * 2 * 2 * 2


def test_variant_4_is_compared_at_twice_the_patch_size_too(capsys: pytest.CaptureFixture[str]) -> None:
    def arms(preset: str, resolution: int) -> dict[str, RunConfig]:
        data = {"resolution": resolution, "class_folders": True}
        config = load_config(RunConfig, {"autoencoder": "builtin", "data": data, "model": {"preset": preset}})
        plan = StudyPlan(Path("out"), "demo", (f"model.preset={preset}", "train.batch_size=2"))
        found = {}
        for name, fields in variant_arms(config).items():
            command = commands(name, fields, plan, 10)[0][0]
            assert len([word for word in command if word.startswith("model.preset=")]) == 1
            assert "train.batch_size=2" in command
            found[name] = load_config(RunConfig, {}, [word for word in command[3:] if "." in word.partition("=")[0]])
        return found

    found = arms("tiny/2", 64)
    four = {name: config for name, config in found.items() if name != "variant-4-patch-4"}
    assert [config.model.variant for config in four.values()] == [1, 2, 3, 4]
    assert {config.model.preset for config in four.values()} == {"tiny/2"}
    assert (found["variant-4-patch-4"].model.variant, found["variant-4-patch-4"].model.preset) == (4, "tiny/4")
    capsys.readouterr()
    for preset, resolution in (("tiny/8", 64), ("tiny/2", 40)):
        assert len(arms(preset, resolution)) == 4
        assert "Variant 4 is not compared at patch size" in capsys.readouterr().out


def test_clips_of_all_frame_intervals_start_alike(tmp_path: Path) -> None:
    """The arms see the same first frames of the same videos, and a video too short for the longest clip in none."""
    write_videos(tmp_path / "videos", num_frames=12)
    write_videos(tmp_path / "videos" / "short", num_frames=8)
    values = {"data": {"path": str(tmp_path / "videos"), "num_frames": 3, "resolution": 16}}
    starts, intervals = [], []
    for fields in frame_interval_arms(load_config(RunConfig, values)).values():
        data = load_config(RunConfig, values, fields).data
        batches = BatchMaker(data, TrainConfig(), make_tiny_vae(), 0.1)
        draws = [batches.sampler.draw(step, index) for step in range(50) for index in range(2)]
        starts.append([(draw.video.name, draw.start, draw.flip) for draw in draws])
        intervals.append(data.frame_interval)
    assert intervals == [1, 2, 3, 4]
    assert starts[0] == starts[1] == starts[2] == starts[3]
    assert {start for _, start, _ in starts[0]} == set(range(12 - 8))
    assert not any("short" in name for name, _, _ in starts[0])


def test_steps_must_rise(tmp_path: Path) -> None:
    for steps in ((), (5, 5), (7, 3), (0, 4)):
        with pytest.raises(ValueError, match="steps is"):
            run_study(STUDIES["variant"], StudyPlan(tmp_path, "demo", steps=steps))


def test_the_headline_of_a_report() -> None:
    rows = {"a": {"ratio": 0.5}, "b": {"ratio": 2.0}, "still": {"ratio": None}}
    report = {
        "scores": {"kernel-video[x]": {"value": 0.1}, "prdc[x]": {"precision": 1.0}},
        "accuracy": {"accuracy": 0.75},
        "motion": {"num_within_factor_two": 2, "num_classes": 3, "per_class": rows},
    }
    expected = {"kernel-video[x]": 0.1, "accuracy": 0.75, "motion within 2x": 2 / 3, "motion ratio": 1.0}
    assert headline(report) == pytest.approx(expected)


def test_the_summary_of_an_arm_is_that_of_its_lines(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 100.0 / step, "clips_per_second": float(step % 7)} for step in range(1, 41)]
    (tmp_path / "arm" / "train").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "arm" / "train" / "metrics.jsonl").write_text(text, encoding="utf-8")
    found = summarize("arm", StudyPlan(tmp_path, "demo"))
    assert found["loss_first"] == pytest.approx((100 + 50 + 100 / 3 + 25) / 4)
    assert found["loss_last"] == pytest.approx((100 / 37 + 100 / 38 + 100 / 39 + 2.5) / 4)
    assert found["curve"] == [[line["step"], line["loss"]] for line in lines]
    assert (found["clips_per_second"], found["scores"]) == (3.0, {})


def test_each_arm_is_trained_once_per_seed_and_the_table_has_their_spread(tmp_path: Path) -> None:
    plan = StudyPlan(tmp_path, "demo", steps=(5, 10), train_seeds=(3, 4))
    assert plan.trainings("a", ("model.variant=1",)) == {
        "a/seed-3": ("model.variant=1", "train.seed=3"),
        "a/seed-4": ("model.variant=1", "train.seed=4"),
    }
    rows = [
        {
            "arm": arm,
            "name": f"{arm}/seed-{seed}",
            "loss_first": loss,
            "loss_last": loss / 2,
            "curve": [[5, loss], [10, loss / 2]],
            "clips_per_second": 4.0,
            "scores": {step: {"motion ratio": loss} for step in ("5", "10")},
        }
        for arm, losses in {"a": (1.0, 3.0), "b": (5.0, 5.0)}.items()
        for seed, loss in zip((3, 4), losses, strict=True)
    ]
    console = Console(width=200, record=True, file=StringIO())
    print_study(rows, console)
    table = [line.split() for line in console.export_text().splitlines()]
    values = {words[1]: [word for word in words if word not in ("│", "+-")] for words in table if len(words) > 2}
    # The standard deviation of 1 and 3 with n - 1 is the root of 2.
    assert values["a"] == ["a", "2.000", "1.414", "1.000", "0.707", "4.0", "0.0", "2.000", "1.414"]
    assert values["b"][-2:] == ["5.000", "0.000"]
    write_curves(rows, plan)
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_a_study_trains_samples_scores_and_goes_on(
    tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_videos(tmp_path / "videos")
    tiny_vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "config.yaml").write_text(f"autoencoder: {tmp_path / 'vae'}\n")
    overrides = (
        f"data.path={tmp_path / 'videos'}",
        "data={class_folders: true, num_frames: 2, frame_interval: 1, resolution: 16}",
        "model.preset=tiny/4",
        "train={batch_size: 2, log_every: 1}",
    )
    arms = {"space": ("model.variant=1",), "both": ("model.variant=4",)}
    plan = StudyPlan(
        tmp_path / "study",
        str(tmp_path / "config.yaml"),
        overrides,
        steps=(1, 3),
        seeds="0",
        sample_steps=2,
        real=tmp_path / "videos",
        metrics="motion",
        protocol=("frame_interval=1",),
    )
    calls = []

    def stops(command: list[str]) -> None:  # in this process: a dozen starts would take minutes
        calls.append(command[0])
        if len(calls) == 4:
            raise CommandFailed(1)
        app(command, standalone_mode=False)

    monkeypatch.setattr(ablation, "run_command", stops)
    with pytest.raises(CommandFailed):
        run_study(arms, plan)
    rows = run_study(arms, plan)
    one_arm = ["train", "sample", "evaluate"] * 2
    assert calls == [*one_arm[:4], *one_arm[3:], *one_arm], "the command that failed came again, no finished one did"
    assert [row["name"] for row in rows] == list(arms)
    for row in rows:
        assert [step for step, _ in row["curve"]] == [1, 2, 3]
        assert list(row["scores"]) == ["1", "3"]
    assert json.loads((plan.out / "results.json").read_text())["trainings"] == rows
    assert Image.open(plan.out / "curves.png").width > 500
    assert Image.open(plan.out / "contact_sheet.png").height >= 2 * 16
    assert "both" in capsys.readouterr().out
    calls.clear()
    (plan.out / "study.json").unlink()  # as a version left it whose generators were others
    with pytest.raises(ValueError, match="holds arms of a version that drew other clips and noise"):
        run_study(arms, plan)
    assert not calls


def test_fields_of_an_arm_win_over_those_of_the_study(tmp_path: Path) -> None:
    """The arms of `recipe` set the optimizer of the paper's, and leave that of the modern one to the command line."""
    plan = StudyPlan(tmp_path, "demo", ("train.optimizer=muon", "train.warmup_steps=7"))
    for arm, expected in (("modern", ["train.optimizer=muon", "train.warmup_steps=7"]), ("paper", [])):
        (command, _), *_ = commands(arm, STUDIES["recipe"][arm], plan, 5)
        assert [word for word in command if word in plan.overrides] == expected
        keys = [word.partition("=")[0] for word in command if "=" in word]
        assert len(set(keys)) == len(keys), "no field is given twice"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run_dir=x", "run_dir=x has no effect: the study sets run_dir"),
        ("train.steps=3", "train.steps=3 has no effect: the study sets train.steps"),
        ("model.variant=1", "model.variant=1 has no effect: every arm sets model.variant"),
    ],
)
def test_overrides_without_an_effect_are_refused_before_anything_is_trained(
    override: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run_study(STUDIES["variant"], StudyPlan(tmp_path / "study", "demo", (override,)))
    assert not (tmp_path / "study").exists()
