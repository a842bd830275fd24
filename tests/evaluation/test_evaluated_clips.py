"""Which clips are chosen: by content and seed, exactly as many, and the same again."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_data import paint, write_broken, write_numbered, write_videos

from lavita.data.content_hash import content_hash
from lavita.evaluation import clips as clips_module
from lavita.evaluation.clips import (
    ClipSet,
    choose_all,
    choose_clips,
    every_frame,
    iter_pixels,
    read_pixels,
    successive_clips,
)
from lavita.evaluation.manifest import read_manifest, write_manifest
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.sources import Source, VideoFolder
from lavita.video.formats import VideoError
from lavita.video.writing import write_video

NAMES = [f"{label}/{number}.mp4" for label in "ab" for number in range(5)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), NAMES, num_frames=12)


@pytest.fixture(scope="module")
def source(videos: Path) -> Source:
    return VideoFolder(videos).usable()


def drawn(clips: ClipSet) -> list[tuple[str, int]]:
    return [(clip.sha256, clip.start) for clip in clips.clips]


def test_clips_depend_on_content_not_on_names(tmp_path: Path, videos: Path, source: Source) -> None:
    renamed = tmp_path / "renamed" / "deep"
    for number, name in enumerate(reversed(NAMES)):
        (renamed / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / name, renamed / Path(name).parent / f"{number:03}.mp4")
    chosen, again = (choose_clips(each, 17, 4, 2, seed=3) for each in (source, VideoFolder(renamed).usable()))
    assert drawn(chosen) == drawn(again)
    assert chosen.digest == again.digest
    assert chosen.labels == again.labels
    other = choose_clips(source, 17, 4, 2, seed=4)
    assert drawn(other) != drawn(chosen) and other.digest != chosen.digest


def test_clips_are_spread_and_distinct(source: Source) -> None:
    chosen = choose_clips(source, 23, 4, 2, seed=0)  # starts 0 to 5
    assert len(chosen.clips) == len(set(drawn(chosen))) == 23
    assert sorted(Counter(clip.name for clip in chosen.clips).values()) == [2] * 7 + [3] * 3
    assert {clip.start for clip in chosen.clips} == set(range(6))
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
    taken = {clip.sha256 for clip in first.clips}
    rest = choose_clips(source, 7, 4, 1, seed=0, max_clips_a_video=1, without=taken)
    assert not {clip.sha256 for clip in rest.clips} & {clip.sha256 for clip in first.clips}


def test_the_floor_has_other_videos_than_the_score(source: Source) -> None:
    protocol = Protocol(num_real_clips=6, num_generated_clips=4, num_frames=4, frame_interval=2)

    def choose(protocol: Protocol, **more: Source) -> tuple[dict[str, ClipSet], list[str]]:
        return choose_all({"real": source, "generated": source, **more}, protocol, {}, False)

    for seed in range(5):
        sets, warnings = choose(protocol.model_copy(update={"seed": seed}))
        real, floor = ({clip.sha256 for clip in sets[name].clips} for name in ("real", "floor"))
        assert (len(real), len(floor), len(sets["floor"].clips), warnings) == (6, 4, 4, [])
        assert real.isdisjoint(floor)
    sets, (warning,) = choose(protocol.model_copy(update={"num_real_clips": 10}))
    assert "floor" not in sets and warning.startswith("no floor: ") and "its 0 videos give 0 clips" in warning
    sets, warnings = choose(protocol.model_copy(update={"num_real_clips": 10}), held_out=source)
    assert len(sets["floor"].clips) == 4 and warnings == [], "held-out videos are others, whatever the score used"


def test_a_digest_is_of_all_that_decides_the_frames(source: Source) -> None:
    clips = choose_clips(source, 6, 4, 2, seed=0)
    first, *rest = clips.clips
    changed = [
        replace(clips, frame_interval=1),
        replace(clips, clips=(replace(first, start=first.start + 1), *rest)),
        replace(clips, clips=(replace(first, num_frames=3), *rest)),
        replace(clips, clips=(replace(first, sha256="0" * 64), *rest)),
        replace(clips, clips=(*rest, first)),
    ]
    assert len({clips.digest, *(other.digest for other in changed)}) == 6
    assert replace(clips, clips=(replace(first, name="renamed.mp4", label="x"), *rest)).digest == clips.digest


def test_a_file_that_keeps_its_size_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "0.mp4"
    file.write_bytes(b"before")
    before = content_hash(file)
    file.write_bytes(b"after!")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert content_hash(file) != before


def test_every_frame_once(source: Source) -> None:
    frames = Counter(
        (clip.name, clip.start + i) for clip in every_frame(source, 5).clips for i in range(clip.num_frames)
    )
    assert set(frames.values()) == {1} and len(frames) == 12 * len(NAMES)


@pytest.mark.parametrize(
    ("num_frames", "interval", "expected"),
    [
        (4, 1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (4, 3, [[0, 3, 6, 9]]),
        (3, 2, [[0, 2, 4], [5, 7, 9]]),
        (13, 1, [list(range(13))]),
        (14, 1, []),
    ],
)
def test_successive_clips_of_a_video(tmp_path: Path, num_frames: int, interval: int, expected: list[list[int]]) -> None:
    write_numbered(tmp_path / "video", 13)
    source = VideoFolder(tmp_path).usable()
    clips = successive_clips(source, source.catalog.videos, num_frames, interval)
    assert [pixels[:, 0, 0, 0].tolist() for _, pixels in iter_pixels(clips, 32)] == expected


def test_one_pass_reads_what_single_clips_are(source: Source) -> None:
    for clips in (successive_clips(source, source.catalog.videos, 3, 2), choose_clips(source, 10, 4, 2, seed=0)):
        read = list(iter_pixels(clips, 8))
        assert [clip for clip, _ in read] == list(clips.clips)
        for clip, pixels in read:
            assert np.array_equal(pixels, read_pixels(clips, clip, 8))


def test_one_pass_notices_damage_after_the_last_clip(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Iterator[np.ndarray]:
        yield from paint(9)
        raise VideoError(path, "frame 9 is damaged")

    monkeypatch.setattr(clips_module, "iter_frames", damaged)
    with pytest.raises(VideoError, match="frame 9 is damaged"):
        list(iter_pixels(successive_clips(source, source.catalog.videos[:1], 8, 1), 8))


def test_a_manifest_is_written_and_used_again(tmp_path: Path, videos: Path, source: Source) -> None:
    protocol = Protocol(seed=1, num_frames=4, frame_interval=2)
    clips = choose_clips(source, 5, 4, 2, seed=1)
    file = tmp_path / "new" / "clips.json"
    write_manifest(file, {"real": clips}, protocol)
    moved = tmp_path / "moved"
    shutil.copytree(videos, moved)
    (moved / clips.clips[0].name).rename(moved / "a" / "other.mp4")
    again = read_manifest(file, {"real": VideoFolder(moved).usable(), "floor": source}, protocol)
    assert set(again) == {"real"}
    assert (drawn(again["real"]), again["real"].digest) == (drawn(clips), clips.digest)
    assert again["real"].clips[0].name == "a/other.mp4"
    with pytest.raises(ValueError, match="was written with seed=1, but 2 was asked for"):
        read_manifest(file, {"real": source}, protocol.model_copy(update={"seed": 2}))
    write_video(moved / "a" / "other.mp4", paint(12, seed=99), fps=10)
    with pytest.raises(ValueError, match=r"names .*, but no video below .*moved has its content"):
        read_manifest(file, {"real": VideoFolder(moved).usable()}, protocol)
    for damage in ("{", "[]", json.dumps({"sides": {"real": 3}})):
        file.write_text(damage)
        with pytest.raises(ValueError, match="is not a manifest of clips"):
            read_manifest(file, {"real": source}, protocol)


def test_a_manifest_takes_the_copy_of_its_name_in_any_unicode_form(tmp_path: Path) -> None:
    file, protocol = tmp_path / "clips.json", Protocol(seed=1, num_frames=4, frame_interval=2)
    sources = {}
    for name in ("cafe\u0301", "caf\xe9"):
        write_videos(tmp_path / name, [f"{name}/{name}.mp4"], num_frames=12)
        shutil.copy(tmp_path / name / name / f"{name}.mp4", tmp_path / name / "a.mp4")
        sources[name] = VideoFolder(tmp_path / name).usable()
    write_manifest(file, {"real": choose_clips(sources["cafe\u0301"], 2, 4, 2, seed=1)}, protocol)
    again = read_manifest(file, {"real": sources["caf\xe9"]}, protocol)["real"]
    assert {(clip.name, clip.label) for clip in again.clips} == {("a.mp4", None), ("caf\xe9/caf\xe9.mp4", "caf\xe9")}


def test_broken_videos_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_videos(tmp_path, ["a/0.mp4", "a/1.mp4"], num_frames=12)
    write_videos(tmp_path, ["a/short.mp4"], num_frames=3)
    write_broken(tmp_path / "a" / "noise.mp4")
    with pytest.raises(
        ValueError, match=r"2 of 4 videos cannot be used, the first: .*noise\.mp4.*--skip-broken continues"
    ):
        VideoFolder(tmp_path).usable(8)
    assert "noise.mp4" in capsys.readouterr().err
    facts = VideoFolder(tmp_path).usable(8, skip_broken=True).facts()
    assert (facts["num_videos"], facts["num_broken"]) == (2, 2)
    assert any("has 3 frames, but a clip needs 8" in text for text in facts["broken"])
    assert facts["codecs"] == {"h264 yuv420p": 2} and facts["sizes"] == {"20x16": 2} and facts["frames"] == [12, 12]


def test_lossless_files_say_so(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", frames, fps=8)
    assert VideoFolder(tmp_path).usable().facts()["codecs"] == {"ffv1 bgr0": 1}
    before = content_hash(tmp_path / "a.mkv")
    write_video(tmp_path / "b.mkv", frames, fps=8)
    assert content_hash(tmp_path / "b.mkv") == before
    write_video(tmp_path / "a.mkv", frames[::-1], fps=8)
    assert content_hash(tmp_path / "a.mkv") != before
