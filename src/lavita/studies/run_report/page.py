"""The page of a report: what the runs are, how far they have come, and whether they learn."""

from __future__ import annotations

import html
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavita.core.config import ConfigError
from lavita.studies.run_report.charts import make_charts
from lavita.studies.run_report.curves import SMOOTHED_FROM, colour_of, smooth
from lavita.studies.run_report.reading import Run, clock, is_number, read_runs

MOST_SHEETS = 12  # of a run on the page; the newest, the oldest, and evenly spaced ones between
MOST_EVENTS = 200
MOST_CLIPS = 8  # named of an event
MOST_VIDEOS = 48  # that play at a time on the page; browsers have a limit
RATHER_LOUD = ("spike", "not-finite")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.2rem 0 .5rem; } h3 { margin: 1rem 0 .25rem; font-size: 1rem; }
.small { font-size: .85rem; opacity: .8; }
.cards { display: flex; gap: 1rem; flex-wrap: wrap; margin-top: 1rem; }
.card { flex: 1 1 20rem; max-width: 40rem; padding: .6rem 1rem; border: 1px solid #8886; border-top: 5px solid;
  border-radius: 8px; }
.card h3 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; } .card table { width: 100%; }
progress { width: 100%; height: .5rem; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid #8884; padding: .2rem .6rem .2rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } .n { text-align: right; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: .75rem; }
.panels svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; padding: .3rem;
  position: sticky; top: 0; background: Canvas; }
.chip { display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .4em; }
.scroll { overflow-x: auto; } .sheets td { padding: .3rem .6rem .3rem 0; border: 0; }
.sheets img { display: block; width: 100%; min-width: 240px; max-width: 540px; border-radius: 4px; }
figure { margin: 0; } figcaption { font-size: .85rem; }
.videos { display: flex; flex-wrap: wrap; gap: 6px; }
video { width: 144px; height: 144px; image-rendering: pixelated; border-radius: 4px; background: #8883; }
.loud { color: #c33; font-weight: 600; } code { font-size: .85rem; } summary { cursor: pointer; }
"""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes `index.html`, with the pictures and videos that it shows in `files/` beside.

    Args:
        folders: of runs, finished or not.
        out: of the page; made if missing. What else is in it stays.

    Returns:
        The page.

    Raises:
        ConfigError: where a folder is no run.
    """
    if not folders:
        raise ConfigError("name at least one run's folder")
    runs = read_runs(folders)
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "index.html.partial"
    partial.write_text(_page(runs, out, time.time()), encoding="utf-8")
    partial.replace(out / "index.html")
    return out / "index.html"


def _page(runs: Sequence[Run], out: Path, now: float) -> str:
    sections = [
        _differences(runs),
        _curves(runs),
        _samples(runs, out),
        _events(runs),
        _configurations(runs),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    cards = "\n".join(_card(place, run, now) for place, run in enumerate(runs))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LAVITA: {html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class=small>Written {written} by <code>lavita report</code>; the same command writes it anew.</p>
<div class="cards">
{cards}
</div>
{chr(10).join(section for section in sections if section)}
</body></html>
"""


def _card(place: int, run: Run, now: float) -> str:
    total = run.total
    done = f"{run.step:,}" + (f" of {total:,}" if total else "")
    rows = [("steps", done), *_learning(run)]
    seconds, left = run.seconds(), run.seconds_left()
    speed = run.metrics[-1].get("clips_per_second") if run.metrics else None
    if is_number(speed):
        rows.append(("speed", f"{speed:.3g} clips/s"))
    if seconds is not None:
        rows.append(("time taken", clock(seconds)))
    if left:
        rows.append(("time left at this speed", clock(left)))
    rows.append(("last checkpoint", "none yet" if run.checkpoint is None else f"step {run.checkpoint:,}"))
    if run.parameters is not None:
        rows.append(("parameters", f"{run.parameters / 1e6:.1f} M"))
    rows += [("note", text) for text in run.damaged]
    body = "".join(f"<tr><td>{key}</td><td class=n>{html.escape(text)}</td></tr>" for key, text in rows)
    share = f'<progress max="{total}" value="{min(run.step, total)}"></progress>' if total else ""
    return f"""<div class="card" style="border-top-color: {colour_of(place)}"><h3>{html.escape(run.name)}</h3>
<div class=small>{html.escape(run.state(now))}</div>{share}
<table>{body}</table></div>"""


def _learning(run: Run) -> list[tuple[str, str]]:
    """The last loss, the last and the lowest validation loss, the last and the lowest scores."""
    rows = []
    losses = [row["loss"] for row in run.metrics if is_number(row.get("loss"))]
    if losses:
        average = len(losses) >= SMOOTHED_FROM
        rows.append(("loss, averaged" if average else "loss", f"{(smooth(losses) if average else losses)[-1]:.4f}"))
    elif not run.metrics:
        rows.append(("loss", "no line yet"))
    rows += _last_and_lowest("validation loss", run.validation, "loss")
    keys = [
        key
        for key in (run.scores[-1] if run.scores else {})
        if key != "step" and f"{key}_standard_error" in run.scores[-1]
    ]
    for key in keys:
        rows += _last_and_lowest(key, run.scores, key)
    return rows


def _last_and_lowest(label: str, records: Sequence[dict[str, Any]], key: str) -> list[tuple[str, str]]:
    pairs = [(row[key], row["step"]) for row in records if is_number(row.get(key))]
    if not pairs:
        return []
    (value, step), (lowest, at) = pairs[-1], min(pairs)
    error = records[-1].get(f"{key}_standard_error")
    text = f"{value:.4g}" + (f" ± {error:.2g}" if is_number(error) else "")
    if at < step:
        text += f"; lowest {lowest:.4g} at step {at:,}"
    return [(label, text)]


def _differences(runs: Sequence[Run]) -> str:
    """The fields in which several runs differ."""
    if len(runs) == 1:
        return ""
    names = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = []
    for key in names:
        values = [_text(run.config.get(key)) if key in run.config else "(no such field)" for run in runs]
        if key != "run_dir" and len(set(values)) > 1:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            rows.append(f"<tr><td><code>{html.escape(key)}</code></td>{cells}</tr>")
    if not rows:
        return "<h2>What differs</h2>\n<p>Nothing: the runs have the same configuration.</p>"
    heads = "".join(f"<th>{_chip(place)}{html.escape(run.name)}</th>" for place, run in enumerate(runs))
    return f'<h2>What differs</h2>\n<div class="scroll"><table id="differences"><tr><th>field</th>{heads}</tr>\n' + (
        "\n".join(rows) + "\n</table></div>"
    )


def _curves(runs: Sequence[Run]) -> str:
    charts = make_charts(runs)
    if not any(charts):
        return "<h2>Curves</h2>\n<p>No lines yet.</p>"
    legend = "".join(
        f"<span>{_chip(place)}{html.escape(run.name)}</span>" for place, run in enumerate(runs) if len(runs) > 1
    )
    parts = [f'<h2>Curves</h2>\n<div class="legend">{legend}</div>' if legend else "<h2>Curves</h2>"]
    parts.append(
        "<p class=small>Pale: what was logged; bold: its average. Diamonds: the validation loss. Dotted lines: the run "
        "was resumed. Crosses: a spike, or a step that is not finite.</p>"
    )
    parts.append('<div class="panels">\n' + "\n".join(charts.progress) + "\n</div>")
    if charts.noise:
        parts.append(
            "<h2>Validation by noise level</h2>\n<p class=small>0-10% is the part of the schedule with the least "
            "noise. Dashed: the first measurement; solid: the last.</p>"
        )
        parts.append('<div class="panels">\n' + "\n".join(charts.noise) + "\n</div>")
    return "\n".join(parts)


def _samples(runs: Sequence[Run], out: Path) -> str:
    """The newest samples as videos, and contact sheets over time."""
    if not any(run.samples for run in runs):
        return ""
    parts = ["<h2>Samples</h2>", "<p class=small>The same seeds and conditions every time.</p>"]
    most = max(1, MOST_VIDEOS // len(runs))
    for place, run in enumerate(runs):
        if run.samples:
            step, sheet = run.samples[-1]
            videos = sorted(sheet.with_suffix("").glob("*.mp4"), key=lambda file: (len(file.stem), file.stem))[:most]
            tags = "".join(
                f'<video src="{_copy(file, out, place, step)}" autoplay loop muted playsinline></video>'
                for file in videos
            )
            if tags:
                parts.append(f"<h3>{_chip(place)}{html.escape(run.name)}, step {step:,}</h3>")
                parts.append(f'<div class="videos">{tags}</div>')
    chosen = [dict(_spread(run.samples)) for run in runs]
    parts += ["<h3>Over time</h3>", _strip(chosen[0], out) if len(runs) == 1 else _sheet_table(runs, chosen, out)]
    left = sum(len(run.samples) - len(sheets) for run, sheets in zip(runs, chosen, strict=True))
    if left:
        parts.append(f"<p class=small>{left} sets of samples between these are not shown.</p>")
    return "\n".join(parts)


def _strip(sheets: dict[int, Path], out: Path) -> str:
    """The contact sheets of one run, the newest first."""
    figures = "\n".join(
        f"<figure>{_picture(sheets[step], out, 0, step)}<figcaption>step {step:,}</figcaption></figure>"
        for step in sorted(sheets, reverse=True)
    )
    return f'<div class="panels sheets">\n{figures}\n</div>'


def _sheet_table(runs: Sequence[Run], chosen: Sequence[dict[int, Path]], out: Path) -> str:
    """The contact sheets of several runs: a row a step, the newest first; a column a run."""
    heads = "".join(f"<th>{_chip(place)}{html.escape(run.name)}</th>" for place, run in enumerate(runs))
    rows = []
    for step in sorted({step for sheets in chosen for step in sheets}, reverse=True):
        pictures = (
            _picture(sheets[step], out, place, step) if step in sheets else "" for place, sheets in enumerate(chosen)
        )
        rows.append(f"<tr><td class=n>{step:,}</td>{''.join(f'<td>{picture}</td>' for picture in pictures)}</tr>")
    return f"<div class=scroll><table class=sheets><tr><th>step</th>{heads}</tr>\n{chr(10).join(rows)}\n</table></div>"


def _picture(sheet: Path, out: Path, place: int, step: int) -> str:
    source = _copy(sheet, out, place, None)
    return f'<a href="{source}"><img src="{source}" alt="samples of step {step}" loading="lazy"></a>'


def _spread(samples: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    if len(samples) <= MOST_SHEETS:
        return list(samples)
    places = {round(place * (len(samples) - 1) / (MOST_SHEETS - 1)) for place in range(MOST_SHEETS)}
    return [samples[place] for place in sorted(places)]


def _copy(file: Path, out: Path, place: int, step: int | None) -> str:
    """Copies a file beside the page; its address there."""
    name = file.name if step is None else f"step-{step:08d}-{file.name}"
    target = Path("files") / f"run-{place}" / name
    (out / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / target)
    return target.as_posix()


def _events(runs: Sequence[Run]) -> str:
    found = [(place, event) for place, run in enumerate(runs) for event in run.events]
    if not found:
        return ""
    # Of one run as they were written, the newest first; several runs step by step.
    found = found[::-1] if len(runs) == 1 else sorted(found, key=lambda pair: -pair[1]["step"])
    rows = []
    for place, event in found[:MOST_EVENTS]:
        loud = " class=loud" if event["event"] in RATHER_LOUD else ""
        run = f"<td>{_chip(place)}{html.escape(runs[place].name)}</td>" if len(runs) > 1 else ""
        numbers = "".join(f"<td class=n>{_measured(event, key)}</td>" for key in ("loss", "grad_norm"))
        rows.append(
            f"<tr>{run}<td class=n>{event['step']:,}</td><td{loud}>{html.escape(event['event'])}</td>{numbers}"
            f"<td>{_details(event)}</td></tr>"
        )
    head = f"{'<th>run</th>' if len(runs) > 1 else ''}<th class=n>step</th><th>event</th><th class=n>loss</th>"
    left = len(found) - MOST_EVENTS
    return (
        f'<h2>Events</h2>\n<div class=scroll><table id="events"><tr>{head}<th class=n>gradient norm</th>'
        f"<th>details</th></tr>\n{chr(10).join(rows)}\n</table></div>"
    ) + (f"<p class=small>{left:,} older ones are not shown.</p>" if left > 0 else "")


def _measured(event: dict[str, Any], key: str) -> str:
    value = event.get(key)
    if is_number(value):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def _details(event: dict[str, Any]) -> str:
    parts = []
    if isinstance(event.get("processes"), int):
        shared = f"{event['processes']} processes, parallel={html.escape(str(event.get('parallel', '?')))}"
        parts.append("1 process" if event["processes"] == 1 else shared)
    if event.get("skipped"):
        parts.append("this step was left out")
    if event.get("note"):
        parts.append(html.escape(str(event["note"])))
    clips = event.get("clips")
    for clip in clips[:MOST_CLIPS] if isinstance(clips, list) else []:
        if isinstance(clip, dict):
            flip = ", mirrored" if clip.get("flip") else ""
            loss = f": loss {_measured(clip, 'loss')}" if "loss" in clip else ""
            name = html.escape(str(clip.get("video", "?")))
            parts.append(f"<code>{name}</code> from frame {html.escape(str(clip.get('start', '?')))}{flip}{loss}")
    if isinstance(clips, list) and len(clips) > MOST_CLIPS:
        parts.append(f"and {len(clips) - MOST_CLIPS} more clips")
    return "<br>".join(parts)


def _configurations(runs: Sequence[Run]) -> str:
    parts = ["<h2>Configuration</h2>"]
    for place, run in enumerate(runs):
        rows = "".join(
            f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(_text(value))}</td></tr>"
            for key, value in run.config.items()
        )
        parts.append(
            f"<details{' open' if len(runs) == 1 else ''}><summary>{_chip(place)}{html.escape(run.name)}: "
            f"<code>{html.escape(str(run.folder))}</code></summary>\n<table class=config>{rows}</table></details>"
        )
    return "\n".join(parts)


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _chip(place: int) -> str:
    return f'<span class="chip" style="background: {colour_of(place)}"></span>'
