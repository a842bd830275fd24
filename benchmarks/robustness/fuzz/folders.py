"""Kind `folders`: links, mixed content, names in every script, deep trees, many files, entries nobody can read."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import CLASS_NAMES, Material
from benchmarks.robustness.fuzz.values import file_name

OTHERS = (".txt", ".json", ".csv", ".zip", ".pt", ".part", "", ".mp3")


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """A tree of valid videos, images and other things, and a command that catalogs it."""
    root = folder / "in"
    root.mkdir(parents=True)
    tree = Tree(rng, root, material)
    for _ in range(rng.choice([0, 1, 3, 8, 15])):
        tree.grow()
    if rng.random() < 0.7:
        tree.video(root)
    many = rng.random() < 0.01
    if many:
        for number in range(10_000):
            (root / f"{number}.txt").touch()
        tree.what.append("10,000 files")
    command = _command(rng, folder, material)
    return Case(
        arguments=command,
        what=", ".join(dict.fromkeys(tree.what)) or "nothing",
        num_videos=tree.num_videos if tree.countable and not {"--dataset", "--images"} & set(command) else None,
        as_nobody=tree.has_locked,
        seconds=120 if many else 40,
    )


class Tree:
    """A folder that grows."""

    def __init__(self, rng: random.Random, root: Path, material: Material) -> None:
        self.rng, self.root, self.material = rng, root, material
        self.what: list[str] = []
        self.videos: list[Path] = []
        self.num_videos = 0
        self.countable = True
        """Whether it is plain how many videos there are: without frame folders and links."""
        self.has_locked = False

    def grow(self) -> None:
        """Adds something."""
        home = self._folder()
        kind = self.rng.choice(["video"] * 4 + ["image", "other", "link", "deep", "hidden", "locked", "odd"])
        getattr(self, kind)(home)

    def video(self, home: Path) -> None:
        """A valid video."""
        suffix = self.rng.choice([".mp4", ".mkv", ".gif", ".MP4", ".webm"])
        self.videos.append(self._write(home, suffix, self.material.videos[suffix.lower()]))
        self.num_videos += 1
        self.what.append("videos")

    def image(self, home: Path) -> None:
        """Some images."""
        for _ in range(self.rng.choice([1, 3])):
            suffix = self.rng.choice(list(self.material.images))
            self._write(home, suffix, self.material.images[suffix])
        self.countable = False
        self.what.append("images")

    def other(self, home: Path) -> None:
        """A file that is nothing to us, or what a system leaves behind."""
        name = self.rng.choice(
            [".DS_Store", "Thumbs.db", "._a.mp4", "generation.json", "manifest.json", "train_list.txt"]
        )
        if self.rng.random() < 0.5:
            (home / name).write_bytes(self.rng.choice([b"", b"{}", b"[]", b"a.mp4\n", b"\xff\xfe"]))
        else:
            self._write(home, self.rng.choice(OTHERS), b"hello")
        self.what.append("other files")

    def link(self, home: Path) -> None:
        """A link: to itself, to a folder above, to a video, to nothing, out of the tree."""
        target = self.rng.choice(
            [".", "..", "../..", "missing", "loop", os.fspath(self.root), "/dev/zero", "../../elsewhere"]
        )
        (self.root.parent / "elsewhere").mkdir(exist_ok=True)
        if self.videos and self.rng.random() < 0.4:
            target = os.fspath(self.rng.choice(self.videos))
        name = self.rng.choice(["loop", "loop.mp4", "link", "zero.mp4", "link.png"])
        if not os.path.lexists(home / name):
            (home / name).symlink_to(target)
        self.countable = False
        self.what.append(f"a link to {target}")

    def deep(self, home: Path) -> None:
        """A video far below."""
        for number in range(self.rng.choice([30, 300, 1100])):
            below = home / f"d{number % 10}"
            try:
                below.mkdir(exist_ok=True)
            except OSError:  # longer than a path may be
                break
            home = below
        if len(os.fspath(home)) < 3900:
            self.video(home)
        self.what.append("a deep tree")

    def hidden(self, home: Path) -> None:
        """A hidden folder with a video."""
        (home / ".hidden").mkdir(exist_ok=True)
        self.material.write_video(home / ".hidden" / "a.mp4")
        self.what.append("hidden files")

    def odd(self, home: Path) -> None:
        """An entry that is neither file nor folder, or a folder named like a video."""
        name = self.rng.choice(["pipe.mp4", "socket.mp4", "folder.mp4", "folder.png", "empty.mp4", "pipe.png"])
        if os.path.lexists(home / name):
            return
        if name.startswith("pipe"):
            os.mkfifo(home / name)
        elif name.startswith("socket"):
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                try:
                    os.chdir(home)
                    server.bind(name)
                except OSError:
                    return
                finally:
                    os.chdir(here)
        elif name.startswith("folder"):
            (home / name).mkdir()
        else:
            (home / name).touch()
            self.num_videos += 1
        if not name.startswith("empty"):
            self.countable = False
        self.what.append(name)

    def locked(self, home: Path) -> None:
        """A file or folder that nobody may read."""
        path = home / self.rng.choice(["locked.mp4", "locked", "locked.png"])
        if os.path.lexists(path):
            return
        if path.suffix:
            self.material.write_video(path, ".mp4")
        else:
            path.mkdir()
            self.material.write_video(path / "a.mp4")
        path.chmod(0)
        self.has_locked, self.countable = True, False
        self.what.append("unreadable entries")

    def _folder(self) -> Path:
        home = self.root
        for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
            home = home / (self.rng.choice(CLASS_NAMES) if self.rng.random() < 0.5 else file_name(self.rng, ""))
        if any(part.startswith(".") for part in home.relative_to(self.root).parts):
            home = self.root
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError:
            return self.root
        return home

    def _write(self, home: Path, suffix: str, data: bytes) -> Path:
        name = file_name(self.rng, suffix)
        if name.startswith(".") or os.path.lexists(home / name):
            name = f"{len(os.listdir(home))}{suffix}"
        (home / name).write_bytes(data)
        return home / name


def _command(rng: random.Random, folder: Path, material: Material) -> tuple[str, ...]:
    command = rng.choice(["inspect"] * 4 + ["sheet", "dataset", "encode", "encode", "train", "evaluate", "autoencoder"])
    if command == "inspect":
        return "data", "inspect", "in", "--json", "--num-frames", "2"
    if command == "sheet":
        out = rng.choice(["out", "out", "out/below", "in/out"])
        return "data", "inspect", "in", "--json", "--out", out, "--num-frames", "2", "--frame-interval", "1"
    if command == "dataset":
        name = rng.choice(["folder", "faceforensics", "sky_timelapse", "ucf101", "taichi_hd"])
        split = rng.choice([(), ("--split", "train"), ("--split", "all"), ("--split", "test")])
        return "data", "inspect", "in", "--json", "--dataset", name, *split
    if command == "evaluate":
        folders = ("--real", "in", "--generated", "in", "--out", "out/scores.json", "--page", "out/page")
        return "evaluate", *folders, "--metrics", "motion"
    material.copy("vae", folder / "vae")
    if command == "autoencoder":
        return "autoencoder", "evaluate", "vae", "--data", "in", "--resolution", "16", "--out", "out/quality.json"
    if command == "train":
        fields = ("data.class_folders=true", "data.num_frames=2", "data.resolution=16", "model.preset=tiny/4")
        return "train", "--data", "in", "--dry-run", "--run-dir", "out", "autoencoder=vae", *fields
    images = rng.choice([(), (), ("--images",)])
    return "encode", "--data", "in", "--out", "out", "--autoencoder", "vae", "--resolution", "16", *images
