"""Tables of captions: every format says the same, WebVid's as well, and only what a folder holds is kept."""

from __future__ import annotations

import csv
import json
import re
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
from lavita.data.captions import CaptionSampler, find_captions, match_captions, read_captions
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
    assert capsys.readouterr().err.splitlines() == [
        f"{file}: 1 of 2 rows have no caption",
        f"skipped: 2 of 3 files in {tmp_path}/v have no caption in {file}, such as a/0.mp4",
    ]
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
        ("a.csv", b"", "holds no captions"),
        ("a.csv", b'file,caption\na,"' + b"x" * 200_000, "cannot be read: line 2: field larger"),
        ("a.csv", b'file,caption\na,"b\nc,d\n', "cannot be read: line 3: unexpected end of data"),
        ("a.csv", b"file,caption\na,b\nc,a dog, running\n", "line 3 has 3 values for 2 columns; .* needs quotes"),
        ("a.csv", b"file,caption,caption\na,b,c\n", "has the column 'caption' twice"),
        ("a.jsonl", b'{"file": "a", "caption": "b", "caption": "c"}', "line 1 has 'caption' twice"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: cannot be read"),
        ("a.json", b"[]", r"ends in \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_damaged_table_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


LATIN = "file,caption\ncafé.mp4,a café\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_encodings_that_a_table_tells_are_read(encoding: str, suffix: str, tmp_path: Path) -> None:
    text = LATIN if suffix == ".csv" else json.dumps({"file": "café.mp4", "caption": "a café"}, ensure_ascii=False)
    file = tmp_path / f"a{suffix}"
    file.write_text(text, encoding=encoding)
    assert read_captions(file) == {"café.mp4": ("a café",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LATIN.encode("latin-1"), r"a\.csv: line 2 is not UTF-8 \(byte 4 is 0xe9\); save it as UTF-8$"),
        (LATIN.encode("utf-16-le"), r"a\.csv: line 1 is not UTF-8 \(it begins with the bytes 66 00 69 00\)"),
        (LATIN.encode("utf-16")[:-1], r"a\.csv: begins like UTF-16, but is not"),
    ],
)
def test_other_encodings_are_refused_with_their_place(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_is_several_captions(suffix: str, tmp_path: Path) -> None:
    cells = (["a dog", "a  hound"], ["a cur", None])
    rows = [{"file": "a.mp4", "caption": cell} for cell in cells]
    assert read_captions(write_table(tmp_path / f"a{suffix}", rows)) == {"a.mp4": ("a dog", "a hound", "a cur")}


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("""['a dog', "the dog's bone"]""", ("a dog", "the dog's bone")),
        ("""["a dog", "a \\u00e9t\\u00e9"]""", ("a dog", "a été")),
        ("[music]", ("[music]",)),
        ("['woof'] says the dog", ("['woof'] says the dog",)),
    ],
)
def test_a_list_that_was_written_into_csv_is_read(cell: str, captions: tuple[str, ...], tmp_path: Path) -> None:
    file = write_table(tmp_path / "a.csv", [{"file": "a.mp4", "caption": cell}])
    assert read_captions(file) == {"a.mp4": captions}


def test_a_list_without_commas_in_csv_is_refused(tmp_path: Path) -> None:
    """As NumPy prints it; Python would read two texts as one."""
    file = write_table(tmp_path / "a.csv", [{"file": "a.mp4", "caption": "['a dog' 'a cat']"}])
    with pytest.raises(ValueError, match=r"line 2: .*looks like a list of captions, but is not one"):
        read_captions(file)


EMPTY: dict[str, list[Any]] = {
    ".csv": ["", " ", "NaN", "nan", "null", "None", "<NA>"],
    ".jsonl": [None, float("nan"), "", "nan", []],
    ".parquet": [None, "", "NaN"],
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_captions_are_none_and_counted(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = scan(write_videos(tmp_path / "v", ["0.mp4", "1.mp4"], 2))
    rows = [{"file": "0.mp4", "caption": value} for value in EMPTY[suffix]]
    file = write_table(tmp_path / f"a{suffix}", [*rows, {"file": "1.mp4", "caption": "b"}])
    captions, _ = match_captions(file, catalog)
    assert captions == {"1.mp4": ("b",)}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{file}: {len(rows)} of {len(rows) + 1} rows have no caption" and len(lines) == 2
    with pytest.raises(ValueError, match=r"line .* has no caption"):
        read_captions(file)


def test_a_missing_caption_of_floats_is_none(tmp_path: Path) -> None:
    """A column of Parquet that is all NaN has no other type."""
    file = write_table(tmp_path / "a.parquet", [{"file": "0.mp4", "caption": float("nan")}])
    assert find_captions(file, {"0.mp4"}).num_empty == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("value", "shown"), [(3, "3 .int"), (2.5, "2.5 .float"), (True, "True .bool"), ({"en": "x"}, ".*dict"), ([1], ".*")]
)
def test_a_caption_of_another_type_is_refused(suffix: str, value: object, shown: str, tmp_path: Path) -> None:
    file = write_table(tmp_path / f"a{suffix}", [{"file": "a.mp4", "caption": value}])
    with pytest.raises(ValueError, match=rf"line 1: 'caption' is {shown}.*, but must be a text or a list of texts"):
        find_captions(file, {"a.mp4"})


def test_captions_of_bytes_and_half_characters_are_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a.parquet", [{"file": "a.mp4", "caption": b"a dog"}])
    with pytest.raises(ValueError, match=r"line 1: 'caption' is b'a dog' \(bytes\), but must be a text"):
        read_captions(file)
    file = tmp_path / "a.jsonl"
    file.write_text(r'{"file": "a.mp4", "caption": "\ud83d"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: 'caption' is .*, which holds half a character"):
        read_captions(file)


def test_numbers_that_name_videos_keep_their_digits(tmp_path: Path) -> None:
    """pandas makes floats of the integers in a column with a missing value, and writes them so."""
    rows: list[dict[str, Any]] = [
        {"videoid": 21179416.0, "page_dir": None, "name": "a"},
        {"videoid": 5.0, "page_dir": "1", "name": "b"},
    ]
    expected = {"21179416.mp4": ("a",), "1/5.mp4": ("b",)}
    for suffix in FORMATS:
        assert read_captions(write_table(tmp_path / f"a{suffix}", rows)) == expected
    assert read_captions(write_table(tmp_path / "b.jsonl", [{"file": 7.0, "caption": "x"}])) == {"7": ("x",)}
    assert read_captions(write_table(tmp_path / "b.csv", [{"file": "007.0", "caption": "x"}])) == {"007.0": ("x",)}


@pytest.mark.parametrize("value", [True, 5.5, float("inf"), 1e20, ["a.mp4"], {"path": "a.mp4"}])
def test_a_file_of_another_type_is_refused(value: object, tmp_path: Path) -> None:
    file = write_table(tmp_path / "a.jsonl", [{"file": value, "caption": "x"}])
    with pytest.raises(ValueError, match=r"line 1: 'file' is .*, but must be a text or a whole number"):
        read_captions(file)


# --- Unicode

DECOMPOSED, COMPOSED = "cafe\u0301/1.mp4", "caf\xe9/1.mp4"


@pytest.mark.parametrize(("on_disk", "in_table"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED)])
def test_a_table_may_compose_its_names_otherwise(
    on_disk: str, in_table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = scan(write_videos(tmp_path / "v", [on_disk], 2))
    captions, kept = match_captions(write_table(tmp_path / "a.csv", [{"file": in_table, "caption": "x"}]), catalog)
    assert captions == {on_disk: ("x",)} and kept == catalog and not capsys.readouterr().err
    CaptionSampler([(captions, kept)], 0).draw(kept.root, on_disk, 0, 0)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    write_videos(tmp_path / "v", [DECOMPOSED, COMPOSED], 2)
    both = re.escape(r"'cafe\u0301/1.mp4' and 'caf\xe9/1.mp4' are one name in two Unicode forms")
    with pytest.raises(ValueError, match=both):
        scan(tmp_path / "v")
    file = write_table(tmp_path / "a.csv", [{"file": COMPOSED, "caption": "x"}])
    with pytest.raises(ValueError, match=both):
        find_captions(file, sorted([DECOMPOSED, COMPOSED]))


def test_spellings_of_a_file_in_a_table_are_one_file(tmp_path: Path) -> None:
    rows = [{"file": DECOMPOSED, "caption": "x"}, {"file": COMPOSED, "caption": "y"}]
    assert read_captions(write_table(tmp_path / "a.csv", rows)) == {COMPOSED: ("x", "y")}


def test_parquet_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    write_videos(tmp_path / "v", ["0.mp4"], 2)
    file = write_table(tmp_path / "t.parquet", [{"file": "0.mp4", "caption": "c"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("data", "inspect", tmp_path / "v", "--captions", file)
    assert code == 2
    assert 'tables in Parquet need the extra "tables": pip install "lavita[tables]"' in err.splitlines()[-1]
