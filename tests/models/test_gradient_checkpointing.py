"""Gradient checkpointing changes what is kept between the passes, and not one bit of the gradients."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import MakeTransformer, random_transformer
from models.passes import (
    CONDITIONS,
    Gradients,
    backward,
    batch,
    bf16,
    every_embedding,
    every_kind,
    gradients,
    process_group,
    run_in_two_processes,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lavita.core.processes import Processes
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.training.parallel import ParallelModel

KINDS: tuple[Checkpointing, ...] = (True, "cheap")


class CountOperations(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def assert_same(mine: Gradients, expected: Gradients) -> None:
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(mine[name], gradient), name


@pytest.mark.parametrize(
    ("given", "bf16"),
    [*((given, False) for given in CONDITIONS.values()), (CONDITIONS["classes"], True)],
    ids=[*(f"{name}-fp32" for name in CONDITIONS), "classes-bf16"],
)
@every_embedding
@every_kind
def test_gradients_are_the_same_to_the_bit(
    kind: dict[str, Any], patch_embedding: str, given: dict[str, int], bf16: bool, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(**kind, **given, patch_embedding=patch_embedding, num_frames=4).train()
    for num_images in (0,) if patch_embedding == "compression" else (0, 2):
        inputs = batch(model, num_images)
        output = backward(model, inputs, bf16)
        expected = gradients(model)
        for checkpointing in KINDS:
            checkpoint_blocks(model, checkpointing)
            assert torch.equal(backward(model, inputs, bf16), output)
            assert_same(gradients(model), expected)
            model.disable_gradient_checkpointing()


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_fused_attention_too(variant: int, make_transformer: MakeTransformer) -> None:
    """144 tokens a frame are more than the plain product takes."""
    model = make_transformer(variant=variant, sample_size=24).train()
    given = batch(model, 1)
    backward(model, given, bf16=False)
    expected = gradients(model)
    for kind in KINDS:
        checkpoint_blocks(model, kind)
        backward(model, given, bf16=False)
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("sample_size", [8, 24], ids=["plain-attention", "fused-attention"])
def test_cheap_is_what_is_no_matrix_product(sample_size: int, make_transformer: MakeTransformer) -> None:
    """The backward pass computes norms, GELU and gates again, but no linear layer and no attention."""
    counts = {}
    for kind in (False, "cheap", True):
        model = make_transformer(sample_size=sample_size).train()
        checkpoint_blocks(model, kind)
        with CountOperations() as counted:
            backward(model, batch(model, 0), bf16=False)
        counts[kind] = counted.counts
    products = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")
    assert {name: counts["cheap"][name] for name in products} == {name: counts[False][name] for name in products}
    assert counts[True]["addmm"] > counts[False]["addmm"]
    for name in ("native_layer_norm", "gelu"):
        assert counts["cheap"][name] == counts[True][name] > counts[False][name] > 0


@bf16
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_between_the_passes_a_block_keeps_its_input_alone(
    variant: int, bf16: bool, make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=variant, num_blocks=6, num_frames=4).train()
    model.enable_gradient_checkpointing()
    kept = []
    for count in (6, 4):
        del model.blocks[count:]
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> torch.Tensor:
            storages[tensor.data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
            model(**batch(model, 0))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    tokens = 2 * 4 * 16 * 32  # B F N D
    assert kept[0] - kept[1] == 2 * tokens * (2 if bf16 else 4)  # the residual stream is in autocast's precision


def test_each_block_runs_twice_in_training_and_once_in_sampling(make_transformer: MakeTransformer) -> None:
    model = make_transformer().train()
    runs: list[nn.Module] = []
    attentions = [model.get_submodule(f"blocks.{index}.attn") for index in range(2)]
    for attention in attentions:
        attention.register_forward_pre_hook(lambda module, _: runs.append(module))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    backward(model, batch(model, 0), bf16=False)
    assert runs == [*attentions, *reversed(attentions)]
    runs.clear()
    with torch.no_grad():
        model(**batch(model, 0))
    assert runs == attentions


# --- distributed


def compare_in_process(rank: int, meeting: str, parallel: Literal["ddp", "fsdp"], bf16: bool) -> None:
    """Compares gradients with and without checkpointing in one of two processes, each with its own batch."""
    with process_group(rank, meeting):
        for variant in (1, 2, 3, 4):
            outcomes = []
            for checkpointing in (False, True):
                model = random_transformer(variant=variant, num_classes=3).train()
                if checkpointing:
                    model.enable_gradient_checkpointing()
                network = ParallelModel(model, parallel, Processes(rank, 2), torch.device("cpu"))
                for step in range(2):  # the second step runs on parameters that the first has sharded or bucketed
                    model.zero_grad()
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        output = network(**batch(model, 1, seed=2 * step + rank))
                    output.float().square().mean().backward()
                outcomes.append(gradients(model))
            assert_same(outcomes[1], outcomes[0])


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "bf16"), [("ddp", False), ("fsdp", True)])
def test_with_ddp_and_fsdp2(parallel: str, bf16: bool, tmp_path: Path) -> None:
    run_in_two_processes(compare_in_process, tmp_path, parallel, bf16)
