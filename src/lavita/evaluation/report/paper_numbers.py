"""Scores that the paper states, quoted next to ours if the protocol is the paper's, and not otherwise.

Most rows of its tables come from other papers, whose protocol was another: such a row says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavita.core.names import DataSetName
from lavita.sampling.recipes import RECIPES


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
VARIANT_FVD: dict[int, tuple[float, float, float, float]] = {
    50: (328.16, 227.32, 227.84, 331.27),
    60: (194.33, 133.66, 110.32, 191.53),
    70: (132.22, 97.84, 100.27, 128.13),
    80: (106.09, 84.78, 91.67, 97.38),
    90: (83.18, 73.69, 86.41, 98.79),
    100: (81.12, 67.50, 75.42, 88.53),
    110: (74.26, 61.93, 72.30, 82.15),
    120: (69.20, 59.31, 66.21, 83.29),
    130: (68.66, 54.86, 61.75, 82.45),
    140: (60.26, 53.10, 58.56, 81.25),
    150: (60.51, 52.73, 54.03, 73.85),
}
"""Table 4: FVD of Variants 1 to 4 on FaceForensics after so many thousand steps."""
_TEXTS = {"fvd": 378.20, "fid": 47.72}
_TEXT_SOURCE = "quoted from the paper's Sec. 4.4: 2,048 videos, trained on Webvid2M and Laion5B; no protocol is named"
_TABLES: dict[tuple[str, str], tuple[str, tuple[float | None, ...]]] = {
    ("is", "ucf101"): ("Table 1", (10.09, 15.26, 12.61, 23.39, 23.16, 23.94, 20.55, 68.53, 73.31)),
    ("fid", "faceforensics"): ("Table 1", (23.97, 10.82, 22.7, 7.12, 19.1, 9.445, 41.74, 5.02, 3.87)),
    **{("fvd", dataset): ("Table 2", values) for dataset, values in _FVD.items()},
}


def quoted_rows(name: str, settings: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[QuotedRow]:
    """Looks up the paper's values of a score.

    Args:
        name: name of the score; only `fvd`, `fid` and `is` are quoted.
        settings: fields of the protocol, without gaps.
        generation: how the generated videos were sampled, as recorded with them; None if it is not recorded.

    Returns:
        One row per method; none if the protocol, the data set or the sampling is not one of the paper's.
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
    if not same_protocol or (generation is not None and not _is_the_papers(generation)):
        return []
    if settings["dataset"] == "webvid" and name in _TEXTS:
        return [QuotedRow("LAVITA", _TEXTS[name], _TEXT_SOURCE)]
    if (name, settings["dataset"]) not in _TABLES:
        return []
    table, values = _TABLES[name, settings["dataset"]]
    return [
        QuotedRow(method, value, f"quoted from the paper's {table}{_origin(name, method)}")
        for method, value in zip(_METHODS, values, strict=True)
        if value is not None
    ]


def _is_the_papers(generation: Mapping[str, Any]) -> bool:
    """Whether videos were sampled by the recipe `paper`, by their record."""
    paper = RECIPES["paper"].settings({"num_classes": 0, "text_dim": 0})
    others = ("spacing", "guidance_interval", "cache", "quantize")
    return all(generation.get(key) == value for key, value in paper.items()) and not any(map(generation.get, others))


def _origin(name: str, method: str) -> str:
    """Where the paper has a row from, and how its protocol differs."""
    if method.startswith("LAVITA"):
        return ""
    if name == "fvd" and method == "PVDM":
        return ", trained again by its authors"
    how = {
        "fvd": "frame interval 1",
        "fid": "StyleGAN's own resize of Inception, not clean-fid",
        "is": "frame interval 1",
    }[name]
    return f", there from StyleGAN-V or PVDM: another protocol ({how})"
