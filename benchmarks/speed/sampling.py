"""A sampler's loop through the pipeline: what it adds to the evaluations, and what guidance and caches change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.speed.setup import IN_CHANNELS, Setup, build_model, model_inputs
from benchmarks.speed.timing import Row, Section, interleave, timings
from lavita.core.progress import Progress
from lavita.models.autoencoder import AutoencoderKL, decode
from lavita.models.compilation import compile_blocks
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.packaged import STABLE_DIFFUSION_AUTOENCODER
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.schedulers import make_scheduler
from lavita.sampling.step_cache import Calibration, PyramidCache, Recorder, ResidualCache

FORWARD = "an evaluation alone"
LOOP = "loop"
GUIDED = "loop, guidance"
INTERVAL = "loop, guidance in an interval"
PAB = "loop, cache pab"
RESIDUAL = "loop, cache residual"
COMPILED = "loop, compiled"
INT8 = "loop, int8"
DECODE = "decoding a frame"
SCALE = 4.0
GUIDED_TIMESTEPS = (NUM_TIMESTEPS / 4, 3 * NUM_TIMESTEPS / 4)
DECODED_FRAMES = 2


def stable_diffusion(setup: Setup) -> AutoencoderKL:
    """An autoencoder of Stable Diffusion's architecture, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: AutoencoderKL = AutoencoderKL.from_config(STABLE_DIFFUSION_AUTOENCODER)
    return vae.eval().requires_grad_(False).to(setup.torch_device)


def half_reused(calibration: Calibration, timesteps: list[float]) -> tuple[ResidualCache, float]:
    """The residual cache whose threshold reuses nearest to half of the pairs of blocks, and the share that it does."""

    def share(threshold: float) -> float:
        plan = ResidualCache(calibration, threshold).plan(timesteps)
        return sum(map(len, plan)) / (len(plan) * len(calibration.path[0]))

    steps = np.diff(calibration.at(timesteps), axis=0)
    thresholds = [0.0, *(float(value) * factor for value in np.unique(steps) for factor in (1.001, 2.001))]
    best = min(thresholds, key=lambda threshold: abs(share(threshold) - 0.5))
    return ResidualCache(calibration, best), share(best)


def run(setup: Setup) -> Section:
    """Times of the loop, an evaluation of the network each."""
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

    recorder = Recorder()
    loop(pipeline, cache=recorder)()
    calibration = recorder.calibration({"made_with": "random weights"})
    times = [float(timestep) for timestep in pipeline.scheduler.timesteps]
    residual, reused = half_reused(calibration, times)
    guidance: dict[str, Any] = {"guidance_scale": SCALE}
    runs: dict[str, Callable[[], Any]] = {
        FORWARD: evaluate,
        LOOP: loop(pipeline),
        GUIDED: loop(pipeline, **guidance),
        INTERVAL: loop(pipeline, **guidance, guidance_interval=GUIDED_TIMESTEPS),
        PAB: loop(pipeline, cache=PyramidCache()),
        RESIDUAL: loop(pipeline, cache=residual),
    }
    if setup.compiled:
        faster = copy.deepcopy(model)
        compile_blocks(faster)
        runs[COMPILED] = loop(_pipeline(faster, vae))
    if setup.device == "cpu" and torch.backends.mkldnn.is_available():
        runs[INT8] = loop(_pipeline(quantize_int8(copy.deepcopy(model)), vae))
    decoded = latents[:1, :DECODED_FRAMES]
    runs[DECODE] = lambda: decode(vae, decoded, setup.precision)
    progress = Progress("sampling: run", timings(len(runs), setup.repeats))
    seconds = interleave(runs, setup.repeats, device, progress)
    units = dict.fromkeys(runs, setup.steps) | {FORWARD: 1, DECODE: decoded.shape[1]}
    each = {name: [value / units[name] for value in values] for name, values in seconds.items()}
    guided = sum(GUIDED_TIMESTEPS[0] <= timestep <= GUIDED_TIMESTEPS[1] for timestep in times)
    notes = {
        LOOP: "S-AdaLN's vectors are made for many steps at once, so that it may be quicker than evaluations alone",
        GUIDED: "both halves as one batch",
        INTERVAL: f"{guided} of {setup.steps} steps guided",
        PAB: "diffusers' hooks, attention in space every 2nd and along time every 4th step of the middle",
        RESIDUAL: f"{reused:.0%} of the pairs of blocks reused",
    }
    rows = [
        Row(
            name,
            each[name],
            floor=FORWARD if name not in (FORWARD, DECODE) else None,
            ours=LOOP if name not in (FORWARD, LOOP, DECODE) else None,
            note=notes.get(name, ""),
        )
        for name in runs
    ]
    frames = setup.batch_size * setup.num_frames
    decoding = float(np.median(each[DECODE])) * frames
    looping = float(np.median(seconds[LOOP]))
    facts = {"steps": setup.steps, "pairs_reused": reused, "guided_steps": guided}
    facts |= {"decode_share": decoding / (decoding + looping), "calibration_steps": setup.steps}
    lines = [
        "An evaluation is one of the eager model outside of the loop, without guidance. Time only: what caches and "
        "guidance do to videos is measured elsewhere. The residual cache is calibrated in this run, and its threshold "
        "chosen to reuse half.",
        f"Decoding {frames} frames with Stable Diffusion's autoencoder (by the time of {decoded.shape[1]}) takes "
        f"{facts['decode_share']:.0%} of a sample of {setup.steps} steps without guidance.",
    ]
    return Section("sampling", "A sampler's loop", "one step of the batch", rows, facts, lines, base="an evaluation")


def _pipeline(model: Any, vae: AutoencoderKL) -> LavitaPipeline:
    assert vae.config["latent_channels"] == IN_CHANNELS
    pipeline = LavitaPipeline(model, vae, make_scheduler("unipc"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
