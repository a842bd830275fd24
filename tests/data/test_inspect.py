"""`lavita data inspect`: its numbers are those of the videos that were written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from rich.console import Console
from tiny_data import paint, write_avi, write_broken, write_frames, write_videos

from lavita.data.clips import ClipSampler, center_crop_resize
from lavita.data.datasets import open_dataset
from lavita.data.inspect import inspect_dataset, print_inspection
from lavita.video.writing import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of videos of two sizes, rates and lengths, one of them as frames, and two that are broken."""
    root = tmp_path / "v"
    write_videos(root, ["a/0.mp4", "a/1.mp4"], num_frames=10)
    write_videos(root, ["b/2.mp4"], num_frames=5, height=24, width=32)
    write_video(root / "b" / "3.mp4", paint(30), fps=15)
    write_frames(root, ["b/frames"], 4)
    write_broken(root / "a" / "noise.mp4")
    whole = write_videos(root, ["b/cut.mp4"], num_frames=20) / "b" / "cut.mp4"
    whole.write_bytes(whole.read_bytes()[:-200])
    return root


def test_the_numbers_are_those_of_the_videos(folder: Path) -> None:
    found = inspect_dataset(folder, num_frames=3, frame_interval=2)
    assert (found.num_videos, found.num_frame_folders, found.num_frames) == (5, 1, 10 + 10 + 5 + 30 + 4)
    assert found.hours * 3600 == pytest.approx(10 / 10 + 10 / 10 + 5 / 10 + 30 / 15 + 4 / 25)
    assert found.classes == {"a": 2, "b": 3}
    assert found.folders == {"a": 3, "b": 4}, "with the broken ones"
    assert list(found.sizes.items()) == [("20x16", 4), ("32x24", 1)]
    assert list(found.rates.items()) == [("10", 3), ("15", 1), ("unknown", 1)]
    assert (found.shortest, found.median, found.longest) == (4, 10, 30)
    assert [(low, high) for low, high, _ in found.lengths][-1][1] == 30
    for low, high, count in found.lengths:
        assert count == sum(low <= length <= high for length in (10, 10, 5, 30, 4)) > 0
    assert sum(count for *_, count in found.lengths) == 5
    # A clip of 3 frames at interval 2 spans 5 frames.
    assert found.num_clips == 6 + 6 + 1 + 26
    assert found.too_short == ("b/frames",)
    assert [message.split(": ")[0] for message in found.broken] == ["a/noise.mp4", "b/cut.mp4"]
    assert "is cut off" in found.broken[1]
    assert (found.looks_like, found.splits, found.captions, found.left_out) == (None, {}, None, {})
    assert found.notes == (f"{folder}: 1 of 7 videos are folders of images, such as b/frames",)


def test_the_clips_are_those_of_training(folder: Path) -> None:
    found = inspect_dataset(folder, "folder", None, 4, 3)
    sampler = ClipSampler(open_dataset(folder, min_frames=10), 4, 3, True, seed=0)
    assert found.num_clips == sampler.num_clips == 1 + 1 + 21


def test_captions_are_compared(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("file,caption\na/0.mp4,x\na/0.mp4,y\nb/3.mp4,\ngone.mp4,z\na/noise.mp4,w\n")
    covered = inspect_dataset(folder, captions=table).captions
    assert covered is not None
    assert (covered.num_captions, covered.num_videos) == (2, 1)
    assert covered.without == ("a/1.mp4", "b/2.mp4", "b/3.mp4", "b/frames")
    assert (covered.num_rows, covered.num_rows_unused, covered.num_rows_empty) == (5, 2, 1)
    assert covered.unused_example == "gone.mp4"


NAMES = ["YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g08_c01.avi", "Surfing/v_Surfing_g09_c01.avi"]


def test_a_data_set_is_guessed_and_inspected_by_name(tmp_path: Path, run: Run) -> None:
    write_avi(tmp_path / "UCF-101", [*NAMES, "trailer.avi"])
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text(NAMES[0])
    (lists / "trainlist01.txt").write_text("\n".join(f"{name} 1" for name in NAMES[1:]))
    splits = {"train": 2, "test": 1, "train01": 2, "test01": 1}

    guessed = inspect_dataset(tmp_path / "UCF-101")
    assert (guessed.looks_like, guessed.splits, guessed.split) == ("ucf101", splits, None)
    assert guessed.num_videos == 4
    named = inspect_dataset(tmp_path / "UCF-101", "ucf101", "train")
    assert (named.looks_like, named.splits, named.split) == (None, splits, "train")
    assert named.classes == {"Surfing": 1, "YoYo": 1}
    assert [message.split(": ")[0] for message in named.broken] == ["trailer.avi"]

    code, out, _ = run("data", "inspect", tmp_path / "UCF-101")
    assert code == 0 and "looks like   ucf101: inspect it with --dataset ucf101" in out
    code, out, _ = run("data", "inspect", tmp_path / "UCF-101", "--dataset", "ucf101", "--json")
    assert code == 0
    assert json.loads(out)["split"] == "all" and json.loads(out)["classes"] == {"Surfing": 1, "YoYo": 2}
    assert run("data", "inspect", tmp_path / "UCF-101", "--dataset", "taichi_hd")[0] == 2


def test_the_contact_sheet_shows_what_training_sees(folder: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    code, printed, err = run("data", "inspect", folder, "--out", out, "--num-frames", "3", "--frame-interval", "2")
    assert code == 0, err
    assert printed.splitlines()[-1] == str(out)
    assert json.loads((out / "inspection.json").read_text())["num_clips"] == 39
    with Image.open(out / "contact_sheet.png") as image:
        sheet = np.asarray(image)
    # Four videos have a clip: a line of 16 pixels of text and one of frames each, and gaps of 2 pixels.
    assert sheet.shape == (4 * (16 + 2 + 96) + 3 * 2, sheet.shape[1], 3)
    first = center_crop_resize(_frames(folder / "a" / "0.mp4", [2, 4, 6]), 96)
    tiles = [sheet[18 : 18 + 96, x : x + 96] for x in (0, 98, 196)]
    assert np.array_equal(np.stack(tiles), first)


def _frames(path: Path, wanted: list[int]) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[number] for number in wanted])


def test_videos_that_cannot_be_decoded_show_on_the_sheet(tmp_path: Path) -> None:
    """Their headers are whole: only who decodes them notices."""
    write_videos(tmp_path / "v", ["0.mp4", "1.mp4"], 40)
    damaged = tmp_path / "v" / "1.mp4"
    data = bytearray(damaged.read_bytes())
    middle = data.index(b"mdat") + 4
    start = middle + (len(data) - middle) // 2
    data[start:] = np.random.default_rng(0).bytes(len(data) - start)
    damaged.write_bytes(data)
    assert inspect_dataset(tmp_path / "v").broken == ()
    found = inspect_dataset(tmp_path / "v", sheet=tmp_path / "sheet.png")
    assert found.num_videos == 1 and [message.split(": ")[0] for message in found.broken] == ["1.mp4"]


def printed(folder: Path, width: int = 200, **options: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_inspection(inspect_dataset(folder, **options), console)  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_console_says_what_matters(folder: Path) -> None:
    text = printed(folder, num_frames=3, frame_interval=2)
    for words in (
        "5, 1 of them frame folders; 2 more cannot be read",
        "2  (with data.class_folders=true): a 2, b 3",
        "39 of 3 frames at interval 2; 1 videos are shorter than the 5 frames of a clip: b/frames",
        "Sizes differ",
        "Rates differ",
        "broken: a/noise.mp4: ",
    ):
        assert words in text
    (folder / "a" / "noise.mp4").unlink()
    for path in ("b/2.mp4", "b/3.mp4", "b/cut.mp4"):
        (folder / path).unlink()
    text = printed(folder / "a")
    assert "10 frames each" in text and "differ" not in text and "broken: " not in text


def test_only_broken_videos_are_reported_too(tmp_path: Path) -> None:
    write_broken(tmp_path / "[bold]" / "0.mp4")
    text = printed(tmp_path)
    assert "broken: " in text and "[bold]/0.mp4: " in text


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path, run: Run) -> None:
    write_videos(tmp_path / "v", ["cats/0.mp4", "cats/1.mp4", "dogs/0.mp4"], 2)
    write_frames(tmp_path / "v", ["cats"], 3)  # posters
    (tmp_path / "v" / "notes.txt").write_text("a note")
    found = inspect_dataset(tmp_path / "v")
    assert found.classes == {"cats": 2, "dogs": 1}
    assert found.left_out == {"images": 3, ".txt": 1}
    text = printed(tmp_path / "v")
    line = "left out: 3 images next to videos, such as cats/000000.jpg; 1 other files (.txt 1)"
    assert f"{tmp_path}/v: {line}" in text
    code, out, _ = run("data", "inspect", tmp_path / "v", "--json")
    assert code == 0 and json.loads(out)["left_out"] == {"images": 3, ".txt": 1}


def test_nothing_is_written_into_the_data(tmp_path: Path, run: Run) -> None:
    """The sheet would count as an image, or in a folder of frames as a frame."""
    write_videos(tmp_path / "v", ["a/0.mp4"], 2)
    (tmp_path / "link").symlink_to("v")
    before = sorted(tmp_path.rglob("*"))
    for out in ("v", "v/a/look", "link/look", "w/../v"):
        code, _, err = run("data", "inspect", tmp_path / "v", "--out", tmp_path / out)
        assert code == 2 and err.startswith(f"error: out is {tmp_path / out}, ") and "that are read" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert run("data", "inspect", tmp_path / "v", "--out", tmp_path / "v2")[0] == 0


def test_what_is_wrong_is_one_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    write_videos(tmp_path / "v", ["0.mp4"], 2)
    for arguments, message in (
        (["missing"], "missing: no such folder"),
        (["empty"], "empty: holds no video files and no frame folders"),
        (["v", "--split", "train"], "split is 'train', but dataset=folder has no splits"),
        (["v", "--dataset", "ucf101"], "holds no video of ucf101; looked for"),
        (["v", "--captions", "none.csv"], "none.csv: cannot be read"),
    ):
        code, out, err = run("data", "inspect", *arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        assert message in err.splitlines()[-1]
