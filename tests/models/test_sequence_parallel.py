"""Processes that share clips have the outputs and gradients of one process, in float64 up to its rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import random_transformer
from models.passes import batch, fresh_model, gradients, process_group
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import spawn

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.models import blocks
from lavita.models.compilation import compile_blocks
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.sequence_parallel import SequenceGroup, SharedClip, open_group
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.parallel import ParallelModel

# 5 frames and 9 places, or 10 with a condition among them: neither 2 nor 4 processes divide all of them.
SIZES: dict[str, Any] = {"num_frames": 5, "sample_size": 6}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "classes": ({"num_classes": 3}, 0),
    "images of their own classes": ({"num_classes": 3}, 2),
    "images of a text": ({"text_dim": 5, "temporal_position": "rope"}, 1),
    "images of their own words": ({"text_dim": 5, "text_tokens": 6}, 2),
    "images without a condition": ({"temporal_position": "absolute_input"}, 4),
    "tokens": ({"conditioning": "all_tokens"}, 0),
    "tokens and images": ({"conditioning": "all_tokens", "num_classes": 3, "temporal_position": "rope"}, 1),
    "tubes": ({"patch_embedding": "compression", "tube_size": 2, "num_frames": 6}, 0),
    "given frames": ({"given_frames": ["first"]}, 0),
    "given tubes": (
        {"given_frames": ["first"], "patch_embedding": "compression", "num_frames": 6, "conditioning": "all_tokens"},
        0,
    ),
}
VARIANTS = (1, 2, 3, 4)


def inputs_of(model: LavitaTransformer3DModel, num_images: int, seed: int) -> dict[str, Any]:
    """Two clips in float64."""
    given = batch(model, num_images, seed)
    if model.config["given_frames"]:
        given["given"] = torch.zeros(given["latents"].shape[:2], dtype=torch.bool)
        given["given"][0, [0, 3]] = True
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs from token to token."""
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype).view_as(output[0])
    return (weights * output.square()).mean()


def alone(model: LavitaTransformer3DModel, clips: list[dict[str, Any]]) -> tuple[list[torch.Tensor], Any]:
    """Outputs for several batches, and the gradients of the mean of their losses, in one process."""
    model.zero_grad()
    outputs = [model(**given).sample for given in clips]
    torch.stack([loss_of(output) for output in outputs]).mean().backward()
    return [output.detach() for output in outputs], gradients(model)


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str, bound: float = 1e-12) -> None:
    assert torch.isfinite(found).all(), what
    distance, scale = (found - expected).norm().item(), expected.norm().item()
    assert distance <= bound * scale, (what, distance, scale)
    if "weight" in what:
        assert scale > 0, what


def compare(team: Processes, parallel: Literal["ddp", "fsdp"], fields: dict[str, Any], num_images: int) -> None:
    """Compares a model that groups share, each with its own clips, with one that has all clips to itself."""
    model = random_transformer(**{**SIZES, **fields}).double().train()
    clips = [inputs_of(model, num_images, seed) for seed in range(team.count)]
    outputs, expected = alone(model, clips)
    model.zero_grad()
    shared = ParallelModel(model, parallel, team, torch.device("cpu"))
    output = shared(**clips[team.rank])
    loss_of(output).backward()
    assert_near(output.detach(), outputs[team.rank], f"{fields}: output")
    for name, gradient in gradients(model).items():
        assert_near(gradient, expected[name], f"{fields}: {name}")


Plan = list[tuple[int, Literal["ddp", "fsdp"], list[str]]]
"""Processes of a group, how the model is parallel, and names of cases."""


def compare_cases(rank: int, meeting: str, count: int, plan: Plan) -> None:
    """Compares cases in one of several processes."""
    with process_group(rank, meeting, count):
        for members, parallel, names in plan:
            team = Processes(rank, count).grouped(members)
            for name in names:
                for variant in VARIANTS:
                    fields, num_images = CASES[name]
                    compare(team, parallel, {"variant": variant, **fields}, num_images)


def run_together(folder: Path, count: int, function: Any, *arguments: Any) -> None:
    spawn(function, (str(folder / "meeting"), count, *arguments), nprocs=count)


def test_two_processes_share_a_clip(tmp_path: Path) -> None:
    plan: Plan = [(2, "ddp", ["classes", "images of their own words", "tokens and images"])]
    run_together(tmp_path, 2, compare_cases, plan)


@pytest.mark.slow
def test_four_processes_share_clips(tmp_path: Path) -> None:
    plan: Plan = [
        (4, "ddp", list(CASES)),
        (2, "ddp", list(CASES)),
        (2, "fsdp", ["classes", "tokens and images"]),
        (4, "fsdp", ["given tubes"]),
    ]
    run_together(tmp_path, 4, compare_cases, plan)


def compare_ways(rank: int, meeting: str, count: int) -> None:
    """Checkpointed, compiled, bf16, without temporal layers, with computed vectors."""
    with process_group(rank, meeting, count):
        group = open_group(Processes(rank, count).grouped(count), torch.device("cpu"))
        mix = torch.compile(blocks.TransformerBlock._mix, backend="aot_eager", fullgraph=True, dynamic=False)
        blocks.compiled_mix = lambda: mix  # type: ignore[assignment]
        for variant in VARIANTS:
            outcomes = []
            for way in ("plain", True, "cheap", "compiled"):
                model = random_transformer(**SIZES, variant=variant, num_classes=3, num_blocks=4).double().train()
                model.sequence_group = group
                if way == "compiled":
                    compile_blocks(model)
                elif way != "plain":
                    checkpoint_blocks(model, way)  # type: ignore[arg-type]
                outcomes.append(alone(model, [inputs_of(model, 2, 0)]))
            for outputs, found in outcomes[1:]:
                assert_near(outputs[0], outcomes[0][0][0], "output")
                for name, gradient in found.items():
                    assert_near(gradient, outcomes[0][1][name], name)

            model = random_transformer(**SIZES, variant=variant, num_classes=3)
            given = batch(model)
            vectors = model.modulate(given["timesteps"][:1], given["class_labels"])
            assert vectors is not None
            computed = {**given, "modulation": [vector[0] for vector in vectors], "timesteps": given["timesteps"][0]}
            ways: list[dict[str, Any]] = [{**given, "use_temporal": False}, computed]
            for options in ways:
                results = []
                for chosen in (None, group):
                    model.sequence_group = chosen
                    with torch.no_grad():
                        results.append(model(**options).sample)
                assert_near(results[1], results[0], "output", 1e-6)
            results = []
            for chosen in (None, group):
                model.sequence_group = chosen
                with torch.autocast("cpu", torch.bfloat16):
                    results.append(alone(model, [given])[0][0].float())
            assert_near(results[1], results[0], "bf16", 2e-2)


@pytest.mark.slow
def test_checkpointing_compilation_and_bf16(tmp_path: Path) -> None:
    run_together(tmp_path, 2, compare_ways)


# --- in one process


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9])
def test_every_frame_belongs_to_one_process(count: int) -> None:
    x = torch.randn(2, 10, 3)
    parts = [SharedClip(SequenceGroup("", rank, count), 5).own(x, unit=2) for rank in range(count)]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined[:, :10], x) and not joined[:, 10:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_process_computes_its_part_of_the_tokens(variant: int) -> None:
    """Without data: the tokens that the linear layers see."""
    seen: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fresh_model(num_frames=8, variant=variant, num_blocks=4)
        for block in model.blocks:
            mlp = block.get_submodule("mlp")
            mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1:3].numel()))
        for group in (None, SequenceGroup("", 0, 4)):
            model.sequence_group = group
            model(torch.zeros(1, 8, 4, 8, 8), torch.zeros(1, dtype=torch.long))
    assert seen == [8 * 16] * 4 + [8 * 16 // 4] * 4


def test_groups_of_processes() -> None:
    ranks = [Processes(rank, 6).grouped(3) for rank in range(6)]
    assert [(team.rank, team.member) for team in ranks] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert {(team.count, team.members) for team in ranks} == {(2, 3)}
    assert [team.is_first for team in ranks] == [True, *[False] * 5]
    assert [team.everyone for team in ranks] == [Processes(rank, 6) for rank in range(6)]
    assert ranks[4].grouped(2) == replace(ranks[4], rank=2, count=3, member=0, members=2)
    assert [team.share("abcd") for team in ranks[2:4]] == ["ac", "bd"]
    assert Processes().grouped(1) == Processes()


@pytest.mark.parametrize(
    ("processes", "members", "message"),
    [
        (1, 2, r"sequence_parallel is 2, but must divide the processes \(1\); start several with torchrun"),
        (4, 3, r"sequence_parallel is 3, but must divide the processes \(4\)$"),
        (4, 0, r"sequence_parallel is 0, but must divide the processes \(4\)$"),
    ],
)
def test_groups_that_do_not_fit_are_refused(processes: int, members: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Processes(0, processes).grouped(members)
