"""Every key of a run's configuration changes what the run does; a new key needs an entry here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from models.dit import make_dit, write_pt
from PIL import Image
from run_folders import last_checkpoint, lines_of
from tiny_data import paint, write_broken, write_videos
from tiny_text import CLIP, save_text_encoder
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from lavita.core.config import StrictConfig
from lavita.data.catalog import scan
from lavita.data.clip_sources import VideoSource
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.blocks import Attention, TransformerBlock
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig
from lavita.training.train import train

Observe = Callable[[RunConfig], Any]


def losses(config: RunConfig) -> Any:
    """Loss and gradient norm of each step."""
    return [(line["loss"], line["grad_norm"]) for line in lines_of(config)]


def weights(config: RunConfig) -> Any:
    """The sums over the tensors of the last checkpoint."""
    return {name: tensor.double().sum().item() for name, tensor in last_checkpoint(config).read_all().items()}


def files(config: RunConfig) -> Any:
    """Everything in the run's folder."""
    return sorted(path.relative_to(config.run_dir).as_posix() for path in config.run_dir.rglob("*"))


def steps_logged(config: RunConfig) -> Any:
    return [line["step"] for line in lines_of(config)]


def checkpoints(config: RunConfig) -> Any:
    return [path.name for path in list_checkpoints(config.run_dir / "checkpoints")]


def events(config: RunConfig) -> Any:
    return [event["event"] for event in lines_of(config, "events.jsonl")]


def validations(config: RunConfig) -> Any:
    return lines_of(config, "validation.jsonl")


def model_config(config: RunConfig) -> Any:
    return json.loads((config.run_dir / "pipeline" / "transformer" / "config.json").read_text())


def passes(config: RunConfig) -> Any:
    """Number of forward passes of attention layers."""
    return COUNTS["passes"]


def compiled(config: RunConfig) -> Any:
    """Whether a block ran compiled."""
    return COUNTS["compiled"]


def threads(config: RunConfig) -> Any:
    """Number of threads that decode videos."""
    return COUNTS["threads"]


COUNTS = {"passes": 0, "threads": 0, "compiled": 0}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, start = Attention.forward, VideoSource.__init__

    def counting(self: Attention, *inputs: Any) -> torch.Tensor:
        COUNTS["passes"] += 1
        return forward(self, *inputs)

    def starting(self: VideoSource, *arguments: Any) -> None:
        start(self, *arguments)
        COUNTS["threads"] = self.workers

    def compiling(*inputs: Any) -> torch.Tensor:
        COUNTS["compiled"] += 1
        return TransformerBlock._mix(*inputs)  # what compiled blocks compute: tests/models/test_compilation.py

    monkeypatch.setattr(Attention, "forward", counting)
    monkeypatch.setattr("lavita.models.blocks.compiled_mix", lambda: compiling)
    monkeypatch.setattr(VideoSource, "__init__", starting)


@dataclass
class Key:
    """How the effect of a key is shown: a run with another value differs from a plain one."""

    value: str
    """A value other than the default."""
    observe: Observe = losses
    """The property of the run that differs."""
    also: tuple[str, ...] = ()
    """Further settings of both runs."""
    only_with: tuple[str, ...] = ()
    """Further settings that the changed run needs and the plain one cannot have."""
    refused: str = ""
    """The message with which the changed run is refused, if an effect needs other machines or processes."""


VALIDATED = ("data.validation={held_out}", "train.validate_every=2", "train.validation_clips=2")
FLOW = ("model.prediction_type=flow", "model.learn_sigma=false")
INIT = ("train.init_from={pipeline}",)
TEXTS = ("data.captions={captions}", "data.class_folders=false", "model.text_encoder={clip}")
IMAGES = ("data.num_images=1", "data.images={images}")
ACTIONS = ("data.actions={actions}", "data.horizontal_flip=false", "data.frame_interval=1")
KEYS: dict[str, Key] = {
    "run_dir": Key("{other}", lambda config: config.run_dir.name if (config.run_dir / "pipeline").exists() else None),
    "autoencoder": Key("{other_vae}"),
    "data.path": Key("{held_out}"),
    "data.dataset": Key("ucf101", refused="looked for", also=("data.class_folders=false",)),
    "data.split": Key("train", refused="dataset=folder has no splits"),
    "data.use_classes": Key("false", refused="has no effect"),
    "data.class_folders": Key("false"),
    "data.num_frames": Key("3"),
    "data.frame_interval": Key("1"),
    "data.start_span": Key("7"),
    "data.resolution": Key("32"),
    "data.fit": Key("pad"),
    "data.buckets": Key("[2x16x16,3x16x32]", model_config, only_with=("data.fit=bucket",)),
    "data.horizontal_flip": Key("false"),
    "data.latent_cache": Key("{cache}", threads),
    "data.normalize_latents": Key("true"),
    "data.workers": Key("5", threads),
    "data.captions": Key("{captions}", also=("data.class_folders=false",), only_with=("model.text_encoder={clip}",)),
    "data.num_images": Key("1"),
    "data.images": Key("{images}", also=("data.num_images=1",)),
    "data.image_captions": Key(
        "{image_captions_2}", weights, (*TEXTS, *IMAGES, "data.image_captions={image_captions}", "train.steps=4")
    ),
    "data.actions": Key("{actions_2}", weights, ACTIONS),
    "data.validation": Key("{held_out}", validations, only_with=("train.validate_every=2",)),
    "data.validation_captions": Key(
        "{held_captions_2}", validations, (*TEXTS, *VALIDATED, "data.validation_captions={held_captions}")
    ),
    "data.broken": Key("error", refused="cannot be decoded", also=("data.path={with_broken}",)),
    "model.preset": Key("tiny/2"),
    "model.variant": Key("3"),
    "model.patch_embedding": Key("compression"),
    "model.tube_size": Key("4", also=("model.patch_embedding=compression", "data.num_frames=4")),
    "model.conditioning": Key("all_tokens"),
    "model.temporal_position": Key("rope", model_config),
    "model.text_encoder": Key("{other_clip}", weights, TEXTS),
    "model.text_tokens": Key("6", model_config, (*TEXTS[:2], "model.text_encoder={plain_clip}")),
    "model.class_dropout": Key("0.9", weights),
    "model.given_frames": Key("[first]"),
    "model.given_dropout": Key("0.9", also=("model.given_frames=[first]",)),
    "model.action_dropout": Key("0.9", weights, ACTIONS),
    "model.learn_sigma": Key("false"),
    "model.prediction_type": Key("v_prediction"),
    "train.timestep_sampling": Key("logit_normal", losses, FLOW),
    "train.timestep_shift": Key("3", losses, FLOW),
    "train.loss_weighting": Key("min_snr", losses, ("model.prediction_type=v_prediction",)),
    "train.min_snr_gamma": Key("0.01", losses, ("train.loss_weighting=min_snr",)),
    "train.init_from": Key("{pipeline}"),
    "train.init_weights": Key("model", weights, ("train.init_from={published}", "train.init_weights=ema")),
    "train.init_closed": Key("false", weights, ("train.init_from={dit}", "model.preset=tiny/2", "model.variant=1")),
    "train.freeze": Key("spatial", weights, INIT),
    "train.lora_rank": Key("2", weights, INIT),
    "train.lora_alpha": Key("64", weights, (*INIT, "train.lora_rank=2", "train.lora_targets=[adaLN_modulation]")),
    "train.lora_targets": Key("[fc1]", weights, (*INIT, "train.lora_rank=2")),
    "train.steps": Key("3", steps_logged),
    "train.batch_size": Key("2"),
    "train.accumulation": Key("2", passes),
    "train.parallel": Key("ddp", refused="there is one process"),
    "train.sequence_parallel": Key("2", refused=r"must divide the processes \(1\)"),
    "train.optimizer": Key("muon", weights),
    "train.learning_rate": Key("1e-2", weights),
    "train.warmup_steps": Key("10", weights),
    "train.decay_steps": Key("2", weights),
    "train.weight_decay": Key("0.5", weights),
    "train.clip_grad_norm": Key("1e-3", weights),
    "train.ema_decay": Key("0.01", weights),
    "train.ema_warmup": Key("false", weights),
    "train.power_ema": Key("[0.05,0.1]", files),
    "train.gradient_checkpointing": Key("true", passes),
    "train.compile": Key("true", compiled),
    "train.precision": Key("bf16"),
    "train.bad_steps": Key("skip", weights, ("train.spike_factor=1e-9", "train.steps=23")),
    "train.spike_factor": Key("1e-9", events, ("train.steps=23",)),
    "train.device": Key("cuda:7", refused="not available"),
    "train.seed": Key("1"),
    "train.log_every": Key("2", steps_logged),
    "train.checkpoint_every": Key("1", checkpoints),
    "train.keep_checkpoints": Key("1", checkpoints, ("train.checkpoint_every=1",)),
    "train.keep_every": Key("1", checkpoints, ("train.checkpoint_every=1", "train.keep_checkpoints=1")),
    "train.keep_best": Key(
        "true",
        checkpoints,
        (
            *VALIDATED,
            "train.validate_every=1",
            "train.checkpoint_every=1",
            "train.keep_checkpoints=1",
            "train.learning_rate=1.0",
            "train.ema_decay=0",
            "train.steps=3",
        ),
    ),
    "train.sample_every": Key("2", files),
    "train.num_samples": Key("2", files, ("train.sample_every=2",)),
    "train.score_every": Key("2", refused="train.score_clips is 64"),
    "train.score_clips": Key("25", refused="train.score_clips is 25", also=("train.score_every=2",)),
    "train.validate_every": Key("1", validations, VALIDATED),
    "train.validation_clips": Key("3", validations, VALIDATED),
    "train.trackers": Key("[tensorboard]", files),
}


@pytest.fixture
def places(tmp_path: Path, make_config: MakeConfig, tiny_vae: AutoencoderKL) -> Callable[[str], str]:
    """Creates the files that a value names in braces, and replaces the name with their path."""

    def captions(name: str, names: list[str], text: str) -> Path:
        (tmp_path / name).write_text("file,caption\n" + "".join(f"{file},{text}\n" for file in names))
        return tmp_path / name

    def actions(name: str, turn: str) -> Path:
        rows = [f"{file},{' '.join(turn[(place // 3) % 2] for place in range(10))}" for file in own]
        (tmp_path / name).write_text("\n".join(["file,actions", *rows]))
        return tmp_path / name

    def clip(name: str, seed: int, model: PreTrainedModel | None = None) -> Path:
        torch.manual_seed(seed)
        save_text_encoder(model or CLIPTextModelWithProjection(CLIP), tmp_path / name)
        return tmp_path / name

    def images() -> Path:
        for index, name in enumerate(("a/0.png", "b/1.png")):
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(paint(1, 100 + index)[0]).save(tmp_path / "images" / name)
        return tmp_path / "images"

    def other_vae() -> Path:
        with torch.no_grad():
            tiny_vae.get_parameter("encoder.conv_out.bias").add_(0.5)
        tiny_vae.save_pretrained(tmp_path / "other-vae")
        return tmp_path / "other-vae"

    def cache() -> Path:
        encode_dataset(scan(tmp_path / "videos"), tmp_path / "cache", tiny_vae, 16, True, "fp32")
        return tmp_path / "cache"

    def pipeline() -> Path:
        return train(make_config("first", "train.steps=3", "train.learning_rate=1e-2"))

    def published() -> Path:
        model = LavitaTransformer3DModel.from_pretrained(pipeline() / "transformer")
        state = {name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": {name: -tensor for name, tensor in state.items()}, "ema": state}, tmp_path / "both.pt")
        return tmp_path / "both.pt"

    def with_broken() -> Path:
        write_broken(write_videos(tmp_path / "some") / "a" / "9.mp4")
        return tmp_path / "some"

    held, own = ["a/7.mp4", "b/8.mp4"], ["a/0.mp4", "a/1.mp4", "b/2.mp4"]
    made: dict[str, Callable[[], Path]] = {
        "other": lambda: tmp_path / "elsewhere",
        "other_vae": other_vae,
        "held_out": lambda: write_videos(tmp_path / "held-out", ["a/7.mp4", "b/8.mp4", "b/9.mp4"], 12),
        "cache": cache,
        "captions": lambda: captions("captions.csv", own, "a game of boxing"),
        "images": images,
        "image_captions": lambda: captions("images-1.csv", ["a/0.png", "b/1.png"], "a game"),
        "actions": lambda: actions("actions.csv", "ab"),
        "actions_2": lambda: actions("actions-2.csv", "bb"),
        "image_captions_2": lambda: captions("images-2.csv", ["a/0.png", "b/1.png"], "freeway of boxing"),
        "held_captions": lambda: captions("held-1.csv", [*held, "b/9.mp4"], "a game"),
        "held_captions_2": lambda: captions("held-2.csv", [*held, "b/9.mp4"], "freeway of boxing"),
        "clip": lambda: clip("clip", 1),
        "other_clip": lambda: clip("other-clip", 2),
        "plain_clip": lambda: clip("plain-clip", 1, CLIPTextModel(CLIP)),
        "pipeline": pipeline,
        "published": published,
        "with_broken": with_broken,
        "dit": lambda: Path(write_pt(make_dit(2, num_attention_heads=2, attention_head_dim=32), tmp_path)),
    }

    def place(text: str) -> str:
        for name, make in made.items():
            if f"{{{name}}}" in text:
                text = text.replace(f"{{{name}}}", str(make()))
        return text

    return place


def _fields(section: type[StrictConfig], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, StrictConfig):
            found += _fields(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def test_every_key_is_here() -> None:
    assert set(KEYS) == set(_fields(RunConfig))


@pytest.fixture(scope="module")
def plain_runs() -> dict[tuple[str, ...], dict[Observe, Any]]:
    """Observations of the plain runs so far, by their settings: keys with the same settings share one run."""
    return {}


def observed(config: RunConfig, observers: Iterable[Observe]) -> dict[Observe, Any]:
    """Trains a run and observes it."""
    COUNTS.update(passes=0, threads=0, compiled=0)
    train(config)
    return {observe: observe(config) for observe in observers}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_has_its_effect(
    key: str,
    make_config: MakeConfig,
    places: Callable[[str], str],
    plain_runs: dict[tuple[str, ...], dict[Observe, Any]],
) -> None:
    entry = KEYS[key]
    common = ["train.steps=2", *(places(text) for text in entry.also)]
    changed = [f"{key}={places(entry.value)}", *(places(text) for text in entry.only_with)]
    if entry.refused:
        with pytest.raises(ValueError, match=entry.refused):
            train(make_config("changed", *common, *changed))
        return
    if entry.also not in plain_runs:
        observers = {other.observe for other in KEYS.values() if other.also == entry.also}
        plain_runs[entry.also] = observed(make_config("plain", *common), observers)
    after = observed(make_config("changed", *common, *changed), [entry.observe])
    assert plain_runs[entry.also][entry.observe] != after[entry.observe]


def test_without_a_change_nothing_differs(
    make_config: MakeConfig, plain_runs: dict[tuple[str, ...], dict[Observe, Any]]
) -> None:
    """Two plain runs look the same to every observer, so the differences above are due to the keys."""
    observers = {entry.observe for entry in KEYS.values() if not entry.also}
    expected = plain_runs.get(()) or observed(make_config("other/plain", "train.steps=2"), observers)
    again = observed(make_config("plain", "train.steps=2"), observers)
    for observe, value in expected.items():
        assert again[observe] == value, observe
