"""Folders of generated videos: what is written, kept and refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, SavePipeline
from PIL import Image
from tiny_text import BERT, save_text_encoder
from transformers import BertModel

from lavita.core.seeds import generator
from lavita.core.text import normal_name
from lavita.evaluation.sources import find_interval
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling import generate as generate_module
from lavita.sampling.generate import generate
from lavita.sampling.jobs import parse_seeds
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.sampling.recipes import Recipe
from lavita.video.reading import probe, read_clip

TWO = Recipe(steps=2)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision `auto` is float32 here, whatever the processor; bf16 is tested with the recipes."""
    monkeypatch.setenv("LAVITA_BF16", "off")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("1,5,9", [1, 5, 9]), ("7", [7]), ("4-5, 2", [4, 5, 2]), ("3-3", [3])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-2-3", "1,,2", "1.5", "3-1", "0-99999999999", "²", "9" * 5000])
def test_seeds_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"seeds is '{text}'"):
        parse_seeds(text)


@pytest.fixture
def model_folder(tmp_path: Path, pipeline: LavitaPipeline) -> str:
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_generate_writes_a_folder_and_skips_what_is_there(tmp_path: Path, model_folder: str) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"classes": "pong, 0", "seeds": "4-5", "recipe": TWO, "suffix": ".mp4", "device": "cpu"}
    written = generate(model_folder, out, **options)
    expected = [out / name / f"{seed}.mp4" for name in ("pong", "boxing") for seed in (4, 5)]
    assert written == expected
    assert sorted(file for file in out.rglob("*.*")) == sorted([*expected, out / "generation.json"])
    info = probe(expected[0])
    assert (info.num_frames, info.width, info.height, info.fps) == (2, 16, 16, 4.0)

    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in expected}
    expected[1].unlink()
    assert generate(model_folder, out, **options) == expected
    after = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in expected}
    assert [file for file in expected if before[file] != after[file]] == [expected[1]]


def test_generated_videos_do_not_depend_on_the_batch(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos: dict[Path, np.ndarray] = {}
    monkeypatch.setattr(generate_module, "write_video", lambda path, frames, fps: videos.update({path: frames}))
    for batch_size in (1, 4, 6):
        out = tmp_path / str(batch_size)
        assert len(generate(model_folder, out, seeds="0-1", recipe=TWO, batch_size=batch_size, device="cpu")) == 6
    for name in ("boxing", "enduro", "pong"):
        for seed in (0, 1):
            one, four, six = (videos[tmp_path / size / name / f"{seed}.mp4"].astype(int) for size in "146")
            # Sums of floats may be rounded differently.
            assert max(np.abs(one - four).max(), np.abs(one - six).max()) <= 1
    boxing = tmp_path / "1" / "boxing"
    assert (videos[boxing / "0.mp4"] != videos[boxing / "1.mp4"]).any()


def test_generate_from_an_unconditional_model(
    tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    make_pipeline(make_transformer(), tiny_vae).save_pretrained(folder)
    written = generate(str(folder), out, seeds="3", recipe=TWO, num_frames=1, suffix=".gif", device="cpu")
    assert written == [out / "3.gif"]
    assert probe(written[0]).num_frames == 1
    with pytest.raises(ValueError, match="classes is 'pong', but this model has none"):
        generate(str(folder), out, classes="pong", device="cpu")


def test_generate_images(tmp_path: Path, model_folder: str) -> None:
    out = tmp_path / "out"
    written = generate(model_folder, out, classes="pong", seeds="0-1", recipe=TWO, images=True, device="cpu")
    assert [path.relative_to(out).as_posix() for path in written] == ["pong/0.png", "pong/1.png"]
    pictures = [np.asarray(Image.open(path)) for path in written]
    assert pictures[0].shape == (16, 16, 3) and not np.array_equal(pictures[0], pictures[1])
    pipeline = load_pipeline(model_folder)
    frames = pipeline(
        ["pong"],
        num_frames=1,
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=[generator(1, "sample")],
        use_temporal=False,
    ).frames
    assert isinstance(frames, np.ndarray)
    assert np.abs(frames[0, 0].astype(int) - pictures[1]).max() <= 1


def test_generate_from_texts(tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> None:
    encoder = tmp_path / "encoder"
    torch.manual_seed(0)
    save_text_encoder(BertModel(BERT), encoder)
    transformer = make_transformer(text_dim=16, text_encoder=str(encoder))
    make_pipeline(transformer, tiny_vae).save_pretrained(tmp_path / "model")
    table = tmp_path / "prompts.csv"
    table.write_text("file,caption\nboxing/000.mp4,a game of boxing\nfreeway/000.mp4,freeway\n")
    out = tmp_path / "out"
    options: dict[str, Any] = {"recipe": TWO, "device": "cpu"}
    one = generate(str(tmp_path / "model"), out, prompts=["A game, of boxing!"], seeds="4", **options)
    two = generate(str(tmp_path / "model"), out, prompt_table=table, seeds="4-5", **options)
    assert [path.relative_to(out).as_posix() for path in (*one, *two)] == [
        "a-game-of-boxing--b6b1311a16ad/4.mp4",
        "boxing/000-4.mp4",
        "boxing/000-5.mp4",
        "freeway/000-4.mp4",
        "freeway/000-5.mp4",
    ]
    clips = [read_clip(path, 0, 2) for path in two]
    assert not np.array_equal(clips[0], clips[2]), "another prompt, the same seed"
    with pytest.raises(ValueError, match="this model has texts: give --prompt"):
        generate(str(tmp_path / "model"), out, **options)
    table.write_text("file,caption\n../up.mp4,freeway\n")
    with pytest.raises(ValueError, match=r"the name '\.\./up\.mp4' does not stay inside the folder"):
        generate(str(tmp_path / "model"), out, prompt_table=table, **options)


def test_generate_refuses_what_does_not_exist(tmp_path: Path, model_folder: str) -> None:
    out = tmp_path / "out"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"classes": "pong,chess"}, "class is 'chess'; allowed: all, boxing, enduro, pong, or 0-2"),
        ({"classes": "3"}, "class is '3'"),
        ({"classes": ""}, "class is ''"),
        ({"seeds": "x"}, "seeds is 'x'"),
        ({"recipe": Recipe(sampler="lms")}, "sampler is 'lms'"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 2, "images": True}, "num_frames is 2, but an image has 1"),
        ({"prompts": ["a"]}, "a prompt was given, but this model has no texts"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"device": "toaster"}, "device is 'toaster'"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            generate(model_folder, out, **{"device": "cpu", **options})
    with pytest.raises(ValueError, match="no such folder"):
        generate(str(tmp_path / "missing"), out, device="cpu")
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"recipe": replace(TWO, steps=3)}, "steps=2, not 3"),
        ({"recipe": replace(TWO, sampler="ddim")}, "sampler=unipc, not ddim"),
        ({"recipe": replace(TWO, guidance_scale=2.0)}, "guidance_scale=1.5, not 2.0"),
        ({"recipe": replace(TWO, guidance_interval=(100, 900))}, r"guidance_interval=None, not \[100, 900\]"),
        ({"recipe": replace(TWO, spacing="karras")}, "spacing=None, not karras"),
        ({"recipe": replace(TWO, cache="pab")}, "cache=None, not pab"),
        ({"recipe": replace(TWO, quantize="int8")}, "quantize=None, not int8"),
        ({"recipe": replace(TWO, compiled=True)}, "compiled=None, not True"),
        ({"num_frames": 1}, "num_frames=2, not 1"),
        ({"images": True}, "num_frames=2, not 1"),
    ],
)
def test_a_folder_never_holds_videos_made_in_two_ways(
    tmp_path: Path, model_folder: str, changed: dict[str, Any], named: str
) -> None:
    out = tmp_path / "out"
    generate(model_folder, out, seeds="0", recipe=TWO)
    with pytest.raises(ValueError, match=named):
        generate(model_folder, out, **{"seeds": "1", "recipe": TWO, **changed})
    assert not list(out.rglob("1.mp4"))
    (out / "generation.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation\.json: damaged"):
        generate(model_folder, out, seeds="0", recipe=TWO)


def test_the_frame_interval_of_the_model_decides_how_it_is_scored(
    tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    transformer = make_transformer(num_classes=1, class_names=["a"], frame_interval=3)
    make_pipeline(transformer, tiny_vae).save_pretrained(tmp_path / "model")
    generate(str(tmp_path / "model"), tmp_path / "out", seeds="0", recipe=TWO)
    assert find_interval(tmp_path / "out", None) == 3
    with pytest.raises(ValueError, match=r"frame_interval is 1, but the model of .*out has 3"):
        find_interval(tmp_path / "out", 1)


@pytest.mark.slow
def test_classes_in_any_unicode_form(
    make_transformer: MakeTransformer, save_pipeline: SavePipeline, tmp_path: Path
) -> None:
    folder = save_pipeline(make_transformer(num_classes=2, class_names=["a", "cafe\u0301"]))
    (file,) = generate(folder, tmp_path / "out", classes="caf\xe9", seeds="0", recipe=TWO, device="cpu")
    assert file.exists() and normal_name(file.parent.name) == "caf\xe9"


def test_several_processes_write_the_files_of_one(tmp_path: Path, model_folder: str) -> None:
    """A file is the same to the bit whichever process makes it, and whatever exists already."""
    options = ["--classes", "pong", "--seeds", "0-4", "--steps", "2", "--batch-size", "2", "--format", "mkv"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert len(generate(model_folder, one, classes="pong", seeds="0-4", recipe=TWO, batch_size=2, suffix=".mkv")) == 5
    (two / "pong").mkdir(parents=True)
    for name in ("generation.json", "pong/1.mkv"):
        shutil.copy(one / name, two / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lavita"]
    subprocess.run(
        [*launch, "sample", model_folder, "--out", str(two), *options],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    written = sorted(file.relative_to(one) for file in one.rglob("*.mkv"))
    assert written == sorted(file.relative_to(two) for file in two.rglob("*.mkv"))
    for file in written:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
