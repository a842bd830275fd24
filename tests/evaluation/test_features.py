"""Outputs of networks: the frames they are shown, the cache, and what cannot be decoded."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scripted import I3D, save_script
from tiny_data import write_videos

from lavita.data.clips import center_crop_resize
from lavita.evaluation import clips as clips_module
from lavita.evaluation.clips import ClipSet, choose_clips, every_frame
from lavita.evaluation.features.compute import PIXELS, BrokenVideos, cache_key, compute_outputs
from lavita.evaluation.features.networks import NETWORKS, Network, load_network
from lavita.evaluation.sources import Source, VideoFolder
from lavita.video.formats import VideoError
from lavita.video.reading import read_clip

NAMES = [f"a/{number}.mp4" for number in range(11)]


def recording(shown: list[npt.NDArray[np.uint8]]) -> Network:
    """A network whose output is the pixels."""

    def run(pixels: torch.Tensor) -> torch.Tensor:
        shown.append(pixels.numpy())
        return pixels.flatten(2).float()

    return Network(NETWORKS["inception"], Path("pixels"), "0" * 64, run)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return VideoFolder(write_videos(tmp_path_factory.mktemp("videos"), NAMES, num_frames=14)).usable()


@pytest.fixture(scope="module")
def clips(source: Source) -> ClipSet:
    return choose_clips(source, 20, 4, 3, seed=0)


def test_outputs_are_those_of_the_chosen_pixels_in_order(clips: ClipSet) -> None:
    outputs = compute_outputs(clips, [recording([])], 8)["inception"]
    assert len(outputs) == 20
    for clip, row in zip(clips.clips, outputs, strict=True):
        frames = read_clip(clips.root / clip.name, clip.start, 4, 3)
        assert np.array_equal(row, center_crop_resize(frames, 8).reshape(4, -1))


def test_clips_of_several_lengths_keep_their_order(source: Source) -> None:
    whole = every_frame(source, 5)  # of 14 frames: 5, 5 and 4
    outputs = compute_outputs(whole, [recording([])], 8)["inception"]
    assert [len(row) for row in outputs] == [clip.num_frames for clip in whole.clips]
    for clip, row in zip(whole.clips, outputs, strict=True):
        frames = read_clip(whole.root / clip.name, clip.start, clip.num_frames, 1)
        assert np.array_equal(row, center_crop_resize(frames, 8).reshape(clip.num_frames, -1))


def test_the_cache_is_keyed_by_content_and_protocol(tmp_path: Path, source: Source, clips: ClipSet) -> None:
    shown: list[npt.NDArray[np.uint8]] = []
    network = recording(shown)
    first = compute_outputs(clips, [network], 8, tmp_path)["inception"]
    passes = len(shown)
    again = compute_outputs(clips, [network], 8, tmp_path)["inception"]
    assert len(shown) == passes == 3
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    keys = {
        cache_key(clips, network, 8),
        cache_key(clips, network, 16),
        cache_key(choose_clips(source, 20, 4, 3, seed=1), network, 8),
        cache_key(choose_clips(source, 20, 4, 2, seed=0), network, 8),
        cache_key(clips, Network(network.spec, network.path, "1" * 64, network.run), 8),
        cache_key(clips, Network(NETWORKS["inception_stylegan"], network.path, "0" * 64, network.run), 8),
    }
    assert len(keys) == 6
    assert [file.name for file in tmp_path.iterdir()] == [f"{cache_key(clips, network, 8)}.safetensors"]


@pytest.mark.parametrize("damage", [lambda content: b"x", lambda content: content[: len(content) // 2]])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, clips: ClipSet, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    first = compute_outputs(clips, [recording([])], 8, tmp_path)["inception"]
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = compute_outputs(clips, [recording([])], 8, tmp_path)["inception"]
    assert "damaged, computing it again" in capsys.readouterr().err
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_outputs_of_clips_are_cached_too(tmp_path: Path, source: Source) -> None:
    network = load_network(NETWORKS["i3d"], {"i3d": save_script(I3D(), tmp_path / "i3d.pt")})
    clips = choose_clips(source, 9, 10, 1, seed=0)
    first, again = (compute_outputs(clips, [network], 16, tmp_path / "cache")["i3d"] for _ in range(2))
    assert [row.shape for row in first] == [(400,)] * 9
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_all_videos_that_cannot_be_decoded_are_named(
    clips: ClipSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sorted({clips.clips[0].name, clips.clips[-1].name})

    def read(path: Path, *arguments: int) -> npt.NDArray[np.uint8]:
        if path.relative_to(clips.root).as_posix() in bad:
            raise VideoError(path, "frame 3 is damaged")
        return read_clip(path, *arguments)

    monkeypatch.setattr(clips_module, "read_clip", read)
    with pytest.raises(
        BrokenVideos, match=r"2 videos cannot be decoded, the first: .*frame 3 is damaged; --skip-broken continues"
    ) as caught:
        compute_outputs(clips, [recording([])], 8)
    assert caught.value.names == set(bad)
    err = capsys.readouterr().err
    assert all(f"broken: {clips.root / name}" in err for name in bad)


def test_the_identifier_of_the_pixels_is_that_of_the_code() -> None:
    tree = ast.parse(inspect.getsource(center_crop_resize))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.body = function.body[1:]  # without the docstring
    code = hashlib.sha256(ast.unparse(function).encode()).hexdigest()
    assert (PIXELS, code[:16]) == ("90fca6b40186be2e", "342f95cf45c3d74f"), (
        "other code: if it makes other pixels, change PIXELS"
    )
