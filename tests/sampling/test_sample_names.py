"""Names of samples: another job is another file, on any file system and whatever else is asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from tiny_text import BERT, save_text_encoder
from transformers import BertModel

from lavita.core.files import folded, inside
from lavita.data.captions import read_captions
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.generate import generate
from lavita.sampling.names import class_folders, prompt_folder, table_prefixes
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.sampling.recipes import Recipe

FAST: dict[str, Any] = {"recipe": Recipe(steps=1), "device": "cpu", "num_frames": 1}


@pytest.mark.parametrize(
    ("prompt", "folder"),
    [("a dog runs", "a-dog-runs"), ("freeway", "freeway"), ("two 2 do", "two-2-do"), ("一只 狗", "一只-狗")],
)
def test_a_prompt_that_can_be_read_off_its_folder(prompt: str, folder: str) -> None:
    assert prompt_folder(prompt) == folder


def test_other_prompts_have_a_hash() -> None:
    long = "a dog " * 13 + "runs and"
    prompts = ["A dog runs!", "a dog runs!", "A dog runs", "a  dog runs", " a dog runs", "a-dog-runs", "", "!", "con"]
    prompts += [f"{long} jumps", f"{long} sleeps", "ﬁsh", "cafe\u0301", "../../x", "/etc/passwd", "a\\b", "a\nb"]
    folders = [prompt_folder(prompt) for prompt in prompts]
    assert len(set(map(folded, folders))) == len(prompts)
    assert all("--" in folder for folder in folders)
    assert "a-dog-runs" not in folders
    assert prompt_folder(prompt_folder("A dog runs!").replace("-", " ")) not in folders


def random_texts(letters: str, count: int, seed: int) -> list[str]:
    """Different short texts of few letters, so that many are nearly equal."""
    rng = random.Random(seed)
    return list({"".join(rng.choices(letters, k=rng.randrange(5))) for _ in range(count)})


def test_two_prompts_never_share_a_folder() -> None:
    prompts = random_texts("aA1 -.!é\u0301/ß", 5000, 0)
    folders = [prompt_folder(prompt) for prompt in prompts]
    assert len(set(map(folded, folders))) == len(prompts)
    assert all(inside(Path("out"), folder).parent == Path("out") for folder in folders)


def test_two_classes_never_share_a_folder() -> None:
    names = random_texts("aA1 -.!é\u0301/\\\0", 5000, 1)
    folders = class_folders(names)
    assert len(set(map(folded, folders))) == len(names)
    assert all(inside(Path("out"), folder).parent == Path("out") for folder in folders)


def test_classes_keep_their_names_where_those_can_be_folders() -> None:
    names = ["boxing", "ApplyEyeMakeup", "playing guitar", "Dog", "dog", "a/b", "..", "/abs/dir", "CON", "é", "e\u0301"]
    folders = class_folders(names)
    assert folders[:3] == names[:3]
    assert not set(folders[3:]) & set(names)
    assert folders[3].startswith("dog--") and folders[3] != folders[4]


def test_two_rows_of_a_table_never_share_a_file() -> None:
    rng = random.Random(2)
    stems = random_texts("aA.-1/", 1000, 2)
    captions = {
        f"{stem}{suffix}": rng.choices("xyz", k=rng.randint(1, 3)) for stem in stems for suffix in ("", ".mp4", ".mkv")
    }
    rows = table_prefixes(captions)
    files = [folded(f"{prefix}{seed}.mp4") for prefix, _ in rows for seed in (0, 1, 10)]
    assert len(set(files)) == 3 * len(rows)
    assert len(rows) == sum(len(set(texts)) for texts in captions.values())


def test_rows_of_a_table() -> None:
    captions = {"a/0.mp4": ["x"], "a/0.mkv": ["x"], "b.v2.mp4": ["x"], "c.mp4": ["x", "y", "x"], "d": ["x"]}
    names = [prefix for prefix, _ in table_prefixes(captions)]
    assert names[:3] == ["a/0-", "a/0.mkv-", "b.v2.mp4-"]
    assert all(name.startswith("c--") for name in names[3:5]) and names[5].startswith("d--")
    assert len(names) == 6


# ---- the folder that sampling leaves


@pytest.fixture
def with_texts(tmp_path: Path, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_text_encoder(BertModel(BERT), tmp_path / "encoder")
    transformer = make_transformer(text_dim=16, text_encoder=str(tmp_path / "encoder"))
    make_pipeline(transformer, tiny_vae).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def samples(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.suffix in (".mp4", ".mkv", ".gif", ".png")]


def test_the_command_claims_as_many_videos_as_there_are(with_texts: str, run: Run, tmp_path: Path) -> None:
    out, long = tmp_path / "out", "a dog " * 13
    (tmp_path / "p.csv").write_text("file,caption\na.mp4,a game\na.mkv,boxing\n")
    prompts = ["a dog runs", "A dog runs!", f"{long} jumps", f"{long} sleeps", "a dog runs"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, stdout, stderr = run(
        *("sample", with_texts, "--out", out, "--seeds", "0,0", "--steps", "1", "--num-frames", "1"),
        *("--prompts", tmp_path / "p.csv", "--batch-size", "4", *words),
    )
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == f"{out}: 6 videos"
    assert len(samples(out)) == 6
    # The table of what was sampled reads as a table of captions.
    recorded = read_captions(out / "prompts.jsonl")
    assert recorded.keys() == {path.relative_to(out).as_posix() for path in samples(out)}
    assert recorded["a-dog-runs/0.mp4"] == ("a dog runs",)
    assert recorded["a.mkv-0.mp4"] == ("boxing",)


def test_a_later_call_with_another_prompt_samples_it(with_texts: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (first,) = generate(with_texts, out, prompts=["a dog runs"], seeds="0", **FAST)
    (second,) = generate(with_texts, out, prompts=["a dog, runs"], seeds="0", **FAST)
    assert first != second and first.exists() and second.exists()
    before = first.stat().st_mtime_ns
    again = generate(with_texts, out, prompts=["a dog runs"], seeds="0-1", **FAST)
    assert again[0] == first and first.stat().st_mtime_ns == before and again[1].exists()
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines() if line]
    assert [row["file"] for row in rows] == [path.relative_to(out).as_posix() for path in (first, second, again[1])]


def test_a_file_of_another_prompt_is_not_taken(with_texts: str, tmp_path: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "p.csv"
    table.write_text("file,caption\na.mp4,a game\n")
    (path,) = generate(with_texts, out, prompt_table=table, seeds="0", **FAST)
    before = path.read_bytes()
    table.write_text("file,caption\na.mp4,boxing\n")
    with pytest.raises(ValueError, match=r"a-0\.mp4: was made from the prompt 'a game', but 'boxing' was asked for"):
        generate(with_texts, out, prompt_table=table, seeds="0-1", **FAST)
    assert samples(out) == [path] and path.read_bytes() == before
    path.unlink()  # without the file, its record binds nobody
    (path,) = generate(with_texts, out, prompt_table=table, seeds="0", **FAST)
    generate(with_texts, out, prompt_table=table, seeds="0", **FAST)


def test_a_file_that_no_record_explains_is_not_taken(with_texts: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a-game").mkdir(parents=True)
    (out / "a-game" / "0.mp4").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"a-game/0\.mp4: is there, but no .*generation\.json says how it was made"):
        generate(with_texts, out, prompts=["a game"], seeds="0", **FAST)
    generate(with_texts, out, prompts=["boxing"], seeds="0", **FAST)
    with pytest.raises(ValueError, match=r"a-game/0\.mp4: is not recorded in prompts\.jsonl, but 'a game' was asked"):
        generate(with_texts, out, prompts=["a game"], seeds="0", **FAST)
    assert (out / "a-game" / "0.mp4").read_bytes() == b"somebody's"


def test_a_record_that_was_cut_off_is_completed(with_texts: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (path,) = generate(with_texts, out, prompts=["a game"], seeds="0", **FAST)
    record = out / "prompts.jsonl"
    path.unlink()  # the process was killed while it wrote the record, so before the file
    record.write_bytes(record.read_bytes()[:-9])
    for _ in range(2):
        generate(with_texts, out, prompts=["a game"], seeds="0", **FAST)
    assert json.loads(record.read_text().split("\n")[-2]) == {"file": "a-game/0.mp4", "caption": "a game"}


def test_classes_that_differ_in_case_have_their_own_files(
    tmp_path: Path, make_transformer: MakeTransformer, save_pipeline: SavePipeline
) -> None:
    model = save_pipeline(make_transformer(num_classes=3, class_names=["Dog", "dog", "cat"]))
    written = generate(model, tmp_path / "out", seeds="0", **FAST)
    assert len({folded(str(path)) for path in written}) == 3 == len(samples(tmp_path / "out"))
    assert written[2] == tmp_path / "out" / "cat" / "0.mp4"
    # A class has its folder whichever classes are asked for.
    assert generate(model, tmp_path / "out", classes="dog,dog,1", seeds="0", **FAST) == [written[1]]


def test_a_class_asked_for_twice_is_one_video(tmp_path: Path, pipeline: LavitaPipeline) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    assert len(generate(str(tmp_path / "model"), tmp_path / "out", classes="pong,2", seeds="0,0-1", **FAST)) == 2
