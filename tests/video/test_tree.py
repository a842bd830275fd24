"""What a folder holds: which folders are videos, what counts once, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lavita.video.tree import find_images, find_videos, is_frame_folder


def make_tree(root: Path, *names: str) -> Path:
    """Empty files: what a folder is does not depend on their content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names_of(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_videos(root).videos]


@pytest.mark.parametrize(
    ("files", "videos", "strays"),
    [
        (["1.png", "2.jpg"], ["."], []),
        (["cover.png", "a.mp4"], ["a.mp4"], ["cover.png"]),
        (["cover.png", "a/b/c.mp4"], ["a/b/c.mp4"], ["cover.png"]),
        (["cover.png", "a/1.png", "b/1.png"], ["a", "b"], ["cover.png"]),
        (["a/1.png", "a/thumbnails/1.png"], ["a/thumbnails"], ["a/1.png"]),
        (
            ["cats/0.mp4", "cats/1.png", "cats/2.png", "cats/3.png", "dogs/0.mp4"],
            ["cats/0.mp4", "dogs/0.mp4"],
            ["cats/1.png", "cats/2.png", "cats/3.png"],
        ),
        (
            [f"{i:02d}{suffix}" for i in range(16) for suffix in (".mp4", ".jpg")],
            [f"{i:02d}.mp4" for i in range(16)],
            [f"{i:02d}.jpg" for i in range(16)],
        ),
        (["b.mp4", "a.ts", "c/1.png", "d/e.avi", "d/f/1.png"], ["a.ts", "b.mp4", "c", "d/e.avi", "d/f"], []),
        (["a/1.png", "a/.hidden.mp4", "a/.cache/b.mp4", ".trash/c.mp4"], ["a"], []),
        (["a/1.png", "a/empty/.notes"], ["a"], []),
    ],
)
def test_what_a_folder_is(tmp_path: Path, files: list[str], videos: list[str], strays: list[str]) -> None:
    tree = find_videos(make_tree(tmp_path, *files))
    assert names_of(tmp_path) == videos
    assert tree.left_out == ({"images": (len(strays), strays[0])} if strays else {})
    if strays:
        assert tree.notes[0] == f"{tmp_path}: left out: {len(strays)} images next to videos, such as {strays[0]}"
    for path in tmp_path.rglob("*"):
        assert is_frame_folder(path) == (path.is_dir() and path.relative_to(tmp_path).as_posix() in videos)


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    files = ["a.mp4", "a.srt", "b/c.SRT", "b/README", "frames/1.png", "frames/times.txt", ".x.txt", "generation.json"]
    files.append("prompts.jsonl")
    tree = find_videos(make_tree(tmp_path, *files))
    assert tree.counts == {"": 1, ".srt": 2, ".txt": 1}, "the record of generated videos belongs to them"
    assert tree.notes == (
        f"{tmp_path}: left out: 4 other files (.srt 2, no suffix 1, .txt 1)",
        f"{tmp_path}: 1 of 2 videos are folders of images, such as frames",
    )


def test_folders_without_videos_are_known(tmp_path: Path) -> None:
    tree = find_videos(make_tree(tmp_path, "cats/0.mp4", "dogs/0.mp4v", "birds/late/.hidden.mp4", "cats/x/1.png"))
    assert tree.empty_folders == ("birds", "birds/late", "dogs")


# --- several names of one file


def test_a_link_to_the_folder_itself_is_not_followed_forever(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "V", "a.mp4", "b/1.png")
    (root / "self").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    (tmp_path / "outside").symlink_to("V")
    assert names_of(root) == ["a.mp4", "b"]
    assert find_videos(root).notes[0] == f"{root}: left out: 2 links to what is here already, such as b/up"
    assert names_of(tmp_path / "outside") == ["a.mp4", "b"]
    assert find_images(root).videos == (root / "b" / "1.png",)


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    make_tree(tmp_path, "b/real.mp4", "c/other.mp4")
    (tmp_path / "a.mp4").symlink_to("b/real.mp4")
    (tmp_path / "all").symlink_to("c")
    os.link(tmp_path / "c" / "other.mp4", tmp_path / "d.mp4")
    assert names_of(tmp_path) == ["d.mp4", "b/real.mp4"], "a name without a link, else the first one"
    assert find_videos(tmp_path).left_out == {"links": (3, "a.mp4")}


def test_links_that_lead_out_of_the_folder_are_followed_once(tmp_path: Path) -> None:
    make_tree(tmp_path / "pool", "x/0.mp4", "x/1.mp4", "y/1.png", "y/2.png")
    root = make_tree(tmp_path / "V", "own.mp4")
    for name, target in (("one", "pool/x"), ("two", "pool"), ("three", "pool/y")):
        (root / name).symlink_to(tmp_path / target)
    (root / "again.mp4").symlink_to(tmp_path / "pool" / "x" / "0.mp4")
    assert names_of(root) == ["again.mp4", "own.mp4", "one/1.mp4", "three"]
    assert find_videos(root).counts == {"links": 3}, "one/0.mp4, two/x and two/y"


def test_frame_folders_of_the_same_images_count_once(tmp_path: Path) -> None:
    make_tree(tmp_path, *(f"frames/{i}.png" for i in range(3)))
    for copy, count in (("copy", 3), ("part", 2)):
        (tmp_path / copy).mkdir()
        for i in range(count):
            os.link(tmp_path / "frames" / f"{i}.png", tmp_path / copy / f"{i}.png")
    (tmp_path / "linked").symlink_to("frames")
    assert names_of(tmp_path) == ["copy", "part"], "a part of the frames is another video"
    assert find_videos(tmp_path).left_out == {"links": (2, "frames")}


def test_an_image_with_several_names_counts_once_among_images(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/0.png", "a/1.png", "v.mp4", "notes.txt")
    (tmp_path / "0.png").symlink_to("a/0.png")
    tree = find_images(tmp_path)
    assert tree.videos == (tmp_path / "a" / "0.png", tmp_path / "a" / "1.png")
    assert tree.notes == (
        f"{tmp_path}: left out: 1 videos next to images, such as v.mp4; "
        "1 links to what is here already, such as 0.png; 1 other files (.txt 1)",
    )


def test_links_that_lead_nowhere_are_videos_that_cannot_be_read(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.mp4")
    (tmp_path / "b.mp4").symlink_to("gone.mp4")
    (tmp_path / "c.mp4").symlink_to("c.mp4")
    assert names_of(tmp_path) == ["a.mp4", "b.mp4", "c.mp4"]


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.mp4")
    os.mkfifo(tmp_path / "b.mp4")
    assert names_of(tmp_path) == ["a.mp4"]
    assert find_videos(tmp_path).counts == {".mp4": 1}


def test_folders_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, "a.mp4", "lost+found/b.mp4")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith(guarded_name):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    guarded_name = "lost+found"
    tree = find_videos(tmp_path)
    assert tree.videos == (tmp_path / "a.mp4",)
    assert tree.notes == (f"{tmp_path}: left out: 1 folders that cannot be read, such as lost+found",)
    guarded_name = tmp_path.name
    with pytest.raises(PermissionError):
        find_videos(tmp_path)
