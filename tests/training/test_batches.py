"""Batches: latents, labels, captions and images, and how conditions are dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from tiny_data import paint, write_videos

from lavita.core.config import ConfigError
from lavita.core.processes import Processes
from lavita.data.captions import CaptionSampler, read_captions
from lavita.data.catalog import scan
from lavita.data.clips import read_pixels
from lavita.data.latent_cache.encode import encode_dataset
from lavita.models.autoencoder import AutoencoderKL, encode
from lavita.training.batches import BatchMaker

MakeBatches = Callable[..., BatchMaker]


@pytest.fixture
def make_batches(make_config: MakeConfig, tiny_vae: AutoencoderKL) -> MakeBatches:
    """Batches of three tiny videos in two classes."""

    def make(*overrides: str) -> BatchMaker:
        config = make_config("run", *overrides)
        return BatchMaker(config.data, config.train, tiny_vae, config.model.class_dropout)

    return make


def write_images(root: Path, names: tuple[str, ...] = ("a/0.png", "b/1.png", "b/2.png")) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(1, 100 + seed)[0]).save(root / name)
    return root


def standardised(batches: BatchMaker, vae: AutoencoderKL, step: int) -> torch.Tensor:
    """(z - mean) / std for the clips that the samplers draw for the step, (B, F + I, C, h, w)."""
    batch, count = batches.make(step), batches.num_images
    rows = []
    for index in range(batches.batch_size):
        pixels = [read_pixels(batches.sampler.draw(step, index), 2, 2, 16)]
        for image in range(count):
            draw = batches.image_sampler.draw(step, index * count + image)
            pixels.append(read_pixels(draw, 1, 1, 16))
        mean, std = encode(vae, np.concatenate(pixels), "fp32")
        rows.append((batch.latents[index] - mean) / std)
    return torch.stack(rows)


@pytest.mark.parametrize("num_images", [0, 2])
def test_latents_are_samples_of_the_posterior(
    num_images: int, make_batches: MakeBatches, tiny_vae: AutoencoderKL
) -> None:
    """z = mean + std * noise, with the mean and std of the drawn clip and images, and different noise each time."""
    batches = make_batches(f"data.num_images={num_images}")
    batch = batches.make(5)
    assert batch.latents.shape == batch.noise.shape == (4, 2 + num_images, 4, 8, 8)
    values = standardised(batches, tiny_vae, 5)
    for part in (values[:, :2], values[:, 2:])[: 2 if num_images else 1]:
        assert abs(part.mean().item()) < 0.1
        assert abs(part.std().item() - 1) < 0.1
    assert not torch.allclose(values, batch.noise, atol=0.1)
    again = batches.make(5)
    assert torch.equal(again.latents, batch.latents) and torch.equal(again.noise, batch.noise)
    assert not torch.equal(batches.make(6).noise, batch.noise)


@pytest.mark.parametrize("captions", [False, True])
def test_joint_training_sees_the_clips_of_training_on_videos(
    captions: bool, make_batches: MakeBatches, tmp_path: Path
) -> None:
    """The same latents, noise, timesteps and conditions: what follows a clip changes nothing of it."""
    overrides = ["model.class_dropout=0.5", "train.batch_size=16"]
    if captions:
        rows = [f"{name},{number}{name}" for name in ("a/0.mp4", "a/1.mp4", "b/2.mp4") for number in range(9)]
        table = write_table(tmp_path / "t.csv", "file,caption", *rows)
        overrides += [f"data.captions={table}", "data.class_folders=false"]
    video, *joint = (make_batches(*overrides, f"data.num_images={count}") for count in (0, 1, 3))
    for batches in (video, *joint):
        if captions:
            batches.embed_captions(lambda given: torch.arange(float(len(given)))[:, None])
    alone = video.make(2)
    for batches in joint:
        together = batches.make(2)
        assert torch.equal(together.timesteps, alone.timesteps)
        assert torch.equal(together.latents[:, :2], alone.latents) and torch.equal(together.noise[:, :2], alone.noise)
        assert not torch.equal(together.noise[:, 2], alone.noise[:, 0])
        if captions:
            assert together.text_embeds is not None and alone.text_embeds is not None
            assert torch.equal(together.text_embeds[:, 0], alone.text_embeds)
            assert len(alone.text_embeds.unique()) > 5
        else:
            assert together.class_labels is not None and alone.class_labels is not None
            assert torch.equal(together.class_labels[:, 0], alone.class_labels)
            assert (alone.class_labels == 2).any() and (alone.class_labels != 2).any()


def test_joint_training_draws_the_same_clips(make_batches: MakeBatches) -> None:
    plain, joint = make_batches(), make_batches("data.num_images=3")
    assert [plain.sampler.draw(7, i) for i in range(4)] == [joint.sampler.draw(7, i) for i in range(4)]
    images = [joint.image_sampler.draw(step, i) for step in range(20) for i in range(12)]
    assert {(draw.video.name, draw.start) for draw in images} == {
        (name, start) for name in ("a/0.mp4", "a/1.mp4", "b/2.mp4") for start in range(10)
    }, "every frame of every video"


@pytest.mark.parametrize("num_images", [0, 3])
def test_a_share_of_the_labels_is_dropped(
    num_images: int, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_batches("train.batch_size=16", f"data.num_images={num_images}")
    blank = torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(batches.source, "read_many", lambda draws, frames, _: [(blank[:frames],) * 2] * len(draws))
    dropped = total = 0
    timesteps = []
    for step in range(60):
        batch = batches.make(step)
        assert batch.class_labels is not None and batch.text_embeds is None
        truth = torch.tensor([batches.sampler.draw(step, index).video.label for index in range(16)])
        if num_images:
            images = [batches.image_sampler.draw(step, index).video.label for index in range(16 * num_images)]
            truth = torch.cat([truth[:, None], torch.tensor(images).view(16, num_images)], dim=1)
        null = batch.class_labels == 2
        assert torch.equal(batch.class_labels[~null], truth[~null])
        dropped, total = dropped + int(null.sum()), total + null.numel()
        timesteps += batch.timesteps.tolist()
    assert stats.binomtest(dropped, total, 0.3).pvalue > 1e-3
    assert stats.kstest(timesteps, stats.randint(0, 1000).cdf).pvalue > 1e-3


def test_labels_of_a_clip_and_its_images_are_dropped_independently(
    make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_batches("train.batch_size=16", "data.num_images=2")
    blank = torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(batches.source, "read_many", lambda draws, frames, _: [(blank[:frames],) * 2] * len(draws))
    labels = [batches.make(step).class_labels for step in range(60)]
    dropped = np.concatenate([row.eq(2).numpy() for row in labels if row is not None])  # (960, 3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        found = np.histogram2d(dropped[:, one], dropped[:, other], bins=2)[0]
        assert stats.chi2_contingency(found).pvalue > 1e-3, (one, other)


@pytest.mark.parametrize("condition", ["class_labels", "text_embeds"])
def test_a_share_of_a_batch_is_that_part_of_the_whole(
    condition: str, make_batches: MakeBatches, tmp_path: Path
) -> None:
    """Clips, images, noise, timesteps and conditions, whichever of the processes makes them."""
    overrides = ["data.num_images=2", "train.batch_size=6"]
    if condition == "text_embeds":
        lines = [f"{name},{name} {number}" for name in ("a/0.mp4", "a/1.mp4", "b/2.mp4") for number in range(5)]
        table = write_table(tmp_path / "t.csv", "file,caption", *lines)
        overrides += [f"data.captions={table}", "data.class_folders=false"]
    batches = make_batches(*overrides)
    if condition == "text_embeds":
        batches.embed_captions(lambda given: torch.arange(float(len(given)))[:, None].repeat(1, 3))
    whole = batches.make(7)
    cpu = torch.device("cpu")
    shares = {
        range(2 * rank, 2 * rank + 2): next(batches.make_all(range(7, 8), Processes(rank, 3), cpu)) for rank in range(3)
    }
    shares[range(5, 6)] = batches.make(7, range(5, 6))
    for indices, share in shares.items():
        for name in ("latents", "noise", "timesteps", condition):
            part = getattr(whole, name)[indices.start : indices.stop]
            assert torch.equal(getattr(share, name), part), (name, indices)
        assert share.draws == whole.draws[indices.start : indices.stop]


def test_images_of_their_own(make_batches: MakeBatches, tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    """Image files and a cache of them give the same latents, and labels among the classes of the videos."""
    root = write_images(tmp_path / "images", ("b/1.png", "b/2.png"))
    files = make_batches("data.num_images=2", f"data.images={root}", "model.class_dropout=0")
    encode_dataset(scan(root, images=True), tmp_path / "cache", tiny_vae, 16, True, "fp32")
    cached = make_batches("data.num_images=2", f"data.images={tmp_path / 'cache'}", "model.class_dropout=0")
    for step in range(3):
        one, other = files.make(step), cached.make(step)
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=2e-3)
        assert one.class_labels is not None and other.class_labels is not None
        assert torch.equal(one.class_labels, other.class_labels)
        assert one.class_labels[:, 1:].eq(1).all(), "b is the videos' second class, though the images' only one"
    assert abs(standardised(files, tiny_vae, 0)[:, 2:].std().item() - 1) < 0.1


def test_images_of_an_unknown_class_are_refused(make_batches: MakeBatches, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", ("zebra/1.png",))
    with pytest.raises(ConfigError, match="has class 'zebra', which the videos do not have"):
        make_batches("data.num_images=2", f"data.images={root}")


# --- captions


def write_table(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_tables_are_read_alike(tmp_path: Path) -> None:
    csv = write_table(tmp_path / "a.csv", "file,caption", 'a/0.mp4,"a dog, running"', "a/0.mp4,a  dog", "b.mp4,cat")
    jsonl = write_table(
        tmp_path / "a.jsonl",
        '{"file": "a/0.mp4", "caption": "a dog, running", "more": 1}',
        "",
        '{"file": "a/0.mp4", "caption": "a dog"}',
        '{"file": "b.mp4", "caption": "cat"}',
    )
    expected = {"a/0.mp4": ("a dog, running", "a dog"), "b.mp4": ("cat",)}
    assert read_captions(csv) == read_captions(jsonl) == expected


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", ["file,label", "a,b"], "has no column of captions, which is one of caption, .*; found: file, label"),
        ("a.csv", ["file,caption", "a,"], "line 2 has no caption"),
        ("a.csv", ["file,caption"], "holds no captions"),
        ("a.jsonl", ["{"], "line 1 is not JSON"),
        ("a.jsonl", ["[1]"], "line 1 is not an object"),
        ("a.txt", ["x"], r"ends in \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_bad_table_is_named(name: str, lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_captions(write_table(tmp_path / name, *lines))
    with pytest.raises(ValueError, match=r"missing\.csv: cannot be read"):
        read_captions(tmp_path / "missing.csv")


def test_every_caption_of_a_file_is_drawn(tmp_path: Path) -> None:
    catalog = scan(write_videos(tmp_path / "videos", ["0.mp4", "1.mp4"]))
    sampler = CaptionSampler([({"0.mp4": ("x", "y"), "1.mp4": ("y", "z")}, catalog)], seed=0)
    assert sampler.texts == ["", "x", "y", "z"]
    rows = [sampler.draw(catalog.root, "1.mp4", step, 0) for step in range(200)]
    assert set(rows) == {2, 3}
    assert stats.binomtest(rows.count(2), 200).pvalue > 1e-3
    assert rows == [sampler.draw(catalog.root, "1.mp4", step, 0) for step in range(200)]
    rows = [sampler.draw(catalog.root, "1.mp4", 0, index) for index in range(200)]
    assert set(rows) == {2, 3} and stats.binomtest(rows.count(2), 200).pvalue > 1e-3, "each clip of a step draws anew"


@pytest.mark.parametrize("num_images", [0, 2])
def test_captions_become_embeddings(
    num_images: int, make_batches: MakeBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a/0.mp4", "a/1.mp4", "b/2.mp4")
    table = write_table(tmp_path / "t.csv", "file,caption", *(f"{name},{name}!" for name in names))
    overrides = [f"data.captions={table}", "data.class_folders=false", "train.batch_size=16"]
    if num_images:
        images = write_images(tmp_path / "images", ("0.png", "1.png"))
        own = write_table(tmp_path / "i.csv", "file,caption", "0.png,zero", "1.png,one")
        overrides += [f"data.num_images={num_images}", f"data.images={images}", f"data.image_captions={own}"]
    batches = make_batches(*overrides)
    assert batches.captions is not None
    texts = batches.captions.texts
    blank = torch.zeros(2, 4, 8, 8)  # what the captions go with does not matter
    for source in {batches.source, batches.image_source}:
        monkeypatch.setattr(source, "read_many", lambda draws, frames, _: [(blank[:frames],) * 2] * len(draws))
    batches.embed_captions(lambda given: torch.arange(float(len(given)))[:, None].repeat(1, 3))
    dropped = total = 0
    for step in range(20):
        batch = batches.make(step)
        assert batch.class_labels is None and batch.text_embeds is not None
        assert batch.text_embeds.shape == ((16, 1 + num_images, 3) if num_images else (16, 3))
        rows = batch.text_embeds[..., 0].long().view(16, -1)
        for index in range(16):
            names_drawn = [f"{batches.sampler.draw(step, index).video.name}!"]
            for image in range(num_images):
                name = batches.image_sampler.draw(step, index * num_images + image).video.name
                names_drawn.append({"0.png": "zero", "1.png": "one"}[name])
            for row, expected in zip(rows[index].tolist(), names_drawn, strict=True):
                assert row == 0 or texts[row] == expected
        dropped, total = dropped + int((rows == 0).sum()), total + rows.numel()
    assert stats.binomtest(dropped, total, 0.3).pvalue > 1e-3
    examples = batches.example_embeds(3)
    assert examples is not None and examples.shape == (3, 3) and examples[:, 0].min() >= 1


def test_workers_decode_the_videos(make_batches: MakeBatches) -> None:
    """Any number of them gives the same batch, to the bit."""
    one, three = make_batches("data.workers=1"), make_batches("data.workers=3")
    pools = [source.source.workers for source in (one, three)]  # type: ignore[attr-defined]
    assert pools == [1, 3]
    assert torch.equal(one.make(0).latents, three.make(0).latents)
