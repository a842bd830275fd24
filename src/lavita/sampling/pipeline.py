"""Noise -> latents -> frames: the pipeline, in diffusers' layout, and its samplers."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.utils import BaseOutput
from diffusers.utils.logging import disable_progress_bar, get_logger
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError

from lavita.core.precision import Precision
from lavita.models.adapters import Adapters
from lavita.models.autoencoder import decode
from lavita.models.diffusion import NUM_TIMESTEPS
from lavita.models.text_encoder import TextEncoder, load_text_encoder
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.denoiser import Denoiser, Guidance
from lavita.sampling.schedulers import Spacing, make_scheduler, set_timesteps
from lavita.sampling.step_cache import CacheName

logger = get_logger(__name__)


@dataclass
class LavitaPipelineOutput(BaseOutput):
    """What the pipeline returns."""

    frames: npt.NDArray[np.uint8] | torch.Tensor
    """uint8 `(B, F, H, W, 3)`, or float32 latents `(B, F, C, h, w)`."""


class LavitaPipeline(DiffusionPipeline):
    """Generates videos: `LavitaPipeline.from_pretrained(folder)(class_labels=["boxing"]).frames`.

    Load it with this class: `DiffusionPipeline.from_pretrained` does not know it.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: LavitaTransformer3DModel, vae: AutoencoderKL, scheduler: SchedulerMixin) -> None:
        """Puts the three together; `make_scheduler` makes the scheduler.

        Raises:
            ValueError: where the transformer's latents are not the autoencoder's, or the scheduler takes its
                prediction for something else.
        """
        super().__init__()
        channels, expected = transformer.config["in_channels"], vae.config["latent_channels"]
        if channels != expected:
            raise ValueError(f"the transformer has {channels} latent channels, but the autoencoder {expected}")
        predicted, taken = transformer.config["prediction_type"], scheduler.config["prediction_type"]
        if predicted != taken:
            raise ValueError(f"the transformer predicts {predicted}, but the scheduler takes it for {taken}")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self._text_encoder: TextEncoder | None = None

    def use_sampler(self, sampler: str, spacing: Spacing = "trailing") -> None:
        """Replaces the scheduler by one of `SAMPLERS` that fits the model (see `make_scheduler`)."""
        config = self.transformer.config
        self.scheduler = make_scheduler(sampler, config["learn_sigma"], config["prediction_type"], spacing)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_videos: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        use_temporal: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["uint8", "latent"] = "uint8",
        precision: Precision = "auto",
        cache: CacheName | None = None,
    ) -> LavitaPipelineOutput:
        """Generates a batch of videos.

        Args:
            class_labels: a class a video, by number or name; a class-conditional model needs them.
            prompt: a text a video; a text-conditional model needs them, or `prompt_embeds`.
            negative_prompt: with guidance, the text to lead away from, one for all or one a video; by default the
                empty one, which stands for "no caption".
            prompt_embeds: pooled embeddings (B, text_dim) instead of `prompt`.
            negative_prompt_embeds: the same instead of `negative_prompt`.
            num_videos: how many, for an unconditional model; 1 by default.
            num_frames: F; the model's training length by default. Longer clips are squeezed into the positions of the
                trained length (`embeddings.frame_positions`), which a warning says.
            num_inference_steps: network evaluations (twice as many samples of them with guidance).
            guidance_scale: 1 for none; w gives `uncond + w (cond - uncond)` (Ho & Salimans 2022).
            guidance_interval: timesteps between which there is guidance; all by default (see `denoising.Guidance`).
            use_temporal: False leaves the temporal modules out: every frame is an image of its own (A.4).
            generator: one for all, or one a video, so that a video depends on its own alone; CPU generators give
                the same noise on every device.
            latents: initial noise (B, F, C, h, w) instead of the generator's.
            output_type: `uint8` frames or scaled `latent`s.
            precision: see `runtime.autocast`.
            cache: what steps reuse of earlier ones (see `step_cache`); by default nothing.

        Raises:
            ValueError: for labels, lengths or a guidance that do not fit the model.
        """
        config = self.transformer.config
        device = self.transformer.device
        labels = self._labels(class_labels)
        guidance = Guidance(guidance_scale, (0, NUM_TIMESTEPS) if guidance_interval is None else guidance_interval)
        guided = guidance_scale != 1.0
        embeds = self._embeds(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, guided)
        given = labels if labels is not None else None if embeds is None else embeds[0]
        batch = len(given) if given is not None else (1 if num_videos is None else num_videos)
        frames = config["num_frames"] if num_frames is None else num_frames
        self._check(given, num_videos, frames, num_inference_steps, guided, output_type)
        if guidance_interval is not None and not guided:
            raise ValueError("guidance_interval has no effect with a guidance_scale of 1")
        if batch < 1:
            raise ValueError(f"{batch} videos were asked for, but a call makes at least 1")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator has {len(generator)} generators, but this call makes {batch} videos")
        size, channels = config["sample_size"], config["in_channels"]
        shape = (batch, frames, channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call needs {shape}")
        null = config["num_classes"]
        label_tensor = None if labels is None else torch.tensor(labels, device=device)
        if guided and label_tensor is not None:
            label_tensor = torch.cat([label_tensor, torch.full_like(label_tensor, null)])
        text_tensor = None if embeds is None else torch.cat(embeds).to(device)

        set_timesteps(self.scheduler, num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        denoiser = Denoiser(
            self.transformer, timesteps, label_tensor, text_tensor, guidance, use_temporal, precision, cache
        )
        learned_variance = getattr(self.scheduler.config, "variance_type", None) == "learned_range"
        # Schedulers split noise from variance, and draw a sample's noise, along the second axis: (B, C, F, h, w).
        state = latents.to(device).transpose(1, 2) * self.scheduler.init_noise_sigma
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if draws else {}
        with denoiser.loop():
            for index, timestep in enumerate(self.progress_bar(timesteps)):
                scaled = self.scheduler.scale_model_input(state, timestep).transpose(1, 2)
                prediction, variance = denoiser(index, scaled)
                if learned_variance:
                    prediction = torch.cat([prediction, variance], dim=2)
                state = self.scheduler.step(prediction.transpose(1, 2), timestep, state, **extra).prev_sample
        latents = state.transpose(1, 2)
        result = decode(self.vae, latents, precision) if output_type == "uint8" else latents
        return LavitaPipelineOutput(frames=result)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings of texts by the model's text encoder, float32 (B, text_dim); it is loaded once.

        Raises:
            ValueError: where the model has no texts, or its encoder cannot be loaded.
        """
        config = self.transformer.config
        if not config["text_dim"]:
            raise ValueError("this model has no texts")
        if self._text_encoder is None:
            self._text_encoder = load_text_encoder(config["text_encoder"], self.transformer.device)
        return self._text_encoder(texts)

    def _embeds(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt: str | Sequence[str],
        negative_prompt_embeds: torch.Tensor | None,
        guided: bool,
    ) -> list[torch.Tensor] | None:
        """Embeddings of the prompts, and with guidance those of the negative ones, (B, text_dim) each."""
        text_dim = self.transformer.config["text_dim"]
        if not text_dim:
            if prompt is not None or prompt_embeds is not None:
                raise ValueError("a prompt was given, but this model has no texts")
            return None
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("this model has texts: give either prompt or prompt_embeds")
        if prompt_embeds is None:
            prompt_embeds = self.encode_text([prompt] if isinstance(prompt, str) else list(prompt or ()))
        batch = len(prompt_embeds)
        embeds = [prompt_embeds]
        if guided:
            if negative_prompt_embeds is None:
                texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else list(negative_prompt)
                negative_prompt_embeds = self.encode_text(texts)
            embeds.append(negative_prompt_embeds)
        for name, tensor in zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=False):
            if tensor.shape != (batch, text_dim):
                raise ValueError(f"{name} have shape {tuple(tensor.shape)}, but must have {(batch, text_dim)}")
        return embeds

    def _labels(self, class_labels: Sequence[int | str] | None) -> list[int] | None:
        num_classes, names = self.transformer.config["num_classes"], self.transformer.config["class_names"]
        if not num_classes:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional")
            return None
        if class_labels is None or isinstance(class_labels, str):
            raise ValueError(f"class_labels is {class_labels!r}, but this model needs a list, one class a video")
        known = ", ".join(names) if names else f"0..{num_classes - 1}"
        labels = []
        for label in class_labels:
            number = names.index(label) if names and label in names else label
            if not isinstance(number, int) or not 0 <= number < num_classes:
                raise ValueError(f"class label is {label!r}; allowed: {known}")
            labels.append(number)
        return labels

    def _check(
        self,
        given: Sized | None,
        num_videos: int | None,
        frames: int,
        steps: int,
        guided: bool,
        output_type: str,
    ) -> None:
        trained, tube = self.transformer.config["num_frames"], self.transformer.tube_size
        if frames < 1 or frames % tube:
            allowed = f"a multiple of {tube}, a tube's frames" if tube > 1 else "at least 1"
            raise ValueError(f"num_frames is {frames}, but must be {allowed}")
        if frames > trained:
            logger.warning(
                f"{frames} frames were asked for, but the model was trained on {trained}: its temporal positions are "
                "interpolated"
            )
        if not 1 <= steps <= NUM_TIMESTEPS:
            raise ValueError(f"num_inference_steps is {steps}, but must be in 1..{NUM_TIMESTEPS}")
        if given is not None and num_videos is not None and num_videos != len(given):
            raise ValueError(f"num_videos is {num_videos}, but there are {len(given)} class_labels or prompts")
        if guided and given is None:
            raise ValueError("guidance_scale other than 1 needs a model with classes or texts")
        if output_type not in ("uint8", "latent"):
            raise ValueError(f"output_type is {output_type!r}; allowed: uint8, latent")


def load_pipeline(source: str | Path, device: torch.device | str = "cpu") -> LavitaPipeline:
    """Loads a pipeline folder (or hub id) in float32; ValueError, in one line, where it is none."""
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").exists():
        raise ValueError(f"{source}: holds no pipeline (no model_index.json in it)")
    if not folder.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        raise ValueError(f"{source}: no such folder; a model is a pipeline's folder or a hub id")
    disable_progress_bar()
    try:
        pipeline = LavitaPipeline.from_pretrained(str(source), dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"{source}: cannot load a pipeline ({' '.join(str(error).split())[:200]})") from error
    for name, parameter in pipeline.transformer.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{source}: its transformer's weights lack {name}")
    pipeline.transformer.requires_grad_(False)
    return pipeline.to(device)


def make_pipeline(model: LavitaTransformer3DModel, vae: AutoencoderKL) -> LavitaPipeline:
    """The pipeline of a model, with UniPC as its sampler."""
    scheduler = make_scheduler("unipc", model.config["learn_sigma"], model.config["prediction_type"])
    pipeline = LavitaPipeline(model, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: LavitaPipeline, folder: Path, adapters: Adapters | None = None) -> None:
    """Saves a pipeline in diffusers' layout, and adapters in `lora` below, replacing an older one whole."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        if adapters is not None:
            adapters.save(partial / "lora")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{partial}: {error}") from error  # its writer's own kind for a full disk
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
