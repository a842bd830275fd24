"""Builds everything that a training run needs."""

from __future__ import annotations

from lavita.models.autoencoder import AutoencoderKL, latent_size
from lavita.models.config import DEFAULT_TUBE_SIZE
from lavita.models.text_encoder import DEFAULT_TEXT_ENCODER
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig


def build_model(config: RunConfig, vae: AutoencoderKL, batches: BatchMaker) -> LavitaTransformer3DModel:
    """The freshly initialised model of a run, which carries the facts about its data."""
    names, table = list(batches.class_names), batches.text_table
    rates = sorted(video.info.fps for video in batches.source.catalog.videos)
    return LavitaTransformer3DModel.from_preset(
        config.model.preset,
        variant=config.model.variant,
        patch_embedding=config.model.patch_embedding,
        tube_size=config.model.tube_size or DEFAULT_TUBE_SIZE,
        conditioning=config.model.conditioning,
        temporal_position=config.model.temporal_position,
        learn_sigma=config.model.learn_sigma,
        prediction_type=config.model.prediction_type,
        sample_size=latent_size(vae, config.data.resolution),
        in_channels=vae.config["latent_channels"],
        num_frames=config.data.num_frames,
        num_classes=len(names),
        class_names=names or None,
        text_dim=0 if table is None else table.shape[1],
        text_encoder=None if table is None else config.model.text_encoder or DEFAULT_TEXT_ENCODER,
        frame_interval=config.data.frame_interval,
        fps=round(rates[len(rates) // 2] / config.data.frame_interval, 3),
    )
