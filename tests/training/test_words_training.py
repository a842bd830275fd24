"""Training with the tokens of captions: what batches hold, resuming, several processes, fine-tuning into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from run_folders import last_checkpoint, lines_of
from tiny_data import write_frames, write_videos
from tiny_text import BERT, save_text_encoder
from training.parallel_runs import assert_alike, torchrun
from transformers import BertModel

from lavita.core.config import ConfigError
from lavita.data.text_embeddings import TokenTable, embed_texts
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.text_encoder import load_text_encoder
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.training.batches import BatchMaker
from lavita.training.config import RunConfig
from lavita.training.train import train

WordRun = Callable[..., RunConfig]


@pytest.fixture
def word_run(make_config: MakeConfig, tmp_path: Path) -> WordRun:
    """Configurations of runs with captions of videos, images and held-out videos, and a text encoder."""
    torch.manual_seed(0)
    save_text_encoder(BertModel(BERT), tmp_path / "text")
    write_frames(tmp_path / "images", ["x"], 2)
    write_videos(tmp_path / "held", ["a/7.mp4", "b/8.mp4"], 12)
    tables = {
        "captions": "a/0.mp4,a game of boxing\na/1.mp4,freeway\nb/2.mp4,a game of a game of freeway\n",
        "image_captions": "x/000000.jpg,boxing boxing\nx/000001.jpg,a freeway of boxing\n",
        "validation_captions": "a/7.mp4,a boxing game\nb/8.mp4,boxing\n",
    }
    for name, rows in tables.items():
        (tmp_path / f"{name}.csv").write_text(f"file,caption\n{rows}")

    def make(name: str, *overrides: str, words: bool = True) -> RunConfig:
        return make_config(
            name,
            "data.class_folders=false",
            *(f"data.{table}={tmp_path / table}.csv" for table in tables),
            f"data.images={tmp_path / 'images'}",
            "data.num_images=2",
            f"data.validation={tmp_path / 'held'}",
            "train.validate_every=2",
            "train.validation_clips=2",
            f"model.text_encoder={tmp_path / 'text'}",
            *(["model.text_tokens=6"] if words else []),
            *overrides,
        )

    return make


def losses(config: RunConfig) -> list[Any]:
    return [
        *(line["loss"] for line in lines_of(config)),
        *(line["loss"] for line in lines_of(config, "validation.jsonl")),
    ]


def test_a_batch_holds_the_tokens_of_each_caption(word_run: WordRun, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Those of the clip's and of each image's own, or of the empty text."""
    config = word_run("run")
    source = config.model.text_encoder
    assert source is not None
    batches = BatchMaker(config.data, config.train, tiny_vae, config.model.class_dropout)
    batches.embed_captions(lambda texts: embed_texts(texts, source, tmp_path, num_tokens=6))
    assert isinstance(batches.text_table, TokenTable) and batches.text_table.shape == (6, 7, 16)
    encoder, captions = load_text_encoder(source), batches.captions
    assert captions is not None
    dropped = 0
    for step in range(6):
        batch = batches.make(step)
        assert batch.text_embeds is not None and batch.text_embeds.shape == (4, 3, 7, 16)
        part = batches.make(step, range(2, 4)).text_embeds
        assert part is not None and torch.equal(part, batch.text_embeds[2:])
        for index, draw in enumerate(batch.draws):
            text = captions.draw(batches.source.catalog.root, draw.video.name, step, index)
            expected = encoder.encode([captions.texts[text], "a game of a game of freeway", ""], 6)
            found = batch.text_embeds[index, 0]
            assert any(torch.equal(found, expected[row]) for row in (0, 2)), "the caption, or the empty text"
            dropped += torch.equal(found, expected[2])
    assert 0 < dropped < 24
    examples = batches.example_embeds(2)
    assert examples is not None and examples.shape == (2, 7, 16)


def test_a_stopped_run_goes_on_to_the_bit(word_run: WordRun) -> None:
    whole = word_run("whole", "train.steps=4", "train.sample_every=4", "train.num_samples=2")
    train(whole)
    train(word_run("parts", "train.steps=2", "train.num_samples=2"))
    parts = word_run("parts", "train.steps=4", "train.sample_every=4", "train.num_samples=2")
    train(parts)
    assert losses(parts) == losses(whole)
    expected, found = last_checkpoint(whole).read_all(), last_checkpoint(parts).read_all()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    model = LavitaTransformer3DModel.from_pretrained(whole.run_dir / "pipeline" / "transformer")
    assert model.config["text_tokens"] == 6 and model.config["text_dim"] == 16
    assert any(".cross_attn.proj.weight" in name and tensor.any() for name, tensor in model.state_dict().items())


def test_accumulated_and_checkpointed_batches_are_the_same(word_run: WordRun) -> None:
    plain, parts = word_run("plain"), word_run("parts", "train.accumulation=2", "train.gradient_checkpointing=true")
    train(plain)
    train(parts)
    assert losses(parts) == pytest.approx(losses(plain), rel=1e-4)


def test_a_pooled_model_goes_on_as_it_is(word_run: WordRun) -> None:
    """Fine-tuned with tokens, it predicts at first what it did: the first losses are equal to the bit."""
    pooled = word_run("pooled", "train.learning_rate=1e-2", words=False)
    train(pooled)
    source = f"train.init_from={pooled.run_dir}"
    runs = [word_run("same", source, words=False), word_run("words", source)]
    for config in runs:
        train(config)
    same, words = map(losses, runs)
    assert words[0] == same[0] and words[1:4] != same[1:4]
    report = (runs[1].run_dir / "init.txt").read_text()
    assert "attention to texts, which the source does not have; it adds nothing at first" in report
    again = word_run("again", f"train.init_from={runs[1].run_dir}", "train.lora_rank=2", "train.steps=1")
    train(again)
    names = last_checkpoint(again).read_all()
    for layer in ("q", "kv", "proj"):
        assert any(f"blocks.0.cross_attn.{layer}.lora_A" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_like_one(parallel: str, word_run: WordRun) -> None:
    one, two = word_run("one"), word_run("two", f"train.parallel={parallel}")
    train(one)
    torchrun(2, two)
    assert_alike(two, one)


def test_tokens_need_captions(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.text_tokens is 6, but has no effect without data\.captions"):
        make_config("run", "model.text_tokens=6")
    with pytest.raises(ConfigError, match=r"model\.text_tokens"):
        make_config("run", "model.text_tokens=2")
