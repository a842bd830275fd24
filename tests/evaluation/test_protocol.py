"""Protocols: presets, fields, and their differences; names of scores; the paper's scores."""

from __future__ import annotations

from typing import Any

import pytest

from lavita.evaluation.feature_metrics import FEATURE_METRICS, score_name
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.protocol import PRESETS, Protocol, make_protocol
from lavita.evaluation.report.compare import differences
from lavita.evaluation.report.paper_numbers import quoted_rows


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
    assert stylegan.image_ddof == 0
    assert (latte.frame_interval, latte.real_videos) == (3, "random")


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
        found = quoted_rows(name, settings)
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
