"""A static page of an evaluation: the scores, and generated clips beside the real ones that they resemble most."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavita.evaluation.clips import Side
from lavita.evaluation.features.compute import read_pixels
from lavita.evaluation.nearest_clips import Neighbour
from lavita.evaluation.report.table import feature_rows
from lavita.evaluation.result import NUM_SHOWN, Evaluation
from lavita.video.writing import write_video

FPS = 8.0


def write_gallery(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `index.html` and the clips that it shows.

    Args:
        evaluation: what `scores.score` returned, with features.
        folder: of the page; made if missing.

    Returns:
        The page.

    Raises:
        ValueError: where the evaluation has no features to show.
    """
    if "scores" not in evaluation.report:
        raise ValueError("page is set, but has no effect without a metric of features, such as kernel-video")
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    real, generated = evaluation.real, evaluation.generated
    if evaluation.neighbours and real is not None and generated is not None:
        near = evaluation.neighbours[:NUM_SHOWN]
        far = evaluation.neighbours[::-1][:NUM_SHOWN]
        for title, rows, text in (
            ("Nearest", near, "Is the model copying? If it is, the two of a pair show the same events."),
            ("Farthest", far, "The worst: generated clips that no real clip resembles."),
        ):
            pairs = [_pair(row, real, generated, evaluation.resolution, folder, title) for row in rows]
            sections.append(f"<h2>{title}</h2>\n<p>{text}</p>\n<div class=pairs>\n" + "\n".join(pairs) + "\n</div>")
    partial = folder / "index.html.partial"
    partial.write_text(_page(evaluation.report, sections))
    partial.replace(folder / "index.html")
    return folder / "index.html"


def _pair(row: Neighbour, real: Side, generated: Side, resolution: int, folder: Path, title: str) -> str:
    cells = []
    for kind, side, index in (("generated", generated, row.generated), ("real", real, row.real)):
        clip = side.clips[index]
        file = f"clips/{title.lower()}-{row.generated}-{kind}.mp4"
        write_video(folder / file, read_pixels(side, clip, resolution), FPS)
        label = f"{clip.name}, from frame {clip.start}"
        cells.append(
            f'<figure><video src="{file}" autoplay loop muted playsinline></video>'
            f"<figcaption>{kind}<br>{html.escape(label)}</figcaption></figure>"
        )
    return f"<div class=pair>{''.join(cells)}<p>distance {row.distance:.4g}</p></div>"


def _page(report: dict[str, Any], sections: Sequence[str]) -> str:
    protocol = report["protocol"]
    lines = []
    for name, row in report["scores"].items():
        for label, cells in feature_rows(name, row):
            numbers = "".join(f"<td class=n>{html.escape(cell)}</td>" for cell in cells)
            lines.append(f"<tr><td>{html.escape(label)}</td>{numbers}</tr>")
        for quoted in row.get("quoted", ()):
            lines.append(
                f"<tr class=quoted><td>{html.escape(quoted['method'])}</td><td class=n>{quoted['value']}</td>"
                f"<td colspan=4>{html.escape(quoted['source'])}</td></tr>"
            )
    settings = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in sorted(protocol["settings"].items())
    )
    warnings = "".join(f"<p class=warning>{html.escape(text)}</p>" for text in report["warnings"])
    blind = [name for name, row in report["scores"].items() if not row["sees_order_of_frames"]]
    blindness = f"<p>Blind to the order of frames: {html.escape(', '.join(blind))}.</p>" if blind else ""
    near = report["neighbours"]
    copying = ""
    if near and near["other_real"]:
        other = near["other_real"]
        copying = (
            f"<p>Distance to the nearest real clip: {near['median_distance']:.4g} for generated clips, "
            f"{other['median_distance']:.4g} for other real ones (medians). A generated clip is the nearer one in "
            f"{other['chance_that_generated_is_nearer']:.1%} of pairs; 50% is alike, far more is copying.</p>"
        )
    heads = ("value", "95% interval", "limit for many", "real against real", "n real / generated")
    head = "".join(f"<th class=n>{text}</th>" for text in heads)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LAVITA evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
td, th {{ border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }} .quoted {{ opacity: .7; font-style: italic; }}
.warning {{ color: #b60; }} .pairs {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 6px; width: 320px; }}
.pair p {{ grid-column: 1 / 3; margin: 0; font-size: .85rem; }} figure {{ margin: 0; }}
figcaption {{ font-size: .75rem; opacity: .8; overflow-wrap: anywhere; }}
video {{ width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px; background: #8883; }}
</style></head><body>
<h1>Evaluation</h1>
<p>{html.escape(protocol["generated"])} against {html.escape(protocol["real"])}: clips of {protocol["num_frames"]}
frames at interval {protocol["frame_interval"]}, {protocol["resolution"]}x{protocol["resolution"]} pixels.</p>
{warnings}
<table><tr><th>score</th>{head}</tr>
{chr(10).join(lines)}
</table>
<p>The interval covers the mean score over other samples of these numbers, which is biased like the score itself;
the limit is an estimate for infinitely many. What real clips score against other real ones is the best there is.</p>
{blindness}{copying}
{chr(10).join(sections)}
<h2>Protocol</h2>
<table>{settings}</table>
</body></html>
"""
