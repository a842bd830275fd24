"""Videos that are given frames: what comes back, what it depends on, guidance, refusals, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MakeTransformer, Run
from PIL import Image
from sampling.sampled import largest_error, seeded

from lavita.models.autoencoder import AutoencoderKL, decode, encode
from lavita.models.given_frames import KINDS
from lavita.sampling.pipeline import LavitaPipeline, make_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.sampling.schedulers import DIFFUSION_SAMPLERS, FLOW_SAMPLERS, make_scheduler
from lavita.video.reading import read_clip
from lavita.video.writing import write_video

FRAMES = 4
FLOW: dict[str, Any] = {"prediction_type": "flow", "learn_sigma": False}


@pytest.fixture
def filler(make_transformer: MakeTransformer, tiny_vae: AutoencoderKL) -> LavitaPipeline:
    """A pipeline with classes that was trained with all kinds of given frames."""
    model = make_transformer(
        num_frames=FRAMES, num_classes=2, class_names=["a", "b"], given_frames=list(KINDS), frame_interval=2
    )
    return make_pipeline(model, tiny_vae)


def pictures(number: int, seed: int = 0, side: int = 16) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


def latents_of(pipeline: LavitaPipeline, labels: list[Any] | None, *seeds: int, **options: Any) -> torch.Tensor:
    frames = pipeline(
        labels, num_inference_steps=3, generator=seeded(*seeds), output_type="latent", precision="fp32", **options
    ).frames
    assert isinstance(frames, torch.Tensor)
    return frames


def test_given_frames_come_back_and_the_others_depend_on_them(filler: LavitaPipeline) -> None:
    image, other = pictures(2)
    plain = latents_of(filler, ["a"], 1)
    found = latents_of(filler, ["a"], 1, image=image)
    mean = encode(filler.vae, image[None], "fp32")[0]
    assert torch.equal(found[0, :1], mean)
    assert (found[0, 1:] - plain[0, 1:]).abs().max() > 1e-3
    assert (found[0, 1:] - latents_of(filler, ["a"], 1, image=other)[0, 1:]).abs().max() > 1e-3
    assert torch.equal(plain, latents_of(filler, ["a"], 1)), "nothing stays behind"


def test_a_video_does_not_depend_on_its_batch(filler: LavitaPipeline) -> None:
    one, two = pictures(2)
    together = latents_of(filler, ["a", "b"], 1, 2, given=[{0: one}, {0: two}])
    assert largest_error(latents_of(filler, ["b"], 2, image=two), together[1:]) < 1e-4
    shared = latents_of(filler, ["a", "b"], 1, 2, image=one)
    assert largest_error(shared[:1], together[:1]) < 1e-4


@pytest.mark.parametrize("sampler", sorted({*DIFFUSION_SAMPLERS, *FLOW_SAMPLERS}))
@pytest.mark.parametrize("places", [[0], [0, 1, 2], [3], [0, 3], [0, 2]])
def test_every_kind_with_every_sampler(
    sampler: str, places: list[int], filler: LavitaPipeline, make_transformer: MakeTransformer, tiny_vae: AutoencoderKL
) -> None:
    if sampler in DIFFUSION_SAMPLERS:
        filler.scheduler = make_scheduler(sampler)
        pipeline, labels = filler, ["a"]
    else:
        model = make_transformer(num_frames=FRAMES, given_frames=list(KINDS), **FLOW)
        pipeline, labels = make_pipeline(model, tiny_vae), None
        pipeline.use_sampler(sampler)
    given = dict(zip(places, pictures(len(places)), strict=True))
    found = latents_of(pipeline, labels, 1, given=given, guidance_scale=1.5, guide_given=True)
    means = encode(pipeline.vae, np.stack(list(given.values())), "fp32")[0]
    assert torch.equal(found[0, places], means)
    assert torch.isfinite(found).all()


def test_if_all_frames_are_given_they_come_back(filler: LavitaPipeline) -> None:
    frames = pictures(FRAMES)
    found = latents_of(filler, ["a"], 1, video=frames)
    assert torch.equal(found[0], encode(filler.vae, frames, "fp32")[0])
    exact = filler(["a"], num_inference_steps=2, generator=seeded(1), video=frames, exact=True).frames
    assert np.array_equal(exact[0], frames)


def test_exact_pastes_the_pixels_of_given_frames_only(filler: LavitaPipeline) -> None:
    image, last = pictures(2)
    options: dict[str, Any] = {"num_inference_steps": 2, "image": image, "last_image": last}
    decoded = filler(["a"], generator=seeded(1), **options).frames
    exact = filler(["a"], generator=seeded(1), exact=True, **options).frames
    assert np.array_equal(exact[0, 0], image) and np.array_equal(exact[0, 3], last)
    assert np.array_equal(exact[0, 1:3], decoded[0, 1:3])
    assert not np.array_equal(decoded[0, 0], image)
    assert np.array_equal(decoded[:, :1], decode(filler.vae, encode(filler.vae, image[None])[0][None]))


def test_guidance_with_and_without_the_frames(filler: LavitaPipeline) -> None:
    """At one step from pure noise: prediction = u + w (c - u), where u has frames or noise in their places."""
    image = pictures(1)[0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0].clone(), kwargs["given"].clone()))

    handle = filler.transformer.register_forward_pre_hook(record, with_kwargs=True)
    latents_of(filler, ["a"], 1, image=image, guidance_scale=2.0)
    latents_of(filler, ["a"], 1, image=image, guidance_scale=2.0, guide_given=True)
    handle.remove()
    (both, mask), (half, half_mask) = seen[0], seen[3]
    first = [True, *[False] * (FRAMES - 1)]
    assert mask.tolist() == [first, first]
    assert torch.equal(both[0], both[1])
    assert half_mask.tolist() == [first, [False] * FRAMES]
    assert torch.equal(half[0], both[0]) and torch.equal(half[0, 1:], half[1, 1:])
    assert not torch.equal(half[0, 0], half[1, 0])
    clean, noisy = half[0, 0], half[1, 0]
    noise = torch.randn((1, FRAMES, 4, 8, 8), generator=seeded(1)[0])[0, 0]
    signal = filler.scheduler.alphas_cumprod[filler.scheduler.timesteps[0]].item() ** 0.5  # type: ignore[attr-defined]
    torch.testing.assert_close(noisy, signal * clean + (1 - signal**2) ** 0.5 * noise, rtol=1e-4, atol=1e-4)


def test_no_class_is_a_class_label(filler: LavitaPipeline) -> None:
    found = latents_of(filler, [None], 1, image=pictures(1)[0])
    filler.transformer.config["class_names"] = None
    assert not torch.equal(found, latents_of(filler, [0], 1, image=pictures(1)[0]))


@pytest.mark.parametrize("cache", ["pab", "fastercache", "taylorseer"])
def test_with_step_caches(cache: Any, filler: LavitaPipeline) -> None:
    image = pictures(1)[0]
    found = filler(
        ["a"], num_inference_steps=8, generator=seeded(1), output_type="latent", image=image, cache=cache,
        guidance_scale=1.5, precision="fp32",
    ).frames  # fmt: skip
    assert torch.equal(found[0, :1], encode(filler.vae, image[None], "fp32")[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": pictures(1, side=24)[0]}, "a given frame is 24x24, but the model's videos are 16x16"),
        ({"video": pictures(5)}, "video has a frame for place 4, but the video has 4 frames"),
        ({"image": pictures(1)[0], "video": pictures(2)}, "video has a frame for place 0, which is given already"),
        ({"given": {1: pictures(1)[0]}}, "frames 1 of 4 are given, but this model was trained with given frames of"),
        ({"image": pictures(1)}, r"image has uint8 \(1, 16, 16, 3\), but frames are uint8 \(H, W, 3\)"),
        ({"given": [{0: pictures(1)[0]}] * 2}, "given has frames for 2 videos, but this call makes 1"),
        ({"exact": True}, "guide_given and exact have no effect without given frames"),
        ({"image": pictures(1)[0], "guide_given": True}, "guide_given has no effect with a guidance_scale of 1"),
        ({"image": pictures(1)[0], "use_temporal": False}, "images have no frames that could be given"),
    ],
)
def test_frames_that_do_not_fit_are_refused(options: dict[str, Any], words: str, filler: LavitaPipeline) -> None:
    with pytest.raises(ValueError, match=words):
        filler(["a"], num_inference_steps=2, **options)


def test_a_model_of_whole_clips_refuses_frames(pipeline: LavitaPipeline) -> None:
    with pytest.raises(
        ValueError, match=r"this model was trained to make whole clips; train it with model\.given_frames"
    ):
        pipeline(["boxing"], image=pictures(1)[0])


# ---- files


@pytest.mark.parametrize("arguments", [("--image", "good.png"), ("--length", "9", "--overlap", "1")], ids=" ".join)
def test_a_model_of_whole_clips_writes_nothing(
    arguments: tuple[str, ...], pipeline: LavitaPipeline, tmp_path: Path, run: Run
) -> None:
    save_pipeline(pipeline, tmp_path / "plain")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "good.png")
    code, _, errors = run("sample", "plain", "--out", "out", "--steps", 2, "--seeds", 0, *arguments)
    assert code == 2 and "this model was trained to make whole clips; train it with model.given_frames" in errors
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(filler: LavitaPipeline, tmp_path: Path) -> Path:
    save_pipeline(filler, tmp_path / "model")
    return tmp_path / "model"


def test_an_image_becomes_a_video(model: Path, tmp_path: Path, run: Run) -> None:
    Image.fromarray(pictures(1, side=24)[0][:, :20]).save(tmp_path / "photo.png")
    command = ["sample", model, "--out", "out", "--seeds", "0-1", "--steps", 2, "--classes", "a", "--format", "mkv"]
    code, out, errors = run(*command, "--image", "photo.png", "--exact")
    assert code == 0, errors
    assert "photo.png is 20x24: the middle is cut out and scaled to 16x16" in errors
    assert out.strip().endswith("out: 2 videos")
    clips = [read_clip(tmp_path / "out" / "a" / f"{seed}.mkv", 0, FRAMES) for seed in (0, 1)]
    assert np.array_equal(clips[0][0], clips[1][0]) and not np.array_equal(clips[0][1], clips[1][1])
    rows = [json.loads(line) for line in (tmp_path / "out" / "given.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["a/0.mkv", "a/1.mkv"] and rows[0]["given"].startswith("0: ")
    assert run(*command, "--image", "photo.png", "--exact")[0] == 0, "the same once more"
    Image.fromarray(pictures(1, seed=5)[0]).save(tmp_path / "photo.png")
    code, _, errors = run(*command, "--image", "photo.png", "--exact")
    assert code == 2 and "was made from the given frames '0: " in errors
    code, _, errors = run(*command, "--image", "photo.png")
    assert code == 2 and "holds videos made with exact=True, not False" in errors


def test_each_video_of_a_folder_is_gone_on_with(model: Path, tmp_path: Path, run: Run) -> None:
    for index, name in enumerate(("a/one", "b/two")):
        write_video(tmp_path / "videos" / f"{name}.mkv", pictures(8, seed=index), 8)
    for index in range(3):
        write_video(tmp_path / "large" / "a" / f"{index}.mkv", pictures(8, side=32), 8)
    code, _, errors = run("sample", model, "--video", "large", "--steps", 1, "--seeds", 0, "--out", "fitted")
    assert code == 0, errors
    (line,) = [line for line in errors.splitlines() if "is cut out" in line]
    assert line.endswith("0.mkv is 32x32 (and 2 more are of other sizes): the middle is cut out and scaled to 16x16")
    arguments = [
        "sample",
        model,
        "--video",
        "videos",
        "--keep-frames",
        2,
        "--steps",
        2,
        "--seeds",
        3,
        "--format",
        "mkv",
    ]
    code, _, errors = run(*arguments, "--out", "out", "--exact")
    assert code == 0, errors
    for index, name in enumerate(("a/one", "b/two")):
        clip = read_clip(tmp_path / "out" / f"{name}.mkv-3.mkv", 0, FRAMES)
        # The model's clips have every second frame of a video.
        assert np.array_equal(clip[:2], pictures(8, seed=index)[[0, 2]])
    code, _, errors = run(*arguments, "--out", "none", "--unlabelled")
    assert code == 0, errors
    labelled = read_clip(tmp_path / "out" / "a" / "one.mkv-3.mkv", 0, FRAMES)
    assert not np.array_equal(labelled, read_clip(tmp_path / "none" / "a" / "one.mkv-3.mkv", 0, FRAMES))
    code, _, errors = run(*arguments, "--out", "all", "--classes", "b")
    assert code == 0, errors
    assert sorted(path.name for path in (tmp_path / "all" / "b").rglob("*.mkv")) == ["one.mkv-3.mkv", "two.mkv-3.mkv"]
    write_video(tmp_path / "videos" / "c" / "three.mkv", pictures(8), 8)
    code, _, errors = run(*arguments, "--out", "more")
    assert code == 2 and "its folder is no class of this model; give --classes or --unlabelled" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "missing.png"), "missing.png: cannot be found"),
        (("--image", "broken.png"), "broken.png"),
        (("--video", "short.mkv", "--keep-frames", "3"), "short.mkv"),
        (("--video", "short.mkv", "--keep-frames", "4"), "keep_frames is 4, but must be in 1..3: a video has 4 frames"),
        (("--video", "short.mkv", "--keep-every", "9"), "keep_every is 9, but must be in 2..3"),
        (("--video", "short.mkv", "--image", "good.png"), "image and video both give the first frame"),
        (
            ("--video", "short.mkv", "--keep-frames", "2", "--keep-every", "2"),
            "keep_frames is 2 and keep_every 2; give",
        ),
        (("--keep-frames", "2"), "keep_frames and keep_every have no effect without a video"),
        (("--exact",), "guide_frames and exact have no effect without an image or a video"),
        (("--unlabelled",), "unlabelled has no effect without --video and a folder of videos"),
        (
            ("--image", "good.png", "--guide-frames", "--guidance-scale", "1"),
            "guide_frames has no effect with a guidance",
        ),
        (("--image", "good.png", "--images"), "images have no frames that could be given"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str, model: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "good.png")
    write_video(tmp_path / "short.mkv", pictures(3), 8)
    code, _, errors = run("sample", model, "--out", "out", "--steps", 2, "--seeds", 0, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("error:")]) == 1
    assert not list((tmp_path / "out").rglob("*.mp4"))
