"""Nested fields of a configuration, before it is whole: those that were chosen, and those that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from lavita.core.config import load_config, merge, read_yaml
from lavita.data.config import SETS_WITH_CLASSES
from lavita.models.flow import FLOW
from lavita.studies.budget import table
from lavita.training.config import RunConfig


def recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the table, without its objective if the user has another one, or weights that have one."""
    values = read_yaml(Path(str(files("lavita") / "configs" / "recipes" / f"{table.RECIPE}.yaml")))
    model, train = given.get("model", {}), given.get("train", {})
    pretrained = train.get("init_from") is not None
    if pretrained or model.get("prediction_type", FLOW) != FLOW or train.get("loss_weighting") == "min_snr":
        values.pop("model", None)
        for key in ("timestep_sampling", "timestep_shift"):
            values["train"].pop(key, None)
    if pretrained:
        values["data"].pop("normalize_latents", None)
    # Fields of which the defaults would not go together with those that are given.
    batch_size, interval = train.get("accumulation"), train.get("keep_every") or train.get("validate_every")
    if isinstance(batch_size, int) and batch_size > 0:
        put(values, "train", batch_size=batch_size)
    if isinstance(interval, int) and interval > 0:
        put(values, "train", checkpoint_every=interval)
    return values


def without_path(given: Mapping[str, Any]) -> dict[str, Any]:
    """The videos are those in the cache, which has not all in the folder."""
    values: dict[str, Any] = {}
    merge(values, given)
    for key in ("path", "split"):
        values["data"].pop(key, None)
    if values["data"].get("dataset") not in SETS_WITH_CLASSES:
        values["data"].pop("dataset", None)
    return values


def load(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """The configuration of what was chosen and what is given, which wins; ConfigError if it cannot be."""
    values: dict[str, Any] = {}
    merge(values, chosen)
    merge(values, given)
    return load_config(RunConfig, values)


def put(values: dict[str, Any], section: str, **fields: Any) -> None:
    """Sets fields of a section."""
    merge(values, {section: fields})
