"""The sampling loop of the pipeline: what it adds to evaluations of the model, and what guidance and caches change."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any, get_args

import torch

from benchmarks.speed.setup import IN_CHANNELS, Setup, build_model, model_inputs
from benchmarks.speed.timing import Row, Section, interleave, num_timings
from lavita.core.names import CacheName
from lavita.core.progress import Progress
from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.compilation import compile_blocks
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.schedulers import make_scheduler

FORWARD = "an evaluation alone"
LOOP = "loop"
GUIDED = "loop, guidance"
INTERVAL = "loop, guidance in an interval"
CACHES = {name: f"loop, guidance, cache {name}" for name in get_args(CacheName)}
COMPILED = "loop, compiled"
INT8 = "loop, int8"
DECODE = "decoding a frame"
SCALE = 4.0
GUIDED_TIMESTEPS = (NUM_TIMESTEPS / 4, 3 * NUM_TIMESTEPS / 4)
DECODED_FRAMES = 2


def stable_diffusion(setup: Setup) -> AutoencoderKL:
    """An autoencoder with Stable Diffusion's architecture and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: AutoencoderKL = AutoencoderKL.from_config(STABLE_DIFFUSION_AUTOENCODER)
    torch.nn.Module.to(vae, setup.torch_device)  # diffusers declares its own `to` in a way that mypy misreads
    return vae.eval().requires_grad_(False)


def run(setup: Setup) -> Section:
    """Measures the time per step of the loop."""
    model, vae = build_model(setup), stable_diffusion(setup)
    pipeline, device = _pipeline(model, vae), setup.torch_device
    latents, timesteps, labels = model_inputs(setup)

    def loop(chosen: LavitaPipeline, **options: Any) -> Callable[[], Any]:
        return lambda: chosen(
            class_labels=labels.tolist(),
            latents=latents,
            num_inference_steps=setup.steps,
            output_type="latent",
            precision=setup.precision,
            **options,
        )

    def evaluate() -> Any:
        with torch.no_grad(), setup.autocast():
            return model(latents, timesteps, labels).sample.float()

    guidance: dict[str, Any] = {"guidance_scale": SCALE}
    runs: dict[str, Callable[[], Any]] = {
        FORWARD: evaluate,
        LOOP: loop(pipeline),
        GUIDED: loop(pipeline, **guidance),
        INTERVAL: loop(pipeline, **guidance, guidance_interval=GUIDED_TIMESTEPS),
        **{row: loop(pipeline, **guidance, cache=name) for name, row in CACHES.items()},
    }
    if setup.compiled:
        faster = copy.deepcopy(model)
        compile_blocks(faster)
        runs[COMPILED] = loop(_pipeline(faster, vae))
    if setup.device == "cpu" and torch.backends.mkldnn.is_available():
        runs[INT8] = loop(_pipeline(quantize_int8(copy.deepcopy(model)), vae))
    decoded = latents[:1, :DECODED_FRAMES]
    runs[DECODE] = lambda: decode(vae, decoded, setup.precision)
    progress = Progress("sampling: run", num_timings(len(runs), setup.repeats))
    seconds = interleave(runs, setup.repeats, device, progress)
    units = dict.fromkeys(runs, setup.steps) | {FORWARD: 1, DECODE: decoded.shape[1]}
    each = {name: [value / units[name] for value in values] for name, values in seconds.items()}
    times = pipeline.scheduler.timesteps.tolist()  # as the loops have set them
    guided = sum(GUIDED_TIMESTEPS[0] <= timestep <= GUIDED_TIMESTEPS[1] for timestep in times)
    notes = {
        LOOP: "S-AdaLN vectors are computed for many steps at once, so that it can be faster than evaluations alone",
        GUIDED: "both halves as one batch",
        INTERVAL: f"{guided} of {setup.steps} steps guided",
    }
    rows = [
        Row(
            name,
            each[name],
            floor=FORWARD if name not in (FORWARD, DECODE) else None,
            ours=GUIDED if name in CACHES.values() else LOOP if name not in (FORWARD, LOOP, DECODE) else None,
            note=notes.get(name, ""),
        )
        for name in runs
    ]
    frames = setup.batch_size * setup.num_frames
    decoding = statistics.median(each[DECODE]) * frames
    looping = statistics.median(seconds[LOOP])
    facts = {"steps": setup.steps, "guided_steps": guided}
    facts |= {"decode_share": decoding / (decoding + looping)}
    lines = [
        "An evaluation is one of the eager model outside the loop, without guidance; caches are compared with the loop "
        "with guidance. Times only: the recipes benchmark measures what caches and guidance do to videos.",
        f"Decoding {frames} frames with Stable Diffusion's autoencoder (extrapolated from {decoded.shape[1]}) takes "
        f"{facts['decode_share']:.0%} of a sample of {setup.steps} steps without guidance.",
    ]
    return Section("sampling", "A sampler's loop", "one step of the batch", rows, facts, lines, base="an evaluation")


def _pipeline(model: Any, vae: AutoencoderKL) -> LavitaPipeline:
    assert vae.config["latent_channels"] == IN_CHANNELS
    pipeline = LavitaPipeline(model, vae, make_scheduler("unipc"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
