"""What a folder holds is the same to every command, and each says what it leaves out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeConfig, Run
from tiny_data import write_frames, write_videos

from lavita.core.config import save_config
from lavita.evaluation.sources import VideoFolder


def posters_beside_videos(root: Path) -> None:
    write_videos(root, [f"c/{i:02d}.mp4" for i in range(16)], 3)
    write_frames(root, ["c"], 16, "{:02d}.jpg")


def posters_of_one_class(root: Path) -> None:
    write_videos(root, ["cats/0.mp4", "cats/1.mp4", "dogs/0.mp4", "dogs/1.mp4"], 3)
    write_frames(root, ["cats"], 3)


def a_cover(root: Path) -> None:
    write_videos(root, ["a/0.mp4", "b/1.mp4"], 3)
    write_frames(root, ["."], 1, "cover.png")


def links(root: Path) -> None:
    write_videos(root, ["c/a.mp4"], 3)
    (root / "self").symlink_to(".")
    (root / "c" / "b.mp4").symlink_to("a.mp4")
    os.link(root / "c" / "a.mp4", root / "c" / "z.mp4")


def unknown_endings(root: Path) -> None:
    write_videos(root, ["c/a.mp4"], 3)
    for i in range(9):
        (root / "c" / f"{i}.mp4v").write_bytes(b"x")


CASES: list[tuple[Callable[[Path], None], int, int, str]] = [
    (posters_beside_videos, 16, 1, "16 images next to videos, such as c/00.jpg"),
    (posters_of_one_class, 4, 2, "3 images next to videos, such as cats/000000.jpg"),
    (a_cover, 2, 2, "1 images next to videos, such as cover.png"),
    (links, 1, 1, "3 links to what is here already, such as c/b.mp4"),
    (unknown_endings, 1, 1, "9 other files (.mp4v 9)"),
]


@pytest.mark.parametrize(
    ("write", "num_videos", "num_classes", "left_out"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_every_command_finds_the_same_videos(
    run: Run,
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], None],
    num_videos: int,
    num_classes: int,
    left_out: str,
) -> None:
    root, line = tmp_path / "V", f"{tmp_path / 'V'}: left out: {left_out}"
    write(root)

    code, out, _ = run("data", "inspect", root, "--json")
    found = json.loads(out)
    assert code == 0 and (found["num_videos"], len(found["classes"])) == (num_videos, num_classes)
    assert found["notes"] == [line]

    config = make_config("run", f"data.path={root}")
    vae = ("--autoencoder", tmp_path / "vae", "--resolution", "16", "--no-flip", "--device", "cpu")
    code, out, err = run("encode", "--data", root, "--out", tmp_path / "cache", *vae)
    assert code == 0 and out == f"{tmp_path / 'cache'}: {num_videos} videos, 0 broken\n"
    assert err.splitlines().count(line) == 1

    save_config(config, tmp_path / "run.yaml")
    code, out, err = run("train", "--config", tmp_path / "run.yaml", "--dry-run")
    assert code == 0, err
    assert f"data        {num_videos:,} videos, " in out and f", {num_classes} classes; none left out" in out
    assert err.splitlines().count(line) == 1

    catalog = VideoFolder(root).catalog()
    assert (len(catalog.videos), len(catalog.class_names)) == (num_videos, num_classes)
    assert capsys.readouterr().err.splitlines() == [line]


def test_nothing_is_written_into_the_videos_that_are_read(run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
    make_config("run")
    videos = tmp_path / "videos"
    small = ("data.num_frames=2", "data.frame_interval=1", "data.resolution=16", "train.steps=1")
    before = sorted(tmp_path.rglob("*"))
    refused: list[tuple[tuple[str | Path, ...], str]] = [
        (("encode", "--data", videos, "--out", videos / "latents"), "out"),
        (("train", "--data", videos, "--run-dir", videos / "run", *small), "run_dir"),
        (("train", "--data", videos, "--run-dir", videos / "run", *small, "--dry-run"), "run_dir"),
        (("autoencoder", "train", "--data", videos, "--run-dir", videos / "a"), "run_dir"),
        (("autoencoder", "evaluate", "--data", videos, "--out", videos / "scores.json"), "out"),
        (("evaluate", "--real", videos, "--generated", tmp_path / "x", "--page", videos / "page"), "page"),
        (("evaluate", "--real", tmp_path / "x", "--generated", videos, "--out", videos / "r.json"), "out"),
        (("evaluate", "--real", videos, "--generated", "builtin", "--samples", videos / "samples"), "samples"),
    ]
    for arguments, field in refused:
        if "--page" in arguments:
            arguments += ("--metrics", "kernel-video")
        code, _, err = run(*arguments)
        lines = err.splitlines()
        assert code == 2 and lines[-1].startswith(f"error: {field} is {videos}/"), err
        assert lines[-1].endswith(f"inside {videos}, the folder of the videos that are read; write outside of it")
    assert sorted(tmp_path.rglob("*")) == before
