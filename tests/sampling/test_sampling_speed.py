"""What makes sampling faster: conditions known ahead, guidance in an interval, step caches, Karras spacing, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, Run
from diffusers import AutoencoderKL
from diffusers.hooks import HookRegistry
from lavita.sampling.calibrate import calibrate

from lavita.core import precision as runtime
from lavita.core.names import RecipeName
from lavita.core.precision import store_linear_weights
from lavita.core.seeds import generator
from lavita.models.packaged import model_source
from lavita.models.presets import VARIANTS
from lavita.models.transformer import LavitaTransformer3DModel, Residuals
from lavita.sampling import denoiser as denoising
from lavita.sampling.denoiser import Guidance
from lavita.sampling.generate import generate
from lavita.sampling.int8 import quantize_int8
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline
from lavita.sampling.recipes import RECIPES, Recipe, find_recipe
from lavita.sampling.schedulers import make_scheduler, set_timesteps
from lavita.sampling.step_cache import (
    CALIBRATION,
    Calibration,
    PyramidCache,
    Recorder,
    ResidualCache,
    StepCache,
    load_calibration,
)
from lavita.video.reading import read_clip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def make(pipeline: LavitaPipeline, labels: list[int], seeds: list[int] | None = None, **options: Any) -> torch.Tensor:
    """Latents of clips, by default of seeds 0, 1 ..., in float32."""
    seeds = list(range(len(labels))) if seeds is None else seeds
    given = {"num_inference_steps": 6, "guidance_scale": 1.5, "precision": "fp32", **options}
    generators = [generator(seed, "sample") for seed in seeds]
    return pipeline(labels, generator=generators, output_type="latent", **given).frames


@pytest.fixture
def make_pipeline(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> Any:
    def build(**fields: Any) -> LavitaPipeline:
        transformer = make_transformer(num_classes=3, **fields)
        pipeline = LavitaPipeline(transformer, tiny_vae, make_scheduler("unipc"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


# --- conditions known ahead


@pytest.mark.parametrize("condition", ["nothing", "classes", "texts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_known_ahead_are_those_of_the_forward_pass(
    variant: int, condition: str, make_transformer: MakeTransformer
) -> None:
    fields: dict[str, Any] = {"nothing": {}, "classes": {"num_classes": 3}, "texts": {"text_dim": 5}}[condition]
    model = make_transformer(variant=variant, **fields)
    given: dict[str, Any] = {}
    if condition == "classes":
        given["class_labels"] = torch.tensor([0, 2])
    if condition == "texts":
        given["text_embeds"] = torch.randn(2, 5)
    latents, timesteps = torch.randn(2, 2, 4, 8, 8), torch.tensor([999.0, 500.0, 3.0])
    with torch.no_grad():
        modulation = model.modulate(timesteps, **given)
        assert modulation is not None and len(modulation) == 2 + 1
        for index, timestep in enumerate(timesteps):
            expected = model(latents, timestep.expand(2), **given).sample
            # They alone decide: the timesteps are others, and so are the labels and texts.
            others = {name: value.flip(0) for name, value in given.items()}
            vectors = [of_all[index] for of_all in modulation]
            found = model(latents, torch.zeros(2), **others, modulation=vectors).sample
            assert relative(found, expected) < 1e-6


def test_all_tokens_have_no_vectors(make_transformer: MakeTransformer) -> None:
    assert make_transformer(conditioning="all_tokens").modulate(torch.tensor([3.0])) is None


def test_windows_of_steps_do_not_change_the_videos(pipeline: LavitaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    modulate = pipeline.transformer.modulate
    monkeypatch.setattr(
        pipeline.transformer, "modulate", lambda *given: calls.append(len(given[0])) or modulate(*given)
    )
    expected = make(pipeline, [0, 1])
    assert calls == [6], "once for all steps"
    of_a_step = (6 * 2 + 2) * 32 * 4 * 4
    monkeypatch.setattr(denoising, "MODULATION_BYTES", 2 * of_a_step)
    calls.clear()
    assert relative(make(pipeline, [0, 1]), expected) < 1e-5
    assert calls == [2, 2, 2]


# --- weights in the precision of the products


@pytest.mark.parametrize("fields", [{}, {"temporal_position": "rope"}, {"conditioning": "all_tokens"}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_weights_change_not_one_bit(
    variant: int, fields: dict[str, Any], make_transformer: MakeTransformer
) -> None:
    model = make_transformer(variant=variant, num_classes=3, **fields)
    given = {"latents": torch.randn(2, 2, 4, 8, 8), "timesteps": torch.tensor([3, 900]), "class_labels": [0, 2]}
    given["class_labels"] = torch.tensor(given["class_labels"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, before = model(**given).sample, sum(p.nbytes for p in model.blocks.parameters())
        store_linear_weights(model.blocks, None)
        assert sum(p.nbytes for p in model.blocks.parameters()) == before
        store_linear_weights(model.blocks, torch.bfloat16)
        assert torch.equal(model(**given).sample, expected)
    assert sum(p.nbytes for p in model.blocks.parameters()) < 0.52 * before


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_samples_in_bf16_are_those_of_float32_weights(
    quantize: Any, tmp_path: Path, pipeline: LavitaPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose processor multiplies bf16."""
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    recipe = Recipe(steps=3, quantize=quantize)
    path = generate(
        str(tmp_path / "model"), tmp_path / "out", classes="pong", seeds="0", recipe=recipe, suffix=".mkv", device="cpu"
    )[0]
    if quantize:
        quantize_int8(pipeline.transformer)
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "precision": "bf16"}
    frames = pipeline(["pong"], generator=[generator(0, "sample")], **options).frames
    np.testing.assert_array_equal(read_clip(path, 0, 2), frames[0])


# --- guidance in an interval


def test_guidance_in_an_interval_is_guidance_there_and_none_elsewhere(pipeline: LavitaPipeline) -> None:
    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    everywhere = make(pipeline, [0, 1], guidance_interval=(0, 1000))
    assert torch.equal(everywhere, make(pipeline, [0, 1]))
    timesteps = pipeline.scheduler.timesteps.tolist()
    sizes.clear()
    middle = make(pipeline, [0, 1], guidance_interval=(timesteps[3], timesteps[1]))
    assert sizes == [2, 4, 4, 4, 2, 2], "both bounds belong to it"
    nowhere = make(pipeline, [0, 1], guidance_scale=1.0)
    assert relative(middle, everywhere) > 1e-3 and relative(middle, nowhere) > 1e-3
    outside = make(pipeline, [0, 1], guidance_interval=(1, timesteps[-1] - 1))
    assert relative(outside, nowhere) < 1e-6
    alone = make(pipeline, [1], [1], guidance_interval=(timesteps[3], timesteps[1]))
    assert relative(alone, middle[1:]) < 1e-5


@pytest.mark.parametrize("interval", [(500, 500), (600, 500), (-1, 500), (0, 1001), (float("nan"), 500)])
def test_what_is_no_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"guidance_interval is .* must be two timesteps in 0\.\.1000, rising"):
        Guidance(1.5, interval)


def test_an_interval_without_guidance_is_refused(pipeline: LavitaPipeline) -> None:
    with pytest.raises(ValueError, match="guidance_interval has no effect with a guidance_scale of 1"):
        make(pipeline, [0], guidance_scale=1.0, guidance_interval=(100, 900))


# --- spacing


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 8, 25, 100])
def test_karras_spacing_is_its_formula(sampler: str, steps: int) -> None:
    scheduler = make_scheduler(sampler, spacing="karras")
    set_timesteps(scheduler, steps)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    ramp = np.linspace(0, 1, steps)
    expected = (sigmas[-1] ** (1 / 7) + ramp * (sigmas[0] ** (1 / 7) - sigmas[-1] ** (1 / 7))) ** 7
    np.testing.assert_allclose(scheduler.sigmas[:-1], expected, rtol=2e-3)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == steps
    nearest = np.abs(np.log(sigmas)[None] - np.log(expected)[:, None]).argmin(axis=1)
    assert np.abs(scheduler.timesteps.numpy() - nearest).max() <= 1


def test_spacings_that_there_are() -> None:
    with pytest.raises(ValueError, match="spacing is 'leading'; allowed: trailing, karras"):
        make_scheduler("unipc", spacing="leading")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spacing is karras, but ddpm has its own"):
        make_scheduler("ddpm", spacing="karras")


# --- step caches


def flat_calibration(model: LavitaTransformer3DModel, change: float) -> Calibration:
    """Every group moves by `change` from each of 6 trailing steps to the next."""
    scheduler = make_scheduler("unipc")
    set_timesteps(scheduler, 6)
    groups = len(model.block_groups)
    return Calibration(scheduler.timesteps.tolist(), [[change * i] * groups for i in range(6)], {})


def test_a_plan_reuses_until_the_threshold() -> None:
    path = [[0.0, 0.0], [0.1, 0.3], [0.2, 0.6], [0.3, 0.9], [0.4, 1.2], [0.5, 1.5]]
    cache = ResidualCache(Calibration([999, 800, 600, 400, 200, 50], path, {}), 0.25)
    plan = cache.plan([999, 800, 600, 400, 200, 50])
    # The first pair has moved 0.1, 0.2, then 0.3 since it was computed; the second one 0.3 at each step.
    assert plan == [frozenset(), {0}, {0}, frozenset(), {0}, frozenset()]
    between = cache.plan([999, 900, 800, 50])  # 0.05 and 0.15, then 0.1 and 0.3
    assert between == [frozenset(), {0, 1}, {0}, frozenset()]


def test_caches_that_reuse_nothing_change_nothing(make_pipeline: Any) -> None:
    for variant in VARIANTS:
        pipeline = make_pipeline(variant=variant)
        expected = make(pipeline, [0, 1])
        caches: list[StepCache] = [
            ResidualCache(flat_calibration(pipeline.transformer, 0.1), 0.0),
            PyramidCache(1, 1),
            Recorder(),
        ]
        for cache in caches:
            assert relative(make(pipeline, [0, 1], cache=cache), expected) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_reused_is_not_computed(variant: int, make_pipeline: Any) -> None:
    pipeline = make_pipeline(variant=variant, num_blocks=4)
    model = pipeline.transformer
    runs: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, inputs, index=index: runs.append(index))
    cache = ResidualCache(flat_calibration(model, 0.1), 0.15)  # every other step
    expected = make(pipeline, [0, 1])
    assert len(runs) == 6 * 4
    runs.clear()
    found = make(pipeline, [0, 1], cache=cache)
    # The first and the last step are computed, and of the four between them those after one that was reused.
    assert len(runs) == 4 * 4 and runs[:4] == [0, 1, 2, 3]
    assert 1e-4 < relative(found, expected) < 1
    assert not cache._residuals.kept, "nothing stays in memory after the loop"


def test_a_reused_residual_is_what_the_group_added(make_transformer: MakeTransformer) -> None:
    """At the same input everything may be reused: the output is the same."""
    model = make_transformer(num_blocks=4)
    latents, timesteps = torch.randn(2, 2, 4, 8, 8), torch.tensor([500.0, 500.0])
    with torch.no_grad():
        residuals = Residuals()
        expected = model(latents, timesteps, residuals=residuals).sample
        assert sorted(residuals.kept) == [0, 1]
        residuals.reuse = frozenset({0, 1})
        assert relative(model(latents, timesteps, residuals=residuals).sample, expected) < 1e-6
        other = model(2 * latents, timesteps, residuals=residuals).sample
        assert relative(other, model(2 * latents, timesteps).sample) > 1e-3


@pytest.mark.parametrize("kind", ["pab", "residual"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cached_video_does_not_depend_on_its_batch(variant: int, kind: str, make_pipeline: Any) -> None:
    pipeline = make_pipeline(variant=variant)
    model = pipeline.transformer
    cache: StepCache = PyramidCache() if kind == "pab" else ResidualCache(flat_calibration(model, 0.1), 0.25)
    options = {"cache": cache, "guidance_interval": (100, 700)}  # guided steps come after others: two kinds of batches
    together = make(pipeline, [0, 1, 2], **options)
    for seed in range(3):
        assert relative(make(pipeline, [seed], [seed], **options), together[seed : seed + 1]) < 1e-5
    assert relative(together, make(pipeline, [0, 1, 2], guidance_interval=(100, 700))) > 1e-4
    assert torch.equal(make(pipeline, [0, 1, 2], **options), together), "a second loop starts afresh"


def test_the_pyramid_computes_each_kind_of_attention_in_its_rhythm(make_pipeline: Any) -> None:
    pipeline = make_pipeline(variant=1)
    counts = {"space": 0, "time": 0}
    for block in pipeline.transformer.blocks:
        kind = block.mixing

        def count(module: Any, inputs: Any, kind: str = kind) -> None:
            counts[kind] += 1

        block.attn.qkv.register_forward_pre_hook(count)
    make(pipeline, [0], num_inference_steps=20, cache=PyramidCache(2, 4))
    inside = sum(100 < timestep < 850 for timestep in pipeline.scheduler.timesteps.tolist())
    outside = 20 - inside
    assert counts["space"] == pytest.approx(outside + inside / 2, abs=1)
    assert counts["time"] == pytest.approx(outside + inside / 4, abs=1)
    registries = [getattr(block.attn, "_diffusers_hook", None) for block in pipeline.transformer.blocks]
    assert all(isinstance(registry, HookRegistry) and not registry.hooks for registry in registries)
    counts.update(space=0, time=0)
    make(pipeline, [0], num_inference_steps=20)
    assert counts == {"space": 20, "time": 20}, "the hooks are gone after the loop"


def test_what_caches_refuse(tmp_path: Path, make_pipeline: Any) -> None:
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="space_every is 0, but must be at least 1"):
        PyramidCache(space_every=0)
    with pytest.raises(ValueError, match="threshold is -1, but must be at least 0"):
        ResidualCache(flat_calibration(pipeline.transformer, 0.1), -1)
    with pytest.raises(ValueError, match="has 2 pairs of blocks, but the model 1: calibrate anew"):
        two = flat_calibration(make_pipeline(num_blocks=4).transformer, 0.1)
        make(pipeline, [0], cache=ResidualCache(two, 0.1))
    with pytest.raises(ValueError, match=r"has no step_cache\.json, .*: lavita calibrate"):
        load_calibration(tmp_path)
    for text in ("{", '{"timesteps": []}', "[]"):
        (tmp_path / CALIBRATION).write_text(text)
        with pytest.raises(ValueError, match="is no calibration"):
            load_calibration(tmp_path)


# --- calibration


def test_a_calibration_is_the_mean_change_of_what_groups_add(make_pipeline: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline(num_blocks=4)
    pipeline.transformer.register_to_config(class_names=["a", "b", "c"])
    pipeline.save_pretrained(tmp_path / "model")
    kept: list[list[torch.Tensor]] = []
    blocks = pipeline.transformer.blocks
    inputs: dict[int, torch.Tensor] = {}
    for group in (0, 1):
        first, last = blocks[2 * group], blocks[2 * group + 1]
        first.register_forward_pre_hook(lambda m, given, group=group: inputs.update({group: given[0]}))
        last.register_forward_hook(lambda m, given, out, group=group: kept.append([group, out - inputs[group]]))
    changes = np.zeros((2, 5, 2))
    for clip in range(2):
        kept.clear()
        pipeline(
            [clip],
            generator=[generator(clip, "calibrate")],
            num_inference_steps=6,
            guidance_scale=1.5,
            output_type="latent",
        )
        for group in (0, 1):
            added = [tensor.double() for number, tensor in kept if number == group]
            for i in range(5):
                changes[clip, i, group] = (added[i + 1] - added[i]).abs().sum() / added[i].abs().sum()
    expected = np.vstack([np.zeros((1, 2)), np.cumsum(changes.mean(0), axis=0)])

    path = calibrate(str(tmp_path / "model"), steps=6, num_clips=2, device="cpu")
    assert path == tmp_path / "model" / CALIBRATION
    found = load_calibration(tmp_path / "model")
    np.testing.assert_allclose(found.path, expected, rtol=1e-4, atol=2e-6)
    assert found.made_with == {"sampler": "unipc", "steps": 6, "guidance_scale": 1.5, "clips": 2}
    assert found.at(found.timesteps) == pytest.approx(np.array(found.path))
    middle = (found.timesteps[1] + found.timesteps[2]) / 2
    np.testing.assert_allclose(found.at([middle])[0], (np.array(found.path[1]) + found.path[2]) / 2)


def test_calibrate_then_sample(tmp_path: Path, pipeline: LavitaPipeline, run: Run) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    options = ("--classes", "pong", "--seeds", "0", "--steps", "6", "--format", "mkv", "--device", "cpu")
    cached = (*options, "--cache", "residual", "--cache-threshold", "9")
    code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / "out", *cached)
    assert code == 2 and "make it: lavita calibrate" in stderr
    assert not (tmp_path / "out").exists()
    code, stdout, stderr = run("calibrate", tmp_path / "model", "--steps", "6", "--clips", "2", "--device", "cpu")
    assert code == 0 and stdout.strip().endswith(CALIBRATION), stderr
    for name, given in (("plain", options), ("cached", cached)):
        code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / name, *given)
        assert code == 0, stderr
    plain, other = ((tmp_path / name / "pong" / "0.mkv").read_bytes() for name in ("plain", "cached"))
    assert plain != other
    settings = json.loads((tmp_path / "cached" / "generation.json").read_text())
    assert (settings["cache"], settings["cache_threshold"]) == ("residual", 9)
    code, _, stderr = run("calibrate", tmp_path / "none")
    assert code == 2 and "no such folder" in stderr
    with pytest.raises(ValueError, match="num_clips is 0, but must be at least 1"):
        calibrate(str(tmp_path / "model"), num_clips=0)
    with pytest.raises(ValueError, match="steps is 1, but must be at least 2"):
        calibrate(str(tmp_path / "model"), steps=1)


def test_the_packages_model_is_calibrated() -> None:
    source = Path(model_source("builtin"))
    calibration = load_calibration(source)
    assert len(calibration.path[0]) == len(load_pipeline(source).transformer.block_groups)
    assert calibration.made_with["steps"] == 50


# --- recipes


def test_recipes_are_those_of_the_command_line(pipeline: LavitaPipeline) -> None:
    assert list(get_args(RecipeName)) == list(RECIPES)
    assert RECIPES["paper"].num_steps == 250 and RECIPES["paper"].sampler == "ddpm"
    for recipe in RECIPES.values():
        pipeline.use_sampler(recipe.sampler, recipe.spacing)
    with pytest.raises(ValueError, match="recipe is 'slow'; allowed: default, "):
        find_recipe("slow")


def test_what_recipes_refuse() -> None:
    with pytest.raises(ValueError, match="cache is 'all'; allowed: pab, residual"):
        Recipe(cache="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache_threshold is 0\.1, but has no effect without cache=residual"):
        Recipe(cache_threshold=0.1)
    with pytest.raises(ValueError, match="cache is pab, which works on models that are not compiled"):
        Recipe(cache="pab", compiled=True)


def test_options_change_parts_of_a_recipe() -> None:
    recipe = Recipe(sampler="dpm++", steps=7).changed(steps=9, spacing=None, guidance_interval=(1, 2))
    assert recipe == Recipe(sampler="dpm++", steps=9, guidance_interval=(1, 2))
    assert Recipe().changed(sampler="ddpm").num_steps == 250
    assert Recipe().num_steps == 25
