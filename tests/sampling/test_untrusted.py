"""Pipelines from somewhere else: names that lead out, code, links, and weights that are not numbers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from safetensors.torch import load_file, save_file
from tiny_data import write_videos

from lavita.models.autoencoder import AutoencoderKL, decode, load_autoencoder, to_frames
from lavita.models.pretrained.transfer import initialize
from lavita.sampling.generate import generate
from lavita.sampling.pipeline import LavitaPipeline, load_pipeline, make_pipeline
from lavita.sampling.recipes import Recipe

CLASSES: dict[str, Any] = {"num_classes": 3, "class_names": ["a", "b", "c"]}
FAST: dict[str, Any] = {"recipe": Recipe(steps=1), "device": "cpu", "num_frames": 1, "seeds": "0"}


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.fixture
def folder(save_pipeline: SavePipeline, make_transformer: MakeTransformer) -> Path:
    return Path(save_pipeline(make_transformer(**CLASSES)))


# ---- names


def test_class_names_stay_below_the_folder(folder: Path, tmp_path: Path, run: Run) -> None:
    evil, out = tmp_path / "abs", tmp_path / "deep" / "er" / "out"
    change(folder / "transformer" / "config.json", class_names=["../../../evil", str(evil), ".."])
    code, stdout, stderr = run("sample", folder, "--out", out, "--steps", "1", "--seeds", "0", "--num-frames", "1")
    assert code == 0, stderr
    assert stdout.splitlines()[-1].endswith(": 3 videos") and len(list(out.glob("*/0.mp4"))) == 3
    assert not evil.exists()
    assert {path.parent.parent for path in tmp_path.rglob("0.mp4")} == {out}


@pytest.mark.parametrize("names", [["a", "b", "b"], ["a", "b", None], ["a", "b", 3]])
def test_class_names_are_different_texts(names: list[Any], folder: Path) -> None:
    change(folder / "transformer" / "config.json", class_names=names)
    with pytest.raises(ValueError, match=r"class_names has .* at 2, but must be a list of different texts"):
        load_pipeline(folder)


def test_a_link_below_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the name 'b/0\.mp4' leads out of the folder, through a link"):
        generate(str(folder), out, **FAST)
    assert not list((tmp_path / "elsewhere").iterdir()) and not list(out.rglob("*.mp4"))


# ---- code


TRAP = "import pathlib; pathlib.Path({!r}).mkdir()\nclass {}: pass\n"


@pytest.mark.parametrize(
    ("part", "module", "name"),
    [
        ("vae", "trap", "AutoencoderKL"),
        ("vae", "diffusers", "AutoencoderKL"),
        ("transformer", "lavita.models.transformer", "LavitaTransformer3DModel"),
        ("scheduler", "trap", "UniPCMultistepScheduler"),
    ],
)
def test_code_in_a_pipeline_is_refused(part: str, module: str, name: str, folder: Path, tmp_path: Path) -> None:
    (folder / part / f"{module}.py").write_text(TRAP.format(str(tmp_path / "sprung"), name))
    change(folder / "model_index.json", **{part: [module, name]})
    for load in (load_pipeline, LavitaPipeline.from_pretrained):
        with pytest.raises(ValueError, match=rf"{module}\.py: is code, which no part of a pipeline needs"):
            load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vae": ["subprocess", "Popen"]}, "vae is .'subprocess', 'Popen'.; allowed: AutoencoderKL"),
        ({"transformer": ["torch.nn", "Linear"]}, "transformer is .*; allowed: LavitaTransformer3DModel"),
        ({"scheduler": "os"}, "scheduler is 'os'; allowed: DDPM"),
        ({"helper": ["os", "system"]}, "names the part 'helper'; allowed: transformer, vae, scheduler"),
        ({"_class_name": ["pipeline", "Trap"]}, "names the class .*; allowed: LavitaPipeline"),
        ({"_class_name": "StableDiffusionPipeline"}, "names the class 'StableDiffusionPipeline'"),
    ],
)
def test_other_classes_in_model_index_are_refused(fields: dict[str, Any], words: str, folder: Path) -> None:
    change(folder / "model_index.json", **fields)
    for load in (load_pipeline, LavitaPipeline.from_pretrained):
        with pytest.raises(ValueError, match=words):
            load(folder)


def test_modules_in_model_index_decide_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "trapmodule.py").write_text(TRAP.format(str(tmp_path / "sprung"), "AutoencoderKL"))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    change(
        folder / "model_index.json",
        vae=["trapmodule", "AutoencoderKL"],
        transformer=["trapmodule", "LavitaTransformer3DModel"],
    )
    assert type(load_pipeline(folder).vae) is AutoencoderKL
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("write", [torch.save, lambda trap, file: file.write_bytes(pickle.dumps(trap))])
def test_a_pickle_in_a_pipeline_is_not_run(
    write: Callable[[Any, Path], None], part: str, folder: Path, tmp_path: Path
) -> None:
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    write({"a": Trap(tmp_path / "sprung")}, folder / part / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a pipeline") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()
    if part == "vae":
        with pytest.raises(ValueError, match="cannot load an autoencoder"):
            load_autoencoder(str(folder))
    assert not (tmp_path / "sprung").exists()


# ---- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_are_not_finite_are_named(
    part: str, value: float, folder: Path, tmp_path: Path, run: Run, make_transformer: MakeTransformer
) -> None:
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if name.endswith(".weight"))
    tensors[name].flatten()[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    said = f"{part}: {name} holds 1 of"
    real = write_videos(tmp_path / "videos", [f"{name}/{i}.mp4" for name in "abc" for i in range(4)], 9)
    for arguments in (["sample", folder], ["evaluate", "--real", real, "--generated", folder]):
        code, _, stderr = run(*arguments, "--out", tmp_path / "out")
        assert code == 2 and stderr.count("\n") == 1 and said in stderr, stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=rf"{name} holds 1 of"):
        if part == "vae":
            load_autoencoder(str(folder))
        else:
            initialize(make_transformer(**CLASSES), str(folder))


@pytest.mark.parametrize("fields", [{"fps": float("nan")}, {"mlp_ratio": float("inf")}])
def test_fields_of_a_model_are_finite(fields: dict[str, float], folder: Path) -> None:
    change(folder / "transformer" / "config.json", **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is (nan|inf), but must be a finite number"):
        load_pipeline(folder)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_autoencoder_has_a_scale(value: float, folder: Path) -> None:
    change(folder / "vae" / "config.json", scaling_factor=value)
    for load in (load_pipeline, lambda path: load_autoencoder(str(path))):
        with pytest.raises(ValueError, match=f"scaling_factor is {value}"):
            load(folder)


def test_sampling_stops_before_it_writes_what_is_not_finite(
    tmp_path: Path, tiny_vae: AutoencoderKL, make_transformer: MakeTransformer, run: Run
) -> None:
    model = make_transformer(**CLASSES)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(1e38)
    make_pipeline(model, tiny_vae).save_pretrained(tmp_path / "model")
    code, _, stderr = run("sample", tmp_path / "model", "--out", tmp_path / "out", "--steps", "3", "--seeds", "0")
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: the latents are not finite after 3 steps with guidance_scale 1.5")
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_that_overflows_is_said(tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(FloatingPointError, match="pixels that are not finite"):
        to_frames(torch.tensor([[[float("nan")]]]))
    with torch.no_grad():
        tiny_vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="pixels that are not finite"):
        decode(tiny_vae, torch.ones(1, 4, 8, 8))
    assert to_frames(torch.tensor([[[-1.0]], [[0.0]], [[1.0]]])).dtype == np.uint8
