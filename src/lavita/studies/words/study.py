"""`lavita study words`: attention to the tokens of a caption against its pooled embedding.

Both arms start from the same weights and train on the same clips, noise and captions, with each of some seeds. They are
then asked for scenes that they were trained on and for scenes whose combination of colour, shape and direction was held
out, and a detector reads off what they made. Every part is kept, so a stopped study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lavita.core.commands import run_command
from lavita.core.files import write_json
from lavita.core.seeds import numpy_generator
from lavita.models.autoencoder import decode, encode, load_autoencoder
from lavita.models.packaged import autoencoder_source
from lavita.studies.ablation import Arms, StudyPlan, run_study
from lavita.studies.words.detector import read_scene
from lavita.studies.words.world import ATTRIBUTES, SIZE, Scene, prompts, render, write_clips, write_prompts
from lavita.video.contact_sheet import contact_sheet
from lavita.video.formats import Frames
from lavita.video.reading import iter_frames

CLIPS_PER_SCENE = 2
NUM_SEEN = 120
"""Scenes that are trained on and asked for: as many as are held out."""
GUIDANCE_SCALE = 3.0
TEXT_TOKENS = 24
"""The longest caption of the world has 17 tokens in all-MiniLM."""
ARMS: Arms = {"pooled": (), "tokens": (f"model.text_tokens={TEXT_TOKENS}",)}
GROUPS = ("held-out", "seen")
SCORES = (*ATTRIBUTES, "all")
"""Shares of the clips in which an attribute is right; `all`: in which all four are."""

Accuracies = Mapping[str, Mapping[str, float]]
"""For each of GROUPS the share of right clips for each of SCORES."""


def run_words(plan: StudyPlan) -> dict[str, Any]:
    """Renders the clips, trains and samples both arms, scores them, and writes and prints the results.

    Args:
        plan: the training, the seeds and the folder; its data and prompts are replaced by the study's own.

    Returns:
        What `results-words.json` holds: `ceiling`, the accuracies of real clips and of their reconstructions;
        `trainings`, those of each training; `summary`, see `summarize_arms`.

    Raises:
        ValueError: if the folder holds other clips, or the plan sets what the arms differ in.
        CommandFailed: if a command failed; the same call continues from there.
    """
    out = plan.out
    if any(override.startswith("model.text_tokens=") for override in plan.overrides):
        raise ValueError("model.text_tokens is set, but is what the study words compares")
    write_clips(out / "clips", CLIPS_PER_SCENE)
    asked = prompts(NUM_SEEN)
    write_prompts(out / "prompts.csv", asked)
    encoded = out / "latents" / "done"
    data = ["--data", str(out / "clips" / "train"), "--out", str(encoded.parent), "--resolution", str(SIZE)]
    if not encoded.exists():
        run_command(["encode", *data, "--no-flip"])
        encoded.touch()
    own = (f"data.latent_cache={encoded.parent}", f"data.captions={out / 'clips' / 'captions.csv'}")
    plan = replace(
        plan, overrides=(*own, *plan.overrides), prompts=out / "prompts.csv", seeds="0", guidance_scale=GUIDANCE_SCALE
    )
    trainings = [
        {"arm": row["arm"], "name": row["name"], "accuracy": score(asked, clips_of(plan, row["name"]))}
        for row in run_study(ARMS, plan)
    ]
    results = {
        "ceiling": ceiling(asked),
        "trainings": trainings,
        "summary": summarize_arms(trainings),
    }
    write_json(out / "results-words.json", results)
    _write_sheet(asked, plan, [row["name"] for row in trainings])
    print_words(results)
    return results


def clips_of(plan: StudyPlan, name: str) -> dict[str, Frames]:
    """The samples of a training by the names of `prompts`, uint8 (F, H, W, 3) each."""
    folder = plan.samples(name, plan.steps[-1])
    return {
        file.relative_to(folder).as_posix().removesuffix("-0.mp4"): np.stack(list(iter_frames(file)))
        for file in sorted(folder.rglob("*.mp4"))
    }


def score(asked: Mapping[str, tuple[Scene, str]], clips: Mapping[str, Frames]) -> Accuracies:
    """The share of clips that show what was asked for, by group and attribute.

    Raises:
        ValueError: if a clip is missing.
    """
    rights: dict[str, list[list[bool]]] = {group: [] for group in GROUPS}
    for name, (scene, _) in asked.items():
        if name not in clips:
            raise ValueError(f"the sample {name} is missing")
        right = [found == wanted for found, wanted in zip(read_scene(clips[name]), scene, strict=True)]
        rights[name.partition("/")[0]].append([*right, all(right)])
    return {group: dict(zip(SCORES, np.mean(rows, axis=0).tolist(), strict=True)) for group, rows in rights.items()}


def ceiling(asked: Mapping[str, tuple[Scene, str]]) -> dict[str, Accuracies]:
    """Accuracies of the detector on real clips of what is asked for, and on their reconstructions.

    Returns:
        `real` and `reconstructed`; by the autoencoder of the study, `builtin`.
    """
    real = {name: render(scene, numpy_generator(0, "words", "real", name)) for name, (scene, _) in asked.items()}
    vae = load_autoencoder(autoencoder_source("builtin", SIZE))
    decoded = {name: decode(vae, encode(vae, clip)[0][None])[0] for name, clip in real.items()}
    return {"real": score(asked, real), "reconstructed": score(asked, decoded)}


def summarize_arms(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and differences over the seeds, by group and score.

    Args:
        trainings: with `arm` and `accuracy`, those of each arm in the order of their seeds.

    Returns:
        For each group and score `pooled` and `tokens`, each with the `mean` over the seeds and their standard deviation
        `sd` (n - 1; 0 for one seed), and `difference`, the same of the differences tokens - pooled of equal seeds.
    """

    def numbers(values: Sequence[float]) -> dict[str, float]:
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

    summary: dict[str, Any] = {}
    for group in GROUPS:
        summary[group] = {}
        for name in SCORES:
            pooled, tokens = (
                [float(row["accuracy"][group][name]) for row in trainings if row["arm"] == arm] for arm in ARMS
            )
            pairs = [after - before for before, after in zip(pooled, tokens, strict=True)]
            rows = zip(("pooled", "tokens", "difference"), (pooled, tokens, pairs), strict=True)
            summary[group][name] = {key: numbers(values) for key, values in rows}
    return summary


def print_words(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a table of the accuracies: mean and standard deviation over the seeds."""
    console = console or Console()
    seeds = len(results["trainings"]) // len(ARMS)
    title = f"right clips, %: mean +- standard deviation of {seeds} seeds; decoded: real clips, decoded"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("", "", "decoded", *ARMS, "difference"):
        table.add_column(heading, no_wrap=True)
    for group in GROUPS:
        for name in SCORES:
            row = results["summary"][group][name]
            cells = (f"{100 * row[key]['mean']:.1f} +- {100 * row[key]['sd']:.1f}" for key in (*ARMS, "difference"))
            ceiling = f"{100 * results['ceiling']['reconstructed'][group][name]:.1f}"
            table.add_row(group if name == SCORES[0] else "", name, ceiling, *cells)
        table.add_section()
    console.print(table)


def _write_sheet(asked: Mapping[str, tuple[Scene, str]], plan: StudyPlan, names: Sequence[str]) -> None:
    """Writes `words.png`: for captions that were held out, a real clip and that of the first training of each arm."""
    chosen = [name for name in asked if name.startswith(GROUPS[0])][::10]
    firsts = {arm: clips_of(plan, next(name for name in names if name.partition("/")[0] == arm)) for arm in ARMS}
    rows, labels = [], []
    for name in chosen:
        scene, caption = asked[name]
        real = render(scene, numpy_generator(0, "words", "real", name))
        rows.append([real, *(clips[name] for clips in firsts.values())])
        labels.append(f"{caption}: real, {', '.join(firsts)}")
    contact_sheet(rows, plan.out / "words.png", labels, num_columns=4)
