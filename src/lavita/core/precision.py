"""Devices, and the precision that matrix products are computed in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is a GPU if there is one, each process of `torchrun` its own, else the CPU.

    Raises:
        ValueError: for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not available here; allowed: auto, cpu, cuda") from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (AMX or AVX-512 BF16 on a CPU).

    On a CPU the environment variable LAVITA_BF16 (`on` or `off`) overrules this, so that the tests can run on one
    processor as they would on another; `on` without the hardware is right, but slow.

    Raises:
        ValueError: if the variable has another value.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        forced = os.environ.get("LAVITA_BF16", "")
        if forced not in ("", "on", "off"):
            raise ValueError(f"LAVITA_BF16 is {forced!r}; allowed: on, off")
        return (
            forced == "on"
            if forced
            else bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        )
    return False


def low_precision(device: torch.device, precision: Precision) -> torch.dtype | None:
    """What matrix products are computed in, None for float32; `auto` asks the device.

    `auto` is bf16 where the device has it, else fp16 on a GPU, else float32.
    """
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def without_fp16(device: torch.device, precision: Precision) -> Precision:
    """What an autoencoder computes in where `precision` is asked for: its activations may overflow in fp16."""
    return "bf16" if low_precision(device, precision) == torch.bfloat16 else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Autocast to what `low_precision` says, or nothing."""
    dtype = low_precision(device, precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def store_linear_weights(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Keeps the linear layers of a module in what `autocast` turns their weights into at each evaluation.

    For inference: under autocast to `dtype` the outputs are the same to the bit, the weights take half the memory, and
    no evaluation reads them in float32 and writes them again.

    Args:
        module: changed in place; outside of autocast it works no more.
        dtype: as `low_precision` gives it; None changes nothing.
    """
    if dtype is None:
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
