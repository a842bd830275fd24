"""Predicted memory: against torch's own allocator at work, the tensors of real steps, and sums by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline

from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.gradient_checkpointing import checkpoint_blocks
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.pipeline import LavitaPipeline
from lavita.studies.live_storages import (
    ACTIVATIONS,
    AUTOENCODER,
    AVERAGE,
    BATCH,
    EXCHANGE,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
)
from lavita.studies.memory import Precision, Setting, sampling_memory, training_memory
from lavita.training.batches import random_batch
from lavita.training.config import TrainConfig
from lavita.training.state import TrainState
from lavita.training.step import train_step

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "unconditional": ({}, 0),
    "images": ({"num_classes": 3}, 2),
    "texts": ({"text_dim": 6, "temporal_position": "rope"}, 1),
    "words": ({"text_dim": 6, "text_tokens": 7}, 2),
    "tokens": ({"conditioning": "all_tokens", "num_classes": 3}, 2),
    "tubes": ({"patch_embedding": "compression", "tube_size": 2}, 0),
    "many tokens": ({"sample_size": 24}, 0),  # 144 a frame: attention by torch's own function
}
every_variant = pytest.mark.parametrize("variant", [1, 2, 3, 4])


PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def highest_allocated(step: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator hands out at the highest moment of a call, over those before it.

    Without the scratch memory of a matrix product in bf16, which oneDNN asks for and gives back within the product: its
    size is the library's choice for the kind of processor, and no tensor has it. Without native bf16 products it is the
    product in float32.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    found = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    products = [
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in found if event.name() in PRODUCTS
    ]
    events = [event for event in found if event.name() == "[memory]"]
    now = highest = skipped = 0
    for event, following in zip(events, [*events[1:], None], strict=True):
        within = any(start <= event.start_ns() <= end for start, end in products)
        if within and following is not None and event.nbytes() == -following.nbytes() > 0:
            skipped = event.nbytes()  # given back at once
        now += event.nbytes()
        highest = max(highest, now - skipped)
        skipped = skipped if event.nbytes() == skipped else 0
    return highest


def storages(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_training(model: LavitaTransformer3DModel, images: int, setting: Setting) -> tuple[int, dict[str, int]]:
    """The peak of a second training step on random numbers, and the bytes that stay between two steps."""
    settings = TrainConfig(
        optimizer=setting.optimizer,
        precision=setting.precision,
        batch_size=2 * setting.accumulation,
        accumulation=setting.accumulation,
    )
    checkpoint_blocks(model.train(), setting.gradient_checkpointing)
    state = TrainState.build(model, settings, torch.device("cpu"))
    batches = [random_batch(model.config, settings.batch_size, num_images=images, seed=seed) for seed in range(2)]
    train_step(state, batches[0], settings)
    states = [t for optimizer in state.optimizers for values in optimizer.state.values() for t in values.values()]
    conditions = [t for t in (batches[0].class_labels, batches[0].text_embeds) if t is not None]
    staying = {
        WEIGHTS: storages([*model.parameters(), *model.buffers()]),
        OPTIMIZER: storages(states),
        AVERAGE: storages(list(state.ema.weights.values())),
        BATCH: storages([*conditions, *(t for batch in batches for t in (batch.latents, batch.noise))]),
    }
    return sum(staying.values()) + highest_allocated(lambda: train_step(state, batches[1], settings)), staying


SETTINGS = {
    "plain": Setting(),
    "checkpointing": Setting(gradient_checkpointing=True),
    "cheap": Setting(gradient_checkpointing="cheap"),
    "bf16": Setting(precision="bf16"),
    "bf16-checkpointing": Setting(precision="bf16", gradient_checkpointing=True),
    "muon-accumulation": Setting(optimizer="muon", accumulation=3),
}


@pytest.mark.parametrize(
    ("case", "setting"),
    [(case, "plain") for case in CASES]
    + [("many tokens", "checkpointing"), ("many tokens", "cheap")]
    + [("images", setting) for setting in SETTINGS if setting != "plain"],
    ids=lambda name: name.replace(" ", "-"),
)
@every_variant
def test_the_peak_of_training_is_the_allocators(
    variant: int, case: str, setting: str, make_transformer: MakeTransformer
) -> None:
    fields, images = CASES[case]
    model = make_transformer(variant=variant, num_frames=4, **fields)
    predicted = training_memory(model.config, 2, None, images, SETTINGS[setting])
    measured, staying = measure_training(model, images, SETTINGS[setting])
    assert predicted.total == pytest.approx(measured, rel=0.05)
    for part, size in staying.items():
        assert predicted.parts[part] == pytest.approx(size, rel=0.01, abs=100), part  # timesteps are in the batch


def test_what_checkpointing_saves_of_the_activations(make_transformer: MakeTransformer) -> None:
    config = make_transformer(num_blocks=8, num_frames=8).config
    plain, cheap, checkpointed = (
        training_memory(config, 4, setting=Setting(gradient_checkpointing=kind)).parts[ACTIVATIONS]
        for kind in (False, "cheap", True)
    )
    assert checkpointed < plain / 3
    assert checkpointed < cheap < 0.7 * plain


def test_gradients_stay_between_micro_batches(make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_blocks=4)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    one, two, many = (training_memory(model.config, 4, setting=Setting(accumulation=n)) for n in (1, 2, 5))
    assert one.parts.get(GRADIENTS, 0) < 0.1 * weights  # the peak comes before they do
    assert two.parts[GRADIENTS] == weights
    latents = 4 * 2 * 4 * 8 * 8 * 4
    assert many.total - two.total == 3 * 4 * latents  # clips and noise of this step and the next


def test_each_average_takes_the_memory_of_the_weights(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    one, three = (training_memory(model.config, 2, setting=Setting(num_averages=n)) for n in (1, 3))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert one.parts[AVERAGE] == weights
    assert three.parts == {**one.parts, AVERAGE: 3 * weights}


# --- processes


def test_ddp_has_the_gradients_a_second_time(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    alone, together = (training_memory(model.config, 2, setting=Setting(processes=n)) for n in (1, 4))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert together.parts == {**alone.parts, EXCHANGE: weights}


def test_fsdp_divides_the_state_and_gathers_a_block(make_transformer: MakeTransformer) -> None:
    model = make_transformer(num_blocks=4)
    alone = training_memory(model.config, 2)
    shared = training_memory(model.config, 2, setting=Setting(processes=4, sharded=True))
    for part in (WEIGHTS, OPTIMIZER, AVERAGE):
        assert shared.parts[part] == -(-alone.parts[part] // 4)
    assert shared.parts[ACTIVATIONS] == alone.parts[ACTIVATIONS]
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    assert shared.parts[EXCHANGE] == sum(sizes.values()) - blocks + 5 * blocks // 4


@pytest.mark.parametrize("variant", [2, 3])
def test_groups_divide_the_activations(variant: int, make_transformer: MakeTransformer) -> None:
    """All but the loss, which each process computes; measured peaks are in tests/benchmarks/test_sequence_speed.py."""
    config = make_transformer(variant=variant, num_frames=128, hidden_size=128, num_blocks=4).config
    alone, shared = (
        training_memory(config, setting=Setting(processes=8, sequence_parallel=members)) for members in (1, 4)
    )
    loss = 28 * 128 * 4 * 8 * 8 * 4  # about as many tensors of the latents' size
    assert shared.parts[ACTIVATIONS] == pytest.approx(alone.parts[ACTIVATIONS] / 4 + 0.75 * loss, rel=0.05)
    for part in (WEIGHTS, OPTIMIZER, AVERAGE, BATCH, EXCHANGE):
        assert shared.parts[part] == alone.parts[part]


# --- sampling


@pytest.mark.parametrize("frames", [2, 20])  # decoded at once; in two chunks
def test_the_peak_of_sampling_is_the_allocators(
    frames: int, tiny_transformer: LavitaTransformer3DModel, tiny_vae: AutoencoderKL
) -> None:
    model = tiny_transformer.requires_grad_(False)
    latents, labels = torch.randn(2, frames, 4, 8, 8), torch.zeros(4, dtype=torch.long)

    @torch.no_grad()
    def sample() -> None:
        model(torch.cat([latents, latents]), torch.full((4,), 300), labels).sample.float()
        decode(tiny_vae, latents, "fp32")

    predicted = sampling_memory(model.config, 2, frames, guidance=True, autoencoder=tiny_vae.config)
    weights = [storages([*network.parameters(), *network.buffers()]) for network in (model, tiny_vae)]
    assert (predicted.parts[WEIGHTS], predicted.parts[AUTOENCODER]) == tuple(weights)
    assert predicted.total == pytest.approx(sum(weights) + latents.nbytes + highest_allocated(sample), rel=0.15)


def test_groups_divide_what_the_transformer_takes(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    config = make_transformer(num_frames=32, hidden_size=128).config
    alone, shared = (
        sampling_memory(config, autoencoder=tiny_vae.config, sequence_parallel=members) for members in (1, 4)
    )
    assert alone.phase == shared.phase == "transformer"
    assert shared.parts[ACTIVATIONS] == pytest.approx(alone.parts[ACTIVATIONS] / 4, rel=0.15)


def test_large_frames_peak_in_the_decoder(make_transformer: MakeTransformer) -> None:
    peak = sampling_memory(make_transformer(sample_size=32).config)
    assert peak.phase == "decoder"
    assert peak.parts[AUTOENCODER] == 83_653_863 * 4  # as published


# --- the command


def test_the_command_predicts_what_the_functions_do(run: Run, pipeline: LavitaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    options = "--optimizer muon --gradient-checkpointing true --accumulation 2 --processes 2 --sharded --batch-size 3"
    options += " --sequence-parallel 2"
    code, out, _ = run("info", "model", *options.split(), "--json")
    assert code == 0
    answer = json.loads(out)["memory_bytes"]
    config = pipeline.transformer.config
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        setting = Setting("muon", True, precision, 2, 2, True, 2)
        assert answer[f"training, {precision}"] == training_memory(config, 3, setting=setting).to_json()
    sampled = sampling_memory(config, 3, guidance=True, autoencoder=pipeline.vae.config, sequence_parallel=2)
    assert answer["sampling, fp32"] == sampled.to_json()


def test_the_command_prints_the_parts(run: Run) -> None:
    code, out, _ = run("info", "tiny/8", "--precision", "bf16", "--processes", "4", "--sequence-parallel", "2")
    text = " ".join(out.split())
    assert code == 0
    assert "training, bf16" in text and "sampling, bf16" in text and "fp32" not in text
    for part in (WEIGHTS, OPTIMIZER, AVERAGE, EXCHANGE, "whole"):
        assert part in text
    assert "in each of 4 processes (DDP, 2 share a clip)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer sgd", "optimizer is 'sgd'; allowed: adamw, muon"),
        ("--precision int8", "precision is 'int8'; allowed: fp32, bf16, fp16"),
        ("--accumulation 0", "accumulation is 0, but must be in 1..65536"),
        ("--processes 0", "processes is 0, but must be in 1..65536"),
        ("--accumulation 7004275592969907720", "accumulation is 7004275592969907720, but must be in 1..65536"),
        ("--sharded", "sharded is set, but processes is 1"),
        ("--sequence-parallel 0", "sequence_parallel is 0, but must be in 1..65536"),
        ("--sequence-parallel 2", "sequence_parallel is 2, but must divide the processes (1)"),
    ],
)
def test_a_bad_option_is_one_line(options: str, message: str, run: Run) -> None:
    code, _, error = run("info", "tiny/8", *options.split())
    assert code == 2
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("option", ["--batch-size", "--num-frames", "--num-images"])
def test_numbers_that_are_out_of_reach(option: str, run: Run) -> None:
    code, _, error = run("info", "tiny/8", option, str(2**63 - 1))
    assert code == 2 and f"Invalid value for '{option}'" in error


def test_fields_of_an_autoencoder_that_describe_none(
    save_pipeline: SavePipeline, make_transformer: MakeTransformer, run: Run
) -> None:
    folder = Path(save_pipeline(make_transformer()))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "block_out_channels": "none"}))
    code, _, errors = run("info", folder)
    assert code == 2 and errors.startswith("error: vae/config.json describes no autoencoder (TypeError: ")
