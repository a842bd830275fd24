"""Digests of videos, which users' caches and manifests hold: computed here from what the docstrings say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_data import write_frames

from lavita.data.content_hash import content_hash, source_bytes, source_digest


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A frame folder with a hidden file, and a note among the images."""
    folder = write_frames(tmp_path, ["video"], 3, "{:02}.png") / "video"
    (folder / ".hidden").write_text("x", encoding="utf-8")
    (folder / "notes.txt").write_text("a note", encoding="utf-8")
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_has_its_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "0.mp4").write_bytes(b"video" * 300_000)
    content = (tmp_path / "0.mp4").read_bytes()
    assert source_digest(tmp_path / "0.mp4") == content_hash(tmp_path / "0.mp4") == sha256(content)
    assert source_bytes(tmp_path / "0.mp4") == len(content)


def test_the_digest_of_a_frame_folder_is_of_names_sizes_and_contents(frames: Path) -> None:
    images = {name: (frames / name).read_bytes() for name in ("00.png", "01.png", "02.png")}
    parts = [f"{name}\0{len(content)}\0".encode() + content for name, content in images.items()]
    before = source_digest(frames)
    assert before == sha256(b"".join(parts))
    assert source_bytes(frames) == sum(map(len, images.values()))
    (frames / "02.png").rename(frames / "03.png")
    assert source_digest(frames) != before


def test_the_hash_of_a_frame_folder_is_of_names_and_digests_of_all_files(frames: Path) -> None:
    names = ("00.png", "01.png", "02.png", "notes.txt")
    before = content_hash(frames)
    assert before == sha256("".join(repr((name, sha256((frames / name).read_bytes()))) for name in names).encode())
    (frames / "02.png").rename(frames / "03.png")
    assert content_hash(frames) != before
