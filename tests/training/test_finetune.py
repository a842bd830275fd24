"""Fine-tuning: frozen parameters, adapters compared with peft, new data sets, and settings that are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, Run
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from run_folders import last_checkpoint
from tiny_data import write_videos

from lavita.core.config import ConfigError
from lavita.models.adapters import apply_adapter, merge_state
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.pretrained.transfer import initialize
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.schedulers import make_scheduler
from lavita.training import train as module
from lavita.training.config import RunConfig
from lavita.training.ema import EMA
from lavita.training.finetune import prepare, read_fresh, trained_parameters
from lavita.training.optimizers import make_optimizers
from lavita.training.run_folder import Stopped, stop_requested
from lavita.training.snapshots import averaged_model
from lavita.training.train import train

State = dict[str, torch.Tensor]
TABLE = "y_embedder.embedding_table.weight"
LORA = "train.lora_rank=2"


@pytest.fixture
def base(tmp_path: Path, tiny_vae: AutoencoderKL) -> Callable[..., str]:
    """Saves a pipeline of random weights, with every gate open, and returns its folder."""

    def save(**fields: Any) -> str:
        known = {"sample_size": 8, "num_frames": 2, "num_classes": 2, "class_names": ["a", "b"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = LavitaTransformer3DModel.from_preset("tiny/4", **{**known, **fields})
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        scheduler = make_scheduler("unipc", model.config["learn_sigma"])
        LavitaPipeline(model, tiny_vae, scheduler).save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


@pytest.fixture
def make_config(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Configurations of three steps on videos of the classes a and b, from `base`."""
    start = [f"train.init_from={tmp_path / 'base'}", "train.steps=3", "train.learning_rate=1e-2"]
    return lambda name, *overrides, variant=2: make_config(name, *start, f"model.variant={variant}", *overrides)


def weights_of(source: str | Path) -> State:
    return load_pipeline(source).transformer.state_dict()


def last_state(config: RunConfig) -> dict[str, State]:
    """Weights, their averages and the optimizers' moments of the last checkpoint, each by parameter."""
    loaded = last_checkpoint(config)
    moments = loaded.read_all("optimizer.")
    return {
        "model": loaded.read_all("model."),
        "ema": loaded.read_all("ema."),
        "moments": {name.rpartition(".")[0]: moment for name, moment in moments.items()},
    }


def moved(after: State, before: State) -> set[str]:
    return {name for name in after if not torch.equal(after[name], before[name])}


def plain(state: State) -> State:
    """The weights without adapters, by their names in the model that the adapters were added to."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def inputs(num_classes: int = 2) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        latents, timesteps = torch.randn(3, 2, 4, 8, 8), torch.tensor([5, 500, 900])
    return {"latents": latents, "timesteps": timesteps, "class_labels": torch.arange(3).clamp(max=num_classes)}


@torch.no_grad()
def output(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    return model(**inputs(), **options).sample


def passed_by_videos_only(source: str) -> set[str]:
    """Parameters that the output for an image has no gradient for."""
    model = load_pipeline(source).transformer.requires_grad_(True)
    model(**inputs(), use_temporal=False).sample.square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


# --- frozen modules


@pytest.mark.parametrize("conditioning", ["s_adaln", "all_tokens"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_frozen_modules_stay_and_all_others_are_trained(
    variant: int, conditioning: str, base: Callable[..., str], make_config: MakeConfig
) -> None:
    source = base(variant=variant, conditioning=conditioning)
    before, temporal = weights_of(source), passed_by_videos_only(source)
    names = {name for name, _ in load_pipeline(source).transformer.named_parameters()}
    assert temporal and temporal < names
    learning = {"spatial": temporal, "temporal": names - temporal}
    for freeze, expected in learning.items():
        options = (f"train.freeze={freeze}", f"model.conditioning={conditioning}")
        config = make_config(freeze, *options, variant=variant)
        pipeline = load_pipeline(train(config))
        state = last_state(config)
        assert moved(state["model"], before) == expected
        assert set(state["ema"]) == expected, "frozen weights need no average"
        assert moved(pipeline.transformer.state_dict(), before) == expected
        images = [
            output(model, use_temporal=False) for model in (pipeline.transformer, load_pipeline(source).transformer)
        ]
        assert torch.equal(*images) == (freeze == "spatial")
        assert set(state["moments"]) == expected, "nor moments"


def test_the_layer_that_makes_frames_of_tubes_is_temporal(base: Callable[..., str], make_config: MakeConfig) -> None:
    before = weights_of(base(patch_embedding="compression"))
    config = make_config("run", "train.freeze=spatial", "model.patch_embedding=compression")
    train(config)
    changed = moved(last_state(config)["model"], before)
    assert {name.rpartition(".")[0] for name in changed if not name.startswith("blocks.1.")} == {"temporal_upsample"}


def test_new_classes_are_trained_next_to_frozen_modules(
    base: Callable[..., str], make_config: MakeConfig, tmp_path: Path
) -> None:
    source = base()
    temporal, before = passed_by_videos_only(source), weights_of(source)
    write_videos(tmp_path / "other", ["b/0.mp4", "c/1.mp4"])
    config = make_config("run", "train.freeze=spatial", f"data.path={tmp_path / 'other'}")
    train(config)
    before[TABLE] = before[TABLE][[1, 2, 2]]  # b is known, c starts as no label
    assert moved(last_state(config)["model"], before) == {*temporal, TABLE}
    assert read_fresh(config.run_dir) == {TABLE}


# --- adapters


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_only_adapters_are_trained(variant: int, base: Callable[..., str], make_config: MakeConfig) -> None:
    before = weights_of(base(variant=variant))
    config = make_config("run", LORA, "train.lora_alpha=3", variant=variant)
    folder = train(config)
    state = last_state(config)
    assert moved(plain(state["model"]), before) == set()
    adapters = {name for name in state["model"] if ".lora_" in name}
    layers = {name.partition(".lora_")[0] for name in adapters}
    kinds = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    kinds |= {"temporal_attn.qkv", "temporal_attn.proj"} if variant >= 3 else set()
    assert layers == {f"blocks.{index}.{kind}" for index in range(2) for kind in kinds}
    assert all(state["model"][name].any() for name in adapters)
    assert set(state["ema"]) == adapters

    # The sampled model has the averaged W + alpha / r B A.
    after = weights_of(folder)
    assert {name.removesuffix(".weight") for name in moved(after, before)} == layers
    for layer in layers:
        low, high = (state["ema"][f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
        expected = before[f"{layer}.weight"].double() + 3 / 2 * (high @ low)
        torch.testing.assert_close(after[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_adapters_change_nothing_at_first_and_merge_to_the_same(
    base: Callable[..., str], make_config: MakeConfig
) -> None:
    source = base()
    model = load_pipeline(source).transformer
    expected = output(model)
    prepare(model, make_config("run", LORA, "train.lora_alpha=5").train, set())
    assert torch.equal(output(model), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    merged = averaged_model(model, EMA(model, 0.9))
    assert (output(model) - expected).abs().max() > 0.01
    torch.testing.assert_close(output(merged), output(model), rtol=0, atol=1e-5)
    assert merged.config == model.config
    assert set(merged.state_dict()) == set(weights_of(source))


def test_half_precision_is_merged_in_float32() -> None:
    torch.manual_seed(0)
    state = {"x.base_layer.weight": torch.randn(6, 5), "x.base_layer.bias": torch.randn(6)}
    state |= {"x.lora_A.default.weight": torch.randn(2, 5), "x.lora_B.default.weight": torch.randn(6, 2)}
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    weight = half["x.base_layer.weight"].double()
    weight += 0.5 * half["x.lora_B.default.weight"].double() @ half["x.lora_A.default.weight"].double()
    merged = merge_state(half, 0.5)
    assert set(merged) == {"x.weight", "x.bias"}
    assert torch.equal(merged["x.weight"], weight.bfloat16())


def test_peft_loads_the_adapters(base: Callable[..., str], make_config: MakeConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    source = base()
    folder = train(make_config("run", LORA, "train.lora_alpha=5", "train.lora_targets=[qkv, adaLN_modulation]"))
    expected = output(load_pipeline(folder).transformer)
    assert (expected - output(load_pipeline(source).transformer)).abs().max() > 1e-3
    by_peft = PeftModel.from_pretrained(load_pipeline(source).transformer, str(folder / "lora"))
    torch.testing.assert_close(output(by_peft), expected, rtol=0, atol=1e-5)
    by_peft.merge_and_unload()
    ours = load_pipeline(source).transformer
    apply_adapter(ours, folder / "lora")
    torch.testing.assert_close(output(ours), output(by_peft.get_base_model()), rtol=0, atol=1e-5)
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=1e-5)

    # Adapters saved by peft are merged here, too.
    by_peft = PeftModel.from_pretrained(load_pipeline(source).transformer, str(folder / "lora"))
    by_peft.save_pretrained(str(tmp_path / "by_peft"))
    again = load_pipeline(source).transformer
    apply_adapter(again, tmp_path / "by_peft")
    assert moved(again.state_dict(), ours.state_dict()) == set()


def test_a_merged_pipeline_needs_no_peft(
    base: Callable[..., str], make_config: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base(fps=5.0)  # that of the videos at this interval, so that the files are the same
    config = make_config("run", LORA, "train.sample_every=2", "train.num_samples=2")
    folder = train(config)
    assert (config.run_dir / "samples" / "step-00000002" / "1.mp4").exists()
    assert set(weights_of(folder)) == set(weights_of(source))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", False)  # diffusers looked before
    options = ("--classes", "a", "--seeds", "0", "--steps", "2")
    commands = {"merged": [str(folder)], "added": [source, "--lora", str(folder / "lora")]}
    for name, model in commands.items():
        code, _, error = run("sample", *model, "--out", name, *options)
        assert code == 0, error
    merged, added = (Path(name, "a", "0.mp4").read_bytes() for name in commands)
    assert merged == added


def test_freezing_chooses_where_adapters_go(base: Callable[..., str], make_config: MakeConfig) -> None:
    source = base(variant=3)
    temporal = passed_by_videos_only(source)
    for freeze in ("spatial", "temporal"):
        model = load_pipeline(source).transformer
        prepare(model, make_config("run", LORA, f"train.freeze={freeze}", variant=3).train, set())
        adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {f"{layer}.lora_{part}.default.weight" for layer in adapted for part in "AB"}
        assert {f"{layer}.weight" in temporal for layer in adapted} == {freeze == "spatial"}


def test_a_new_table_of_classes_is_trained_with_the_adapters(
    base: Callable[..., str], make_config: MakeConfig, tmp_path: Path
) -> None:
    before = weights_of(base())
    write_videos(tmp_path / "other", ["c/0.mp4", "d/1.mp4", "e/2.mp4"])
    config = make_config("run", LORA, f"data.path={tmp_path / 'other'}")
    folder = train(config)
    before[TABLE] = before[TABLE][[2, 2, 2, 2]]
    state = last_state(config)
    assert moved(plain(state["model"]), before) == {TABLE}
    assert torch.equal(weights_of(folder)[TABLE], state["ema"][TABLE])
    assert not (folder / "lora").exists(), "without the table, the adapters are of no use to anyone"


def test_without_a_rank_nothing_changes(
    base: Callable[..., str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pipeline(base()).transformer.requires_grad_(True)
    monkeypatch.setitem(sys.modules, "peft", None)
    names = [name for name, _ in model.named_modules()]
    prepare(model, make_config("run").train, {TABLE})
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trained_parameters(model) == "0.2 M parameters"


@pytest.mark.parametrize("option", [LORA, "train.freeze=spatial"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    option: str, base: Callable[..., str], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base()
    write_videos(tmp_path / "other", ["b/0.mp4", "c/1.mp4"])  # a table to learn, which the resumed run must know of
    options = (option, f"data.path={tmp_path / 'other'}")
    whole, parts = make_config("whole", *options), make_config("parts", *options)
    train(whole)
    real = stop_requested

    class Once(list[int]):
        def __bool__(self) -> bool:
            return True

    @contextmanager
    def at_once() -> Iterator[list[int]]:
        with real():
            yield Once()

    monkeypatch.setattr(module, "stop_requested", at_once)
    with pytest.raises(Stopped):
        train(parts)
    monkeypatch.setattr(module, "stop_requested", real)
    shutil.rmtree(source)
    train(parts)
    for key in ("model", "ema", "moments"):
        one, other = last_state(whole)[key], last_state(parts)[key]
        assert one.keys() == other.keys() and moved(one, other) == set()
    (parts.run_dir / "init.json").unlink()
    with pytest.raises(ValueError, match=r"init\.json: missing or damaged"):
        train(parts)


def test_every_process_adds_the_same_adapters(base: Callable[..., str], make_config: MakeConfig) -> None:
    source, states = base(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_pipeline(source).transformer
        prepare(model, make_config("run", LORA).train, set())
        states.append(model.state_dict())
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(1), drawn), "and draws nothing that others count on"
    assert moved(*states) == set()
    other = load_pipeline(source).transformer
    prepare(other, make_config("run", LORA, "train.seed=1").train, set())
    assert all(".lora_A." in name for name in moved(other.state_dict(), states[0]))
    assert moved(other.state_dict(), states[0])


@pytest.mark.parametrize("fresh", [set(), {TABLE}])
def test_muon_takes_the_matrices_of_adapters(
    fresh: set[str], base: Callable[..., str], make_config: MakeConfig
) -> None:
    source = base()
    model = load_pipeline(source).transformer
    prepare(model, make_config("run", LORA).train, fresh)
    optimizers = make_optimizers(model, "muon", 1e-3, 0.0)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [type(optimizer).__name__ for optimizer in optimizers] == (["AdamW"] if fresh else []) + ["Muon"]
    config = make_config("run", LORA, "train.optimizer=muon")
    folder = train(config)
    assert moved(plain(last_state(config)["model"]), weights_of(source)) == set()
    assert moved(weights_of(folder), weights_of(source))


# --- other data than the source's


def test_a_run_is_a_source(base: Callable[..., str], make_config: MakeConfig) -> None:
    base()
    first = make_config("first")
    folder = train(first)
    model = LavitaTransformer3DModel.from_config(load_pipeline(folder).transformer.config)
    for weights in (None, "ema"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = initialize(model, str(first.run_dir), weights)
        assert moved(model.state_dict(), weights_of(folder)) == set() and not report.fresh
    second = make_config("second", f"train.init_from={first.run_dir}", "train.learning_rate=1e-12")
    torch.testing.assert_close(weights_of(train(second)), weights_of(folder), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="weights is 'model', but the pipeline of the run"):
        initialize(model, str(first.run_dir), "model")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="this run has no pipeline yet"):
        initialize(model, str(first.run_dir))
    (checkpoint,) = (first.run_dir / "checkpoints").iterdir()
    with pytest.raises(ValueError, match="give the folder of its run"):
        initialize(model, str(checkpoint))


@pytest.mark.parametrize("option", ["train.lora_rank=0", LORA, "train.freeze=temporal"])
def test_other_lengths_and_sizes(option: str, base: Callable[..., str], make_config: MakeConfig) -> None:
    base()
    config = make_config("run", option, "data.num_frames=4", "data.frame_interval=1", "data.resolution=32")
    pipeline = load_pipeline(train(config))
    report = (config.run_dir / "init.txt").read_text()
    assert "recomputed: 16 places of a frame here, 4 there" in report
    assert "recomputed: 4 frames here, 2 there" in report
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["b"], num_inference_steps=2, precision="fp32").frames.shape == (1, 4, 32, 32, 3)
    assert read_fresh(config.run_dir) == set(), "computed tables do not learn"


def test_without_labels_a_model_starts_as_its_source_without_one(
    base: Callable[..., str], make_transformer: Callable[..., LavitaTransformer3DModel]
) -> None:
    source = base()
    given = inputs()
    null = torch.full((3,), 2)
    with torch.no_grad():
        expected = load_pipeline(source).transformer(given["latents"], given["timesteps"], null).sample
    known = {"sample_size": 8, "num_frames": 2}
    cases: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
        ({}, {}),
        ({"text_dim": 6}, {"text_embeds": torch.randn(3, 6)}),
        ({"num_classes": 5}, {"class_labels": torch.tensor([0, 4, 5])}),
        ({"num_classes": 2, "class_names": ["c", "d"]}, {"class_labels": torch.tensor([0, 1, 2])}),
    ]
    for fields, condition in cases:
        model = LavitaTransformer3DModel.from_preset("tiny/4", **known, **fields)
        report = initialize(model, source)
        with torch.no_grad():
            actual = model(given["latents"], given["timesteps"], **condition).sample
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert any("no label" in reason for reason in report.adapted.values())
        conditions = {name for name in model.state_dict() if name.startswith("y_embedder.")}
        assert report.fresh == conditions


def test_classes_are_known_by_name(base: Callable[..., str]) -> None:
    source = base()
    table = weights_of(source)[TABLE]
    names = ["b", "c", "a", *"defghijkl"]
    model = LavitaTransformer3DModel.from_preset(
        "tiny/4", sample_size=8, num_frames=2, num_classes=len(names), class_names=names
    )
    report = initialize(model, source)
    assert torch.equal(model.state_dict()[TABLE], table[[1, 2, 0, *[2] * 9, 2]])
    new = "new, starting as the source's `no label`: c, d, e, f, g, h and 4 more"
    how = f"2 classes there, 12 here; by name: b, a; {new}"
    assert report.adapted == {TABLE: how}
    assert report.fresh == {TABLE}
    swapped = LavitaTransformer3DModel.from_preset(
        "tiny/4", sample_size=8, num_frames=2, num_classes=2, class_names=["b", "a"]
    )
    report = initialize(swapped, source)
    assert torch.equal(swapped.state_dict()[TABLE], table[[1, 0, 2]])
    assert not report.fresh, "nothing in it is left to be learned"


def test_classes_are_known_in_any_unicode_form(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"sample_size": 8, "num_frames": 2, "num_classes": 2}
    source = LavitaTransformer3DModel.from_preset("tiny/4", **sizes, class_names=["b", "cafe\u0301"])
    torch.nn.init.normal_(source.get_parameter(TABLE))
    model = LavitaTransformer3DModel.from_preset("tiny/4", **sizes, class_names=["caf\xe9", "b"])
    source.save_pretrained(tmp_path)
    report = initialize(model, str(tmp_path))
    assert torch.equal(model.state_dict()[TABLE], source.state_dict()[TABLE][[1, 0, 2]])
    assert TABLE not in report.fresh


def write_dit(folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        dit = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2,
            sample_size=8, patch_size=4, num_embeds_ada_norm=7,
        )  # fmt: skip
        for name, parameter in dit.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
            if ".timestep_embedder." in name:  # a DiT has one, of which each block holds a copy
                parameter.data = dit.get_parameter(
                    f"transformer_blocks.0{name[len('transformer_blocks.0') :]}"
                ).data.clone()
    dit.save_pretrained(folder / "dit")
    return str(folder / "dit")


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_adapters_on_an_image_model_open_closed_gates(variant: int, make_config: MakeConfig, tmp_path: Path) -> None:
    """Gates and projections that stay zero would block the gradients of the adapters behind them."""
    config = make_config("run", LORA, f"train.init_from={write_dit(tmp_path)}", "train.steps=4", variant=variant)
    pipeline = load_pipeline(train(config))
    given = inputs()
    other = given["latents"].clone()
    other[:, 1] += 1.0
    with torch.no_grad():
        one = pipeline.transformer(**given).sample[:, 0]
        two = pipeline.transformer(**{**given, "latents": other}).sample[:, 0]
    assert (one - two).abs().max() > 1e-5, "a frame sees the other one"
    frozen = set(last_state(config)["model"]) - set(last_state(config)["ema"])
    assert any(name.endswith("mlp.fc1.base_layer.weight") for name in frozen)


def test_only_motion_is_trained_on_an_image_model(make_config: MakeConfig, tmp_path: Path) -> None:
    source = write_dit(tmp_path)
    config = make_config("run", "train.freeze=spatial", f"train.init_from={source}")
    pipeline = load_pipeline(train(config))
    start = LavitaTransformer3DModel.from_config(pipeline.transformer.config)
    initialize(start, source)
    changed = moved(pipeline.transformer.state_dict(), start.state_dict())
    assert {name.split(".")[1] if "blocks" in name else name for name in changed} == {"1", TABLE}
    with pytest.raises(
        ValueError, match=r"train\.freeze is 'temporal', but .*dit has no weights for some temporal parameters"
    ):
        train(make_config("other", "train.freeze=temporal", f"train.init_from={source}"))


# --- what is refused


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.freeze=spatial", "train.init_from=null"], "freeze is 'spatial', but needs init_from"),
        ([LORA, "train.init_from=null"], "lora_rank is 2, but needs init_from"),
        (["train.freeze=all"], "train.freeze is 'all'"),
        (["train.lora_alpha=2"], "lora_alpha is 2.0, but has no effect with lora_rank=0"),
        (["train.lora_targets=[qkv]"], "lora_targets is ['qkv'], but has no effect with lora_rank=0"),
        ([LORA, "train.lora_targets=[qkx]"], "train.lora_targets.0 is 'qkx'"),
        ([LORA, "train.lora_targets=[]"], "train.lora_targets is []"),
        ([LORA, "train.lora_alpha=0"], "train.lora_alpha is 0"),
        (["train.lora_rank=-1"], "train.lora_rank is -1"),
    ],
)
def test_settings_that_cannot_work(overrides: list[str], named: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config("run", *overrides)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_no_layer_to_adapt(base: Callable[..., str], make_config: MakeConfig) -> None:
    base(conditioning="all_tokens")
    config = make_config("run", LORA, "train.lora_targets=[adaLN_modulation]", "model.conditioning=all_tokens")
    with pytest.raises(
        ValueError, match=r"train\.lora_targets is \['adaLN_modulation'\], but this model has no such layer"
    ):
        train(config)


def test_peft_is_missing(base: Callable[..., str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    base()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError) as caught:
        train(make_config("run", LORA))
    assert str(caught.value) == 'train.lora_rank is 2, but needs the extra "lora": pip install "lavita[lora]"'


def test_adapters_that_do_not_fit(base: Callable[..., str], make_config: MakeConfig, tmp_path: Path) -> None:
    source = base()
    lora = train(make_config("run", LORA)) / "lora"
    model = load_pipeline(source).transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"base: cannot be read as adapters"):
        apply_adapter(model, Path(source))
    other = LavitaTransformer3DModel.from_preset("mini/4", sample_size=8, num_frames=2)
    with pytest.raises(ValueError, match=r"but this model has \(\d+, 128\): they are of another model"):
        apply_adapter(other, lora)
    changed = shutil.copytree(lora, tmp_path / "changed")
    settings = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is True; allowed: False"):
        apply_adapter(model, changed)
    (changed / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as adapters"):
        apply_adapter(model, changed)
    assert moved(model.state_dict(), before) == set()


def test_adapters_that_are_not_numbers(base: Callable[..., str], make_config: MakeConfig) -> None:
    source = base()
    lora = train(make_config("run", LORA)) / "lora"
    settings = json.loads((lora / "adapter_config.json").read_text())
    model = load_pipeline(source).transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"r": 0}, "needs numbers lora_alpha and r"),
        ({"lora_alpha": "x"}, "needs numbers lora_alpha and r"),
        ({"lora_alpha": float("nan")}, r"with a factor of nan: .* holds .* values that are not finite"),
    ]
    for fields, words in changes:
        (lora / "adapter_config.json").write_text(json.dumps({**settings, **fields}))
        with pytest.raises(ValueError, match=words):
            apply_adapter(model, lora)
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"with a factor of .*e\+\d+: .* holds .* values that are not finite"):
        apply_adapter(model, lora, 1e300)
    assert moved(model.state_dict(), before) == set()


def test_the_command_samples_with_adapters(base: Callable[..., str], make_config: MakeConfig, run: Run) -> None:
    source = base()
    folder = train(make_config("run", LORA, "train.learning_rate=0.1"))
    common = ("--classes", "a", "--seeds", "0", "--steps", "2", "--format", "mkv")

    def sample(name: str, *options: str | Path) -> bytes:
        code, _, error = run("sample", options[0], "--out", name, *common, *options[1:])
        assert code == 0, error
        return Path(name, "a", "0.mkv").read_bytes()

    merged, plainly = sample("merged", folder), sample("plain", source)
    assert merged != plainly
    assert sample("none", source, "--lora", folder / "lora", "--lora-scale", "0") == plainly
    code, _, error = run("sample", source, "--out", "plain", *common, "--lora", folder / "lora")
    assert code == 2 and "holds videos made with transformer=" in error
    code, _, error = run("sample", source, "--out", "x", *common, "--lora-scale", "0.5")
    assert code == 2 and error.strip().endswith("--lora-scale is 0.5, but has no effect without --lora")
