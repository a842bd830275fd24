"""Does each score worsen as real clips are degraded more and more, and which score is blind to what?

Held-out arcade clips, degraded in six ways at four strengths, are scored against training clips with the offline
extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

from lavita.core.files import write_json, write_text
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
# The sign of a change for the worse; +1 for all other scores, which are distances.
WORSE = {"recall": -1, "precision": -1, "density": -1, "coverage": -1, "accuracy": -1, "motion agreement": -1}


def blur(clips: Clips, level: float, rng: np.random.Generator) -> Clips:
    """Gaussian blur."""
    kernel = ImageFilter.GaussianBlur(BLUR * level)
    flat = clips.reshape(-1, *clips.shape[2:])
    return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in flat]).reshape(clips.shape)


def add_noise(clips: Clips, level: float, rng: np.random.Generator) -> Clips:
    """Gaussian noise."""
    noise = rng.normal(0, NOISE * level, clips.shape)
    return (clips + noise).clip(0, 255).round().astype(np.uint8)


def shuffled(level: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """An order of the frames in which a share of them has changed positions."""
    order = np.arange(NUM_FRAMES)
    moved = np.sort(rng.choice(NUM_FRAMES, round(level * NUM_FRAMES), replace=False))
    order[moved] = rng.permutation(moved)
    return order


def frozen(level: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """An order of the frames in which the last share of the clip stands still."""
    return np.minimum(np.arange(NUM_FRAMES), round((1 - level) * (NUM_FRAMES - 1)))


@dataclass(frozen=True)
class Side:
    """Clips, their classes and what the network computes of each frame."""

    clips: Clips
    labels: Labels
    outputs: Outputs

    def reordered(self, orders: Sequence[npt.NDArray[np.int64]]) -> Side:
        """The same clips with their frames in other orders; the network sees frames one by one, so it is not run."""
        clips = np.stack([clip[order] for clip, order in zip(self.clips, orders, strict=True)])
        outputs = np.stack([row[order] for row, order in zip(self.outputs, orders, strict=True)])
        return Side(clips, self.labels, outputs)


def scores(real: Side, made: Side, recognise: Callable[[Clips], str]) -> dict[str, float]:
    """All scores of one side against the real one."""
    result: dict[str, float] = {}
    for name in ("efficientnet_lite0_video", "efficientnet_lite0_mean"):
        read = EXTRACTORS[name].read
        x, y = read(real.outputs), read(made.outputs)
        if min(len(x), len(y)) > EXTRACTORS[name].num_features:
            result[f"frechet-video[{name}]"] = frechet_distance(x, y)
        result[f"kernel-video[{name}]"] = kernel_score(x, y).value
        if name == "efficientnet_lite0_video":
            near = neighbour_scores(x, y)
            result |= {key: getattr(near, key) for key in ("precision", "recall", "density", "coverage")}
            by_class = [
                kernel_score(x[real.labels == label], y[made.labels == label]).value
                for label in sorted(set(made.labels.tolist()))
                if min((real.labels == label).sum(), (made.labels == label).sum()) >= 3  # fewer give no distance
            ]
            result["kernel-video, mean of classes"] = float(np.mean(by_class or [np.nan]))
    frames = [EXTRACTORS["efficientnet_lite0"].read(side.outputs) for side in (real, made)]
    x, y = (rows.reshape(-1, rows.shape[-1]) for rows in frames)
    if min(len(x), len(y)) > x.shape[1]:
        result["frechet-image[efficientnet_lite0]"] = frechet_distance(x, y)
    result["kernel-image[efficientnet_lite0]"] = kernel_score(
        frames[0][:, NUM_FRAMES // 2], frames[1][:, NUM_FRAMES // 2]
    ).value
    recognised = [recognise(clip) == label for clip, label in zip(made.clips, made.labels, strict=True)]
    result["accuracy"] = float(np.mean(recognised))
    agreements = []
    for label in sorted(set(made.labels.tolist()) & set(real.labels.tolist())):
        a, b = (float(np.mean([motion(clip) for clip in side.clips[side.labels == label]])) for side in (real, made))
        agreements.append(min(a, b) / max(a, b) if max(a, b) else 1.0)
    result["motion agreement"] = float(np.mean(agreements))
    return result


def study_degradations(data: Path, out: Path, num_clips: int, resolution: int, classifier: Path | None) -> None:
    """Writes `monotone.json`, `monotone.md` (a table) and `monotone.png` (curves).

    Args:
        data: folder with train/ and heldout/, each with one folder per class.
        out: folder to write to.
        num_clips: clips per side; Frechet distances need more than 384.
        resolution: height and width of the frames.
        classifier: folder of trained classifiers, as in `lavita evaluate --cache`.
    """
    network = load_network(NETWORKS["efficientnet_lite0"])
    trained = cached_classifier(VideoFolder(data / "train").catalog(), resolution, 0, classifier)

    def run(clips: Clips, labels: Labels, what: str) -> Side:
        progress = Progress(f"{what}: clip", len(clips))
        rows = []
        with torch.inference_mode():
            for first in range(0, len(clips), BATCH_SIZE):
                rows.append(network.run(torch.from_numpy(clips[first : first + BATCH_SIZE])).numpy())
                progress.update(min(first + BATCH_SIZE, len(clips)))
        return Side(clips, labels, np.concatenate(rows))

    def load(folder: str, what: str, classes: Sequence[str] = ()) -> Side:
        source = VideoFolder(data / folder).usable(NUM_FRAMES)
        if classes:
            kept = {video.name for video in source.catalog.videos if video.info.path.parent.name in classes}
            source = replace(source, catalog=source.catalog.only(kept))
        chosen = choose_clips(source, num_clips, NUM_FRAMES, 1, 0)
        clips = np.stack([read_pixels(chosen, clip, resolution) for clip in chosen.clips])
        return run(clips, np.array(chosen.labels), what)

    real, held_out = load("train", "real"), load("heldout", "held-out")
    names = sorted(set(held_out.labels.tolist()))
    rows: dict[str, list[dict[str, float]]] = {}

    def note(kind: str, degraded: Side) -> None:
        rows.setdefault(kind, []).append(scores(real, degraded, trained.recognise))

    for level in LEVELS:
        rng = np.random.default_rng(0)
        for kind, degrade in (("blur", blur), ("noise", add_noise)):
            note(
                kind,
                run(degrade(held_out.clips, level, rng), held_out.labels, f"{kind} {level}") if level else held_out,
            )
        for kind, reorder in (("frame shuffling", shuffled), ("frozen frames", frozen)):
            note(kind, held_out.reordered([reorder(level, rng) for _ in held_out.clips]))
        wrong = held_out.labels.copy()
        chosen = rng.choice(len(wrong), round(level * len(wrong)), replace=False)
        wrong[chosen] = [names[(names.index(label) + 1) % len(names)] for label in wrong[chosen]]
        note("wrong classes", replace(held_out, labels=wrong))
        # As many clips from fewer classes: 8, 6, 4, 2 and 1 of 8.
        kept = names[: max(1, round(len(names) * (1 - level)))]
        note("fewer classes", load("heldout", f"classes {level}", kept) if level else held_out)

    text = table(rows)
    write_json(out / "monotone.json", {"levels": LEVELS, "rows": rows})
    write_text(out / "monotone.md", text)
    print(text)
    plot(rows, out / "monotone.png")


def verdict(values: Sequence[float], sign: int, scale: float) -> str:
    """`worsens` (at every step), `worsens in all` (from first to last), `blind`, or `improves`.

    Args:
        values: the score at rising strengths.
        sign: +1 if a higher score is worse, -1 if a lower one is.
        scale: the largest change of this score by any degradation; changes below a fiftieth of it count as none.
    """
    steps = sign * np.diff(values)
    in_all = sign * (values[-1] - values[0])
    if abs(in_all) < 0.02 * scale and np.abs(steps).max() < 0.02 * scale:
        return "blind"
    if (steps > 0).all():
        return "worsens"
    return "worsens in all" if in_all > 0 else "improves"


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """One line per score, one column per degradation."""
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


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws the scores as curves over the strength of each degradation."""
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
    figure.savefig(path, dpi=80)
