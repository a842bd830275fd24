"""Kind `tables`: captions in CSV, JSONL and Parquet, and lists of splits."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import Material, corrupt, free_of_surrogates
from benchmarks.robustness.fuzz.values import NAMES, PATHS, number, text

COLUMNS = [
    "file",
    "caption",
    "video",
    "path",
    "text",
    "prompt",
    "videoid",
    "page_dir",
    "name",
    "label",
    "",
    "File",
    "é",
]
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift_jis",
    "gb18030",
    "cp437",
]
WHOLE_NAMES = ["a/0.mp4", "a/1.mp4", "b/é.mp4", "b/日本.mkv"]


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """Four videos and a table about them."""
    root = folder / "in"
    for name in WHOLE_NAMES:
        material.write_video(root / name)
    if rng.random() < 0.2:
        return _splits(rng, root)
    suffix = rng.choice([".csv", ".csv", ".jsonl", ".jsonl", ".parquet"])
    columns = ["file", "caption"] if rng.random() < 0.7 else rng.sample(COLUMNS, rng.randint(0, 4))
    rows = [[_cell(rng, column, suffix) for column in columns] for _ in range(rng.choice([0, 1, 4, 4, 30]))]
    table = folder / f"table{suffix}"
    writers: dict[str, Callable[..., bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    data = writers[suffix](rng, columns, rows)
    what = f"a {suffix} table of {len(rows)} rows with {columns}"
    if rng.random() < 0.2:
        data, damage = corrupt(rng, data)
        what += f", {damage}"
    table.write_bytes(data)
    fields = ("data.num_frames=2", "data.resolution=16", "model.preset=tiny/4", f"data.captions={table.name}")
    command = rng.choice(["inspect", "inspect", "inspect", "train", "sample"])
    if command == "inspect":
        arguments: tuple[str, ...] = ("data", "inspect", "in", "--captions", table.name, "--json")
    elif command == "sample":  # this model has no texts
        material.copy("pipeline", folder / "pipeline")
        arguments = ("sample", "pipeline", "--out", "out", "--prompts", table.name, "--steps", "1", "--seeds", "0")
    else:
        material.copy("vae", folder / "vae")
        arguments = ("train", "--data", "in", "--dry-run", "--run-dir", "out", "autoencoder=vae", *fields)
        arguments += ("model.text_encoder=./missing",)
    return Case(arguments, what, must_fail=command == "sample", num_videos=4)


def _cell(rng: random.Random, column: str, suffix: str) -> Any:
    """A value, for Parquet and JSON of any type."""
    if column == "file" and rng.random() < 0.8:
        return rng.choice(WHOLE_NAMES if rng.random() < 0.8 else ["b/e\u0301.mp4", "./a/0.mp4", "a\\0.mp4", "A/0.MP4"])
    if suffix == ".csv":
        return rng.choice([text(rng), number(rng), "a red ball", "x" * 200_000 if rng.random() < 0.05 else "b"])
    if rng.random() < 0.5:
        return "a red ball"
    values: list[Any] = [None, True, 0, -1.5, float("nan"), float("inf"), 2**63, [], ["a", "b"], ["a", None], [["a"]]]
    values += [{"a": 1}, {}, "", " ", text(rng), rng.choice(NAMES), rng.choice(PATHS), b"\xff\xfe", b"caption"]
    return rng.choice(values)


def _csv(rng: random.Random, columns: list[str], rows: list[list[Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=rng.choice(",,,;\t"), lineterminator=rng.choice(["\n", "\r\n", "\r"]))
    if rng.random() < 0.95:
        writer.writerow(columns)
    writer.writerows([[free_of_surrogates(value) for value in row] for row in rows])
    written = stream.getvalue()
    if rng.random() < 0.1:
        written = written.replace('"', "", 1) + rng.choice(['"', '"unfinished', "\0", "\n\n\n", ",,,,\n"])
    return written.encode(rng.choice(ENCODINGS) if rng.random() < 0.3 else "utf-8", "replace")


def _jsonl(rng: random.Random, columns: list[str], rows: list[list[Any]]) -> bytes:
    lines = []
    for row in rows:
        values = {
            key: value.decode("latin-1") if isinstance(value, bytes) else value
            for key, value in zip(columns, row, strict=True)
        }
        lines.append(json.dumps(values, ensure_ascii=rng.random() < 0.5))
    if rng.random() < 0.15:
        odd = ["[]", "1", "null", '"a"', "{", '{"file": "a/0.mp4", "file": "a/1.mp4", "caption": "b"}', "[" * 100_000]
        lines.insert(
            rng.randint(0, len(lines)), rng.choice([*odd, '{"file": "a/0.mp4", "caption": ' + "9" * 5000 + "}"])
        )
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.2 else "utf-8"
    return free_of_surrogates("\n".join(lines)).encode(encoding, "replace")


def _parquet(rng: random.Random, columns: list[str], rows: list[list[Any]]) -> bytes:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    table = {}
    for place, column in enumerate(columns):
        values = [free_of_surrogates(row[place]) if isinstance(row[place], str) else row[place] for row in rows]
        try:
            table[column] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # types that do not go together
            kind = rng.choice([pyarrow.string(), pyarrow.binary(), pyarrow.list_(pyarrow.string()), pyarrow.float64()])
            table[column] = pyarrow.nulls(len(values), kind)
        if column in ("file", "caption") and rng.random() < 0.2:
            table[column] = pyarrow.array([str(value) for value in values]).dictionary_encode()
    stream = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(table), stream)
    except pyarrow.ArrowException:  # a type that Parquet has not
        parquet.write_table(pyarrow.table({"file": pyarrow.array(["a/0.mp4"])}), stream)
    return stream.getvalue()


def _splits(rng: random.Random, root: Path) -> Case:
    """Lists of splits, of UCF101's kind and of ours."""
    dataset = rng.choice(["ucf101", "faceforensics", "sky_timelapse", "taichi_hd"])
    for number_of_list in range(1, 3):
        lines = []
        for _ in range(rng.choice([0, 1, 3])):
            lines.append(
                rng.choice([*WHOLE_NAMES, "a/v_a_g01_c01.avi 1", "../../x", text(rng), number(rng), "a/0/1.jpg"])
            )
        name = rng.choice(["train_list.txt", "test_list.txt", "trainlist01.txt", f"testlist0{number_of_list}.txt"])
        data = free_of_surrogates("\n".join(lines)).encode(
            rng.choice(["utf-8", "utf-8", "utf-16", "latin-1"]), "replace"
        )
        (root / name).write_bytes(corrupt(rng, data)[0] if data and rng.random() < 0.2 else data)
    if dataset == "ucf101":
        for index, path in enumerate(sorted(root.rglob("*.mp4"))):
            path.rename(path.with_name(f"v_Archery_g01_c0{index}.mp4"))
    split = rng.choice(["train", "test", "all", "val", "train01", "train09", ""])
    return Case(
        ("data", "inspect", "in", "--dataset", dataset, "--split", split, "--json"), f"lists of splits of {dataset}"
    )
