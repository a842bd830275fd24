"""Protocols: presets, fields, and their differences; names of scores; the paper's scores."""

from __future__ import annotations

from typing import Any

import pytest

from lavita.evaluation.feature_metrics import FEATURE_METRICS, score_name
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.protocol import PRESETS, Protocol, make_protocol
from lavita.evaluation.report.compare import differences
from lavita.evaluation.report.paper_numbers import quoted_rows
from lavita.sampling.recipes import RECIPES


def test_presets_are_those_of_the_field() -> None:
    paper, stylegan, latte = (make_protocol(name) for name in ("paper", "stylegan-v", "latte"))
    for protocol in (paper, stylegan, latte):
        assert (protocol.num_real_clips, protocol.num_generated_clips, protocol.num_frames) == (2048, 2048, 16)
        assert (protocol.max_clips_a_video, protocol.video_ddof, protocol.video_extractor) == (1, 0, "i3d")
    assert (paper.frame_interval, paper.resolution, paper.real_frames, paper.image_ddof) == (3, 256, "all", 1)
    assert (stylegan.frame_interval, stylegan.real_videos, stylegan.image_extractor) == (
        1,
        "first",
        "inception_stylegan",
    )
    assert (latte.frame_interval, latte.real_videos) == (3, "random")
    for protocol in (stylegan, latte):  # the FID of StyleGAN's tools
        fid = (protocol.image_extractor, protocol.image_ddof, protocol.real_frames)
        assert fid == ("inception_stylegan", 0, "all")
    assert make_protocol("latte", ["dataset=taichi_hd"]).frame_interval == 6
    assert make_protocol("latte", ["dataset=taichi_hd", "frame_interval=4"]).frame_interval == 4
    assert make_protocol("paper", ["dataset=taichi_hd"]).frame_interval == 3


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_field_can_be_set(preset: str | None) -> None:
    values: dict[str, Any] = {
        "dataset": "ucf101",
        "split": "train",
        "num_real_clips": 7,
        "num_generated_clips": 8,
        "num_frames": 9,
        "frame_interval": 4,
        "resolution": 32,
        "real_videos": "first",
        "max_clips_a_video": 5,
        "real_frames": "all",
        "seed": 6,
        "video_extractor": "x",
        "image_extractor": "y",
        "label_extractor": "z",
        "video_ddof": 1,
        "image_ddof": 0,
        "frames_a_clip": 2,
        "neighbours": 3,
        "inception_score": "custom",
        "inception_splits": 4,
        "num_halvings": 1,
        "floor": False,
    }
    assert set(values) == set(Protocol.model_fields)
    protocol = make_protocol(preset, [f"{key}={value}" for key, value in values.items()])
    assert protocol.model_dump() == values


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="preset is 'x'; allowed: paper"):
        make_protocol("x")
    with pytest.raises(ValueError, match="unknown key 'clips'"):
        make_protocol(None, ["clips=3"])
    with pytest.raises(ValueError, match="num_real_clips is 1"):
        make_protocol(None, ["num_real_clips=1"])
    with pytest.raises(ValueError, match="inception_splits is None; it belongs to inception_score=custom"):
        make_protocol(None, ["inception_score=custom"])


def test_differences_are_named_by_field() -> None:
    first = {"a": 1, "b": {"c": [1], "d": 2}, "e": 3}
    assert differences(first, first) == []
    assert differences(first, {"a": 1, "b": {"c": [2], "d": 2}, "f": 3}) == [
        "b.c: [1] / [2]",
        "e: 3 / missing",
        "f: missing / 3",
    ]


def test_names_of_scores_say_which_network() -> None:
    def name(metric: str, extractor: str) -> str:
        return score_name(FEATURE_METRICS[metric], EXTRACTORS[extractor])

    assert [name(metric, "i3d") for metric in ("fvd", "frechet-video", "kvd", "kernel-video")] == ["fvd"] * 2 + [
        "kvd"
    ] * 2
    assert (name("fid", "inception"), name("kid", "inception")) == ("fid", "kid")
    assert name("fid", "inception_stylegan") == "fid[inception_stylegan]"
    assert (name("is", "c3d"), name("prdc", "i3d")) == ("is", "prdc-video[i3d]")
    assert name("frechet-video", "efficientnet_lite0_video") == "frechet-video[efficientnet_lite0_video]"
    assert name("frechet-image", "efficientnet_lite0") == "frechet-image[efficientnet_lite0]"
    assert name("inception-score", "efficientnet_lite0_labels") == "inception-score[efficientnet_lite0_labels]"
    short = {"fvd", "fid", "kvd", "kid", "is"}
    for metric in FEATURE_METRICS:
        for extractor in EXTRACTORS.values():
            if "efficientnet" in extractor.name:
                assert name(metric, extractor.name).split("[")[0] not in short


def test_the_papers_scores_are_quoted_only_for_its_protocol() -> None:
    def rows(name: str, *overrides: str, preset: str = "paper") -> dict[str, float]:
        settings = make_protocol(preset, overrides).model_dump()
        found = quoted_rows(name, settings, None)
        assert all("quoted" in row.source for row in found)
        return {row.method: row.value for row in found}

    assert rows("fvd", "dataset=sky_timelapse")["LAVITA"] == 59.82
    assert rows("fvd", "dataset=taichi_hd") == {
        "MoCoGAN-HD": 128.1,
        "DIGAN": 156.7,
        "PVDM": 540.2,
        "LAVITA": 159.60,
        "LAVITA+IMG": 116.83,
    }
    assert rows("is", "dataset=ucf101")["LAVITA+IMG"] == 73.31
    assert rows("fid", "dataset=faceforensics")["LAVITA"] == 5.02
    assert rows("fid", "dataset=ucf101") == rows("fvd") == {}
    assert rows("frechet-video[efficientnet_lite0_video]", "dataset=ucf101") == {}
    for change in (
        *("resolution=128", "frame_interval=1", "num_generated_clips=1024", "num_real_clips=4096", "num_frames=8"),
        *("max_clips_a_video=2", "max_clips_a_video=null", "video_ddof=1"),
    ):
        assert rows("fvd", "dataset=ucf101", change) == {}, change
    for change in ("real_frames=clips", "image_ddof=0"):
        assert rows("fid", "dataset=faceforensics", change) == {}, change
        assert rows("fvd", "dataset=faceforensics", change), "which has nothing to do with images"
    assert rows("is", "dataset=ucf101", "inception_score=tgan") == {}
    assert rows("fvd", "dataset=ucf101", preset="stylegan-v") == {}


TABLE_2 = """
    MoCoGAN 124.7 206.6 2886.9 -
    MoCoGAN-Style 55.62 85.88 1821.4 -
    VideoGPT 185.9 222.7 2880.6 -
    MoCoGAN-HD 111.8 164.1 1729.6 128.1
    DIGAN 62.5 83.11 1630.2 156.7
    StyleGAN-V 47.41 79.52 1431.0 -
    PVDM 355.92 436.62 2064.0 540.2
    LAVITA 34.00 59.82 863.41 159.60
    LAVITA+IMG 27.08 42.67 800.54 116.83
"""
TABLE_1 = """
    MoCoGAN 10.09 23.97
    MoCoGAN-Style 15.26 10.82
    VideoGPT 12.61 22.7
    MoCoGAN-HD 23.39 7.12
    DIGAN 23.16 19.1
    StyleGAN-V 23.94 9.445
    PVDM 20.55 41.74
    LAVITA 68.53 5.02
    LAVITA+IMG 73.31 3.87
"""
COLUMNS = [
    (TABLE_2, 1, "fvd", "faceforensics"),
    (TABLE_2, 2, "fvd", "sky_timelapse"),
    (TABLE_2, 3, "fvd", "ucf101"),
    (TABLE_2, 4, "fvd", "taichi_hd"),
    (TABLE_1, 1, "is", "ucf101"),
    (TABLE_1, 2, "fid", "faceforensics"),
    ("LAVITA 378.20", 1, "fvd", "webvid"),
    ("LAVITA 47.72", 1, "fid", "webvid"),
]


@pytest.mark.parametrize(
    ("table", "column", "score", "dataset"), COLUMNS, ids=[f"{score}-{dataset}" for _, _, score, dataset in COLUMNS]
)
def test_the_quoted_scores_are_the_papers(table: str, column: int, score: str, dataset: str) -> None:
    """Against a second copy of its tables."""
    lines = [line.split() for line in table.strip().splitlines()]
    expected = {line[0]: float(line[column]) for line in lines if line[column] != "-"}
    found = quoted_rows(score, make_protocol("paper", [f"dataset={dataset}"]).model_dump(), None)
    assert {row.method: row.value for row in found} == expected
    for row in found:
        is_own = row.method.startswith("LAVITA") or (row.method, score) == ("PVDM", "fvd")
        assert ("another protocol" in row.source) != is_own, row.source


def test_no_score_is_quoted_beside_another_way_of_sampling() -> None:
    settings = make_protocol("paper", ["dataset=ucf101"]).model_dump()
    classes = {"num_classes": 101, "text_dim": 0}
    assert quoted_rows("fvd", settings, {"fps": 8.0, **RECIPES["paper"].settings(classes)})
    for name, recipe in RECIPES.items():
        assert bool(quoted_rows("fvd", settings, recipe.settings(classes))) == (name == "paper")
    for change in (
        {"steps": 100},
        {"sampler": "ddim"},
        {"guidance_scale": 1.5},
        {"cache": "pab"},
        {"quantize": "int8"},
    ):
        recipe = RECIPES["paper"].changed(**change)
        assert not quoted_rows("fvd", settings, recipe.settings(classes)), change
