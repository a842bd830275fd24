"""The floor: the matrix products and convolutions of a pass, back to back, and nothing else.

Legend: M rows (all axes of an input except the last), I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_CONV_FIELDS = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True, eq=False)
class Product:
    """One call of a linear layer or a convolution."""

    input_shape: tuple[int, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    output_shape: tuple[int, ...]
    channels_last: bool = False
    convolution: dict[str, Any] | None = field(default=None)
    """Stride, padding, dilation and groups; None for a linear layer."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates: each output value is a sum over all axes of the weight except the first."""
        return math.prod(self.output_shape) * math.prod(self.weight.shape[1:])


class _Recorder(TorchFunctionMode):
    """Records every call of a linear layer or a 2-D convolution, in any code that runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func is F.linear or func is F.conv2d:
            self._record(func, args, given, result)
        return result

    def _record(self, func: Any, args: Sequence[Any], given: dict[str, Any], result: torch.Tensor) -> None:
        x, weight = args[:2]
        bias = args[2] if len(args) > 2 else given.get("bias")
        convolution, last = None, False
        if func is F.conv2d:
            convolution = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            convolution |= dict(zip(_CONV_FIELDS, args[3:], strict=False)) | {
                name: value for name, value in given.items() if name in _CONV_FIELDS
            }
            last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        detached = None if bias is None else bias.detach()
        product = Product(tuple(x.shape), weight.detach(), detached, tuple(result.shape), last, convolution)
        self.products.append(product)


def record(run: Callable[[], Any]) -> list[Product]:
    """The products of a call, in order. Those of compiled code and int8 layers are not seen."""
    with torch.no_grad(), _Recorder() as recorder:
        run()
    return recorder.products


def total_macs(products: Sequence[Product]) -> int:
    """Multiply-accumulates of all products."""
    return sum(product.macs for product in products)


class Floor:
    """Runs recorded products on inputs of the same shapes, with the same weights."""

    def __init__(self, products: Sequence[Product], dtype: torch.dtype, backward: bool = False) -> None:
        """Allocates the inputs; inputs of one shape share a tensor.

        Args:
            products: as returned by `record`.
            dtype: type of the products; weights of another type are converted now.
            backward: whether each product is followed by the two products of its backward pass.
        """
        self.macs = total_macs(products) * (3 if backward else 1)
        self._backward = backward
        tensors: dict[tuple[Any, ...], torch.Tensor] = {}
        weights: dict[tuple[Any, ...], torch.Tensor] = {}

        def filled(shape: tuple[int, ...], last: bool, device: torch.device) -> torch.Tensor:
            key = (shape, last)
            if key not in tensors:
                tensor = torch.randn(shape, device=device).to(dtype)
                tensors[key] = tensor.contiguous(memory_format=torch.channels_last) if last else tensor
            return tensors[key]

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            key = (tensor.data_ptr(), tensor.shape)
            if key not in weights:
                weights[key] = tensor.to(dtype)
            return weights[key]

        self._calls = []
        for product in products:
            device = product.weight.device
            x = filled(product.input_shape, product.channels_last, device)
            gradient = filled(product.output_shape, product.channels_last, device) if backward else None
            bias = None if product.bias is None else converted(product.bias)
            self._calls.append((x, converted(product.weight), bias, gradient, product.convolution))

    @torch.no_grad()
    def __call__(self) -> None:
        """Runs all products once."""
        for x, weight, bias, gradient, convolution in self._calls:
            if convolution is not None:
                F.conv2d(x, weight, bias, **convolution)
                if gradient is not None:
                    _convolution_backward(gradient, x, weight, convolution)
                continue
            F.linear(x, weight, bias)
            if gradient is not None:
                rows = gradient.flatten(0, -2)  # (M, O)
                rows @ weight  # (M, I): gradient of the input
                rows.T @ x.flatten(0, -2)  # (O, I): gradient of the weight


def _convolution_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, convolution: dict[str, Any]
) -> None:
    def pair(value: Any) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    stride, padding, dilation = (pair(convolution[name]) for name in ("stride", "padding", "dilation"))
    groups = convolution["groups"]
    torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )
