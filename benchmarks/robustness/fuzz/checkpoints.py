"""Kind `checkpoints`: folders that this package wrote (runs, latent caches) and that have since been damaged."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import Material, corrupt, touch_code
from benchmarks.robustness.fuzz.pipelines import JSON_VALUES


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """A run or a cache with something wrong, and a command that reads it."""
    material.copy("vae", folder / "vae")
    material.copy("classes", folder / "in")
    name = rng.choice(["run", "run", "latents"])
    copy = material.copy(name, folder / "out")
    what = "; ".join(_damage(rng, copy) for _ in range(rng.choice([1, 1, 2])))
    if name == "latents":
        what = f"a cache with {what}"
        if rng.random() < 0.5:
            again = ("encode", "--data", "in", "--out", "out", "--autoencoder", "vae", "--resolution", "16")
            return Case((*again, *rng.choice([(), ("--verify",)])), what, num_videos=6)
        fields = ("autoencoder=vae", "data.num_frames=2", "data.resolution=16", "data.class_folders=true")
        cache = ("data.latent_cache=out", "model.preset=tiny/4", "train.batch_size=2", "run_dir=run")
        return Case(("train", "--dry-run", *fields, *cache), what, writable=())
    what = f"a run with {what}"
    command = rng.choice(["resume"] * 8 + ["report"] * 4 + ["init"] * 4 + ["export"] * 4 + ["info"])
    if command == "report":
        return Case(("report", "out", "--out", "out/page"), what)
    if command == "info":
        return Case(("info", "out"), what, writable=())
    if command == "export":
        return Case(("convert", "out", "out/latte.pt"), what)
    fields = ("data.class_folders=true", "data.num_frames=2", "data.frame_interval=2", "data.resolution=16")
    tiny = ("autoencoder=vae", "model.preset=tiny/4", "train.batch_size=2", "train.log_every=1")
    steps = ("train.steps=3", "train.checkpoint_every=1", "train.sample_every=0")
    if command == "init":
        return Case(
            ("train", "--data", "in", "--run-dir", "new", *fields, *tiny, "train.init_from=out", "--dry-run"),
            what,
            writable=(),
        )
    _here(copy, folder)
    return Case(("train", "--data", "in", "--run-dir", "out", *fields, *tiny, *steps), what)


def _here(run: Path, folder: Path) -> None:
    """Makes the run's configuration one that was started in this folder, so that it can be resumed."""
    file = run / "config.yaml"
    if not file.is_file() or file.is_symlink():
        return
    old = file.read_bytes()
    for name in (b"/vae", b"/classes", b"/run"):
        start = old.find(name + b"\n")
        begin = old.rfind(b" ", 0, start) + 1
        if start >= 0:
            new = {b"/vae": b"vae", b"/classes": b"in", b"/run": b"out"}[name]
            old = old[:begin] + new + old[start + len(name) :]
    file.write_bytes(old)


def _damage(rng: random.Random, root: Path) -> str:
    """Damages, removes, swaps or replaces a file."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".mp4", ".png"))
    if not files:
        return "no files"
    file = rng.choice(files)
    name = file.relative_to(root).as_posix()
    kind = rng.choice(["corrupt", "corrupt", "json", "json", "remove", "pickle", "swap", "link", "folder"])
    if kind == "json":
        texts = [path for path in files if path.suffix in (".json", ".jsonl")]
        if texts:
            return _change_json(rng, rng.choice(texts), root)
    if kind == "pickle":
        pickles = [path for path in files if path.name == ".metadata" or path.suffix in (".distcp", ".pt")] or [file]
        file = rng.choice(pickles)
        file.write_bytes(touch_code())
        _make_state_agree(file)
        return f"{file.relative_to(root)}: a pickle with code"
    if kind == "swap":
        other = rng.choice(files)
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
        return f"{name} and {other.relative_to(root)} swapped"
    if kind == "remove":
        file.unlink()
        return f"{name} removed"
    if kind == "link":
        file.unlink()
        file.symlink_to(rng.choice(["/dev/null", file.name, "missing", "/etc/hostname", ".."]))
        return f"{name}: a link to {os.readlink(file)}"
    if kind == "folder":
        file.unlink()
        file.mkdir()
        return f"{name}: a folder"
    data, what = corrupt(rng, file.read_bytes())
    file.write_bytes(data)
    if rng.random() < 0.5:
        _make_state_agree(file)
    return f"{name}: {what}"


def _make_state_agree(file: Path) -> None:
    """Writes the size and checksum of a checkpoint's file into its state, as an attacker would."""
    from lavita.training.checkpoint import STATE

    state = file.parent / STATE
    if file.parent.parent.name != "checkpoints" or file.name == STATE or not state.is_file():
        return
    import zlib

    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        values["files"][file.name] = [file.stat().st_size, zlib.crc32(file.read_bytes())]
    except (ValueError, KeyError, TypeError):
        return
    state.write_text(json.dumps(values), encoding="utf-8")


def _change_json(rng: random.Random, file: Path, root: Path) -> str:
    """One value in a JSON file, at any depth."""
    name = file.relative_to(root).as_posix()
    lines = (
        file.read_text(encoding="utf-8", errors="replace").splitlines()
        if file.suffix == ".jsonl"
        else [file.read_text(encoding="utf-8", errors="replace")]
    )
    if not lines:
        return f"{name}: empty"
    place = rng.randrange(len(lines))
    try:
        value: Any = json.loads(lines[place])
    except ValueError:
        return f"{name}: no JSON"
    new = rng.choice([*JSON_VALUES, "../../../evil", "/tmp/lavita-fuzz-evil"])
    path: list[Any] = []
    inner = value
    while isinstance(inner, (dict, list)) and inner and (not path or rng.random() < 0.8):
        key = rng.choice(sorted(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        path.append(key)
        holder, inner = inner, inner[key]
    if path:
        holder[path[-1]] = new
    else:
        value = new
    lines[place] = json.dumps(value)
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"{name}: {'.'.join(map(str, path))} is {new!r}"
