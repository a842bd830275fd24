"""Sizes and buckets: read, printed, and kept in configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lavita.core.config import ConfigError, load_config, read_yaml, save_config
from lavita.core.sizes import Bucket, Size, parse_size
from lavita.data.config import DataConfig


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("64x64", 64), ("96x160", Size(96, 160)), (" 160x96 ", Size(160, 96))]
)
def test_a_size_is_height_by_width(text: str, size: int | Size) -> None:
    assert parse_size(text) == size
    assert Size.of(64) == Size(64, 64) and str(Size(96, 160)) == "96x160" and Size(96, 160).area == 15360


@pytest.mark.parametrize("text", ["", "x", "64x", "64x64x64", "-64", "6.4", "4", "64x4", "99999x64", "64 x 64"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^size is .*, but "):
        parse_size(text, "size")


@pytest.mark.parametrize("value", [64, "96x160", Size(96, 160)])
def test_a_size_reads_back_from_a_saved_configuration(value: Any, tmp_path: Path) -> None:
    data = load_config(DataConfig, {"resolution": value})
    save_config(data, tmp_path / "config.yaml")
    assert load_config(DataConfig, read_yaml(tmp_path / "config.yaml")) == data
    assert data.resolution == (64 if value == 64 else Size(96, 160))
    assert f"resolution: {value}\n" in (tmp_path / "config.yaml").read_text()


def test_buckets_read_back_and_say_the_shape_of_samples(tmp_path: Path) -> None:
    data = load_config(DataConfig, {"fit": "bucket"}, ["data=1", "buckets=[16x64x96,1x128x128]"][1:])
    assert data.buckets == [Bucket(16, Size(64, 96)), Bucket(1, Size(128, 128))]
    assert (data.num_frames, data.resolution, data.clip_span, data.longest_side) == (16, Size(64, 96), 1, 128)
    save_config(data, tmp_path / "config.yaml")
    assert load_config(DataConfig, read_yaml(tmp_path / "config.yaml")) == data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resolution=4", r"resolution is 4: each side must be in 8\.\."),
        ("resolution=96x4", r"resolution is '96x4': each side must be in 8\.\."),
        ("resolution=wide", "resolution is 'wide': must be a number|resolution is 'wide': must be a side"),
        ("resolution=true", "resolution is True: must be a number"),
        ("resolution=6.5", "resolution is 6.5: must be a side in pixels"),
        ("resolution=[96,160]", r"resolution is \[96, 160\]: must be a side in pixels"),
    ],
)
def test_a_field_says_what_a_size_is(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DataConfig, {}, [override])
