"""One training step: forward, loss, backward, clipping, AdamW, moving average, as in `lavita train`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed.baselines import PlainModel
from benchmarks.speed.machine import COPY, PEAK, large_copy, square_product
from benchmarks.speed.peaks import Candidate, measure_peaks
from benchmarks.speed.products import Floor, record
from benchmarks.speed.setup import Setup, available_memory, build_model, model_inputs, set_compiled
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.progress import Progress
from lavita.models.compilation import compile_blocks
from lavita.models.diffusion import GaussianDiffusion
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.studies.memory import Setting, training_memory
from lavita.training.ema import EMA
from lavita.training.optimizers import make_optimizers

FLOOR = "floor: the products alone"
OURS = "ours, eager"
COMPILED = "ours, compiled"
CHECKPOINTED = "ours, checkpointing"
CHEAP = "ours, cheap checkpointing"
PLAIN = "plain eager"
UPDATE = "clip, AdamW and average alone"
# Clipping reads the gradients, and reads and writes them; AdamW reads four tensors and writes three; the average reads
# two and writes one.
UPDATE_BYTES = 4 * (3 + 7 + 3)
_KINDS: dict[str, Checkpointing] = {CHECKPOINTED: True, CHEAP: "cheap"}
# Plain attention and its copies keep more than ours does.
_HEADROOM = {PLAIN: 1.5}
NOTES = {
    CHECKPOINTED: "a block keeps its input only, and computes the rest again",
    CHEAP: "a block keeps its products, and computes the rest again",
    PLAIN: "conditions repeated a frame and a place, attention's weights in full; the same loss and update",
    UPDATE: "a part of every step",
}


def predicted_memory(setup: Setup, kind: Checkpointing = False) -> int:
    """Bytes of a step's peak, by a rehearsal without numbers."""
    setting = Setting(gradient_checkpointing=kind, precision=setup.precision)
    return training_memory(setup.config, setup.batch_size, setting=setting).total


def candidates(setup: Setup) -> tuple[list[str], list[str]]:
    """Who takes part, and notes on those who would not fit into the memory that is free now."""
    free = available_memory(setup.torch_device)
    names = [OURS, *([COMPILED] if setup.compiled else []), CHECKPOINTED, CHEAP, PLAIN, UPDATE]
    chosen, notes, needs = [], [], {}
    for name in names:
        kind = True if name == UPDATE else _KINDS.get(name, False)
        if kind not in needs:
            needs[kind] = predicted_memory(setup, kind)
        need = needs[kind] * _HEADROOM.get(name, 1.0)
        if free is not None and need > 0.9 * free:
            notes.append(f"{name} was left out: it needs about {need / 2**30:.1f} GiB of {free / 2**30:.1f} free ones.")
        else:
            chosen.append(name)
    if not set(chosen) & {OURS, CHECKPOINTED, CHEAP}:
        raise ValueError(f"preset is {setup.preset}, whose training does not fit into memory here: {notes[0]}")
    return chosen, notes


class Trainer:
    """A model in training on one batch of random latents, with everything that a run has."""

    def __init__(self, setup: Setup) -> None:
        """Builds it."""
        self.setup = setup
        self.model = build_model(setup).requires_grad_(True).train()
        self.parameters = list(self.model.parameters())
        self.optimizers = make_optimizers(self.model, "adamw", 1e-4, 0.0)
        self.ema, self.diffusion = EMA(self.model, 0.9999), GaussianDiffusion()
        self.latents, self.timesteps, self.labels = model_inputs(setup)
        self.noise = torch.randn_like(self.latents)
        self._gradients: list[torch.Tensor] = []

    def forward(self) -> torch.Tensor:
        """Of our model, on noisy latents."""
        noisy = self.diffusion.q_sample(self.latents, self.timesteps, self.noise)
        output: torch.Tensor = self.model(noisy, self.timesteps, self.labels).sample
        return output

    def plain(self) -> torch.Tensor:
        """Of the plain model."""
        weights = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        noisy = self.diffusion.q_sample(self.latents, self.timesteps, self.noise)
        return PlainModel(weights, self.setup.config)(noisy, self.timesteps, self.labels)

    def step(self, forward: Callable[[], torch.Tensor]) -> None:
        """One optimizer step."""
        with self.setup.autocast():
            output = forward()
        losses = self.diffusion.losses(output, self.latents, self.timesteps, self.noise).total
        losses.mean().backward()
        self._finish()

    def update(self) -> None:
        """The end of a step alone, with gradients of zero."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._finish()

    def configure(self, name: str) -> Callable[[], Any]:
        """What to call for a candidate."""
        if name == UPDATE:
            return self.update
        if name == PLAIN:
            return lambda: self.step(self.plain)
        if name == COMPILED:
            compile_blocks(self.model)

        def run() -> None:
            self.model.disable_gradient_checkpointing()
            checkpoint_blocks(self.model, _KINDS.get(name, False))
            set_compiled(self.model, name == COMPILED)
            self.step(self.forward)

        return run

    def state(self) -> list[torch.Tensor]:
        """What an optimizer and the average hold."""
        states = [values for optimizer in self.optimizers for values in optimizer.state.values()]
        return [*self.ema.weights.values(), *(tensor for values in states for tensor in values.values())]

    def _finish(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(1)


def make_case(name: str, setup: Setup) -> Case:
    """A candidate with a trainer of its own; its first call makes the optimizer's state."""
    trainer = Trainer(setup)
    kept = [trainer.latents, trainer.noise]
    return Case(trainer.configure(name), [trainer.model], kept, warm=True, states=trainer.state)


def run(setup: Setup) -> Section:
    """Times and peak memory of a training step."""
    names, notes = candidates(setup)
    measured = [name for name in names if name != UPDATE] if setup.memory else []
    progress = Progress("training: run", num_timings(len(names) + 3, setup.repeats) + len(measured))
    memory = measure_peaks("training", measured, setup, progress)
    trainer = Trainer(setup)
    with setup.autocast():
        products = record(trainer.forward)
    floor = Floor(products, setup.dtype, backward=True)
    square, square_macs = square_product(setup.torch_device, setup.dtype)
    copy, copied = large_copy(setup.torch_device)
    runs: dict[str, Callable[[], Any]] = {FLOOR: floor, **{name: trainer.configure(name) for name in names}}
    runs |= {PEAK: square, COPY: copy}
    seconds = interleave(runs, setup.repeats, setup.torch_device, progress)
    first = next(name for name in names if name != UPDATE)
    rows = [Row(FLOOR, seconds[FLOOR], floor.macs)]
    for name in names:
        macs = floor.macs if name in (OURS, COMPILED) else None
        compared = None if name == first else first
        rows.append(Row(name, seconds[name], macs, FLOOR, compared, memory.get(name), NOTES.get(name, "")))
    rows += [Row(PEAK, seconds[PEAK], square_macs), Row(COPY, seconds[COPY])]
    notes = [
        "The floor is the linear layers' and the patch convolution's products of the forward pass and the two of each "
        "one's backward pass, back to back.",
        *notes,
    ]
    facts: dict[str, Any] = {"num_tokens": setup.num_tokens, "macs": floor.macs}
    if UPDATE in names:
        moved = UPDATE_BYTES * sum(parameter.numel() for parameter in trainer.parameters)
        pairs = zip(seconds[UPDATE], seconds[COPY], strict=True)
        share = statistics.median([moved / mine / (copied / other) for mine, other in pairs])
        facts["update_share_of_bandwidth"] = share
        notes.append(
            f"{UPDATE}: {UPDATE_BYTES} bytes a parameter have to be moved, which it does at {share:.0%} of the "
            "bandwidth of the large copy. More than 100% is possible: a small state fits into a cache, and a copy may "
            "have to read what it overwrites, which is not counted."
        )
    return Section("training", "A training step", "one step on the batch", rows, facts, notes, PEAK)
