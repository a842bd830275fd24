"""The study of words: its world, its detector, its numbers, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_text import BERT, WORDS
from transformers import BertConfig, BertModel, BertTokenizer

from lavita.cli import app
from lavita.core.commands import CommandFailed
from lavita.core.seeds import numpy_generator
from lavita.data.captions import read_captions
from lavita.models.autoencoder import decode, encode, load_autoencoder
from lavita.models.packaged import autoencoder_source
from lavita.studies import ablation
from lavita.studies.ablation import StudyPlan
from lavita.studies.words import study
from lavita.studies.words.detector import read_scene
from lavita.studies.words.study import ARMS, GROUPS, SCORES, print_words, run_words, score, summarize_arms
from lavita.studies.words.world import (
    AREA,
    ATTRIBUTES,
    COLORS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    TEMPLATES,
    Scene,
    prompts,
    render,
    scenes,
    shape_mask,
)


def test_a_quarter_is_held_out_and_every_pair_is_trained_on() -> None:
    trained, held = scenes(held_out=False), scenes(held_out=True)
    assert len(trained) == 360 and len(held) == 120
    triples = [{scene[:3] for scene in group} for group in (trained, held)]
    assert not triples[0] & triples[1] and len(triples[1]) == 24
    for places in combinations(range(4), 2):
        pairs = [{tuple(scene[place] for place in places) for scene in group} for group in (trained, held)]
        assert pairs[1] <= pairs[0], places
    for scene in (*trained, *held):
        captions = {scene.caption(template) for template in range(len(TEMPLATES))}
        assert len(captions) == len(TEMPLATES)
        assert all(scene.color in text and scene.ground in text and scene.shape in text for text in captions)


def test_shapes_have_one_area_and_one_centre() -> None:
    for shape in SHAPES:
        mask = shape_mask(shape, 15.3, 16.8, samples=16)
        assert mask.sum() == pytest.approx(AREA, rel=0.02)
        points = np.arange(SIZE) + 0.5
        center = [mask.sum(1) @ points / mask.sum(), mask.sum(0) @ points / mask.sum()]
        np.testing.assert_allclose(center, [15.3, 16.8], atol=0.1)


def test_the_detector_reads_real_clips() -> None:
    """All of them, as they are; and decoded from latents, in which corners are rounder, nearly all."""
    everything = [*scenes(held_out=True), *scenes(held_out=False)]
    clips = [render(scene, numpy_generator(3, "test", index)) for index, scene in enumerate(everything)]
    assert clips[0].shape == (NUM_FRAMES, SIZE, SIZE, 3)
    assert [read_scene(clip) for clip in clips] == everything
    vae = load_autoencoder(autoencoder_source("builtin", SIZE))
    chosen = range(0, len(everything), 24)
    decoded = decode(vae, torch.stack([encode(vae, clips[index])[0] for index in chosen]))
    right = [read_scene(clip) == everything[index] for clip, index in zip(decoded, chosen, strict=True)]
    assert np.mean(right) >= 0.97


def test_the_detector_sees_what_is_missing() -> None:
    ground = np.full((NUM_FRAMES, SIZE, SIZE, 3), COLORS["blue"], np.uint8)
    assert read_scene(ground) == Scene("none", "none", "none", "blue")
    moving = render(Scene("red", "circle", "up", "blue"), numpy_generator(0))
    still = moving[:1].repeat(NUM_FRAMES, 0)
    assert read_scene(still) == Scene("red", "circle", "none", "blue")
    assert read_scene(moving[::-1]) == Scene("red", "circle", "down", "blue")
    noise = np.random.default_rng(0).integers(-20, 21, moving.shape)
    assert read_scene((moving + noise).clip(0, 255).astype(np.uint8)) == Scene("red", "circle", "up", "blue")


def test_scores_count_each_attribute() -> None:
    asked = prompts(4)
    assert sum(name.startswith("seen/") for name in asked) == 4 and len(asked) == 124
    clips = {name: render(scene, numpy_generator(0)) for name, (scene, _) in asked.items()}
    perfect = score(asked, clips)
    assert all(perfect[group][name] == 1.0 for group in GROUPS for name in SCORES)
    wrong = next(name for name in asked if name.startswith("seen/"))
    scene = asked[wrong][0]
    other = next(color for color in COLORS if color not in (scene.color, scene.ground))
    clips[wrong] = render(scene._replace(color=other), numpy_generator(0))
    found = score(asked, clips)
    assert found["held-out"] == perfect["held-out"]
    assert found["seen"] == {**dict.fromkeys(ATTRIBUTES, 1.0), "color": 0.75, "all": 0.75}
    del clips[wrong]
    with pytest.raises(ValueError, match=f"the sample {wrong} is missing"):
        score(asked, clips)


def test_differences_are_paired() -> None:
    def training(arm: str, value: float) -> dict[str, Any]:
        return {"arm": arm, "accuracy": {group: dict.fromkeys(SCORES, value) for group in GROUPS}}

    rows = [training("pooled", 0.1), training("pooled", 0.5), training("tokens", 0.3), training("tokens", 0.8)]
    found = summarize_arms(rows)["seen"]["shape"]
    assert found["pooled"] == pytest.approx({"mean": 0.3, "sd": 0.4 / 2**0.5})
    assert found["difference"] == pytest.approx({"mean": 0.25, "sd": 0.1 / 2**0.5})
    console = Console(file=StringIO(), width=80)
    ceiling = {kind: rows[0]["accuracy"] for kind in ("real", "reconstructed")}
    print_words({"trainings": rows, "summary": summarize_arms(rows), "ceiling": ceiling}, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "25.0 +- 7.1" in printed and "held-out" in printed and "direction" in printed, "nothing is cut"


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Few clips and prompts; returns a tiny text encoder that knows the words."""
    some = {held_out: scenes(held_out)[:: 60 if held_out else 90] for held_out in (False, True)}
    monkeypatch.setattr("lavita.studies.words.world.scenes", lambda held_out: some[held_out])
    monkeypatch.setattr(study, "NUM_SEEN", 2)
    texts = [
        template.format(direction="to the left upwards downwards right", **dict.fromkeys(ATTRIBUTES[:2], ""), ground="")
        for template in TEMPLATES
    ]
    words = sorted(
        {word for text in texts for word in text.replace(",", " ,").split()} | {*COLORS, *SHAPES, *DIRECTIONS}
    )
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*WORDS[:5], *words]), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**BERT.to_diff_dict(), "vocab_size": 5 + len(words)}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_stopped_study_goes_on_to_the_same_results(
    small_world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def plan(name: str) -> StudyPlan:
        fields = ("model.preset=tiny/4", "train.batch_size=2", "train.warmup_steps=0", "train.decay_steps=0")
        return StudyPlan(
            tmp_path / name,
            "words",
            (*fields, f"model.text_encoder={small_world}"),
            (2,),
            sample_steps=1,
            train_seeds=(0, 1),
        )

    def counting(arguments: list[str]) -> None:  # in this process: two dozen starts would take minutes
        ran.append(arguments[0])
        if len(ran) == stop:
            raise CommandFailed(143)
        app(arguments, standalone_mode=False)

    stop = 5
    monkeypatch.setattr(ablation, "run_command", counting)
    monkeypatch.setattr(study, "run_command", counting)
    with pytest.raises(CommandFailed):
        run_words(plan("study"))
    assert ran == ["encode", "train", "sample", "train", "sample"]
    results = run_words(plan("study"))
    assert ran[5:] == ["sample", *("train", "sample") * 2], "what was finished is kept"
    count = len(ran)
    assert run_words(plan("study")) == results and len(ran) == count
    stop = -1
    assert run_words(plan("again")) == results, "uninterrupted"
    assert [row["name"] for row in results["trainings"]] == [f"{arm}/seed-{seed}" for arm in ARMS for seed in (0, 1)]
    assert json.loads((tmp_path / "study" / "results-words.json").read_text()) == results
    assert (tmp_path / "study" / "words.png").exists()
    captions = read_captions(tmp_path / "study" / "clips" / "captions.csv")
    assert all(len(texts) == 2 for texts in captions.values())
    first = {arm: (tmp_path / "study" / arm / "seed-0" / "train" / "metrics.jsonl").read_text() for arm in ARMS}
    losses = [json.loads(text.splitlines()[0])["loss"] for text in first.values()]
    assert losses[0] == losses[1], "both arms begin with the same prediction of the same clips"
    monkeypatch.setattr(study, "CLIPS_PER_SCENE", 3)
    with pytest.raises(ValueError, match="holds the clips of"):
        run_words(plan("study"))


def test_what_the_study_decides_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.text_tokens is set, but is what the study words compares"):
        run_words(StudyPlan(tmp_path / "study", "words", ("model.text_tokens=8",)))
