"""Which statistics the latents of a run are normalised with."""

from __future__ import annotations

import sys

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.data.clip_sources import ClipSource
from lavita.models.latent_statistics import LatentStatistics
from lavita.models.pretrained.reading import read_config
from lavita.training.checkpoint import list_checkpoints
from lavita.training.config import RunConfig


def latent_statistics(config: RunConfig, source: ClipSource, team: Processes | None = None) -> LatentStatistics | None:
    """The statistics that the model of a run is trained with.

    A resumed run keeps those that it was started with, and fine-tuning those of the pretrained model, which belong to
    its weights. Otherwise they are those of the training videos.

    Args:
        config: the run.
        source: the training videos, or their cache.
        team: the processes of the run; the first one decides.

    Returns:
        None without `data.normalize_latents`.

    Raises:
        ConfigError: if a pretrained model needs normalised latents and the run does not normalise them.
    """
    team = team or Processes()
    return team.first_says(_choose(config, source) if team.is_first else None)


def _choose(config: RunConfig, source: ClipSource) -> LatentStatistics | None:
    wanted, init_from = config.data.normalize_latents, config.train.init_from
    if list_checkpoints(config.run_dir / "checkpoints"):
        init_from = str(config.run_dir)
    pretrained = read_config(init_from) if init_from is not None else {}
    if (known := LatentStatistics.of(pretrained)) is not None:
        if not wanted:
            raise ConfigError(
                f"data.normalize_latents is false, but {init_from} was trained on normalised latents; set it to true"
            )
        return known
    if not wanted:
        return None
    if config.train.init_from is not None:
        print(
            f"note: {config.train.init_from} was trained on latents that are not normalised; this run normalises them",
            file=sys.stderr,
        )
    return source.statistics()
