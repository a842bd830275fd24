"""Scores that the paper states, quoted next to ours if the protocol is the same, and not otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavita.core.names import DataSetName


@dataclass(frozen=True)
class QuotedRow:
    """A score stated in a paper; we have not measured it."""

    method: str
    value: float
    source: str


_METHODS = (
    "MoCoGAN",
    "MoCoGAN-Style",
    "VideoGPT",
    "MoCoGAN-HD",
    "DIGAN",
    "StyleGAN-V",
    "PVDM",
    "LAVITA",
    "LAVITA+IMG",
)
_FVD: dict[DataSetName, tuple[float | None, ...]] = {
    "faceforensics": (124.7, 55.62, 185.9, 111.8, 62.5, 47.41, 355.92, 34.00, 27.08),
    "sky_timelapse": (206.6, 85.88, 222.7, 164.1, 83.11, 79.52, 436.62, 59.82, 42.67),
    "ucf101": (2886.9, 1821.4, 2880.6, 1729.6, 1630.2, 1431.0, 2064.0, 863.41, 800.54),
    "taichi_hd": (None, None, None, 128.1, 156.7, None, 540.2, 159.60, 116.83),
}
_TABLES: dict[tuple[str, str], tuple[str, tuple[float | None, ...]]] = {
    ("is", "ucf101"): ("Table 1", (10.09, 15.26, 12.61, 23.39, 23.16, 23.94, 20.55, 68.53, 73.31)),
    ("fid", "faceforensics"): ("Table 1", (23.97, 10.82, 22.7, 7.12, 19.1, 9.445, 41.74, 5.02, 3.87)),
    **{("fvd", dataset): ("Table 2", values) for dataset, values in _FVD.items()},
}


def quoted_rows(name: str, settings: Mapping[str, Any]) -> list[QuotedRow]:
    """Looks up the paper's values of a score.

    Args:
        name: name of the score; only `fvd`, `fid` and `is` are quoted.
        settings: fields of the protocol, without gaps.

    Returns:
        One row per method; none if the protocol or data set is not one of the paper's.
    """
    same_protocol = (
        settings["num_frames"] == 16
        and settings["frame_interval"] == 3
        and settings["resolution"] == 256
        and settings["num_generated_clips"] == 2048
        # StyleGAN-V's tools take fewer if a data set has fewer videos, one clip of each.
        and settings["num_real_clips"] <= 2048
        and settings["max_clips_a_video"] == 1
        and (name != "is" or settings["inception_score"] == "stylegan-v")
        and (name != "fid" or (settings["real_frames"] == "all" and settings["image_ddof"] == 1))
        and (name != "fvd" or settings["video_ddof"] == 0)
    )
    if not same_protocol or (name, settings["dataset"]) not in _TABLES:
        return []
    table, values = _TABLES[name, settings["dataset"]]
    return [
        QuotedRow(method, value, f"quoted from the paper's {table}")
        for method, value in zip(_METHODS, values, strict=True)
        if value is not None
    ]
