"""Kind `pipelines`: pipelines and weights from someone else, damaged or malicious."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import Material, corrupt, touch_code
from benchmarks.robustness.fuzz.values import NAMES, NUMBERS, TEXTS

EVIL_NAMES = [
    "../../../evil",
    "/tmp/lavita-fuzz-evil",
    "..",
    ".",
    "",
    "a/b",
    "a\0b",
    "evil\n",
    "\x1b[31m",
    "-x",
    "x" * 300,
    "CON",
    "~",
]
JSON_VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 1e308, float("nan"), float("inf"), "", "a", [], {}]
JSON_VALUES += [[1], [None], {"a": 1}, [[]], "1", 3, 7, 64, 0.5]


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """A pipeline, or a Latte file, with one thing wrong."""
    if rng.random() < 0.2:
        return _latte_file(rng, folder, material)
    pipeline = material.copy("pipeline", folder / "in")
    mutate = rng.choice(
        [
            _change_json,
            _change_json,
            _change_json,
            _name_classes,
            _change_tensors,
            _change_tensors,
            _damage_file,
            _link,
            _remove,
            _claim_code,
        ]
    )
    what, must_fail = mutate(rng, pipeline)
    sample = ("sample", "in", "--out", "out", "--seeds", "0", "--steps", "1")
    if what.startswith("class_names") and rng.random() < 0.7:
        return Case(sample, what, must_fail)
    command = rng.choice(["sample"] * 20 + ["convert"] * 6 + ["encode"] * 6 + ["train"] * 6 + ["info", "evaluate"])
    if command == "sample":
        extra = rng.choice(
            [(), (), (), ("--images",), ("--num-frames", "4"), ("--format", "mkv"), ("--sampler", "ddpm")]
        )
        return Case((*sample, *extra), what, must_fail)
    if command == "info":
        return Case(("info", "in"), what)
    if command == "convert":
        return Case(("convert", "in", "out/latte.pt"), what, must_fail and "transformer" in what)
    for name in ("a/0.mp4", "b/1.mp4"):
        material.write_video(folder / "videos" / name)
    if command == "encode":
        arguments: tuple[str, ...] = (
            "encode",
            "--data",
            "videos",
            "--out",
            "out",
            "--autoencoder",
            "in/vae",
            "--resolution",
            "16",
        )
        return Case(arguments, what, must_fail and "vae" in what)
    if command == "evaluate":
        arguments = (
            "evaluate",
            "--real",
            "videos",
            "--generated",
            "in",
            "--metrics",
            "motion",
            "--samples",
            "out",
            "--steps",
            "1",
        )
        return Case((*arguments,), what)
    tiny = (
        "data.num_frames=2",
        "data.resolution=16",
        "model.preset=tiny/4",
        "train.batch_size=2",
        "autoencoder=in/vae",
    )
    return Case(("train", "--data", "videos", "--dry-run", "--run-dir", "out", *tiny, "train.init_from=in"), what)


def _change_json(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    """One value of a configuration."""
    file = pipeline / rng.choice(
        [
            "model_index.json",
            "transformer/config.json",
            "transformer/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
        ]
    )
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = rng.random()
    key = rng.choice(sorted(values))
    if kind < 0.6:
        odd = [*JSON_VALUES, *NUMBERS[:20], *(text for text in TEXTS if text.isprintable())]
        values[key] = value = rng.choice(odd)
    elif kind < 0.8 and isinstance(values[key], list) and values[key]:
        values[key][rng.randrange(len(values[key]))] = value = rng.choice([*JSON_VALUES, "../../x", "os", "system"])
    elif kind < 0.9:
        del values[key]
        value = "removed"
    else:
        key = rng.choice(["unknown", "_class_name", "__class__", "auto_map", "_name_or_path", ""])
        values[key] = value = rng.choice(JSON_VALUES)
    file.write_text(json.dumps(values), encoding="utf-8")
    return f"{file.relative_to(pipeline)}: {key!r} is {str(value)[:60]!r}", False


def _name_classes(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    """Names of classes, which become names of folders."""
    file = pipeline / "transformer" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    count = values["num_classes"]
    names: list[Any] = [rng.choice([*EVIL_NAMES, *NAMES]) for _ in range(count)]
    if rng.random() < 0.3:
        names = [names[0]] * count if rng.random() < 0.5 else names[: rng.randrange(count)]
    if rng.random() < 0.1:
        names[:1] = [rng.choice(JSON_VALUES)]
    values["class_names"] = names
    file.write_text(json.dumps(values), encoding="utf-8")
    return f"class_names is {names!r}"[:200], False


def _change_tensors(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    """Tensors of another shape or type, with NaN, missing, or too many."""
    import torch
    from safetensors.torch import load_file, save_file

    part = rng.choice(["transformer", "transformer", "vae"])
    file = pipeline / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = rng.choice(
        sorted(name for name, tensor in tensors.items() if part == "transformer" or name.startswith("decoder"))
    )
    tensor = tensors[name].clone()
    kind = rng.choice(["nan", "inf", "shape", "dtype", "missing", "extra", "huge", "integers", "empty"])
    must_fail = kind in ("nan", "inf", "shape", "missing", "empty")
    if kind == "nan" or kind == "inf":
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
    elif kind == "shape":
        tensor = tensor.new_zeros((*tensor.shape, 2))
    elif kind == "dtype":
        tensor = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64]))
    elif kind == "huge":
        tensor = tensor * 1e30
    elif kind == "integers":
        tensor = tensor.to(torch.int64)
    elif kind == "empty":
        tensor = tensor.new_zeros(0)
    tensors[name] = tensor.contiguous()
    if kind == "missing":
        del tensors[name]
    if kind == "extra":
        tensors["extra.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{part}: {kind} in {name}", must_fail


def _damage_file(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    files = sorted(path for path in pipeline.rglob("*") if path.is_file())
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix == ".safetensors" and rng.random() < 0.4:
        length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data)])
        damaged, what = length.to_bytes(8, "little") + data[8:], f"claims a header of {length} bytes"
    else:
        damaged, what = corrupt(rng, data)
    file.write_bytes(damaged)
    return f"{file.relative_to(pipeline)}: {what}", False


def _link(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    """A file of the pipeline is a link out of it."""
    file = rng.choice(sorted(path for path in pipeline.rglob("*") if path.is_file()))
    file.unlink()
    target = rng.choice(["/etc/hostname", file.name, "/dev/zero", "missing", "..", "/dev/null"])
    file.symlink_to(target)
    return f"{file.relative_to(pipeline)} is a link to {target}", True


def _remove(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    file = rng.choice(sorted(path for path in pipeline.rglob("*") if path.is_file()))
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    return f"{file.relative_to(pipeline)} is missing", file.name != "training.json" and file.suffix != ".md"


def _claim_code(rng: random.Random, pipeline: Path) -> tuple[str, bool]:
    """A pipeline that brings code of its own, or pickles, which must never run."""
    (pipeline / "evil.py").write_text("import os\nos.system('touch pwned')\nclass Evil: pass\n", encoding="utf-8")
    index = pipeline / "model_index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    kind = rng.choice(["class", "module", "custom", "auto_map", "pickle", "vae pickle"])
    if kind == "class":
        values["_class_name"] = ["evil", "Evil"]
    elif kind == "module":
        values[rng.choice(["transformer", "vae", "scheduler"])] = rng.choice(
            [["evil", "Evil"], ["os", "system"], ["subprocess", "Popen"], ["..evil", "Evil"]]
        )
    elif kind == "custom":
        values["evil"] = ["evil", "Evil"]
        values["custom_pipeline"] = "./evil.py"
        (pipeline / "pipeline.py").write_bytes((pipeline / "evil.py").read_bytes())
    elif kind == "auto_map":
        file = pipeline / "transformer" / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoModel": "evil.Evil"}
        file.write_text(json.dumps(config), encoding="utf-8")
    else:
        part = pipeline / ("vae" if "vae" in kind else "transformer")
        os.remove(part / "diffusion_pytorch_model.safetensors")
        (part / "diffusion_pytorch_model.bin").write_bytes(touch_code())
    index.write_text(json.dumps(values), encoding="utf-8")
    return f"code ({kind})", kind in ("pickle", "vae pickle")


def _latte_file(rng: random.Random, folder: Path, material: Material) -> Case:
    """A `.pt` file of Latte."""
    import torch

    file = material.copy("latte.pt", folder / "in" / "latte.pt")
    material.copy("vae", folder / "vae")
    kind = rng.choice(["corrupt", "corrupt", "pickle", "legacy pickle", "nan", "shape", "missing", "types"])
    must_fail = kind not in ("corrupt", "types")
    if kind == "corrupt":
        file.write_bytes(corrupt(rng, file.read_bytes())[0])
    elif "pickle" in kind:
        if kind == "pickle":
            import zipfile

            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", touch_code())
                archive.writestr("archive/version", "3\n")
        else:
            file.write_bytes(touch_code())
    else:
        state: dict[str, Any] = torch.load(file, weights_only=True)["ema"]
        name = rng.choice(sorted(state))
        if kind == "nan":
            state[name].view(-1)[0] = float("nan")
        elif kind == "shape":
            state[name] = state[name][None, None]
        elif kind == "missing":
            del state[name]
        else:
            state[name] = rng.choice([1, "a", None, [1], {"a": 1}, state[name].to(torch.int32), state[name].half()])
            must_fail = not isinstance(state[name], torch.Tensor)
        torch.save({"ema": state}, file)
    arguments = ("convert", "in/latte.pt", "out/pipeline", "--autoencoder", "vae", "--num-heads", "3")
    return Case(arguments, f"a Latte file: {kind}", must_fail)
