"""Which clips are chosen: by content and seed, exactly as many, and the same again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_data import paint, write_broken, write_videos

from lavita.data.content_hash import content_hash
from lavita.evaluation.clips import Side, all_frames, choose_clips, read_manifest, read_source, write_manifest
from lavita.video.writing import write_video

NAMES = [f"{label}/{number}.mp4" for label in "ab" for number in range(5)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), NAMES, num_frames=12)


def drawn(side: Side) -> list[tuple[str, int]]:
    return [(clip.sha256, clip.start) for clip in side.clips]


def test_clips_depend_on_content_not_on_names(tmp_path: Path, videos: Path) -> None:
    renamed = tmp_path / "renamed" / "deep"
    for number, name in enumerate(reversed(NAMES)):
        (renamed / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / name, renamed / Path(name).parent / f"{number:03}.mp4")
    sides = [choose_clips(read_source(root, 1, False), 17, 4, 2, seed=3) for root in (videos, renamed)]
    assert drawn(sides[0]) == drawn(sides[1])
    assert sides[0].digest == sides[1].digest
    assert sides[0].labels == sides[1].labels
    other = choose_clips(read_source(videos, 1, False), 17, 4, 2, seed=4)
    assert drawn(other) != drawn(sides[0]) and other.digest != sides[0].digest


def test_clips_are_spread_and_distinct(videos: Path) -> None:
    source = read_source(videos, 1, False)
    side = choose_clips(source, 23, 4, 2, seed=0)  # starts 0 to 5
    assert len(side.clips) == len(set(drawn(side))) == 23
    assert sorted(Counter(clip.name for clip in side.clips).values()) == [2] * 7 + [3] * 3
    assert {clip.start for clip in side.clips} == set(range(6))
    everything = choose_clips(source, 60, 4, 2, seed=0)
    assert len(set(drawn(everything))) == 60
    with pytest.raises(
        ValueError, match="num_real_clips is 61, but its 10 videos give 60 clips of 4 frames at interval 2"
    ):
        choose_clips(source, 61, 4, 2, seed=0)
    with pytest.raises(ValueError, match="max_clips_a_video=1; allowed: at most 10"):
        choose_clips(source, 11, 4, 2, seed=0, max_clips_a_video=1)
    first = choose_clips(source, 3, 4, 1, seed=0, order="first", max_clips_a_video=1)
    assert [clip.name for clip in first.clips] == ["a/0.mp4", "a/1.mp4", "a/2.mp4"]
    plain = choose_clips(source, 10, 4, 1, seed=0, random_start=False)
    assert {clip.start for clip in plain.clips} == {0}
    taken = [(clip.sha256, -1) for clip in first.clips]
    rest = choose_clips(source, 7, 4, 1, seed=0, max_clips_a_video=1, without=taken)
    assert not {clip.sha256 for clip in rest.clips} & {clip.sha256 for clip in first.clips}


def test_every_frame_once(videos: Path) -> None:
    side = all_frames(read_source(videos, 1, False), 5)
    frames = Counter((clip.name, clip.start + i) for clip in side.clips for i in range(clip.num_frames))
    assert set(frames.values()) == {1} and len(frames) == 12 * len(NAMES)


def test_a_manifest_is_written_and_used_again(tmp_path: Path, videos: Path) -> None:
    source = read_source(videos, 1, False)
    side = choose_clips(source, 5, 4, 2, seed=1)
    settings = {"seed": 1, "num_frames": 4}
    file = tmp_path / "new" / "clips.json"
    write_manifest(file, {"real": side}, settings)
    moved = tmp_path / "moved"
    shutil.copytree(videos, moved)
    (moved / side.clips[0].name).rename(moved / "a" / "other.mp4")
    again = read_manifest(file, {"real": read_source(moved, 1, False), "floor": source}, settings)
    assert set(again) == {"real"}
    assert (drawn(again["real"]), again["real"].digest) == (drawn(side), side.digest)
    assert again["real"].clips[0].name == "a/other.mp4"
    with pytest.raises(ValueError, match="was written with seed=1, but 2 was asked for"):
        read_manifest(file, {"real": source}, {**settings, "seed": 2})
    write_video(moved / "a" / "other.mp4", paint(12, seed=99), fps=10)
    with pytest.raises(ValueError, match=r"names .*, but no video below .*moved has its content"):
        read_manifest(file, {"real": read_source(moved, 1, False)}, settings)
    for damage in ("{", "[]", json.dumps({"sides": {"real": 3}})):
        file.write_text(damage)
        with pytest.raises(ValueError, match="is no manifest of clips"):
            read_manifest(file, {"real": source}, settings)


def test_broken_videos_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["a/0.mp4", "a/1.mp4"], num_frames=12)
    write_videos(tmp_path, ["a/short.mp4"], num_frames=3)
    write_broken(tmp_path / "a" / "noise.mp4")
    with pytest.raises(
        ValueError, match=r"2 of 4 videos cannot be used, the first: .*noise\.mp4.*--skip-broken goes on"
    ):
        read_source(tmp_path, 8, False)
    assert "noise.mp4" in capsys.readouterr().err
    facts = read_source(tmp_path, 8, True).facts()
    assert (facts["num_videos"], facts["num_broken"]) == (2, 2)
    assert any("has 3 frames, but a clip needs 8" in text for text in facts["broken"])
    assert facts["codecs"] == {"h264 yuv420p": 2} and facts["sizes"] == {"20x16": 2} and facts["frames"] == [12, 12]


def test_lossless_files_say_so(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", frames, fps=8)
    assert read_source(tmp_path, 1, False).facts()["codecs"] == {"ffv1 bgr0": 1}
    before = content_hash(tmp_path / "a.mkv")
    write_video(tmp_path / "b.mkv", frames, fps=8)
    assert content_hash(tmp_path / "b.mkv") == before
    write_video(tmp_path / "a.mkv", frames[::-1], fps=8)
    assert content_hash(tmp_path / "a.mkv") != before
