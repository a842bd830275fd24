"""What a model costs: against sums by hand, real models on the CPU, and the figures that the paper prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer
from torch import nn
from typer.testing import CliRunner

from lavita import cli
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline
from lavita.studies.complexity import CROSS_ATTENTION, measure, model_config, truncated
from lavita.studies.table3 import Table3Row, table3

# --- Table 3


@pytest.fixture(scope="module")
def rows() -> list[Table3Row]:
    return table3()


@pytest.mark.parametrize(
    ("variant", "parameters", "flops"),
    [(1, "673.68", "5,572.69"), (2, "673.68", "5,572.69"), (3, "676.33", "6,153.15"), (4, "676.44", "1,545.15")],
)
def test_table_3(rows: list[Table3Row], variant: int, parameters: str, flops: str) -> None:
    row = rows[variant - 1]
    counted = row.counted
    assert row.variant == variant
    assert truncated(counted.table3_parameters, 10**6) == parameters == f"{row.paper_parameters:.2f}"
    assert truncated(counted.table3_macs, 10**9) == flops == f"{row.paper_flops:,.2f}"
    if variant <= 2:
        assert truncated(counted.table3_macs, 10**7) == "557,269.50"  # 5,572.6950 G

    # The same again by hand, to the last unit.
    two = variant >= 3  # attentions in a block
    patch = 4 if variant == 4 else 2
    width, frames, tokens, batch = 1152, 16, (32 // patch) ** 2, 3
    square, all_tokens = width**2, batch * frames * tokens
    blocks = 23 if two else 28
    per_token = blocks * (4 * (1 + two) + 8) * square + 8 * patch**2 * width  # attention, MLP; decoder
    norms = 2 * width * (blocks * (3 if variant == 3 else 2) + 1)
    repeats = (frames + tokens) * (blocks // 2 if variant <= 2 else blocks)
    modulation = batch * (repeats * 6 * square + frames * 2 * square)
    timestep = batch * (256 * width + square)
    patches = 0 if two else all_tokens * 16 * width
    assert counted.table3_macs == all_tokens * (per_token + norms) + modulation + timestep + patches
    assert counted.num_parameters - counted.table3_parameters == ((4 * patch**2 + 1) * width if two else 0)


def test_variant_4_of_table_3_to_the_last_unit(rows: list[Table3Row]) -> None:
    found = rows[3].counted
    assert (found.table3_parameters, found.table3_macs) == (676_446_464, 1_545_157_361_664)
    assert (rows[3].preset, found.config["patch_size"]) == ("XL/4", 4)


# --- multiply-accumulates and parameters


def macs_by_hand(model: LavitaTransformer3DModel, batch: int, frames: int, images: int) -> int:
    """Layer by layer: every product of a weight or of two activations, from the configuration alone."""
    config = model.config
    width, channels, patch = config["hidden_size"], config["in_channels"], config["patch_size"]
    out_channels = 2 * channels if config["learn_sigma"] else channels
    tube = config["tube_size"] if config["patch_embedding"] == "compression" else 1
    conditional = bool(config["num_classes"] or config["text_dim"])
    patches = (config["sample_size"] // patch) ** 2
    video, frames = frames // tube, frames // tube + images
    conditions = 1 + images if conditional else 1
    plain = config["conditioning"] == "all_tokens"
    tokens = patches + (1 + conditional if plain else 0)
    layers = width**2  # of one square layer, a token
    linear_attention, mlp = 4 * layers, int(2 * config["mlp_ratio"] * layers)
    in_space = 2 * frames * tokens**2 * width  # q k^T, and its product with the values
    in_time = 2 * tokens * video**2 * width
    steering = 0 if plain else 6 * layers

    total = frames * patches * patch**2 * channels * tube * width  # patch embedding
    total += 256 * width + layers  # timestep
    total += conditions * (config["text_dim"] * width + layers) if config["text_dim"] else 0
    total += conditions * (config["text_tokens"] or 0) * config["text_dim"] * width
    for index in range(config["num_blocks"]):
        late = index >= config["num_blocks"] // 2 if config["variant"] == 1 else index % 2 == 1
        if config["variant"] <= 2 and late:
            total += video * tokens * (linear_attention + mlp) + in_time + steering
            continue
        total += frames * tokens * (linear_attention + mlp) + conditions * steering
        total += in_space
        if words := config["text_tokens"]:
            total += frames * tokens * (2 * layers + 2 * words * width) + conditions * words * 2 * layers
        if config["variant"] >= 3:
            total += video * tokens * linear_attention + in_time
    total += 0 if plain else conditions * 2 * layers
    total += frames * patches * width * patch**2 * out_channels * tube  # decoder
    if tube > 1:
        total += frames * config["sample_size"] ** 2 * out_channels * tube * out_channels * tube
    return batch * total


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "unconditional": ({}, 0),
    "with classes": ({"num_classes": 3, "learn_sigma": False, "mlp_ratio": 3.0}, 0),
    "images": ({"num_classes": 3}, 2),
    "images without conditions": ({}, 2),
    "texts": ({"text_dim": 6, "temporal_position": "rope"}, 1),
    "words": ({"text_dim": 6, "text_tokens": 7}, 2),
    "tokens": ({"conditioning": "all_tokens", "num_classes": 3}, 2),
    "tubes": ({"patch_embedding": "compression", "tube_size": 2}, 0),
    "many tokens": ({"sample_size": 24}, 0),  # 144 a frame: attention by torch's own function
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], int]:
    return CASES[request.param]


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_macs_and_parameters_are_those_of_the_layers(
    variant: int, case: tuple[dict[str, Any], int], make_transformer: MakeTransformer
) -> None:
    fields, images = case
    model = make_transformer(variant=variant, num_blocks=4, num_frames=4, **fields)
    cost = measure(model.config, batch_size=2, num_images=images)
    assert cost.macs == macs_by_hand(model, 2, 4, images)
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())

    attentions = [part for name, part in cost.parts.items() if name.endswith("attention")]
    layers = 32 * 96 + 96 + 32 * 32 + 32
    assert sum(part.num_parameters for part in attentions) == (8 if variant >= 3 else 4) * layers
    assert len(attentions) == 2
    words = cost.parts.get(CROSS_ATTENTION)
    assert (words is not None) == ("text_tokens" in fields)
    if words is not None:
        assert words.num_parameters == (4 if variant >= 3 else 2) * layers
    assert 0 < cost.attention_products < sum(part.macs for part in attentions) + (words.macs if words else 0)


def test_a_clip_of_another_length(make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_frames=4)
    assert measure(model.config, num_frames=6).macs == macs_by_hand(model, 1, 6, 0)
    assert measure(model.config, num_frames=6).num_tokens == 6 * 16


def test_the_convention_of_table_3_does_not_depend_on_the_batch(make_transformer: MakeTransformer) -> None:
    config = make_transformer(num_classes=3).config
    assert measure(config, batch_size=1).table3_macs == measure(config, batch_size=5).table3_macs


def test_measuring_leaves_the_random_state_alone(make_transformer: MakeTransformer) -> None:
    config = make_transformer().config
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    measure(config)
    assert torch.equal(torch.randn(3), expected)


# --- the command


def info(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli.app, ["info", *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "--json" in arguments or max(map(len, result.output.splitlines())) <= 80
    return result.output


def test_the_command_prints_a_preset() -> None:
    text = " ".join(info("tiny/4").split())
    counted = measure(model_config("tiny/4", {}))
    assert "variant 2, 2 blocks" in text
    assert f"│ total │ {truncated(counted.num_parameters, 10**6)} │" in text
    assert "1,024 tokens per clip" in text
    parameters, macs = truncated(counted.table3_parameters, 10**6), truncated(counted.table3_macs, 10**9)
    assert f"{parameters} M and, for 3 clips, {macs} G" in text


def test_the_command_prints_table_3(rows: list[Table3Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavita.studies.table3.table3", lambda: rows)
    text = " ".join(info("--table", "3").split())
    assert "│ 1 │ 2 │ 28 │ 673.68 │ 5,572.69 │ 673.68 │ 5,572.69 │" in text
    assert "│ 2 │ 2 │ 28 │ 673.68 │ 5,572.69 │ 673.68 │ 5,572.69 │" in text
    assert "│ 3 │ 2 │ 23 │ 676.33 │ 6,153.15 │ 676.33 │ 6,153.15 │" in text
    assert "│ 4 │ 4 │ 23 │ 676.44 │ 1,545.15 │ 676.44 │ 1,545.15 │" in text
    assert "with them, the models have 676.36 and 676.52 M" in text
    assert "At patch size 2, Variant 4 has 676.33 M parameters and" in text
    answer = json.loads(CliRunner().invoke(cli.app, ["info", "--table", "3", "--json"]).output)
    assert [row["variant"] for row in answer] == [1, 2, 3, 4]
    assert answer[0]["paper"]["macs"] == 5_572_690_000_000
    assert answer[0]["counted_alike"]["macs"] // 10**6 == 5_572_695


def test_the_command_quotes_table_4() -> None:
    """Against the paper's lines as they were printed."""
    lines = """
        50k 328.16 227.32 227.84 331.27
        60k 194.33 133.66 110.32 191.53
        70k 132.22 97.84 100.27 128.13
        80k 106.09 84.78 91.67 97.38
        90k 83.18 73.69 86.41 98.79
        100k 81.12 67.50 75.42 88.53
        110k 74.26 61.93 72.30 82.15
        120k 69.20 59.31 66.21 83.29
        130k 68.66 54.86 61.75 82.45
        140k 60.26 53.10 58.56 81.25
        150k 60.51 52.73 54.03 73.85
    """
    printed = [line.replace("│", " ").split() for line in info("--table", "4").splitlines() if "k │" in line]
    assert printed == [line.split() for line in lines.split("\n") if line.strip()]


def test_the_command_takes_every_option_of_a_preset() -> None:
    options = {
        "variant": 4,
        "patch_embedding": "uniform",
        "conditioning": "all_tokens",
        "temporal_position": "rope",
        "num_classes": 5,
        "sample_size": 8,
        "num_frames": 6,
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    answer = json.loads(info("tiny/2", *words, "--batch-size", "2", "--num-images", "3", "--json"))
    assert options.items() <= answer["config"].items()
    expected = measure(answer["config"], batch_size=2, num_images=3)
    assert (answer["macs"], answer["batch_size"], answer["num_images"]) == (expected.macs, 2, 3)
    assert sum(part["num_parameters"] for part in answer["parts"].values()) == answer["num_parameters"]
    texts = json.loads(info("tiny/8", "--text-dim", "7", "--text-tokens", "9", "--json"))["config"]
    assert (texts["text_dim"], texts["text_tokens"]) == (7, 9)


def test_the_command_reads_folders(pipeline: LavitaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    network: nn.Module = pipeline.transformer
    for folder in ("run", "run/pipeline", "run/pipeline/transformer"):
        answer = json.loads(info(tmp_path / folder, "--num-frames", "4", "--json"))
        assert answer["num_parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert (answer["num_frames"], answer["config"]["num_frames"]) == (4, 2)
        assert answer["macs"] == macs_by_hand(pipeline.transformer, 1, 4, 0)


def test_the_packaged_model() -> None:
    assert model_config("builtin", {})["num_classes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a model"),
        (["XL/2", "--table", "3"], "give either a model"),
        (["--table", "3", "--variant", "2"], "give either a model"),
        (["--table", "2"], "table is 2; allowed: 3, 4"),
        (["--table", "4", "--json"], "json is set, but has no effect with --table 4"),
        (["XL/3"], "preset is 'XL/3'; allowed: one of tiny"),
        (["tiny/2", "--variant", "5"], "variant is 5; allowed: 1, 2, 3, 4"),
        (["tiny/2", "--patch-embedding", "tubes"], "patch_embedding is 'tubes'; allowed: uniform, compression"),
        (["tiny/2", "--num-classes", "2", "--text-dim", "3"], "a model has classes or texts"),
        (["tiny/8", "--sample-size", "12"], "sample_size is 12, but must be a multiple of patch_size (8)"),
        (["tiny/2", "--patch-embedding", "compression", "--num-images", "1"], "num_images must be 0"),
        (["tiny/2", "--patch-embedding", "compression", "--num-frames", "5"], "must be a multiple of tube_size (2)"),
        (["empty"], "empty holds no model"),
        (["run/vae"], "run/vae holds no model"),
        (["run", "--variant", "1"], "variant is 1, but run has its own"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    pipeline: LavitaPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    pipeline.save_pretrained("run")
    monkeypatch.setattr(sys, "argv", ["lavita", "info", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["batch_size", "num_frames"])
def test_sizes_are_checked(name: str, make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
        measure(make_transformer().config, **{name: 0})
