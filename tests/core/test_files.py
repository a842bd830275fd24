"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavita.core import files
from lavita.core.files import (
    check_outside,
    folded,
    hashed_name,
    inside,
    is_plain_name,
    remove_partial,
    replacing,
    write_json,
    write_text,
)


class Killed(BaseException):
    """Like KeyboardInterrupt: not caught by `except Exception`."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_with_its_folders_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.txt"
    write_text(file, "old")
    with replacing(file) as partial:
        assert partial.parent == file.parent and partial.suffix == ".txt" and partial.name.startswith(".")
        partial.write_text("new")
        assert file.read_text() == "old"  # until the block ends
    assert file.read_text() == "new"
    assert names(file.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(error), replacing(file) as partial:
        partial.write_text("half of the n")
        raise error
    assert names(tmp_path) == ["a.txt"] and file.read_text() == "old"
    with pytest.raises(error), replacing(tmp_path / "new.txt"):
        raise error  # before anything was written
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(Killed), replacing(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text("x")
        raise Killed
    assert names(tmp_path) == []
    folder.mkdir()  # an empty folder is replaced
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text("x")
    assert names(tmp_path) == ["model"] and names(folder) == ["weights"]
    with pytest.raises(OSError), replacing(folder) as partial:  # one with content is not
        partial.mkdir()
    assert names(tmp_path) == ["model"] and names(folder) == ["weights"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"  # whose block ended last
    assert names(tmp_path) == ["a"]


def test_durable_files_are_synced_before_and_their_folder_after_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    file = tmp_path / "a.txt"
    sync = files.sync

    def record(path: Path) -> None:
        events.append(f"{'folder' if path == tmp_path else 'file'}, {'replaced' if file.exists() else 'not yet'}")
        sync(path)

    monkeypatch.setattr(files, "sync", record)
    write_text(file, "x")
    assert events == []
    file.unlink()
    write_text(file, "x", durable=True)
    assert events == ["file, not yet", "folder, replaced"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from lavita.core.files import replacing\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with replacing(folder / 'a.txt') as file, replacing(folder / 'model') as model:\n"
        "    file.write_text('half'); model.mkdir(); (model / 'weights').write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    (tmp_path / ".hidden").write_text("of somebody else")
    (tmp_path / "b.txt").write_text("whole")
    assert len(names(tmp_path)) == 4
    remove_partial(tmp_path)
    assert names(tmp_path) == [".hidden", "b.txt"]
    remove_partial(tmp_path / "missing")


def test_partial_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".a-1.partial-0.x", ".b.partial-0.y", ".c.partial-0.z"):
        (tmp_path / name).touch()
    remove_partial(tmp_path, "a-*", "b")
    assert [path.name for path in tmp_path.iterdir()] == [".c.partial-0.z"]


def test_text_is_utf8_in_any_locale(tmp_path: Path) -> None:
    code = (
        "import locale, pathlib, sys; from lavita.core.files import write_text\n"
        "write_text(pathlib.Path(sys.argv[1]), 'caf\\u00e9 \\u2192 \\u6771'); print(locale.getpreferredencoding())\n"
        "folder = pathlib.Path(sys.argv[1]).parent; write_text(folder / '\\u6771' / 'b.txt', 'b')\n"
        "write_text(folder / 'c.txt', [*folder.glob('*/b.txt')][0].parent.name)"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")],
        env={**os.environ, **ascii_only},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "ANSI_X3.4-1968"
    assert (tmp_path / "a.txt").read_bytes() == "café → 東".encode()
    assert (tmp_path / "東" / "b.txt").exists(), "the name of a file, too"
    assert (tmp_path / "c.txt").read_bytes() == "東".encode(), "and a name that was read from the disk"


def test_json_is_indented_and_reads_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "name": "café"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and text.startswith('{\n "a": [') and text.endswith("}\n")


# ---- names from elsewhere


@pytest.mark.parametrize("name", ["a", "a/b.mp4", "..a/b..", "a b/…", "a/.b"])
def test_names_that_stay_inside(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name
    assert inside(tmp_path / "missing", name) == tmp_path / "missing" / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "a/..", "/a", "//a", "\\a", "a\\..\\..\\b", "C:/a", "C:\\a", "a\0b"]
)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not stay inside the folder") as caught:
        inside(tmp_path, name)
    assert repr(name) in str(caught.value)


def test_links_that_lead_out_are_refused_for_what_is_written(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "away").symlink_to(outside)
    (folder / "near").symlink_to(folder)
    (folder / "gone.txt").symlink_to(outside / "missing.txt")
    assert inside(folder, "near/a") == folder / "near" / "a"
    for name in ("away/a", "away", "gone.txt"):
        with pytest.raises(ValueError, match="leads out of the folder, through a link"):
            inside(folder, name)
        assert inside(folder, name, follow_links=True) == folder / name
    linked = tmp_path / "linked"  # the folder itself may be a link
    linked.symlink_to(folder)
    assert inside(linked, "a") == linked / "a"


@pytest.mark.parametrize("name", ["boxing", "ApplyEyeMakeup", "a b", "v1.2", "東", "con-air", "COM", "--", "x--0123"])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "a.", "a ", " a", "a/b", "a\\b", "C:", "a\nb", "a\0", "\udcff", "x" * 181),
        *("CON", "nul", "Com1", "aux.txt", hashed_name("a")),
    ],
)
def test_names_that_are_not_plain_get_one_that_is_safe(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    safe = hashed_name(name)
    assert inside(tmp_path, safe).parent == tmp_path and len(safe.encode()) < 100
    (tmp_path / f".{safe}.partial-12345678.mp4").touch()


def test_hashed_names_differ_where_texts_do() -> None:
    texts = ["a dog", "A dog", "a dog!", "a-dog", "a  dog", "x" * 80 + "a", "x" * 80 + "b", "é", "e\u0301"]
    texts += ["", "!", "東" * 200, "東" * 201]
    assert len({folded(hashed_name(text)) for text in texts}) == len(texts)
    assert hashed_name("A dog!").startswith("a-dog--")
    assert hashed_name("A dog!") == hashed_name("A dog!")


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "null.json").symlink_to("/dev/null")
    for name in ("pipe.json", "null.json"):
        with pytest.raises(FileExistsError, match=f"is neither a file nor a folder.*{name}"):
            write_text(tmp_path / name, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null.json", "pipe.json"]


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    check_outside("out", tmp_path / "loop", tmp_path / "videos")
    with pytest.raises(ValueError, match=r"out is .*loop, inside"):
        check_outside("out", tmp_path / "loop", tmp_path)
    assert inside(tmp_path, "loop/a.mp4") == tmp_path / "loop" / "a.mp4"
    with pytest.raises(OSError):
        write_text(inside(tmp_path, "loop/a.txt"), "a")
