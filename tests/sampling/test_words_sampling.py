"""Sampling by the tokens of prompts: prompts alone and together, guidance, caches, int8, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from sampling.sampled import relative, seeded
from tiny_data import write_videos
from tiny_text import BERT, save_text_encoder
from transformers import BertModel

from lavita.core.names import CacheName
from lavita.models.autoencoder import AutoencoderKL
from lavita.sampling.int8 import Int8Linear, quantize_int8
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.video.reading import read_clip

PROMPTS = ["a game of boxing", "freeway", "a game of a game of freeway"]


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_text_encoder(BertModel(BERT), tmp_path / "text")
    return str(tmp_path / "text")


@pytest.fixture
def with_words(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, encoder: str) -> LavitaPipeline:
    """A model that attends to 8 tokens of a text."""
    return make_pipeline(make_transformer(text_dim=16, text_tokens=8, text_encoder=encoder), tiny_vae)


def make(pipeline: LavitaPipeline, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "precision": "fp32", **options}
    frames = pipeline(**given, output_type="latent").frames
    assert isinstance(frames, torch.Tensor)
    return frames


def test_a_prompts_video_does_not_depend_on_the_others(with_words: LavitaPipeline) -> None:
    together = make(with_words, prompt=PROMPTS, generator=seeded(0, 1, 2))
    for index, prompt in enumerate(PROMPTS):
        alone = make(with_words, prompt=prompt, generator=seeded(index))
        assert relative(alone[0], together[index]) < 1e-5
    others = make(with_words, prompt=["boxing", PROMPTS[1], "a"], generator=seeded(5, 1, 6))
    assert torch.equal(others[1], together[1]), "the same place in a batch of as many: to the bit"
    assert relative(others[:1], together[:1]) > 0.01


def test_tokens_count_beside_the_pooled_embedding(with_words: LavitaPipeline) -> None:
    embeds = with_words.encode_text(PROMPTS[:2])
    assert embeds.shape == (2, 9, 16)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": with_words.encode_text(["", ""])}
    found = make(with_words, **given, generator=seeded(0, 1))
    assert torch.equal(found, make(with_words, prompt=PROMPTS[:2], generator=seeded(0, 1))), "of the empty text"
    other = embeds.clone()
    other[:, 2, :8] += 1.0
    moved = make(with_words, **{**given, "prompt_embeds": other}, generator=seeded(0, 1))
    assert relative(moved, found) > 1e-3
    steered = make(with_words, prompt=PROMPTS[:2], negative_prompt="boxing", generator=seeded(0, 1))
    assert relative(steered, found) > 1e-3


def test_embeddings_that_do_not_fit_are_refused(with_words: LavitaPipeline) -> None:
    embeds = with_words.encode_text(PROMPTS[:2])
    for wrong, message in (
        (embeds[:, 0], r"prompt_embeds have shape \(2, 16\), but must have \(2, 9, 16\)"),
        (embeds[:, :5], r"prompt_embeds have shape \(2, 5, 16\)"),
        (torch.cat([embeds[:, :1], torch.zeros(2, 8, 16)], dim=1), "have a text without a token"),
    ):
        with pytest.raises(ValueError, match=message):
            make(with_words, prompt_embeds=wrong)


@pytest.mark.parametrize("cache", get_args(CacheName))
@pytest.mark.parametrize("variant", [2, 3])
def test_step_caches_take_tokens(
    variant: int, cache: CacheName, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL, encoder: str
) -> None:
    model = make_transformer(variant=variant, text_dim=16, text_tokens=8, text_encoder=encoder)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(0.3)
    pipeline = make_pipeline(model, tiny_vae)
    given: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 16}
    exact = make(pipeline, **given, generator=seeded(0, 1, 2))
    cached = make(pipeline, **given, generator=seeded(0, 1, 2), cache=cache)
    assert 0 < relative(cached, exact) < 0.5
    alone = make(pipeline, **{**given, "prompt": PROMPTS[2]}, generator=seeded(2), cache=cache)
    assert relative(alone[0], cached[2]) < 1e-4


def test_a_long_video_from_given_frames_by_words(
    make_transformer: MakeTransformer, save_pipeline: SavePipeline, encoder: str, run: Run, tmp_path: Path
) -> None:
    fields = {"num_frames": 4, "given_frames": ["start"], "text_dim": 16, "text_tokens": 8, "text_encoder": encoder}
    folder = save_pipeline(make_transformer(**fields))
    write_videos(tmp_path / "clips", ["0.mp4"], 9)
    videos: list[npt.NDArray[np.uint8]] = []
    for prompt in PROMPTS[:2]:
        code, _, errors = run(
            *("sample", folder, "--prompt", prompt, "--out", f"out-{len(videos)}", "--seeds", "0", "--steps", 2),
            *("--video", "clips/0.mp4", "--keep-frames", 2, "--length", 10, "--overlap", 2),
        )
        assert code == 0, errors
        (file,) = Path(f"out-{len(videos)}").rglob("0.mp4")
        videos.append(read_clip(file, 0, 10, 1))
    assert np.array_equal(videos[0][:2], videos[1][:2]) and not np.array_equal(videos[0][2:], videos[1][2:])


def test_int8_takes_the_attention_to_texts(with_words: LavitaPipeline) -> None:
    exact = make(with_words, prompt=PROMPTS, generator=seeded(0, 1, 2))
    quantize_int8(with_words.transformer)
    layers = dict(with_words.transformer.named_modules())
    assert all(isinstance(layers[f"blocks.0.cross_attn.{name}"], Int8Linear) for name in ("q", "kv", "proj"))
    assert relative(make(with_words, prompt=PROMPTS, generator=seeded(0, 1, 2)), exact) < 0.1


def test_the_commands_sample_and_evaluate_prompts(
    with_words: LavitaPipeline, save_pipeline: SavePipeline, run: Run, tmp_path: Path
) -> None:
    folder = save_pipeline(with_words.transformer)
    code, _, errors = run("sample", folder, "--prompt", PROMPTS[0], "--out", "one", "--seeds", "0-1", "--steps", 2)
    assert code == 0, errors
    table = tmp_path / "prompts.csv"
    table.write_text(
        "file,caption\n" + "".join(f"{name}.mp4,{text}\n" for name, text in zip("xyz", PROMPTS, strict=True))
    )
    code, _, errors = run("sample", folder, "--prompts", table, "--out", "all", "--seeds", "0-1", "--steps", 2)
    assert code == 0, errors
    assert sorted(file.name for file in Path("all").glob("*.mp4")) == [f"{x}-{n}.mp4" for x in "xyz" for n in (0, 1)]
    assert Path("one/a-game-of-boxing/1.mp4").read_bytes() == Path("all/x-1.mp4").read_bytes(), (
        "a prompt's video is always the same"
    )
    records = [json.loads(line) for line in Path("all/prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["caption"] for record in records} == set(PROMPTS)
    write_videos(tmp_path / "clips", [f"{index}.mp4" for index in range(4)], 9)
    code, _, errors = run(
        *("evaluate", "--real", "clips", "--generated", folder, "--prompts", table, "--metrics", "kernel-image"),
        *("--steps", "1", "image_extractor=efficientnet_lite0", "num_real_clips=4", "num_generated_clips=3"),
        *("floor=false", "frame_interval=1"),
    )
    assert code == 0, errors
