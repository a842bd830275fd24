"""Writing the latent cache: in shards, by any number of processes, interrupted, grown, shrunk, damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, make_tiny_vae
from safetensors import safe_open
from tiny_data import write_videos

from lavita.core.sizes import Size
from lavita.data.catalog import scan
from lavita.data.latent_cache import encode
from lavita.data.latent_cache.encode import encode_dataset
from lavita.data.latent_cache.manifest import read_manifest
from lavita.data.latent_cache.reading import CacheSource
from lavita.data.latent_cache.shards import read_shard
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.fingerprint import fingerprint
from lavita.video.formats import VideoError

RESOLUTION = 16
VIDEO_BYTES = 4 * 10 * 4 * 8 * 8 * 2  # mean and std, mirrored and not, of 10 frames of 4 x 8 x 8, float16
SEVEN = [f"{folder}/{number}.mp4" for number, folder in enumerate("aaabbcc")]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "videos", SEVEN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the videos, of an encode that was not interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    encode_all(write_videos(folder / "videos", SEVEN), folder / "cache", make_tiny_vae())
    return folder / "cache"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole cache, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def encode_all(root: Path, folder: Path, vae: AutoencoderKL, **options: Any) -> dict[str, Any]:
    """Two videos per shard."""
    fixed = {"resolution": RESOLUTION, "horizontal_flip": True, "precision": "fp32", "shard_bytes": 2 * VIDEO_BYTES}
    return encode_dataset(scan(root), folder, vae, **{**fixed, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def contents(folder: Path) -> list[list[str]]:
    """The names in each shard, in the order of the manifest."""
    shards: dict[str, list[str]] = {}
    for row in read_manifest(folder)["videos"]:
        shards.setdefault(row["shard"], []).append(row["name"])
    return list(shards.values())


def latents_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors that the manifest names, through the library that owns the format."""
    tensors = {}
    for row in read_manifest(folder)["videos"]:
        with safe_open(folder / row["shard"], framework="pt") as file:
            own = [key for key in file.keys() if key.rpartition("/")[0] == row["name"]]  # noqa: SIM118
            tensors[row["name"]] = {key.rpartition("/")[2]: file.get_tensor(key) for key in own}
    return tensors


def assert_equal_latents(one: Path, other: Path) -> None:
    first, second = latents_of(one), latents_of(other)
    assert list(first) == list(second)
    for name, tensors in first.items():
        assert sorted(tensors) == ["mean", "mean_flip", "std", "std_flip"] == sorted(second[name])
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in tensors.items()), name


class Watched:
    """Counts the videos that are encoded, and may fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.failure: tuple[str, BaseException] | None = None
        real = encode._encode_video

        def encode_video(vae: AutoencoderKL, source: Any, size: Size, settings: dict[str, Any], pieces: Any) -> Any:
            if self.failure is not None and source.video.name == self.failure[0]:
                raise self.failure[1]
            self.names.append(source.video.name)
            return real(vae, source, size, settings, pieces)

        monkeypatch.setattr(encode, "_encode_video", encode_video)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


# --- shards


def test_shards_hold_videos_up_to_their_size(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    write_videos(videos, ["b/3.mp4"], num_frames=45)  # more than a shard
    manifest = encode_all(videos, tmp_path / "cache", tiny_vae)
    assert contents(tmp_path / "cache") == [SEVEN[:2], SEVEN[2:3], SEVEN[3:4], SEVEN[4:6], SEVEN[6:]]
    assert sorted(content(tmp_path / "cache")) == sorted(
        {*(row["shard"] for row in manifest["videos"]), "manifest.json"}
    )
    encode_all(videos, tmp_path / "one", tiny_vae, shard_bytes=10**9)
    assert contents(tmp_path / "one") == [SEVEN]
    assert_equal_latents(tmp_path / "cache", tmp_path / "one")


def test_a_shard_says_what_it_is(videos: Path, whole: Path, tiny_vae: AutoencoderKL) -> None:
    row = read_manifest(whole)["videos"][4]
    assert row["class"] is None
    shard = read_shard(whole / row["shard"])
    assert shard.settings == {
        "version": 2,
        "autoencoder": fingerprint(tiny_vae),
        "resolution": 16,
        "horizontal_flip": True,
        "precision": "fp32",
    }
    stored = shard.videos[row["name"]]
    file = videos / row["name"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (stored.name, stored.num_frames, stored.fps, stored.source_sha256, stored.source_bytes) == (
        "b/4.mp4",
        10,
        10.0,
        digest,
        file.stat().st_size,
    )


def test_the_cache_names_the_classes_of_its_catalog(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    """The classes need not be the folders of the videos."""
    catalog = scan(videos, class_folders=True)
    named = type(catalog)(catalog.root, catalog.videos, ("x", "y", "z"), ())
    encode_dataset(named, tmp_path / "cache", tiny_vae, RESOLUTION, False, "fp32")
    cached = CacheSource(tmp_path / "cache", class_folders=True).catalog
    assert cached.class_names == ("x", "y", "z")
    assert [video.label for video in cached.videos] == [0, 0, 0, 1, 1, 2, 2]
    assert CacheSource(tmp_path / "cache").catalog.class_names == ()


# --- interruption


@pytest.mark.parametrize("moment", range(7))
def test_an_interrupted_encode_resumes(
    videos: Path, whole: Path, tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched, moment: int
) -> None:
    folder = tmp_path / "interrupted"
    encoded.failure = SEVEN[moment], KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        encode_all(videos, folder, tiny_vae)
    with pytest.raises(ValueError, match=r"no finished latent cache .no manifest\.json.; run `lavita encode`"):
        CacheSource(folder)
    finished = content(folder)
    assert len(finished) == moment // 2
    encoded.names, encoded.failure = [], None
    encode_all(videos, folder, tiny_vae)
    assert encoded.names == SEVEN[moment // 2 * 2 :]
    assert content(folder) == content(whole)


@pytest.mark.parametrize("file", ["latents-*.safetensors", "manifest.json"])
def test_an_encode_that_stops_while_it_writes_resumes(
    videos: Path, whole: Path, tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder, replaced = tmp_path / "interrupted", []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.match(file):
            replaced.append(target)
            if len(replaced) == 2 or file == "manifest.json":
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            encode_all(videos, folder, tiny_vae)
    assert len(content(folder)) == (1 if len(replaced) == 2 else 4), "nothing half-written is left"
    for name in (".latents-0.partial-0a.safetensors", ".manifest.partial-0b.json"):  # as a killed process leaves them
        (folder / name).write_bytes(b"half")
    others = folder / ".texts-0.partial-0c.safetensors"  # as a training run that embeds its captions is writing it
    others.write_bytes(b"half")
    encode_all(videos, folder, tiny_vae)
    others.unlink()
    assert content(folder) == content(whole)


def test_a_cache_is_not_made_among_the_videos(videos: Path, cache: Path, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match=r"out is .*, inside .*videos, the folder of the videos that are read"):
        encode_all(videos, videos / "cache", tiny_vae)
    assert not (videos / "cache").exists()
    cache.rename(videos / "cache")
    assert len(encode_all(videos, videos / "cache", tiny_vae)["videos"]) == 7, "but one that is there is updated"


def test_what_was_finished_is_kept_when_the_videos_change_in_between(
    videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched
) -> None:
    encoded.failure = SEVEN[4], KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        encode_all(videos, tmp_path / "cache", tiny_vae)
    write_videos(videos, ["a/-first.mp4"])
    encoded.names, encoded.failure = [], None
    encode_all(videos, tmp_path / "cache", tiny_vae)
    assert encoded.names == ["a/-first.mp4", *SEVEN[4:]]
    encode_all(videos, tmp_path / "whole", tiny_vae)
    assert_equal_latents(tmp_path / "cache", tmp_path / "whole")


# --- videos that come, go and change


def test_a_data_set_that_has_changed(
    videos: Path, cache: Path, tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched
) -> None:
    before = content(cache)
    encode_all(videos, cache, tiny_vae)
    assert not encoded.names and content(cache) == before

    write_videos(videos, ["a/new.mp4", "d/new.mp4", "d/newer.mp4"])
    encode_all(videos, cache, tiny_vae)
    assert encoded.names == ["a/new.mp4", "d/new.mp4", "d/newer.mp4"]
    grown = content(cache)
    assert len(grown) == len(before) + 2
    assert all(grown[name] == data for name, data in before.items() if name != "manifest.json")

    shutil.copy(videos / SEVEN[3], videos / SEVEN[0])  # changed
    (videos / SEVEN[2]).unlink()
    (videos / SEVEN[3]).unlink()  # all of the second shard
    (videos / SEVEN[6]).unlink()  # all of the fourth shard
    encoded.names = []
    encode_all(videos, cache, tiny_vae)
    assert encoded.names == [SEVEN[0]]
    encode_all(videos, tmp_path / "other", tiny_vae)
    assert_equal_latents(cache, tmp_path / "other")
    # The first shard still has a video, two are gone, and one has come.
    assert len(content(cache)) == len(grown) - 2 + 1
    CacheSource(cache).check(tiny_vae, RESOLUTION, True, videos)


def test_a_change_that_keeps_the_size_is_found(
    videos: Path, cache: Path, tiny_vae: AutoencoderKL, encoded: Watched
) -> None:
    file = videos / SEVEN[1]
    file.write_bytes(file.read_bytes().replace(b"isom", b"iso2"))
    encode_all(videos, cache, tiny_vae)
    assert encoded.names == [SEVEN[1]]


def test_a_cache_of_other_videos_is_left_alone(cache: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    before = content(cache)
    other = write_videos(tmp_path / "other", ["x.mp4"])
    with pytest.raises(ValueError, match=r"holds a cache of other videos, such as a/0\.mp4, and of none in .*other"):
        encode_all(other, cache, tiny_vae)
    assert content(cache) == before


@pytest.mark.parametrize("change", [{"resolution": 8}, {"horizontal_flip": False}, {"precision": "bf16"}])
def test_a_cache_of_other_settings_is_not_mixed(
    videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched, change: dict[str, Any]
) -> None:
    encoded.failure = SEVEN[2], KeyboardInterrupt()  # before the cache is finished
    with pytest.raises(KeyboardInterrupt):
        encode_all(videos, tmp_path / "cache", tiny_vae)
    encoded.failure = None
    (key, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"holds a cache with {key}=.*, not {value}; use another folder"):
        encode_all(videos, tmp_path / "cache", tiny_vae, **change)


def test_a_cache_of_an_older_version_is_not_mixed(videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "videos": []}))
    with pytest.raises(ValueError, match="holds a cache of version 1, this is 2; encode again, into another folder"):
        encode_all(videos, tmp_path, tiny_vae)


# --- damage


def test_a_video_that_breaks_while_it_is_decoded_is_skipped(
    videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded.failure = SEVEN[1], VideoError(videos / SEVEN[1], "breaks off")
    manifest = encode_all(videos, tmp_path / "cache", tiny_vae)
    assert manifest["broken"] == ["a/1.mp4: breaks off"]
    assert f"skipped: {SEVEN[1]}: breaks off\n" in capsys.readouterr().err
    assert [row["name"] for row in manifest["videos"]] == [SEVEN[0], *SEVEN[2:]]
    assert encode_all(videos, tmp_path / "cache", tiny_vae) == manifest
    CacheSource(tmp_path / "cache").check(tiny_vae, RESOLUTION, True, videos)
    with pytest.raises(ValueError, match="breaks off"):
        encode_all(videos, tmp_path / "other", tiny_vae, broken="error")
    # A shard that was finished before the run was stopped remembers it.
    (tmp_path / "cache" / "manifest.json").unlink()
    encoded.names = []
    assert encode_all(videos, tmp_path / "cache", tiny_vae) == manifest
    assert not encoded.names
    encoded.failure = None  # repaired
    assert len(encode_all(videos, tmp_path / "cache", tiny_vae)["videos"]) == 7


def test_broken_videos_are_known_by_name_below_a_relative_folder(
    videos: Path, tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (videos / "a" / "cut.mp4").write_bytes((videos / SEVEN[0]).read_bytes()[:-50])
    manifest = encode_all(Path("videos"), tmp_path / "cache", tiny_vae)
    assert [message.split(": ")[:2] for message in manifest["broken"]] == [["a/cut.mp4", "is cut off"]]
    CacheSource(tmp_path / "cache").check(tiny_vae, RESOLUTION, True, Path("videos"))


def test_nothing_but_broken_videos_is_an_error(tmp_path: Path, tiny_vae: AutoencoderKL, encoded: Watched) -> None:
    root = write_videos(tmp_path / "videos", ["0.mp4"])
    encoded.failure = "0.mp4", VideoError(root / "0.mp4", "breaks off")
    with pytest.raises(ValueError, match=r"no video could be decoded; the first: 0\.mp4: breaks off"):
        encode_all(root, tmp_path / "cache", tiny_vae)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3000] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "verify", "message"),
    [
        (Path.unlink, False, ""),
        (cut, False, "cut off, "),
        (flip_a_bit, True, "damaged in 1 videos, such as b/3.mp4; is written again"),
    ],
)
def test_a_damaged_shard_is_made_again(
    videos: Path,
    cache: Path,
    tiny_vae: AutoencoderKL,
    encoded: Watched,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    verify: bool,
    message: str,
) -> None:
    before = content(cache)
    manifest = encode_all(videos, cache, tiny_vae, verify=verify)
    assert "again" not in capsys.readouterr().err
    damage(cache / manifest["videos"][2]["shard"])
    encode_all(videos, cache, tiny_vae, verify=verify)
    assert encoded.names == SEVEN[2:4]
    assert content(cache) == before
    assert message in capsys.readouterr().err


# --- processes


@pytest.fixture
def world(tmp_path: Path, tiny_vae: AutoencoderKL) -> Callable[..., list[str]]:
    """Arguments of `python` for `lavita encode` of 12 videos, four per shard, into a folder."""
    root = write_videos(
        tmp_path / "many", [f"{number:02}.mp4" for number in range(12)], num_frames=25, height=32, width=32
    )
    tiny_vae.save_pretrained(tmp_path / "vae")

    def command(out: Path) -> list[str]:
        options = {"data": root, "out": out, "autoencoder": tmp_path / "vae", "resolution": 32, "shard-mb": 1}
        return [
            "-m",
            "lavita",
            "encode",
            *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
        ]

    return command


@pytest.mark.slow
def test_killed_and_shared_encodes_give_the_files_of_one_process(
    world: Callable[..., list[str]], tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed, shared = tmp_path / "whole", tmp_path / "killed", tmp_path / "shared"
    subprocess.run([sys.executable, *world(whole)], check=True, capture_output=True, env=environment)
    files = content(whole)
    assert len(files) == 4

    with subprocess.Popen(
        [sys.executable, *world(killed)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list(killed.glob("latents-*.safetensors")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)  # dies while it encodes or writes the second shard
    assert not (killed / "manifest.json").exists()
    subprocess.run([sys.executable, *world(killed)], check=True, capture_output=True, env=environment)
    assert content(killed) == files

    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [sys.executable, *launch, *world(shared)], check=False, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == f"{shared}: 12 videos, 0 broken\n"
    assert content(shared) == files


def test_bad_input_is_one_line(run: Run, tmp_path: Path) -> None:
    root = write_videos(tmp_path / "videos", ["0.mp4"])
    code, _, err = run("encode", "--data", root, "--out", tmp_path / "cache", "--resolution", "18")
    assert (code, err) == (2, "error: resolution is 18, but this autoencoder needs a multiple of 4\n")
    code, out, _ = run("encode", "--data", root, "--out", tmp_path / "cache", "--resolution", "16", "--verify")
    assert (code, out) == (0, f"{tmp_path / 'cache'}: 1 videos, 0 broken\n")
