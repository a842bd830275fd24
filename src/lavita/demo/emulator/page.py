"""The page, the plot and the table of an emulator study."""

from __future__ import annotations

import csv
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from lavita.core.files import write_text
from lavita.core.web_page import page, table, video
from lavita.demo.games import FPS
from lavita.video.contact_sheet import contact_sheet
from lavita.video.reading import iter_frames
from lavita.video.writing import write_video

HORIZONS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = 4
"""Clips of each game on the page."""
COLOURS = {
    "its actions": "#2a6fdb",
    "other actions": "#d9822b",
    "no actions": "#888888",
    "still": "#c33",
    "ceiling": "#2b9348",
}
STYLE = "video { width: 160px; height: 160px; } .videos span { flex: 0 0 6rem; font-size: .85rem; }"


def write_page(out: Path, results: dict[str, Any]) -> None:
    """Writes `index.html`, `curves.png`, `contact_sheet.png`, `results.csv` and the videos of the page.

    Args:
        out: folder of the study.
        results: see `study.summarize`.
    """
    _write_csv(out, results)
    _write_curves(out, results)
    rows, labels, sections = [], [], []
    for game, scores in results["games"].items():
        clips = _videos(out, game, results)
        for number, clip in enumerate(clips):
            for kind, file in clip.items():
                if number == 0:
                    rows.append([np.stack(list(iter_frames(out / file)))])
                    labels.append(f"{game}: {kind}")
        shown = "\n".join(
            '<div class="videos">'
            + "".join(f"<figure>{video(file)}<figcaption>{kind}</figcaption></figure>" for kind, file in clip.items())
            + "</div>"
            for clip in clips
        )
        sections.append(f"<h2>{html.escape(game)}</h2>\n{shown}\n{_tables(scores, results)}")
    contact_sheet(rows, out / "contact_sheet.png", labels, num_columns=8)
    write_text(out / "index.html", page("Emulator study", _body(sections, results), STYLE))


def _body(sections: list[str], results: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, results["train_seeds"]))
    return f"""<h1>A model in the place of the game</h1>
<p>The game and the model start from the same {results["given"]} frames and get the same actions, for
{results["horizon"]} frames ({results["horizon"] / FPS:.1f} s). Training seeds {seeds}; {results["steps"]:,} steps each;
{results["clips"]} held-out clips of each game. <em>Other actions</em> and <em>no actions</em> are the same model told
something else: what it loses is what the actions tell it. <em>Still</em> repeats the last given frame; the
<em>ceiling</em> is the true frames after the autoencoder.</p>
<p>In the tables, &plusmn; is the standard deviation between training seeds; in parentheses are the 95% interval over
the clips and the number of clips that a value rests on. An object has a distance where it is in the picture in truth
and in the prediction; whether it is there is asked where it truly is.</p>
<img src="curves.png" alt="PSNR, position error and persistence over the horizon">
{"".join(sections)}"""


def _tables(scores: dict[str, Any], results: dict[str, Any]) -> str:
    horizons = [horizon for horizon in HORIZONS if horizon <= results["horizon"]]
    head = ["", *(f"frame {horizon}" for horizon in horizons)]
    parts = [
        "<h3>PSNR in dB</h3>",
        table(head, [_cells(name, row, horizons) for name, row in scores["psnr"].items()], True),
    ]
    for name, measures in scores["objects"].items():
        for measure, title in (("error", "distance from its true place in pixels"), ("persistence", "is there")):
            lines = [_cells(control, row, horizons) for control, row in measures[measure].items()]
            parts += [f"<h3>{html.escape(name)}: {title}</h3>", table(head, lines, True)]
    return '<div class="scroll">' + "\n".join(parts) + "</div>"


def _cells(name: str, row: list[list[float | None]], horizons: list[int]) -> list[str]:
    cells = [name]
    for horizon in horizons:
        mean, low, high, spread, clips = row[horizon - 1]
        if mean is None:
            cells.append("-")
            continue
        between = "" if spread is None else f" &plusmn;{spread:.2f}"
        cells.append(f"{mean:.2f}{between} ({low:.2f} to {high:.2f}; {clips:.0f})")
    return cells


def _videos(out: Path, game: str, results: dict[str, Any]) -> list[dict[str, str]]:
    """Copies clips for the page, by what they show: paths below `out`."""
    first = out / f"seed-{results['train_seeds'][0]}" / "predicted"
    sources = {
        "the game": out / "data" / "heldout" / game,
        "the model": first / "its actions" / game,
        "told other actions": first / "other actions" / game,
    }
    clips: list[dict[str, str]] = []
    for number in range(min(SHOWN, results["clips"])):
        clip = {}
        for kind, folder in sources.items():
            file = f"videos/{game}-{number}-{kind.replace(' ', '-')}.mp4"
            write_video(out / file, np.stack(list(iter_frames(folder / f"{number:03d}.mkv"))), FPS)
            clip[kind] = file
        clips.append(clip)
    return clips


def _write_csv(out: Path, results: dict[str, Any]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["game", "measure", "what", "horizon", "mean", "low", "high", "spread", "clips"])
    for game, scores in results["games"].items():
        named = [("psnr", scores["psnr"])]
        for sprite, measures in scores["objects"].items():
            named += [(f"{sprite} {measure}", rows) for measure, rows in measures.items()]
        for measure, rows in named:
            for name, row in rows.items():
                for horizon, numbers in enumerate(row, start=1):
                    writer.writerow([game, measure, name, horizon, *numbers])
    write_text(out / "results.csv", text.getvalue())


def _write_curves(out: Path, results: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    for game, scores in results["games"].items():
        panels.append((f"{game}: PSNR in dB", scores["psnr"]))
        for sprite, measures in scores["objects"].items():
            for measure, title in (("error", "position error in pixels"), ("persistence", "is there")):
                panels.append((f"{game}, {sprite}: {title}", measures[measure]))
    columns = 3
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-len(panels) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for place, (title, rows) in zip(axes, panels, strict=False):
        for name, row in rows.items():
            values = np.array([[np.nan if value is None else value for value in numbers[:3]] for numbers in row])
            horizon = np.arange(1, len(values) + 1)
            place.plot(horizon, values[:, 0], color=COLOURS[name], label=name, linewidth=1.5)
            place.fill_between(horizon, values[:, 1], values[:, 2], color=COLOURS[name], alpha=0.15, linewidth=0)
        place.set(title=title, xlabel="frames after the last given one")
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    figure.savefig(out / "curves.png", dpi=100)
