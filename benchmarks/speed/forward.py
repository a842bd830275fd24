"""One evaluation of the model by each implementation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.speed.baselines import DIT_NOTE, LATTE_NOTE, PlainModel, make_dit, make_latte
from benchmarks.speed.machine import PEAK, square_product
from benchmarks.speed.peaks import Candidate, measure_peaks, stored_bytes
from benchmarks.speed.products import Floor, Product, record, total_macs
from benchmarks.speed.setup import Setup, build_model, model_inputs, set_compiled
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.precision import store_linear_weights
from lavita.core.progress import Progress
from lavita.models.compilation import compile_blocks
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.int8 import quantize_int8

FLOOR = "floor: the products alone"
OURS = "ours, eager"
COMPILED = "ours, compiled"
HALVED = "ours, weights in bf16"
INT8 = "ours, int8"
INT8_COMPILED = "ours, int8, compiled"
PLAIN = "plain eager"
LATTE = "diffusers, Latte"
DIT = "diffusers, DiT, frame by frame"
NOTES = {
    HALVED: "weights rounded once and kept; autocast rounds the same weights at every evaluation",
    PLAIN: "conditions repeated for every frame and token, attention weights in full, tokens copied between blocks",
    LATTE: LATTE_NOTE,
    DIT: DIT_NOTE,
}


def candidates(setup: Setup) -> list[str]:
    """Names of the candidates, without the floor."""
    int8 = setup.device == "cpu" and torch.backends.mkldnn.is_available()
    halved = [HALVED] if setup.dtype != torch.float32 else []
    compiled = [COMPILED, *halved] if setup.compiled else halved
    quantized = ([INT8, INT8_COMPILED] if setup.compiled else [INT8]) if int8 else []
    return [OURS, *compiled, *quantized, PLAIN, LATTE, DIT]


@dataclass
class _Shared:
    """Models that several candidates share."""

    ours: LavitaTransformer3DModel | None = None
    int8: LavitaTransformer3DModel | None = None


def make_candidate(name: str, setup: Setup, shared: _Shared | None = None) -> Candidate:
    """A candidate that is ready to run.

    Args:
        name: one of `candidates`.
        setup: settings of the benchmark.
        shared: models that other candidates have built; those built now are added.
    """
    shared = shared or _Shared()
    inputs = model_inputs(setup)
    if name in (LATTE, DIT):
        baseline = make_latte(setup.config) if name == LATTE else make_dit(setup.config)
        baseline.model.to(setup.torch_device)
        return Candidate(_evaluation(setup, lambda: baseline.run(*inputs)), [baseline.model], list(inputs))
    if shared.ours is None:
        shared.ours = build_model(setup)
    model = shared.ours
    if name == PLAIN:
        plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), setup.config)
        return Candidate(_evaluation(setup, lambda: plain(*inputs)), [model], list(inputs))
    if name == HALVED:
        model = copy.deepcopy(model)
        store_linear_weights(model.blocks, setup.dtype)
    elif name in (INT8, INT8_COMPILED):
        if shared.int8 is None:
            shared.int8 = quantize_int8(copy.deepcopy(model))
        model = shared.int8
    compiled = name in (COMPILED, INT8_COMPILED)
    if compiled:
        compile_blocks(model)

    def run() -> Any:
        set_compiled(model, compiled)
        return model(*inputs).sample

    return Candidate(_evaluation(setup, run), [model], list(inputs), warm=compiled)


def _evaluation(setup: Setup, run: Callable[[], Any]) -> Callable[[], Any]:
    def evaluate() -> Any:
        with torch.no_grad(), setup.autocast():
            return run()

    return evaluate


def smallest_memory(setup: Setup, products: list[Product], *modules: nn.Module) -> int:
    """Bytes of the weights and of the largest activation set: inputs and outputs of one linear layer for all tokens."""
    values = max(math.prod(product.input_shape) + math.prod(product.output_shape) for product in products)
    return stored_bytes(*modules) + values * setup.dtype.itemsize


def run(setup: Setup) -> Section:
    """Measures time and peak memory of a forward pass."""
    names = candidates(setup)
    progress = Progress("forward: run", num_timings(len(names) + 2, setup.repeats) + len(names) * setup.memory)
    memory = measure_peaks("forward", names, setup, progress) if setup.memory else {}
    shared = _Shared()
    ready = {name: make_candidate(name, setup, shared) for name in names}
    assert shared.ours is not None
    set_compiled(shared.ours, False)
    products = {name: record(ready[name].run) for name in (OURS, PLAIN, LATTE, DIT)}
    for name in memory:
        memory[name]["smallest"] = smallest_memory(setup, products[OURS], *ready[name].modules)
    floor = Floor(products[OURS], setup.dtype)
    square, square_macs = square_product(setup.torch_device, setup.dtype)
    runs: dict[str, Callable[[], Any]] = {
        FLOOR: floor,
        **{name: candidate.run for name, candidate in ready.items()},
        PEAK: square,
    }
    seconds = interleave(runs, setup.repeats, setup.torch_device, progress)
    own = total_macs(products[OURS])
    rows = [Row(FLOOR, seconds[FLOOR], own)]
    for name in names:
        macs = total_macs(products[name]) if name in products else own
        ours = None if name == OURS else OURS
        rows.append(Row(name, seconds[name], macs, FLOOR, ours, memory.get(name), NOTES.get(name, "")))
    rows.append(Row(PEAK, seconds[PEAK], square_macs))
    facts = {"num_tokens": setup.num_tokens, "num_products": len(products[OURS]), "macs": own}
    facts |= {"weight_bytes": stored_bytes(shared.ours)}
    return Section("forward", "A forward pass", "one evaluation of the batch", rows, facts, _notes(setup), PEAK)


def _notes(setup: Setup) -> list[str]:
    notes = [
        "The floor is the products of the linear layers and the patch convolution of our pass, in order, on inputs of "
        "the same shapes, with weights in the precision of the products: no attention, norms or activations. 8-bit "
        "products can be faster than it.",
        "Per product: times ours, each time divided by the multiply-accumulates of the model's own linear layers.",
    ]
    if setup.memory:
        notes.append(
            "Smallest memory: the weights as they are stored and the largest activation set, the input and output of "
            "one linear layer for all tokens."
        )
    return notes
