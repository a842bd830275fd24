"""Muon compared with torch's and with the singular value decomposition; which optimizer updates which parameter."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from conftest import MakeTransformer
from torch import nn

from lavita.training.optimizers import Muon, make_optimizers, orthogonalize


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_orthogonalized_matrices_keep_singular_vectors_and_level_singular_values(
    dtype: torch.dtype, tolerance: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24), (1, 16, 16)):
        matrices = torch.randn(shape, generator=rng)
        for matrix, result in zip(matrices, orthogonalize(matrices, dtype), strict=True):
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            levels = left.T @ result @ right.T  # diagonal where the singular vectors are kept
            assert (levels - levels.diag().diag()).abs().max() < tolerance
            assert levels.diag().min() > 0.6 and levels.diag().max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch_in_bfloat16(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=rng) for shape in ((8, 24), (24, 8), (8, 24))]
    parameters, reference_parameters = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    ours = Muon(parameters, lr=0.1, weight_decay=0.2, dtype=dtype)
    reference = torch.optim.Muon(
        reference_parameters, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for one, two in zip(parameters, reference_parameters, strict=True):
            one.grad = torch.randn(one.shape, generator=rng)
            two.grad = one.grad.clone()
        ours.step()
        reference.step()
    for tensor, one, two in zip(start, parameters, reference_parameters, strict=True):
        moved = (two - tensor).norm()
        assert (one - two).norm() < 0.03 * moved  # bfloat16 has 8 bits


def test_the_precision_of_the_training_is_that_of_the_iterations(make_transformer: MakeTransformer) -> None:
    moved: dict[str, torch.Tensor] = {}
    for precision in ("fp32", "bf16"):
        model = make_transformer()
        matrix = model.get_parameter("blocks.0.attn.qkv.weight")
        before = matrix.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        for optimizer in make_optimizers(model, "muon", learning_rate=0.1, weight_decay=0, precision=precision):
            optimizer.step()
        moved[precision] = matrix.detach() - before
    difference = (moved["bf16"] - moved["fp32"]).norm() / moved["fp32"].norm()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_a_gradient_a_step_is_the_decay(
    kind: Literal["adamw", "muon"], make_transformer: MakeTransformer
) -> None:
    """Decoupled weight decay (Loshchilov & Hutter 2019): w becomes w (1 - rate * decay)."""
    model = make_transformer(num_classes=3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in make_optimizers(model, kind, learning_rate=0.1, weight_decay=0.5):
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * 0.95, rtol=1e-6, atol=0, msg=name)


def test_every_parameter_has_one_optimizer(make_transformer: MakeTransformer) -> None:
    model = make_transformer(variant=3, num_classes=3)
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = sorted(names[id(parameter)] for parameter in muon.param_groups[0]["params"])
    by_adamw = [names[id(parameter)] for parameter in adamw.param_groups[0]["params"]]
    kinds = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "temporal_attn.proj", "temporal_attn.qkv")
    assert by_muon == [f"blocks.{block}.{kind}.weight" for block in range(2) for kind in kinds]
    assert sorted([*by_muon, *by_adamw]) == sorted(names.values())

    (only,) = make_optimizers(model, "adamw", 1e-3, 0.0)
    assert isinstance(only, torch.optim.AdamW)
    assert len(only.param_groups[0]["params"]) == len(names)
