"""The pipeline from noise to latents to frames, in diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar, get_logger
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from lavita.core.names import CacheName, Spacing
from lavita.core.precision import Precision
from lavita.models.actions import Actions, action_numbers
from lavita.models.autoencoder import Autoencoder, check_autoencoder, decode, downsampling, latent_frames, pixel_frames
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.finite import check_finite
from lavita.models.hub import cannot_load, download
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.shapes import default_frames, shape_warning, trained_range
from lavita.models.text_encoder import TextEncoder, load_text_encoder
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.conditions import class_numbers, text_embeddings
from lavita.sampling.denoiser import Denoiser, Guidance
from lavita.sampling.given import Places, encode_given, frames_of_videos, latents_of, place_latents
from lavita.sampling.pipeline_parts import PIPELINE_FILES, check_parts
from lavita.sampling.schedulers import (
    Scheduler,
    denoise_step,
    initial_scale,
    make_scheduler,
    model_input,
    prediction_of,
    set_timesteps,
    uses_learned_variance,
)
from lavita.video.formats import Frames

logger = get_logger(__name__)
MOST_FRAMES = 2**16
"""Longest video that is sampled at once; more would be taken for a slip of the pen."""


@dataclass
class LavitaPipelineOutput(BaseOutput):
    """Output of the pipeline."""

    frames: npt.NDArray[np.uint8] | torch.Tensor
    """uint8 `(B, F, H, W, 3)`, or float32 latents `(B, F, C, h, w)`."""


class LavitaPipeline(DiffusionPipeline):
    """Generates videos: `LavitaPipeline.from_pretrained(folder)(class_labels=["boxing"]).frames`.

    `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` gives this class, too.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    transformer: LavitaTransformer3DModel
    vae: Autoencoder
    scheduler: Scheduler

    def __init__(self, transformer: LavitaTransformer3DModel, vae: Autoencoder, scheduler: Scheduler) -> None:
        """Combines a model, the autoencoder of its latents, and a scheduler of `make_scheduler`.

        Raises:
            ValueError: if the transformer and the autoencoder differ in their latent channels, or the transformer and
                the scheduler in the type of prediction.
        """
        super().__init__()
        channels, expected = transformer.config["in_channels"], vae.config["latent_channels"]
        if channels != expected:
            raise ValueError(f"the transformer has {channels} latent channels, but the autoencoder has {expected}")
        predicted, taken = transformer.config["prediction_type"], prediction_of(scheduler)
        if predicted != taken:
            raise ValueError(f"the transformer predicts {predicted}, but the scheduler expects {taken}")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self._text_encoder: TextEncoder | None = None

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """Reads a folder's `model_index.json`; see `diffusers.ConfigMixin.load_config`.

        The file names the classes of the parts and the modules to import them from. Here the names only have to be
        right, and decide nothing.

        Raises:
            ValueError: for other classes, or Python files in the folder, which diffusers would run.
        """
        found = super().load_config(*args, **options)
        folder = Path(str(args[0] if args else options.get("pretrained_model_name_or_path")))
        check_parts(folder, found[0] if isinstance(found, tuple) else found)
        return found

    def use_sampler(self, sampler: str, spacing: Spacing = "trailing") -> None:
        """Replaces the scheduler by another that fits the model; see `make_scheduler` for names and errors."""
        self.scheduler = _scheduler_for(self.transformer, sampler, spacing)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str | None] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_videos: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        use_temporal: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["uint8", "latent"] = "uint8",
        precision: Precision = "auto",
        cache: CacheName | None = None,
        image: Frames | None = None,
        last_image: Frames | None = None,
        video: Frames | None = None,
        given: Places | Sequence[Places] | None = None,
        given_latents: torch.Tensor | None = None,
        guide_given: bool = False,
        exact: bool = False,
        actions: Actions | None = None,
    ) -> LavitaPipelineOutput:
        """Generates a batch of videos.

        Args:
            class_labels: one class per video, by number or name, or None for no class; required by a class-conditional
                model.
            prompt: one text per video; a text-conditional model requires them or `prompt_embeds`.
            negative_prompt: with guidance, the text to steer away from, one for all videos or one per video; the
                default, the empty text, means "no caption".
            prompt_embeds: what `encode_text` returns for them, instead of `prompt`.
            negative_prompt_embeds: the same, instead of `negative_prompt`.
            num_videos: number of videos of an unconditional model; 1 by default.
            num_frames: frames of a video; by default the length of the training clips. Positions of longer clips are
                interpolated (see `embeddings.frame_positions`), with a warning. F is the number of their latents, which
                is smaller only with temporal downsampling.
            height: height of the videos in pixels; by default that of the training clips, the first of several. In a
                shape that was not trained there is a warning, and positions are interpolated beyond the trained ones.
            width: their width in pixels.
            num_inference_steps: steps; each is one evaluation of the network (with the sampler `heun` two, except for
                the last step), on twice the batch with guidance.
            guidance_scale: 1 for none; w gives `uncond + w (cond - uncond)` (Ho & Salimans 2022).
            guidance_interval: lowest and highest timestep with guidance; by default all (see `denoiser.Guidance`).
            use_temporal: False leaves the temporal modules out: every frame is an image of its own (A.4).
            generator: one for all videos, or one per video, so that a video depends on its own generator only. CPU
                generators give the same noise on every device.
            latents: initial noise (B, F, C, h, w), instead of noise from the generator.
            output_type: `uint8` frames, or scaled `latent`s, not normalised.
            precision: see `core.precision.autocast`.
            cache: step cache that reuses parts of earlier evaluations (see `StepCache`); by default none.
            image: the first frame of the videos, uint8 (H, W, 3) of their size, for a model with `given_frames`.
            last_image: their last frame.
            video: their first frames, uint8 (k, H, W, 3).
            given: frames at any places of the videos, or a list of such for each video. Given frames come back as the
                autoencoder decodes them, from the latents that the model was given.
            given_latents: the first latents of the videos (B, k, C, h, w), as `output_type="latent"` gave them, instead
                of frames.
            guide_given: guide towards the given frames, too: the unconditional prediction is made without them.
            exact: put the given pixels in the place of their decoded ones.
            actions: for a model with actions, the name or number of the action of each frame, one list per video.

        Raises:
            ValueError: if an argument does not fit the model, or arguments do not fit together.
            FloatingPointError: if the result is not finite.
        """
        config = self.transformer.config
        device = self.transformer.device
        labels = class_numbers(config, class_labels)
        guidance = Guidance(guidance_scale, (0, NUM_TIMESTEPS) if guidance_interval is None else guidance_interval)
        guided = guidance_scale != 1.0
        if given is not None and not isinstance(given, Mapping):
            num_videos = len(given) if num_videos is None else num_videos
        embeds = text_embeddings(
            config, self.encode_text, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, guided
        )
        conditions = labels if labels is not None else None if embeds is None else embeds[0]
        batch = len(conditions) if conditions is not None else (1 if num_videos is None else num_videos)
        # An image is a clip of one frame, which no other frame is merged with.
        merging = self.vae.config if use_temporal else {}
        grid = latents_of(self.transformer, self.vae, height, width)
        frames = pixel_frames(merging, default_frames(config, grid)) if num_frames is None else num_frames
        count = latent_frames(merging, frames)
        kept = frames_of_videos(image, last_image, video, given, batch, frames)
        known = encode_given(self.transformer, self.vae, kept, frames, precision, grid) if kept else None
        if given_latents is not None:
            if known is not None:
                raise ValueError("frames and given_latents were given; give one of them")
            fits = given_latents.ndim == 5 and len(given_latents) == batch and given_latents.shape[-2:] == grid
            if not fits or not 1 <= given_latents.shape[1] <= count:
                raise ValueError(
                    f"given_latents have shape {tuple(given_latents.shape)}, but must have {batch} videos and 1 to "
                    f"{count} latents of {grid[0]} x {grid[1]}"
                )
            known = place_latents(self.transformer, given_latents, range(given_latents.shape[1]), count)
        if (guide_given and known is None) or (exact and not kept):
            raise ValueError("guide_given and exact have no effect without given frames")
        if known is not None and not use_temporal:
            raise ValueError("use_temporal is false, but images have no frames that could be given")
        can_guide = conditions is not None or (known is not None and guide_given)
        shape = (batch, count, config["in_channels"], *grid)
        self._check(conditions, num_videos, frames, shape, num_inference_steps, guided and not can_guide, output_type)
        for name, is_set in (("guidance_interval", guidance_interval is not None), ("guide_given", guide_given)):
            if is_set and not guided:
                raise ValueError(f"{name} has no effect with a guidance_scale of 1")
        if batch < 1:
            raise ValueError(f"{batch} videos were asked for, but must be at least 1")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator has {len(generator)} generators, but this call makes {batch} videos")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call needs {shape}")
        doings = None if actions is None else action_numbers(config, actions).to(device)
        if doings is not None and doings.shape != shape[:2]:
            asked = " x ".join(map(str, doings.shape))
            raise ValueError(f"actions are for {asked} videos and frames, but this call makes {batch} x {count}")
        label_tensor = None if labels is None else torch.tensor(labels, device=device)
        if guided and label_tensor is not None:
            label_tensor = torch.cat([label_tensor, torch.full_like(label_tensor, config["num_classes"])])
        text_tensor = None if embeds is None else torch.cat(embeds).to(device)

        set_timesteps(self.scheduler, num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        denoiser = Denoiser(
            self.transformer,
            timesteps,
            label_tensor,
            text_tensor,
            guidance,
            use_temporal,
            precision,
            cache,
            known,
            latents.to(device) if guide_given else None,
            doings,
        )
        learned_variance = uses_learned_variance(self.scheduler)
        state = latents.to(device).transpose(1, 2) * initial_scale(self.scheduler)  # (B, C, F, h, w)
        with denoiser.loop():
            for index, timestep in enumerate(self.progress_bar(timesteps)):
                scaled = model_input(self.scheduler, state, timestep).transpose(1, 2)  # (B, F, C, h, w)
                prediction, variance = denoiser(index, scaled)
                if learned_variance:
                    prediction = torch.cat([prediction, variance], dim=2)
                state = denoise_step(self.scheduler, prediction.transpose(1, 2), timestep, state, generator)
        latents = state.transpose(1, 2)
        if known is not None:
            latents = known.placed(latents)
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the latents are not finite after {num_inference_steps} steps with guidance_scale {guidance_scale:g}: "
                "the weights are not those of a trained model, or numbers became too large for the precision"
            )
        if (statistics := LatentStatistics.of(config)) is not None:
            latents = statistics.denormalize(latents)
        if output_type == "latent":
            return LavitaPipelineOutput(frames=latents)
        if use_temporal:
            pixels = decode(self.vae, latents, precision)
            if exact:
                for clip, places in zip(pixels, kept, strict=True):
                    clip[list(places)] = np.stack(list(places.values()))
            return LavitaPipelineOutput(frames=pixels)
        images = decode(self.vae, latents.flatten(0, 1)[:, None], precision)
        return LavitaPipelineOutput(frames=images.reshape(batch, frames, *images.shape[2:]))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeds texts with the model's text encoder, which is loaded once.

        Returns:
            Pooled embeddings, float32 (B, text_dim); for a model of `text_tokens` (B, 1 + L, text_dim), with the states
            of the tokens after them, see `TextEncoder.encode`.

        Raises:
            ValueError: if the model is not text-conditional, or its encoder cannot be loaded.
        """
        config = self.transformer.config
        if not config["text_dim"]:
            raise ValueError("this model has no texts")
        if self._text_encoder is None:
            self._text_encoder = load_text_encoder(config["text_encoder"], self.transformer.device)
        if (num_tokens := config["text_tokens"]) is None:
            return self._text_encoder(texts)
        return self._text_encoder.encode(texts, num_tokens)

    def _check(
        self,
        given: Sized | None,
        num_videos: int | None,
        frames: int,
        shape: tuple[int, int, int, int, int],
        steps: int,
        guided_by_nothing: bool,
        output_type: str,
    ) -> None:
        config, tube = self.transformer.config, self.transformer.tube_size
        _, count, _, height, width = shape
        trained = trained_range(config)[0]
        if not 1 <= frames <= MOST_FRAMES or count % tube:
            what = f"a multiple of {tube}, a tube's frames" if count == frames else f"have a multiple of {tube} latents"
            allowed = f"in {tube}..{MOST_FRAMES}" + (f" and {what}" if tube > 1 else "")
            raise ValueError(f"num_frames is {frames}, but must be {allowed}")
        if count > trained:
            trained = trained if count == frames else pixel_frames(self.vae.config, trained)
            logger.warning(
                f"{frames} frames were asked for, but the model was trained on {trained}: its temporal positions are "
                "interpolated"
            )
        if (warning := shape_warning(config, (count, height, width), downsampling(self.vae))) is not None:
            logger.warning(warning)
        if not 1 <= steps <= NUM_TIMESTEPS:
            raise ValueError(f"num_inference_steps is {steps}, but must be in 1..{NUM_TIMESTEPS}")
        if given is not None and num_videos is not None and num_videos != len(given):
            raise ValueError(f"num_videos is {num_videos}, but there are {len(given)} class_labels or prompts")
        if guided_by_nothing:
            raise ValueError("guidance_scale other than 1 needs a model with classes or texts, or guide_given")
        if output_type not in ("uint8", "latent"):
            raise ValueError(f"output_type is {output_type!r}; allowed: uint8, latent")


def load_pipeline(source: str | Path, device: torch.device | str = "cpu") -> LavitaPipeline:
    """Loads a pipeline in float32, for inference.

    Args:
        source: folder or hub id.
        device: device to load it to.

    Raises:
        ValueError: if there is no complete pipeline, it holds code, or its weights are not finite.
    """
    folder = Path(source)
    if not folder.exists():
        if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
            raise ValueError(f"{source}: no such folder; a model is a pipeline's folder or a hub id")
        folder = download(str(source), "a pipeline", PIPELINE_FILES)
    if not (folder / "model_index.json").exists():
        raise ValueError(f"{source}: holds no pipeline (no model_index.json in it)")
    disable_progress_bar()
    try:
        pipeline = LavitaPipeline.from_pretrained(str(folder))
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise cannot_load(str(source), "a pipeline", error, {}) from error
    check_finite(f"{source}: transformer", pipeline.transformer.state_dict())
    check_autoencoder(f"{source}: vae", pipeline.vae)
    pipeline.transformer.float().requires_grad_(False)
    pipeline.vae.float()
    return pipeline.to(device)


def make_pipeline(model: LavitaTransformer3DModel, vae: Autoencoder) -> LavitaPipeline:
    """Makes the pipeline of a model, with UniPC as its sampler."""
    pipeline = LavitaPipeline(model, vae, _scheduler_for(model, "unipc"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _scheduler_for(model: LavitaTransformer3DModel, sampler: str, spacing: Spacing = "trailing") -> Scheduler:
    config = model.config
    return make_scheduler(sampler, config["learn_sigma"], config["prediction_type"], spacing, config["flow_shift"])
