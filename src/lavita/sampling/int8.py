"""8-bit inference on CPUs: the linear layers of the blocks as products of integers.

Each row of a weight (an output channel) is `scale * q`, q in -127..127. Each token is quantized at run time from its
own range [min, max] to 0..L, so that its result does not depend on the other tokens:

    x = min + step * u,  step = (max - min) / L,  u = round((x - min) / step)
    W x + b = step * scale * (q u) + min * scale * sum(q) + b

The sum q u is exact, since it adds integers; everything after it is float32. Embedders, S-AdaLN and decoder stay in
float: they are a small part of the products, but their errors would reach the output unattenuated.

Legend: M tokens, I input features, O output features.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import nn

from lavita.models.blocks import TransformerBlock
from lavita.models.transformer import LavitaTransformer3DModel

# A step below this is raised to it, so that 1 / step is still finite in float32.
_LEAST_STEP = torch.finfo(torch.float32).tiny
UNSAVED = "the model is quantized to int8 and cannot be saved: save it before it is quantized"


def token_levels() -> int:
    """The largest level L on this machine: 255 with VNNI or AMX, 127 otherwise.

    The older instruction, vpmaddubsw, adds two products of bytes in 16 bits, and saturates above 32767: 2 * 127 * 127
    fits, 2 * 255 * 127 does not.
    """
    return 255 if torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported() else 127


class PackedWeight:
    """An int8 weight in oneDNN's layout, in which torch cannot copy, save or compile a tensor.

    Compiled code therefore receives a tensor with the number of the weight. The weight lives as long as a module holds
    this object; a copy of a module shares it.
    """

    _numbers = itertools.count()
    _alive: ClassVar[WeakValueDictionary[int, PackedWeight]] = WeakValueDictionary()

    def __init__(self, quantized: torch.Tensor) -> None:
        """Packs int8 (O, I)."""
        self.tensor: torch.Tensor = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.number = next(self._numbers)
        self._alive[self.number] = self

    def __deepcopy__(self, memo: dict[int, object]) -> PackedWeight:
        return self

    def __reduce__(self) -> NoReturn:
        raise ValueError(UNSAVED)

    @classmethod
    def at(cls, number: int) -> torch.Tensor:
        """Looks up a weight by its number."""
        return cls._alive[number].tensor


@torch.library.custom_op("lavita::int8_product", mutates_args=(), device_types="cpu")
def int8_product(tokens: torch.Tensor, weight_number: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Computes `tokens @ (scale * q).T`.

    As a custom operator, it takes the weight as an input of the compiled graph, so that blocks of one kind share it.

    Args:
        tokens: uint8 (M, I), in 0..`token_levels()`.
        weight_number: number of the `PackedWeight` q, (O, I); int64 ().
        weight_scale: float32 (O,).

    Returns:
        float32 (M, O).
    """
    weight, zeros = PackedWeight.at(int(weight_number)), torch.zeros(weight_scale.shape[0], dtype=torch.int64)
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        tokens, 1.0, 0, weight, weight_scale, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
    )
    return product


@int8_product.register_fake
def _(tokens: torch.Tensor, weight_number: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    return tokens.new_empty((tokens.shape[0], weight_scale.shape[0]), dtype=torch.float32)


class Int8Linear(nn.Module):
    """`nn.Linear` in 8-bit integers, for inference."""

    weight_number: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Quantizes the weights of `linear`, and keeps no reference to it."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.levels = token_levels()
        with torch.no_grad():
            weight = linear.weight.float()
            scale = (weight.abs().amax(dim=1) / 127).clamp(min=_LEAST_STEP)  # (O,)
            quantized = (weight / scale[:, None]).round().to(torch.int8)  # (O, I), in -127..127
            bias = torch.zeros(self.out_features) if linear.bias is None else linear.bias.float().clone()
        self.packed_weight = PackedWeight(quantized)  # the only copy of the weight
        self.register_buffer("weight_number", torch.tensor(self.packed_weight.number), persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("weight_sum", scale * quantized.sum(dim=1), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float (..., I) to (..., O) of the same dtype; everything around the product is computed in float32."""
        tokens = x.reshape(-1, self.in_features).float()  # (M, I)
        least, most = tokens.amin(dim=-1, keepdim=True), tokens.amax(dim=-1, keepdim=True)  # (M, 1); aminmax is slow
        step = ((most - least) / self.levels).clamp(min=_LEAST_STEP)
        levels = (tokens - least).div_(step).round_().to(torch.uint8)  # (M, I)
        product = int8_product(levels, self.weight_number, self.weight_scale)  # (M, O)
        out = product.mul_(step).addcmul_(least, self.weight_sum).add_(self.bias)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, levels={self.levels}"

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise ValueError(UNSAVED)


def quantize_int8(model: LavitaTransformer3DModel) -> LavitaTransformer3DModel:
    """Quantizes the linear layers of a model's blocks to 8 bits, in place; the rest stays float.

    For inference on x86 CPUs: `quantize_int8(pipe.transformer)`. The weights of attention and MLPs then take a quarter
    of the memory; the float weights are freed. Merge adapters before.

    Args:
        model: model on a CPU, in eval mode. Its parameters get `requires_grad=False`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is in training mode, on another device, quantized already, or has unmerged adapters, or
            if torch was built without oneDNN.
    """
    if model.training:
        raise ValueError("the model is in training mode, but int8 is for inference: call eval() first")
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}, but int8 is for CPUs")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("int8 needs oneDNN, which this build of torch lacks")
    layers = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, TransformerBlock)
        attentions = {"attn": block.attn, "temporal_attn": block.temporal_attn, "cross_attn": block.cross_attn}
        parents = {name: module for name, module in attentions.items() if module is not None} | {"mlp": block.mlp}
        for parent_name, parent in parents.items():
            for name, layer in parent.named_children():
                if isinstance(layer, Int8Linear):
                    raise ValueError("the model is already quantized to int8")
                if type(layer) is not nn.Linear:
                    kind = type(layer).__name__
                    raise ValueError(
                        f"blocks.{index}.{parent_name}.{name} is a {type(layer).__module__}.{kind}, but must be a "
                        "plain linear layer: merge adapters first"
                    )
                layers.append((parent, name))
    model.requires_grad_(False)
    for parent, name in layers:
        setattr(parent, name, Int8Linear(getattr(parent, name)))
    return model
