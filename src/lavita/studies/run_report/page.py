"""The page that `lavita report` writes: progress, curves, samples, events and configuration of one or more runs."""

from __future__ import annotations

import html
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavita.core.config import ConfigError
from lavita.core.files import inside, write_text
from lavita.core.web_page import page, video
from lavita.studies.run_report.charts import ALARMING_EVENTS, make_charts
from lavita.studies.run_report.curves import SMOOTHED_FROM, colour_of, smooth
from lavita.studies.run_report.reading import Run, clock, is_number, read_runs

MAX_CONTACT_SHEETS = 12  # per run on the page: the newest, the oldest, and evenly spaced ones in between
MAX_EVENTS = 200
MAX_CLIPS = 8  # named per event
MAX_VIDEOS = 48  # that play at the same time: browsers have a limit
STYLE = """
body { max-width: 1240px; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; padding: .3rem;
  position: sticky; top: 0; background: Canvas; }
.chip { display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .4em; }
.sheets td { padding: .3rem .6rem .3rem 0; border: 0; }
.sheets img { display: block; width: 100%; min-width: 240px; max-width: 540px; border-radius: 4px; }
"""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes `index.html`, and copies of the pictures and videos that it shows into `files/` next to it.

    Args:
        folders: the folders of runs, finished or not.
        out: folder of the page; created if missing. Other files in it are kept.

    Returns:
        The page.

    Raises:
        ConfigError: if a folder is not a run.
    """
    if not folders:
        raise ConfigError("give the folder of at least one run")
    runs = read_runs(folders)
    write_text(out / "index.html", _page(runs, out, time.time()))
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
    cards = "\n".join(_card(index, run, now) for index, run in enumerate(runs))
    body = f"""<h1>{html.escape(title)}</h1>
<p class=small>Written {written} by <code>lavita report</code>; run the same command to update it.</p>
<div class="cards">
{cards}
</div>
{chr(10).join(section for section in sections if section)}"""
    return page(f"LAVITA: {title}", body, STYLE)


def _card(index: int, run: Run, now: float) -> str:
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
    return f"""<div class="card" style="border-top-color: {colour_of(index)}"><h3>{html.escape(run.name)}</h3>
<div class=small>{html.escape(run.state(now))}</div>{share}
<table>{body}</table></div>"""


def _learning(run: Run) -> list[tuple[str, str]]:
    """The last loss, and the last and the lowest validation loss and scores."""
    rows = []
    losses = [row["loss"] for row in run.metrics if is_number(row.get("loss"))]
    if losses:
        average = len(losses) >= SMOOTHED_FROM
        rows.append(("loss, averaged" if average else "loss", f"{(smooth(losses) if average else losses)[-1]:.4f}"))
    elif not run.metrics:
        rows.append(("loss", "nothing logged yet"))
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
    """The configuration fields in which the runs differ."""
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
    heads = "".join(f"<th>{_chip(index)}{html.escape(run.name)}</th>" for index, run in enumerate(runs))
    return f'<h2>What differs</h2>\n<div class="scroll"><table id="differences"><tr><th>field</th>{heads}</tr>\n' + (
        "\n".join(rows) + "\n</table></div>"
    )


def _curves(runs: Sequence[Run]) -> str:
    charts = make_charts(runs)
    if not any(charts):
        return "<h2>Curves</h2>\n<p>Nothing has been logged yet.</p>"
    legend = "".join(
        f"<span>{_chip(index)}{html.escape(run.name)}</span>" for index, run in enumerate(runs) if len(runs) > 1
    )
    parts = [f'<h2>Curves</h2>\n<div class="legend">{legend}</div>' if legend else "<h2>Curves</h2>"]
    parts.append(
        "<p class=small>Pale: logged values; bold: their average. Diamonds: validation loss. Dotted lines: the run "
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
    """The newest samples as videos, and the contact sheets over time."""
    if not any(run.samples for run in runs):
        return ""
    parts = ["<h2>Samples</h2>", "<p class=small>All with the same seeds and conditions.</p>"]
    most = max(1, MAX_VIDEOS // len(runs))
    for index, run in enumerate(runs):
        if run.samples:
            step, sheet = run.samples[-1]
            videos = sorted(sheet.with_suffix("").glob("*.mp4"), key=lambda file: (len(file.stem), file.stem))[:most]
            tags = "".join(video(_copy(file, out, index, step)) for file in videos)
            if tags:
                parts.append(f"<h3>{_chip(index)}{html.escape(run.name)}, step {step:,}</h3>")
                parts.append(f'<div class="videos">{tags}</div>')
    chosen = [dict(_spread(run.samples)) for run in runs]
    parts += ["<h3>Over time</h3>", _strip(chosen[0], out) if len(runs) == 1 else _sheet_table(runs, chosen, out)]
    left = sum(len(run.samples) - len(sheets) for run, sheets in zip(runs, chosen, strict=True))
    if left:
        parts.append(f"<p class=small>{left} more sets of samples are not shown.</p>")
    return "\n".join(parts)


def _strip(sheets: dict[int, Path], out: Path) -> str:
    """The contact sheets of one run, newest first."""
    figures = "\n".join(
        f"<figure>{_picture(sheets[step], out, 0, step)}<figcaption>step {step:,}</figcaption></figure>"
        for step in sorted(sheets, reverse=True)
    )
    return f'<div class="panels sheets">\n{figures}\n</div>'


def _sheet_table(runs: Sequence[Run], chosen: Sequence[dict[int, Path]], out: Path) -> str:
    """The contact sheets of several runs: one row per step, newest first, and one column per run."""
    heads = "".join(f"<th>{_chip(index)}{html.escape(run.name)}</th>" for index, run in enumerate(runs))
    rows = []
    for step in sorted({step for sheets in chosen for step in sheets}, reverse=True):
        pictures = (
            _picture(sheets[step], out, index, step) if step in sheets else "" for index, sheets in enumerate(chosen)
        )
        rows.append(f"<tr><td class=n>{step:,}</td>{''.join(f'<td>{picture}</td>' for picture in pictures)}</tr>")
    return f"<div class=scroll><table class=sheets><tr><th>step</th>{heads}</tr>\n{chr(10).join(rows)}\n</table></div>"


def _picture(sheet: Path, out: Path, index: int, step: int) -> str:
    source = _copy(sheet, out, index, None)
    return f'<a href="{source}"><img src="{source}" alt="samples of step {step}" loading="lazy"></a>'


def _spread(samples: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    if len(samples) <= MAX_CONTACT_SHEETS:
        return list(samples)
    indices = {round(index * (len(samples) - 1) / (MAX_CONTACT_SHEETS - 1)) for index in range(MAX_CONTACT_SHEETS)}
    return [samples[index] for index in sorted(indices)]


def _copy(file: Path, out: Path, index: int, step: int | None) -> str:
    """Copies a file into `files/`, and returns its path relative to the page."""
    name = file.name if step is None else f"step-{step:08d}-{file.name}"
    # A link out of the run's folder, which may be somebody else's, could put any file on the page.
    depth = 0 if step is None else 1
    inside(file.parents[depth], file.relative_to(file.parents[depth]).as_posix())
    target = Path("files") / f"run-{index}" / name
    (out / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / target)
    return target.as_posix()


def _events(runs: Sequence[Run]) -> str:
    found = [(index, event) for index, run in enumerate(runs) for event in run.events]
    if not found:
        return ""
    # Newest first; several runs are merged by step.
    found = found[::-1] if len(runs) == 1 else sorted(found, key=lambda pair: -pair[1]["step"])
    rows = []
    for index, event in found[:MAX_EVENTS]:
        mark = " class=bad" if event["event"] in ALARMING_EVENTS else ""
        run = f"<td>{_chip(index)}{html.escape(runs[index].name)}</td>" if len(runs) > 1 else ""
        numbers = "".join(f"<td class=n>{_measured(event, key)}</td>" for key in ("loss", "grad_norm"))
        rows.append(
            f"<tr>{run}<td class=n>{event['step']:,}</td><td{mark}>{html.escape(event['event'])}</td>{numbers}"
            f"<td>{_details(event)}</td></tr>"
        )
    head = f"{'<th>run</th>' if len(runs) > 1 else ''}<th class=n>step</th><th>event</th><th class=n>loss</th>"
    left = len(found) - MAX_EVENTS
    return (
        f'<h2>Events</h2>\n<div class=scroll><table id="events"><tr>{head}<th class=n>gradient norm</th>'
        f"<th>details</th></tr>\n{chr(10).join(rows)}\n</table></div>"
    ) + (f"<p class=small>{left:,} older events are not shown.</p>" if left > 0 else "")


def _measured(event: dict[str, Any], key: str) -> str:
    value = event.get(key)
    if is_number(value):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def _details(event: dict[str, Any]) -> str:
    parts = []
    if isinstance(event.get("processes"), int):
        text = f"{event['processes']} processes, parallel={html.escape(str(event.get('parallel', '?')))}"
        parts.append("1 process" if event["processes"] == 1 else text)
    if event.get("skipped"):
        parts.append("this step was skipped")
    if event.get("note"):
        parts.append(html.escape(str(event["note"])))
    clips = event.get("clips")
    for clip in clips[:MAX_CLIPS] if isinstance(clips, list) else []:
        if isinstance(clip, dict):
            flip = ", mirrored" if clip.get("flip") else ""
            loss = f": loss {_measured(clip, 'loss')}" if "loss" in clip else ""
            name = html.escape(str(clip.get("video", "?")))
            parts.append(f"<code>{name}</code> from frame {html.escape(str(clip.get('start', '?')))}{flip}{loss}")
    if isinstance(clips, list) and len(clips) > MAX_CLIPS:
        parts.append(f"and {len(clips) - MAX_CLIPS} more clips")
    return "<br>".join(parts)


def _configurations(runs: Sequence[Run]) -> str:
    parts = ["<h2>Configuration</h2>"]
    for index, run in enumerate(runs):
        rows = "".join(
            f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(_text(value))}</td></tr>"
            for key, value in run.config.items()
        )
        parts.append(
            f"<details{' open' if len(runs) == 1 else ''}><summary>{_chip(index)}{html.escape(run.name)}: "
            f"<code>{html.escape(str(run.folder))}</code></summary>\n<table class=config>{rows}</table></details>"
        )
    return "\n".join(parts)


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _chip(index: int) -> str:
    return f'<span class="chip" style="background: {colour_of(index)}"></span>'
