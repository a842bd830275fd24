"""Tables of captions: every format says the same, WebVid's as well, and only what a folder holds is kept."""

from __future__ import annotations

import csv
import json
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from conftest import Run
from pyarrow import parquet
from tiny_data import write_videos

from lavita.core.config import load_config
from lavita.data.captions import find_captions, match_captions, read_captions
from lavita.data.catalog import scan
from lavita.models.autoencoder import AutoencoderKL
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig

FORMATS = (".csv", ".jsonl", ".parquet")


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The same rows in the format of the file's suffix."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_say_the_same(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"caption": "a dog, running", "file": "a/0.mp4", "url": "x"},
        {"caption": "two\nlines and  “quotes”", "file": "a/0.mp4", "url": "y"},
        {"caption": "cat", "file": "./b.mp4", "url": "z"},
    ]
    expected = {"a/0.mp4": ("a dog, running", "two lines and “quotes”"), "b.mp4": ("cat",)}
    assert read_captions(write_table(tmp_path / f"a{suffix}", rows)) == expected


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("file_column", "text_column"),
    [("video", "text"), ("video_path", "caption"), ("image", "prompt"), ("path", "text"), ("file_name", "text")],
)
def test_common_names_of_columns(suffix: str, file_column: str, text_column: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"a{suffix}", [{"name": "unused", file_column: "0.mp4", text_column: "a cat"}])
    assert read_captions(table) == {"0.mp4": ("a cat",)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_documented_columns_win_and_others_must_be_one(suffix: str, tmp_path: Path) -> None:
    row = {"path": "no", "file": "0.mp4", "text": "no", "caption": "yes", "videoid": 3, "name": "no"}
    assert read_captions(write_table(tmp_path / f"a{suffix}", [row])) == {"0.mp4": ("yes",)}
    for columns, message in (
        ({"path": "0.mp4", "video": "1.mp4", "caption": "x"}, "video and path could both be the column of files"),
        ({"file": "0.mp4", "text": "x", "prompt": "y"}, "text and prompt could both be the column of captions"),
        (
            {"videoid": 1, "name": "x", "text": "y"},
            "text and name could both be .* of captions; call one of them 'caption'",
        ),
        ({"file": "0.mp4", "name": "x"}, "no column of captions, which is one of caption, .*; found: file, name"),
        ({"label": "0.mp4", "caption": "x"}, "no column of files, which is one of file, .*; found:"),
    ):
        with pytest.raises(ValueError, match=message):
            read_captions(write_table(tmp_path / f"b{suffix}", [columns]))


WEBVID = [
    {"videoid": 21179416, "contentUrl": "https://a", "duration": "PT11S", "page_dir": "006001_006050", "name": "waves"},
    {
        "videoid": 1066651354,
        "contentUrl": "https://b",
        "duration": "PT9S",
        "page_dir": "000051_000100",
        "name": "a dog",
    },
    {"videoid": 7, "contentUrl": "https://c", "duration": "PT9S", "page_dir": None, "name": "flat"},
    {"videoid": 8, "contentUrl": "https://d", "duration": "PT9S", "page_dir": "000051_000100", "name": "flat, too"},
    {"videoid": 9, "contentUrl": "https://e", "duration": "PT9S", "page_dir": "000051_000100", "name": "gone"},
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_webvid_tables(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With folders of pages or without; of most rows the video is gone, which is said once."""
    videos = ["006001_006050/21179416.mp4", "000051_000100/1066651354.mp4", "7.mp4", "8.mp4"]
    catalog = scan(write_videos(tmp_path / "videos", videos, 2))
    file = write_table(tmp_path / f"results_2M_train{suffix}", WEBVID)
    captions, kept = match_captions(file, catalog)
    texts = ("waves", "a dog", "flat", "flat, too")
    assert captions == {video: (text,) for video, text in zip(videos, texts, strict=True)}
    assert kept == catalog
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{file}: 1 of 5 rows are about files that are not in {tmp_path}/videos, such as 000051_000100/9.mp4"
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    """Spreadsheets write one at the beginning of a file."""
    for name, content in (
        ("a.csv", "file,caption\n0.mp4,a cat\n"),
        ("a.jsonl", '{"file": "0.mp4", "caption": "a cat"}'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_captions(tmp_path / name) == {"0.mp4": ("a cat",)}


def test_pandas_writes_a_missing_folder_as_nan(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("videoid,page_dir,name\n5,NaN,a cat\n6,,a dog\n")
    assert read_captions(file) == {"5.mp4": ("a cat",), "6.mp4": ("a dog",)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_videos_without_a_caption(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = scan(write_videos(tmp_path / "v", ["a/0.mp4", "b/1.mp4", "c/2.mp4"], 2), class_folders=True)
    rows = [{"file": "c/2.mp4", "caption": "c"}, {"file": "a/0.mp4", "caption": " "}]
    file = write_table(tmp_path / f"t{suffix}", rows)
    captions, kept = match_captions(file, catalog)
    assert captions == {"c/2.mp4": ("c",)}
    assert [(video.name, video.label) for video in kept.videos] == [("c/2.mp4", 0)] and kept.class_names == ("c",)
    line = f"skipped: 2 of 3 files in {tmp_path}/v have no caption in {file}, such as a/0.mp4"
    assert capsys.readouterr().err.splitlines() == [line]
    with pytest.raises(ValueError, match=r"has no caption for a/0\.mp4, which is in"):
        match_captions(file, catalog, broken="error")


def test_a_table_of_other_files_is_refused(tmp_path: Path) -> None:
    catalog = scan(write_videos(tmp_path / "v", ["a/0.mp4"], 2))
    file = write_table(tmp_path / "t.csv", [{"file": "/data/v/a/0.mp4", "caption": "c"}])
    with pytest.raises(ValueError, match=r"lists files such as '/data/v/a/0\.mp4', the folder holds 'a/0\.mp4'"):
        match_captions(file, catalog)


def test_a_run_trains_on_the_videos_with_captions(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    write_videos(tmp_path / "v", ["0.mp4", "1.mp4", "2.mp4"])
    file = write_table(tmp_path / "t.parquet", [{"video": f"{n}.mp4", "text": f"number {n}"} for n in (0, 2, 5)])
    values = {
        "data": {"path": str(tmp_path / "v"), "captions": str(file), "num_frames": 2, "resolution": 16},
        "train": {"batch_size": 16, "precision": "fp32"},
    }
    config = load_config(RunConfig, values)
    maker = BatchMaker(config.data, config.train, tiny_vae, config.model.class_dropout)
    assert {maker.sampler.draw(step, 0).video.name for step in range(40)} == {"0.mp4", "2.mp4"}
    assert maker.captions is not None and maker.captions.texts == ["", "number 0", "number 2"]
    with pytest.raises(ValueError, match=r"has no caption for 1\.mp4"):
        strict = load_config(RunConfig, values, ["data.broken=error"])
        BatchMaker(strict.data, strict.train, tiny_vae, 0.1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_not_in_the_folder_is_not_kept(suffix: str, tmp_path: Path) -> None:
    """A table of 12 thousand long captions, of which two are wanted, takes a small part of its size."""
    num_rows, text = 12_000, "a long caption of a video of the web " * 10
    rows = [{"file": f"{number}.mp4", "caption": f"{text}{number}"} for number in range(num_rows)]
    file = write_table(tmp_path / f"big{suffix}", rows)
    del rows
    find_captions(file, {"0.mp4"})  # loads libraries
    tracemalloc.start()
    table = find_captions(file, {"7.mp4", "11999.mp4"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(table.captions) == {"7.mp4", "11999.mp4"} and table.num_unused == num_rows - 2
    assert peak < num_rows * len(text) / 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"file": "a", "caption": "b"}\n{"file": null, "caption": "b"}', "line 2 has no 'file'"),
        ("a.csv", b"file,caption\na,b\n,c\n", "line 3 has no 'file'; found: file, caption"),
        ("a.csv", b"file,caption\na,\xff\n", "cannot be read"),
        ("a.csv", b"", "holds no captions"),
        ("a.csv", b'file,caption\na,"' + b"x" * 200_000, "cannot be read"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: cannot be read"),
        ("a.json", b"[]", r"ends in \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_damaged_table_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_parquet_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    write_videos(tmp_path / "v", ["0.mp4"], 2)
    file = write_table(tmp_path / "t.parquet", [{"file": "0.mp4", "caption": "c"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("data", "inspect", tmp_path / "v", "--captions", file)
    assert code == 2
    assert 'tables in Parquet need the extra "tables": pip install "lavita[tables]"' in err.splitlines()[-1]
