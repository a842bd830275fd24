"""One training step: forward, loss, backward, clipping, AdamW, moving average, as in `lavita train`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch

from benchmarks.speed.baselines import PlainModel
from benchmarks.speed.machine import COPY, PEAK, large_copy, square_product
from benchmarks.speed.peaks import Candidate, measure_peaks
from benchmarks.speed.products import Floor, record
from benchmarks.speed.setup import Setup, build_model, set_compiled
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.progress import Progress
from lavita.models.compilation import compile_blocks
from lavita.models.gradient_checkpointing import Checkpointing, checkpoint_blocks
from lavita.studies.memory import Setting, available_memory, training_memory
from lavita.training.batches import random_batch
from lavita.training.config import TrainConfig
from lavita.training.state import TrainState
from lavita.training.step import train_step, update

FLOOR = "floor: the products alone"
OURS = "ours, eager"
COMPILED = "ours, compiled"
CHECKPOINTED = "ours, checkpointing"
CHEAP = "ours, cheap checkpointing"
PLAIN = "plain eager"
UPDATE = "clip, AdamW and average alone"
# Per parameter: the norm reads the gradient, clipping reads and writes it; AdamW reads four values and writes three;
# the moving average reads two and writes one.
UPDATE_BYTES = 4 * (3 + 7 + 3)
_KINDS: dict[str, Checkpointing] = {CHECKPOINTED: True, CHEAP: "cheap"}
# Attention weights in full and copies of the tokens need more memory than ours.
_HEADROOM = {PLAIN: 1.5}
NOTES = {
    CHECKPOINTED: "a block keeps only its input and computes the rest again",
    CHEAP: "a block keeps its products and computes the rest again",
    PLAIN: "conditions repeated for every frame and token, attention weights in full; the same loss and update",
    UPDATE: "part of every step",
}


@lru_cache
def predicted_memory(setup: Setup, kind: Checkpointing = False) -> int:
    """Peak bytes of a step, predicted by a rehearsal on meta tensors."""
    setting = Setting(gradient_checkpointing=kind, precision=setup.precision)
    return training_memory(setup.config, setup.batch_size, setting=setting).total


def candidates(setup: Setup) -> tuple[list[str], list[str]]:
    """Names of the candidates that fit into the free memory, and notes on the others."""
    free = available_memory(setup.torch_device)
    names = [OURS, *([COMPILED] if setup.compiled else []), CHECKPOINTED, CHEAP, PLAIN, UPDATE]
    if free is None:
        return names, []
    chosen, notes = [], []
    for name in names:
        need = predicted_memory(setup, True if name == UPDATE else _KINDS.get(name, False)) * _HEADROOM.get(name, 1.0)
        if need > 0.9 * free:
            needed, left = need / 2**30, free / 2**30
            notes.append(f"{name} was left out: it needs about {needed:.1f} GiB, but {left:.1f} GiB are free.")
        else:
            chosen.append(name)
    if not set(chosen) & {OURS, CHECKPOINTED, CHEAP}:
        raise ValueError(f"preset is {setup.preset}, whose training does not fit into memory here: {notes[0]}")
    return chosen, notes


class Trainer:
    """A model in training on one batch of random latents."""

    def __init__(self, setup: Setup) -> None:
        """Builds the model, its training state and the batch."""
        self.setup = setup
        model, device = build_model(setup).requires_grad_(True).train(), setup.torch_device
        self.settings = TrainConfig(batch_size=setup.batch_size, precision=setup.precision)
        self.state = TrainState.build(model, self.settings, device)
        self.batch = random_batch(setup.config, setup.batch_size).part(0, setup.batch_size, device)

    def forward(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        """The output of our model, or of another one that takes the same inputs."""
        batch = self.batch
        noisy = self.state.diffusion.q_sample(batch.latents, batch.timesteps, batch.noise)
        with self.setup.autocast():
            if model is None:
                output: torch.Tensor = self.state.model(noisy, batch.timesteps, batch.class_labels).sample
            else:
                output = model(noisy, batch.timesteps, batch.class_labels)
        return output

    def step(self) -> None:
        """One optimizer step."""
        train_step(self.state, self.batch, self.settings)

    def plain_step(self) -> None:
        """One optimizer step with the forward pass of the plain model."""
        model, batch = self.state.model, self.batch
        plain = PlainModel(dict((*model.named_parameters(), *model.named_buffers())), self.setup.config)
        losses = self.state.diffusion.losses(self.forward(plain), batch.latents, batch.timesteps, batch.noise).total
        losses.mean().backward()
        update(self.state, losses.detach(), self.settings)

    def update_only(self) -> None:
        """The end of a step, with zero gradients."""
        for parameter, gradient in zip(self.state.parameters, self._zero_gradients, strict=True):
            parameter.grad = gradient
        update(self.state, torch.zeros(self.setup.batch_size), self.settings)

    @cached_property
    def _zero_gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(parameter) for parameter in self.state.parameters]

    def configure(self, name: str) -> Callable[[], Any]:
        """The function to call for a candidate."""
        if name == UPDATE:
            return self.update_only
        if name == PLAIN:
            return self.plain_step
        if name == COMPILED:
            compile_blocks(self.state.model)

        def run() -> None:
            self.state.model.disable_gradient_checkpointing()
            checkpoint_blocks(self.state.model, _KINDS.get(name, False))
            set_compiled(self.state.model, name == COMPILED)
            self.step()

        return run

    def state_tensors(self) -> list[torch.Tensor]:
        """The tensors of the optimizers and the moving average."""
        return [tensor for name, tensor in self.state.tensors().items() if not name.startswith("model.")]


def make_candidate(name: str, setup: Setup) -> Candidate:
    """A candidate with a trainer of its own; its first call allocates the state of the optimizer."""
    trainer = Trainer(setup)
    kept = [trainer.batch.latents, trainer.batch.noise]
    return Candidate(trainer.configure(name), [trainer.state.model], kept, warm=True, states=trainer.state_tensors)


def run(setup: Setup) -> Section:
    """Measures time and peak memory of a training step."""
    names, notes = candidates(setup)
    measured = [name for name in names if name != UPDATE] if setup.memory else []
    progress = Progress("training: run", num_timings(len(names) + 3, setup.repeats) + len(measured))
    memory = measure_peaks("training", measured, setup, progress)
    trainer = Trainer(setup)
    floor = Floor(record(trainer.forward), setup.dtype, backward=True)
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
        "The floor is the products of the linear layers and the patch convolution in the forward pass, and the two of "
        "each in the backward pass, back to back.",
        *notes,
    ]
    facts: dict[str, Any] = {"num_tokens": setup.num_tokens, "macs": floor.macs}
    if UPDATE in names:
        moved = UPDATE_BYTES * sum(parameter.numel() for parameter in trainer.state.parameters)
        pairs = zip(seconds[UPDATE], seconds[COPY], strict=True)
        share = statistics.median([moved / spent / (copied / other) for spent, other in pairs])
        facts["update_share_of_bandwidth"] = share
        notes.append(
            f"{UPDATE}: it has to move {UPDATE_BYTES} bytes per parameter, and does so at {share:.0%} of the bandwidth "
            "of the large copy. More than 100% is possible: a small state fits into a cache, and a copy may have to "
            "read what it overwrites, which is not counted."
        )
    return Section("training", "A training step", "one step on the batch", rows, facts, notes, PEAK)
