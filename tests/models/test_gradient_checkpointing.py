"""Gradient checkpointing changes what is kept between the passes, and not one bit of the gradients."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from conftest import MakeTransformer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lavita.core.processes import Processes
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.parallel import ParallelModel

Gradients = dict[str, torch.Tensor]
KINDS: tuple[Checkpointing, ...] = (True, "cheap")

every_kind = pytest.mark.parametrize(
    ("variant", "conditioning", "patch_embedding", "temporal_position"),
    list(itertools.product((1, 2, 3, 4), ("s_adaln", "all_tokens"), ("uniform", "compression"), ("absolute", "rope"))),
)
bf16 = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


class CountOperations(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def batch(model: LavitaTransformer3DModel, num_images: int, seed: int = 0) -> dict[str, Any]:
    """Two clips, and conditions of all frames that have their own."""
    random = torch.Generator().manual_seed(seed)
    frames, size = model.config["num_frames"] + num_images, model.config["sample_size"]
    rows = (2, 1 + num_images) if num_images else (2,)
    given: dict[str, Any] = {
        "latents": torch.randn(2, frames, 4, size, size, generator=random),
        "timesteps": torch.tensor([3, 900]),
        "num_images": num_images,
    }
    if model.config["num_classes"]:
        given["class_labels"] = torch.randint(3, rows, generator=random)
    if model.config["text_dim"]:
        given["text_embeds"] = torch.randn(*rows, model.config["text_dim"], generator=random)
    return given


def backward(network: nn.Module, given: dict[str, Any], bf16: bool) -> torch.Tensor:
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = network(**given).sample
    output.float().square().mean().backward()
    return output.detach()


def gradients(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = whole.clone()
    return found


def assert_same(mine: Gradients, expected: Gradients) -> None:
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(mine[name], gradient), name


@bf16
@pytest.mark.parametrize("fields", [{}, {"num_classes": 3}, {"text_dim": 5}], ids=["nothing", "classes", "texts"])
@every_kind
def test_gradients_are_the_same_to_the_bit(
    variant: int,
    conditioning: str,
    patch_embedding: str,
    temporal_position: str,
    fields: dict[str, int],
    bf16: bool,
    make_transformer: MakeTransformer,
) -> None:
    model = make_transformer(
        variant=variant,
        conditioning=conditioning,
        patch_embedding=patch_embedding,
        temporal_position=temporal_position,
        num_frames=4,
        **fields,
    ).train()
    for num_images in (0,) if patch_embedding == "compression" else (0, 2):
        given = batch(model, num_images)
        output = backward(model, given, bf16)
        expected = gradients(model)
        for kind in KINDS:
            checkpoint_blocks(model, kind)
            assert torch.equal(backward(model, given, bf16), output)
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
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, _: runs.append(module))
    attentions = [block.attn for block in model.blocks]
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    backward(model, batch(model, 0), bf16=False)
    assert runs == [*attentions, *reversed(attentions)]
    runs.clear()
    with torch.no_grad():
        model(**batch(model, 0))
    assert runs == attentions


# --- distributed


def in_process(rank: int, meeting: str, kind: Literal["ddp", "fsdp"], bf16: bool) -> None:
    """Compares with and without in one of two processes, each on a batch of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    sizes = {"sample_size": 8, "num_frames": 2, "hidden_size": 32, "num_blocks": 2, "num_heads": 2}
    for variant in (1, 2, 3, 4):
        outcomes = []
        for checkpointing in (False, True):
            torch.manual_seed(1)
            model = LavitaTransformer3DModel(**sizes, variant=variant, num_classes=3).train()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            if checkpointing:
                model.enable_gradient_checkpointing()
            parallel = ParallelModel(model, kind, Processes(rank, 2), torch.device("cpu"))
            for step in range(2):  # the second one meets what the first has sharded or bucketed again
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    output = parallel(**batch(model, 1, seed=2 * step + rank))
                output.float().square().mean().backward()
            outcomes.append(gradients(model))
        assert_same(outcomes[1], outcomes[0])
    dist.barrier()  # gloo may hang where one process leaves while the other is still at work
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bf16"), [("ddp", False), ("fsdp", True)])
def test_with_ddp_and_fsdp2(kind: str, bf16: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_process, (str(tmp_path / "meeting"), kind, bf16), nprocs=2)
