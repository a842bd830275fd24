"""Compiled blocks against plain ones: outputs, gradients, losses over some steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import MakeConfig, MakeTransformer, Run, random_transformer
from models.passes import backward, batch, gradients, process_group, run_in_two_processes

from lavita.core.processes import Processes
from lavita.models.blocks import compiled_mix
from lavita.models.compilation import compile_blocks
from lavita.models.presets import VARIANTS
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.parallel import ParallelModel
from lavita.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Graphs of other tests count towards the limit of recompilations."""
    torch._dynamo.reset()
    compiled_mix.cache_clear()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def differences(model: LavitaTransformer3DModel, given: dict[str, Any]) -> tuple[float, float]:
    """Relative differences, in float32, of compiled and plain outputs, and the largest one of the gradients."""
    output, expected = backward(model, given), gradients(model)
    compile_blocks(model)
    found, compiled = backward(model, given), gradients(model)
    return relative(found, output), max(relative(compiled[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "fields",
    [
        *({"variant": variant, "num_classes": 3} for variant in VARIANTS),
        {"conditioning": "all_tokens", "num_classes": 3},
        {"temporal_position": "rope", "text_dim": 5},
        {"sample_size": 24},  # fused attention
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_forward_and_gradients_are_the_plain_ones(fields: dict[str, Any], make_transformer: MakeTransformer) -> None:
    model = make_transformer(**fields).train()
    output, gradient = differences(model, batch(model, 1))
    assert 0 < output < 3e-6
    assert 0 < gradient < 3e-5


def test_in_bf16_it_is_no_further_from_float32_than_the_plain_one(make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3).train()
    given = batch(model, 1)
    exact = backward(model, given, bf16=False)
    plain = relative(backward(model, given, bf16=True).float(), exact)
    compile_blocks(model)
    assert relative(backward(model, given, bf16=True).float(), exact) < 1.5 * plain


def test_with_vectors_known_ahead(make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_classes=3)
    given = batch(model, 0)
    with torch.no_grad():
        modulation = model.modulate(given["timesteps"][:1], given["class_labels"])
        given["timesteps"] = given["timesteps"][:1].expand(2)
        expected = model(**given).sample
        compile_blocks(model)
        found = model(**given, modulation=[vectors[0] for vectors in modulation]).sample
    assert relative(found, expected) < 3e-6


def test_blocks_that_are_alike_share_a_graph(make_transformer: MakeTransformer) -> None:
    """Variant 1 has two kinds, in space and in time, however many there are of them."""
    graphs = []
    for count in (2, 6):
        torch._dynamo.reset()
        compiled_mix.cache_clear()
        torch._dynamo.utils.counters.clear()
        model = make_transformer(variant=1, num_blocks=count)
        compile_blocks(model)
        with torch.no_grad():
            model(**batch(model, 0))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2, 2]


def test_a_training_run_has_the_losses_of_a_plain_one(make_config: MakeConfig) -> None:
    losses = []
    for name, overrides in (("plain", ()), ("compiled", ("train.compile=true",))):
        config = make_config(name, "train.steps=12", "train.learning_rate=0.01", *overrides)
        train(config)
        rows = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    assert losses[1] != losses[0]


def compare_in_process(rank: int, meeting: str, parallel: Literal["ddp", "fsdp"]) -> None:
    """Compares gradients of compiled and plain blocks in one of two processes, each with its own batch."""
    with process_group(rank, meeting):
        outcomes = []
        for compiles in (False, True):
            model = random_transformer(variant=1, num_classes=3).train()
            if compiles:
                compile_blocks(model)
            network = ParallelModel(model, parallel, Processes(rank, 2), torch.device("cpu"))
            for step in range(2):
                model.zero_grad()
                network(**batch(model, 1, seed=2 * step + rank)).square().mean().backward()
            outcomes.append(gradients(model))
        for name, gradient in outcomes[0].items():
            assert relative(outcomes[1][name], gradient) < 3e-5, name
        assert any(not torch.equal(outcomes[1][name], gradient) for name, gradient in outcomes[0].items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_with_ddp_and_fsdp2(parallel: str, tmp_path: Path) -> None:
    run_in_two_processes(compare_in_process, tmp_path, parallel)


def test_without_a_compiler_it_says_so(make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        compile_blocks(make_transformer())


def test_sampling_compiled(tmp_path: Path, pipeline: Any, run: Run) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    options = ("--classes", "pong", "--seeds", "0", "--steps", "2", "--device", "cpu", "--compile")
    code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    assert (tmp_path / "out" / "pong" / "0.mp4").exists()
    code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / "other", *options, "--cache", "pab")
    assert code == 2
    assert stderr.strip() == "error: cache is pab, which does not work with compiled blocks; allowed: taylorseer"
