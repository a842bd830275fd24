"""The wheel as users get it: its contents, and a fresh environment in which pip resolves it without the lock file."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from lavita.video.reading import probe

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Temporary failure in name resolution")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the repository, with nothing of it on PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=1500
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options: list[str | Path] = ["--no-deps", "-w", folder]
    built = run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("lavita-*.whl")
    return file


def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "lavita").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files


@pytest.mark.slow
def test_a_fresh_environment_installs_it_and_samples(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    # Everything but torch is the newest that fits; another torch would be gigabytes more.
    (tmp_path / "torch.txt").write_text(f"torch=={version('torch').partition('+')[0]}\n")
    options: list[str | Path] = ["-q", "--no-compile", "-c", tmp_path / "torch.txt"]
    installed = run(bin_ / "pip", "install", *options, wheel, cwd=tmp_path)
    if "CI" not in os.environ and any(word in installed.stderr for word in OFFLINE):
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    assert (checked := run(bin_ / "pip", "check", cwd=tmp_path)).returncode == 0, checked.stdout

    request = ["--classes", "boxing", "--seeds", "0", "--steps", "2"]
    sampled = run(bin_ / "lavita", "sample", "--out", tmp_path / "samples", *request, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert "arning" not in sampled.stderr, sampled.stderr
    info = probe(tmp_path / "samples" / "boxing" / "0.mp4")
    assert (info.num_frames, info.height, info.width) == (16, 64, 64)
