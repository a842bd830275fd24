"""Names that the command line shares with the rooms that they belong to.

This module imports nothing but `typing`, so that `lavita --help` can list the names without loading pydantic or torch.
"""

from __future__ import annotations

from typing import Literal

DataSetName = Literal["folder", "faceforensics", "sky_timelapse", "ucf101", "taichi_hd"]
"""Layouts of data sets (`data.datasets`): any folder of videos, or one of the paper's data sets."""
SamplerName = Literal["unipc", "dpm++", "sde-dpm++", "ddim", "ddpm", "euler", "heun"]
"""Samplers (`sampling.schedulers`)."""
Spacing = Literal["trailing", "quadratic", "karras"]
"""Spacings of a sampler's steps (`sampling.schedulers`)."""
CacheName = Literal["pab", "fastercache", "taylorseer"]
"""Step caches (`sampling.step_cache`)."""
RecipeName = Literal["default", "paper", "fast"]
"""Sampling recipes (`sampling.recipes`)."""
TrainingRecipe = Literal["paper", "modern"]
"""Recipes of training: the files of `configs/recipes`."""
VideoFormat = Literal["mp4", "gif", "mkv"]
"""Formats of written videos (`video.writing`); each is the suffix of its files."""
