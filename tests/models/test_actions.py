"""Actions as a condition of each frame: in the model, in training, in sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, MakeTransformer, Run
from tiny_data import write_videos

from lavita.core.config import save_config
from lavita.models.actions import action_numbers
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline as save
from lavita.sampling.roll_out import Windows, roll_out
from lavita.training.batches import BatchMaker

PLAIN = ("data.horizontal_flip=false", "data.frame_interval=1")
NAMES = ["jump", "left", "right"]
SIZES: dict[str, Any] = {"num_frames": 4, "num_blocks": 4}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 4, 8, 8, generator=random), torch.tensor([500, 500])


def with_actions(make_transformer: MakeTransformer, **fields: Any) -> LavitaTransformer3DModel:
    return make_transformer(**{**SIZES, "action_names": NAMES, **fields})


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("embedding", ["uniform", "compression"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_an_action_matters_to_its_own_clip(
    variant: int, embedding: str, conditioning: str, make_transformer: MakeTransformer
) -> None:
    model = with_actions(make_transformer, variant=variant, patch_embedding=embedding, conditioning=conditioning)
    latents, timesteps = inputs()
    actions = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 1]])
    changed = actions.clone()
    changed[1, 3] = 0
    with torch.no_grad():
        found = model(latents, timesteps, actions=actions).sample
        other = model(latents, timesteps, actions=changed).sample
        nothing = model(latents, timesteps).sample
        none = model(latents, timesteps, actions=torch.full((2, 4), 3)).sample
    assert torch.equal(found[0], other[0])
    assert (found[1] - other[1]).abs().max() > 1e-3
    assert torch.equal(nothing, none), "no actions are the last row of the table"


def test_a_finetuned_model_starts_as_it_was(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    before = make_transformer(**SIZES)
    save(make_pipeline(before, tiny_vae), tmp_path / "before")
    model = LavitaTransformer3DModel(**{**before.config, "action_names": NAMES})
    report = initialize(model, str(tmp_path / "before"))
    assert set(report.new) == {"action_embed.tables"}
    latents, timesteps = inputs()
    with torch.no_grad():
        expected = before(latents, timesteps).sample
        assert torch.equal(model(latents, timesteps, actions=torch.zeros(2, 4, dtype=torch.int64)).sample, expected)


def test_finetuning_takes_actions_by_name(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    before = with_actions(make_transformer)
    save(make_pipeline(before, tiny_vae), tmp_path / "before")
    latents, timesteps = inputs()
    others = ["duck", "left", "right"]  # as many actions, but not the same
    for names, new in ((others, True), (["left", "right"], False)):
        model = LavitaTransformer3DModel(**{**before.config, "action_names": names})
        report = initialize(model, str(tmp_path / "before"))
        assert ("action_embed.tables" in report.partly_new) is new
        assert "by name" in report.adapted["action_embed.tables"]
        with torch.no_grad():
            for name in (*names, None):
                there, here = (
                    torch.full((2, 4), action_numbers(each.config, [[known]]).item(), dtype=torch.int64)
                    for each, known in ((before, None if name == "duck" else name), (model, name))
                )
                expected = before(latents, timesteps, actions=there).sample
                assert torch.equal(model(latents, timesteps, actions=here).sample, expected), name


def test_actions_that_do_not_fit_are_refused(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    latents, timesteps = inputs()
    model = with_actions(make_transformer)
    actions = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="actions were given, but this model was trained without"):
        make_transformer(**SIZES)(latents, timesteps, actions=actions)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 3\), but must have \(2, 4\)"):
        model(latents, timesteps, actions=actions[:, :3])
    with pytest.raises(ValueError, match=r"actions are torch.int32, but must be torch.int64"):
        model(latents, timesteps, actions=actions.int())
    with pytest.raises(ValueError, match="action_names has 'jump' at 1, but must be a list of different texts"):
        make_transformer(action_names=["jump", "jump"])
    with pytest.raises(ValueError, match="'up' is no action of this model; allowed: jump, left, right, or 0 to 2"):
        action_numbers(model.config, [["jump", "up"]])
    with pytest.raises(ValueError, match=r"actions have \[1, 2\] frames, but must be of one length"):
        action_numbers(model.config, [["jump"], [0, 1]])
    assert action_numbers(model.config, [["right", 0, None]]).tolist() == [[2, 0, 3]]
    with pytest.raises(ValueError, match="actions are for 1 x 2 videos and frames, but this call makes 1 x 4"):
        make_pipeline(model, tiny_vae)(actions=[["jump", "left"]], num_inference_steps=1)


def test_a_window_of_a_roll_out_has_its_own_actions(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_actions(make_transformer, given_frames=["start"])
    pipeline = make_pipeline(model, tiny_vae)
    seen: list[list[list[int]]] = []
    forward = type(model).forward

    def watching(self: LavitaTransformer3DModel, *arguments: Any, **options: Any) -> Any:
        seen.append(options["actions"].tolist())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", watching)
    row = ["jump", "left", "right", "left", "jump", "jump", "right"]
    noise = lambda window: [torch.Generator().manual_seed(window)]  # noqa: E731
    list(roll_out(pipeline, Windows(7, 4, 1), noise, actions=[row], num_inference_steps=1))
    assert seen == [[[0, 1, 2, 1]], [[1, 0, 0, 2]]]
    seen.clear()
    list(roll_out(pipeline, Windows(5, 4, 1), noise, actions=[row[:5]], num_inference_steps=1))
    assert seen == [[[0, 1, 2, 1]], [[1, 0, 3, 3]]], "beyond the end there are none"
    with pytest.raises(ValueError, match="actions are for 7 frames, but the videos have 6"):
        list(roll_out(pipeline, Windows(6, 4, 1), noise, actions=[row], num_inference_steps=1))


def test_guidance_keeps_the_actions(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    pipeline = make_pipeline(with_actions(make_transformer, num_classes=2), tiny_vae)

    def sample(count: int, *actions: str) -> Any:
        generators = [torch.Generator().manual_seed(number) for number in range(count)]
        return pipeline(
            class_labels=[0, 1][:count],
            actions=[[action] * 4 for action in actions],
            guidance_scale=2.0,
            num_inference_steps=2,
            generator=generators,
            output_type="latent",
        ).frames

    both = sample(2, "left", "jump")
    torch.testing.assert_close(both[:1], sample(1, "left"), rtol=1e-4, atol=1e-4)
    assert (both[:1] - sample(1, "right")).abs().max() > 1e-3


def table(folder: Path, videos: Path) -> Path:
    rows = [
        f"{file.relative_to(videos).as_posix()},{' '.join(NAMES[(number + place) % 3] for place in range(10))}"
        for number, file in enumerate(sorted(videos.rglob("*.mp4")))
    ]
    (folder / "actions.csv").write_text("\n".join(["file,actions", *rows]))
    return folder / "actions.csv"


def test_clips_have_the_actions_of_their_frames(
    make_config: MakeConfig, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    plain = make_config("run", *PLAIN, "data.num_images=1", "train.batch_size=6")
    config = make_config(
        *("run", *PLAIN, "data.num_images=1", "train.batch_size=6"),
        f"data.actions={table(tmp_path, tmp_path / 'videos')}",
    )
    batches = BatchMaker(config.data, config.train, tiny_vae, 0.1, action_dropout=0.3)
    before = BatchMaker(plain.data, plain.train, tiny_vae, 0.1).make(2)
    batch = batches.make(2)
    assert batch.actions is not None and before.actions is None
    assert torch.equal(batch.latents, before.latents) and torch.equal(batch.noise, before.noise)
    videos = sorted({draw.video.name for step in range(9) for draw in batches.make(step).draws})
    dropped = 0
    for step in range(20):
        batch = batches.make(step)
        assert batch.actions is not None
        for row, draw in zip(batch.actions.tolist(), batch.draws, strict=True):
            frames = row[:-1]
            assert row[-1] == 3, "an image has none"
            expected = [(videos.index(draw.video.name) + draw.start + place) % 3 for place in range(len(frames))]
            assert frames in (expected, [3] * len(frames))
            dropped += frames != expected
    assert 0.2 < dropped / 120 < 0.4
    part = batches.make(3, range(4, 6)).actions
    whole = batches.make(3).actions
    assert part is not None and whole is not None and torch.equal(part, whole[4:])


def test_a_run_with_actions_goes_on_exactly_and_on_no_others(run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    actions = table(tmp_path, tmp_path / "videos")

    def train(name: str, steps: int) -> tuple[int, str]:
        config = make_config(name, f"data.actions={actions}", *PLAIN, f"train.steps={steps}")
        save_config(config, config.run_dir.with_suffix(".yaml"))
        code, _, errors = run("train", "--config", config.run_dir.with_suffix(".yaml"))
        return code, errors

    def losses(name: str) -> list[Any]:
        file = make_config(name).run_dir / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()]

    assert train("whole", 4)[0] == 0
    assert train("parts", 2)[0] == 0
    assert train("parts", 4)[0] == 0
    assert losses("parts") == losses("whole")
    actions.write_text(actions.read_text().replace("jump", "left"))
    code, errors = train("parts", 6)
    assert code == 2 and "videos" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,actions\na/0.mp4,left left\n", "line 2 has 2 actions for a/0.mp4, which has 10 frames"),
        ("file,actions\nb/9.mp4,left\n", "has no actions for any of the 3 files"),
        ("file,doings\na/0.mp4,left\n", "line 2 has no 'actions'"),
        ('{"file": "a/0.mp4", "actions": 3}\n', "line 1 has 3 for actions, but must have a text"),
        ('{"file": "a/0.mp4", "actions": ["left", null]}\n', "line 1 has ['left', None] for actions"),
        ("file,actions\n" + 2 * f"a/0.mp4,{'left ' * 10}\n", "line 3 is about a/0.mp4 a second time"),
    ],
)
def test_tables_that_do_not_fit(text: str, words: str, run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / f"actions.{'jsonl' if text.startswith('{') else 'csv'}"
    file.write_text(text)
    config = make_config("run", f"data.actions={file}", *PLAIN)
    save_config(config, tmp_path / "run.yaml")
    code, _, errors = run("train", "--config", tmp_path / "run.yaml")
    assert code == 2 and words in errors.splitlines()[-1], errors


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.horizontal_flip=true", "horizontal_flip is True, but must be False with actions"),
        ("data.frame_interval=2", "frame_interval is 2, but must be 1 with actions"),
    ],
)
def test_settings_that_do_not_go_with_actions(override: str, words: str, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=words):
        make_config("run", "data.actions=actions.csv", *PLAIN, override)


def test_dropout_of_actions_needs_actions(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.action_dropout is 0\.5, but has no effect without data\.actions"):
        make_config("run", "model.action_dropout=0.5")


def test_the_command_samples_with_actions(
    make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, run: Run, tmp_path: Path
) -> None:
    save(make_pipeline(with_actions(make_transformer), tiny_vae), tmp_path / "model")
    common = ("sample", tmp_path / "model", "--seeds", "0", "--steps", "1", "--format", "mkv")
    made = []
    for name, text in (("a", "left left\njump right"), ("b", "right left jump right")):
        (tmp_path / f"{name}.txt").write_text(text)
        code, _, errors = run(*common, "--actions", tmp_path / f"{name}.txt", "--out", tmp_path / name)
        assert code == 0, errors
        made.append((tmp_path / name / "0.mkv").read_bytes())
    assert made[0] != made[1]
    code, _, errors = run(*common, "--actions", tmp_path / "b.txt", "--out", tmp_path / "a")
    assert code == 2 and "actions" in errors, "a folder holds videos made in one way"
    for text, words in (("left", "has 1 actions, but the videos have 4 frames"), ("a b c d", "'a' is no action")):
        (tmp_path / "bad.txt").write_text(text)
        code, _, errors = run(*common, "--actions", tmp_path / "bad.txt", "--out", tmp_path / "c")
        assert code == 2 and words in errors and errors.count("\n") == 1, errors
