"""Does each score worsen as real clips are degraded more and more, and which degradations does it not see?

    python benchmarks/evaluation/monotone.py --data runs/demo/data --num-clips 512 --out runs/monotone

Held-out arcade clips, degraded in six ways at four strengths, are scored against training clips with the offline
extractor. Writes `monotone.json`, `monotone.md` (a table) and `monotone.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

from lavita.core.progress import Progress
from lavita.evaluation.classes.classifier import cached_classifier
from lavita.evaluation.classes.motion import motion
from lavita.evaluation.clips import choose_clips, read_pixels
from lavita.evaluation.distances.frechet import frechet_distance
from lavita.evaluation.distances.kernel import kernel_score
from lavita.evaluation.distances.precision_recall import neighbour_scores
from lavita.evaluation.features.compute import BATCH_SIZE
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.features.networks import NETWORKS, load_network
from lavita.evaluation.sources import VideoFolder

Clips = npt.NDArray[np.uint8]  # (N, F, S, S, 3)
Outputs = npt.NDArray[np.float32]  # (N, F, width)
Labels = npt.NDArray[np.str_]
NUM_FRAMES = 16
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
BLUR, NOISE = 3.0, 12.0  # pixels, and 1/255, at full strength
# Which way is worse: +1 for distances.
WORSE = {"recall": -1, "precision": -1, "density": -1, "coverage": -1, "accuracy": -1, "motion agreement": -1}


def blur(clips: Clips, level: float, rng: np.random.Generator) -> Clips:
    kernel = ImageFilter.GaussianBlur(BLUR * level)
    flat = clips.reshape(-1, *clips.shape[2:])
    return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in flat]).reshape(clips.shape)


def add_noise(clips: Clips, level: float, rng: np.random.Generator) -> Clips:
    noise = rng.normal(0, NOISE * level, clips.shape)
    return (clips + noise).clip(0, 255).round().astype(np.uint8)


def shuffled(level: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """An order in which that share of the frames has changed places."""
    order = np.arange(NUM_FRAMES)
    moved = np.sort(rng.choice(NUM_FRAMES, round(level * NUM_FRAMES), replace=False))
    order[moved] = rng.permutation(moved)
    return order


def frozen(level: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """An order in which the last share of the clip stands still."""
    return np.minimum(np.arange(NUM_FRAMES), round((1 - level) * (NUM_FRAMES - 1)))


def scores(
    real: Outputs,
    real_labels: Labels,
    real_clips: Clips,
    made: Outputs,
    labels: Labels,
    clips: Clips,
    recognise: Callable[[Clips], str],
) -> dict[str, float]:
    result: dict[str, float] = {}
    for name in ("efficientnet_lite0_video", "efficientnet_lite0_mean"):
        read = EXTRACTORS[name].read
        x, y = read(real), read(made)
        if min(len(x), len(y)) > EXTRACTORS[name].num_features:
            result[f"frechet-video[{name}]"] = frechet_distance(x, y)
        result[f"kernel-video[{name}]"] = kernel_score(x, y).value
        if name == "efficientnet_lite0_video":
            near = neighbour_scores(x, y)
            result |= {key: getattr(near, key) for key in ("precision", "recall", "density", "coverage")}
            by_class = [
                kernel_score(x[real_labels == label], y[labels == label]).value
                for label in sorted(set(labels.tolist()))
                if min((real_labels == label).sum(), (labels == label).sum()) >= 3  # fewer give no distance
            ]
            result["kernel-video, mean of classes"] = float(np.mean(by_class or [np.nan]))
    frames = [EXTRACTORS["efficientnet_lite0"].read(rows) for rows in (real, made)]
    x, y = (rows.reshape(-1, rows.shape[-1]) for rows in frames)
    if min(len(x), len(y)) > x.shape[1]:
        result["frechet-image[efficientnet_lite0]"] = frechet_distance(x, y)
    result["kernel-image[efficientnet_lite0]"] = kernel_score(
        frames[0][:, NUM_FRAMES // 2], frames[1][:, NUM_FRAMES // 2]
    ).value
    result["accuracy"] = float(np.mean([recognise(clip) == label for clip, label in zip(clips, labels, strict=True)]))
    agreements = []
    for label in sorted(set(labels.tolist()) & set(real_labels.tolist())):
        a = float(np.mean([motion(clip) for clip in real_clips[real_labels == label]]))
        b = float(np.mean([motion(clip) for clip in clips[labels == label]]))
        agreements.append(min(a, b) / max(a, b) if max(a, b) else 1.0)
    result["motion agreement"] = float(np.mean(agreements))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/ class folders")
    parser.add_argument(
        "--num-clips", type=int, default=512, help="real and degraded clips each; Frechet distances need more than 384"
    )
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--classifier", type=Path, help="folder of trained classifiers, as lavita evaluate --cache")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    network = load_network(NETWORKS["efficientnet_lite0"])
    classifier = cached_classifier(
        VideoFolder(arguments.data / "train").catalog(), arguments.resolution, 0, arguments.classifier
    )

    def run(clips: Clips, what: str) -> Outputs:
        progress = Progress(f"{what}: clip", len(clips))
        rows = []
        with torch.inference_mode():
            for first in range(0, len(clips), BATCH_SIZE):
                rows.append(network.run(torch.from_numpy(clips[first : first + BATCH_SIZE])).numpy())
                progress.update(min(first + BATCH_SIZE, len(clips)))
        return np.concatenate(rows)

    def load(folder: str, classes: Sequence[str] = (), seed: int = 0) -> tuple[Clips, Labels]:
        source = VideoFolder(arguments.data / folder).usable(NUM_FRAMES)
        if classes:
            kept = {video.name for video in source.catalog.videos if video.info.path.parent.name in classes}
            source = replace(source, catalog=source.catalog.only(kept))
        chosen = choose_clips(source, arguments.num_clips, NUM_FRAMES, 1, seed)
        clips = np.stack([read_pixels(chosen, clip, arguments.resolution) for clip in chosen.clips])
        return clips, np.array(chosen.labels)

    real_clips, real_labels = load("train")
    clips, labels = load("heldout")
    real, made = run(real_clips, "real"), run(clips, "held-out")
    names = sorted(set(labels.tolist()))
    rows: dict[str, list[dict[str, float]]] = {}

    def note(kind: str, outputs: Outputs, labels: Labels, spoilt: Clips) -> None:
        rows.setdefault(kind, []).append(
            scores(real, real_labels, real_clips, outputs, labels, spoilt, classifier.recognise)
        )

    for level in LEVELS:
        rng = np.random.default_rng(0)
        for kind, spoil in (("blur", blur), ("noise", add_noise)):
            spoilt = clips if level == 0 else spoil(clips, level, rng)
            note(kind, made if level == 0 else run(spoilt, f"{kind} {level}"), labels, spoilt)
        # The network sees frames one by one, so frames in another order need no other pass.
        for kind, reorder in (("frame shuffling", shuffled), ("frozen frames", frozen)):
            orders = [reorder(level, rng) for _ in clips]
            note(
                kind,
                np.stack([row[o] for row, o in zip(made, orders, strict=True)]),
                labels,
                np.stack([clip[o] for clip, o in zip(clips, orders, strict=True)]),
            )
        wrong = labels.copy()
        chosen = rng.choice(len(labels), round(level * len(labels)), replace=False)
        wrong[chosen] = [names[(names.index(label) + 1) % len(names)] for label in labels[chosen]]
        note("wrong classes", made, wrong, clips)
        # As many clips, of fewer classes: 8, 6, 4, 2 and 1 of 8.
        kept = names[: max(1, round(len(names) * (1 - level)))]
        fewer, their_labels = (clips, labels) if level == 0 else load("heldout", kept)
        note("fewer classes", made if level == 0 else run(fewer, f"classes {level}"), their_labels, fewer)

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "monotone.json").write_text(json.dumps({"levels": LEVELS, "rows": rows}, indent=1))
    text = table(rows)
    (arguments.out / "monotone.md").write_text(text)
    print(text)
    plot(rows, arguments.out / "monotone.png")


def verdict(values: Sequence[float], sign: int, scale: float) -> str:
    """`worsens` at each step, `worsens in all`, `blind`, or `improves`.

    Args:
        values: by rising strength.
        sign: +1 if a higher score is worse, -1 if a lower one is.
        scale: the most that anything changes this score; less than a fiftieth of it counts as nothing.
    """
    steps = sign * np.diff(values)
    in_all = sign * (values[-1] - values[0])
    if abs(in_all) < 0.02 * scale and np.abs(steps).max() < 0.02 * scale:
        return "blind"
    if (steps > 0).all():
        return "worsens"
    return "worsens in all" if in_all > 0 else "improves"


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    heads = ["score", *rows]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in next(iter(rows.values()))[0]:
        cells = []
        curves = [[level[name] for level in levels] for levels in rows.values()]
        scale = max(max(values) - min(values) for values in curves)
        for values in curves:
            numbers = ", ".join(f"{value:.3g}" for value in values)
            cells.append(f"**{verdict(values, WORSE.get(name, 1), scale)}**: {numbers}")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, list[dict[str, float]]], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(rows.values()))[0])
    figure = Figure(figsize=(1.9 * len(rows), 1.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, name in zip(
        figure.subplots(len(names), len(rows), sharex=True, sharey="row", squeeze=False), names, strict=True
    ):
        for axes, (kind, levels) in zip(line, rows.items(), strict=True):
            axes.plot(LEVELS, [level[name] for level in levels], marker="o", markersize=3, color="#2a6fdb")
            axes.grid(alpha=0.3)
            if name == names[0]:
                axes.set_title(kind, fontsize=8)
        line[0].set_ylabel(name.replace("[", "\n["), fontsize=5)
        line[0].tick_params(labelsize=6)
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main()
