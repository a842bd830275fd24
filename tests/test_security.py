"""What docs/security.md says about the whole package: what its code never does, and that it asks for no network."""

from __future__ import annotations

import ast
import html
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, SavePipeline
from tiny_data import write_videos
from tiny_text import CLIP, save_text_encoder
from transformers import CLIPTextModelWithProjection

import lavita
from lavita.core.config import ConfigError, read_yaml
from lavita.core.web_page import page, row, table, video
from lavita.models.text_encoder import load_text_encoder
from lavita.models.transformer import LavitaTransformer3DModel

PACKAGE = Path(lavita.__file__).parent

# ---- code that is never there

FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "pickle.load": "a pickle runs code",
    "pickle.loads": "a pickle runs code",
    "os.system": "a shell",
    "os.popen": "a shell",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds many objects",
}


def check_calls(source: str) -> Iterator[str]:
    """Calls in a source file that data from elsewhere could abuse."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN:
            yield f"line {node.lineno}: {name} {FORBIDDEN[name]}"
        if name == "torch.load" and options.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name == "yaml.load" and (len(node.args) < 2 or ast.unparse(node.args[1]) != "_Loader"):
            yield f"line {node.lineno}: yaml.load without the safe loader of core/config.py"
        if options.get("trust_remote_code", "False") != "False" or options.get("shell", "False") != "False":
            yield f"line {node.lineno}: {name} may run code"
        if options.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {name} reads pickles"


def test_the_package_runs_no_code_that_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    found = [f"{file.relative_to(PACKAGE)} {what}" for file in files for what in check_calls(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "call",
    [
        "eval(text)",
        "pickle.load(file)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(source, trust_remote_code=True)",
        "AutoModel.from_pretrained(source, trust_remote_code=chosen)",
        "subprocess.run(words, shell=True)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_such_code_would_be_noticed(call: str) -> None:
    assert len(list(check_calls(f"x = {call}"))) == 1
    assert not list(check_calls("torch.load(file, weights_only=True); yaml.load(text, _Loader); model.eval()"))


# ---- code that a model or a configuration brings


def test_code_of_a_text_encoder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # should it be asked for
    folder = tmp_path / "encoder"
    save_text_encoder(CLIPTextModelWithProjection(CLIP), folder)
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).mkdir()\nclass Trap: pass\n"
    (folder / "trap.py").write_text(trap, encoding="utf-8")
    for file, classes in (("config.json", ["AutoConfig", "AutoModel"]), ("tokenizer_config.json", ["AutoTokenizer"])):
        values = json.loads((folder / file).read_text(encoding="utf-8"))
        values |= {"auto_map": dict.fromkeys(classes, "trap.Trap"), "model_type": "unheard-of"}
        (folder / file).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="encoder"):
        load_text_encoder(str(folder))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:pathlib.Path.mkdir [sprung]", "!!python/name:os.system", "!!python/module:os", "!x 1"],
)
def test_yaml_builds_plain_values_only(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(f"run_dir: {tag}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read as YAML"):
        read_yaml(tmp_path / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


# ---- pages


@pytest.mark.parametrize(
    "write",
    [lambda text: row([text]), lambda text: table([text], [[text]]), video, lambda text: page(text, "")],
    ids=["row", "table", "video", "title"],
)
def test_text_in_pages_is_escaped(write: Callable[[str], str]) -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror='alert(1)'>"
    written = write(evil)
    assert "<script" not in written and "<img" not in written and html.escape(evil) in written


# ---- network


def test_nothing_asks_for_the_network(
    run: Run,
    save_pipeline: SavePipeline,
    tiny_transformer: LavitaTransformer3DModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folders as models, and data on the disk; only a hub id is looked for elsewhere."""

    def refuse(*words: Any) -> None:
        raise AssertionError(f"asks for the network: {words[1:]}")

    folder, videos = save_pipeline(tiny_transformer), write_videos(tmp_path / "videos")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    autoencoder = ("--autoencoder", f"{folder}/vae", "--resolution", "16")
    small = ("data.num_frames=2", "data.resolution=16", "model.preset=tiny/4", "train.batch_size=2")
    for arguments in (
        ["data", "inspect", videos],
        ["encode", "--data", videos, "--out", tmp_path / "latents", *autoencoder],
        ["sample", folder, "--out", tmp_path / "samples", "--seeds", "0", "--steps", "1"],
        ["train", "--data", videos, f"autoencoder={folder}/vae", *small, "train.steps=1", "train.sample_every=0"],
    ):
        code, _, errors = run(*arguments)
        assert code == 0, errors
