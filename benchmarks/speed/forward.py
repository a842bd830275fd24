"""One evaluation of the model, by every implementation at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.speed.machine import PEAK, square_product
from benchmarks.speed.peaks import Case, measure_peaks, stored_bytes
from benchmarks.speed.plain import PlainModel
from benchmarks.speed.products import Floor, Product, record, total_macs
from benchmarks.speed.rivals import DIT_NOTE, LATTE_NOTE, make_dit, make_latte
from benchmarks.speed.setup import Setup, build_model, model_inputs, set_compiled
from benchmarks.speed.timing import Row, Section, interleave, timings
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
    HALVED: "the same weights rounded once, where autocast rounds them at every evaluation",
    PLAIN: "conditions repeated a frame and a place, attention's weights in full, tokens copied between the blocks",
    LATTE: LATTE_NOTE,
    DIT: DIT_NOTE,
}


def candidates(setup: Setup) -> list[str]:
    """Who takes part, beside the floor."""
    int8 = setup.device == "cpu" and torch.backends.mkldnn.is_available()
    halved = [HALVED] if setup.dtype != torch.float32 else []
    compiled = [COMPILED, *halved] if setup.compiled else halved
    quantized = ([INT8, INT8_COMPILED] if setup.compiled else [INT8]) if int8 else []
    return [OURS, *compiled, *quantized, PLAIN, LATTE, DIT]


@dataclass
class _Shared:
    """Models that several candidates use."""

    ours: LavitaTransformer3DModel | None = None
    int8: LavitaTransformer3DModel | None = None


def make_case(name: str, setup: Setup, shared: _Shared | None = None) -> Case:
    """A candidate, ready to run.

    Args:
        name: of `candidates`.
        setup: of the benchmark.
        shared: models that are there already, and where those that are made now are kept.
    """
    shared = shared or _Shared()
    inputs = model_inputs(setup)
    if name in (LATTE, DIT):
        rival = make_latte(setup.config) if name == LATTE else make_dit(setup.config)
        rival.model.to(setup.torch_device)
        return Case(_evaluation(setup, lambda: rival.run(*inputs)), [rival.model], list(inputs))
    if shared.ours is None:
        shared.ours = build_model(setup)
    model = shared.ours
    if name == PLAIN:
        plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), setup.config)
        return Case(_evaluation(setup, lambda: plain(*inputs)), [model], list(inputs))
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

    return Case(_evaluation(setup, run), [model], list(inputs), warm=compiled)


def _evaluation(setup: Setup, run: Callable[[], Any]) -> Callable[[], Any]:
    def evaluate() -> Any:
        with torch.no_grad(), setup.autocast():
            return run()

    return evaluate


def smallest_memory(setup: Setup, products: list[Product], *modules: nn.Module) -> int:
    """Weights, and the largest activation set: what a linear layer reads and writes, of all tokens, at its largest."""
    size = setup.dtype.itemsize
    activations = max(_values(product) * size for product in products)
    return stored_bytes(*modules) + activations


def _values(product: Product) -> int:
    return sum(torch.Size(shape).numel() for shape in (product.input_shape, product.output_shape))


def run(setup: Setup) -> Section:
    """Times and peak memory of a forward pass."""
    names = candidates(setup)
    progress = Progress("forward: run", timings(len(names) + 2, setup.repeats) + len(names) * setup.memory)
    memory = measure_peaks("forward", names, setup, progress) if setup.memory else {}
    shared = _Shared()
    cases = {name: make_case(name, setup, shared) for name in names}
    assert shared.ours is not None
    set_compiled(shared.ours, False)
    products = {name: record(cases[name].run) for name in (OURS, PLAIN, LATTE, DIT)}
    for name in memory:
        memory[name]["smallest"] = smallest_memory(setup, products[OURS], *cases[name].modules)
    floor = Floor(products[OURS], setup.dtype)
    square, square_macs = square_product(setup.torch_device, setup.dtype)
    runs: dict[str, Callable[[], Any]] = {
        FLOOR: floor,
        **{name: case.run for name, case in cases.items()},
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
        "The floor is the linear layers' and the patch convolution's products of our pass, in their order, on inputs "
        "of their shapes, the weights in the products' precision: no attention, no norms, no activations. 8-bit "
        "products can be quicker than it.",
        "Per product: times ours, over the multiply-accumulates of either one's own linear layers.",
    ]
    if setup.memory:
        notes.append(
            "Smallest memory: the weights as they are kept, and the largest activation set, what one linear layer "
            "reads and writes of all tokens."
        )
    return notes
