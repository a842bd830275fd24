"""The page of an evaluation: its scores, and pairs of a generated clip and the real clip nearest to it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavita.core.files import write_text
from lavita.core.web_page import page, row, table, video
from lavita.evaluation.clips import Selection, read_pixels
from lavita.evaluation.nearest_clips import Neighbour
from lavita.evaluation.report.table import feature_rows
from lavita.evaluation.result import NUM_SHOWN, Evaluation
from lavita.video.writing import write_video

FPS = 8.0
_STYLE = """
.quoted { opacity: .7; font-style: italic; } .pairs { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; width: 320px; }
.pair video { width: 100%; height: auto; aspect-ratio: 1; }
.pair p { grid-column: 1 / 3; margin: 0; font-size: .85rem; }
"""


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `index.html` and the clips that it shows.

    Args:
        evaluation: an evaluation with metrics of features.
        folder: folder of the page; made if missing.

    Returns:
        The page.
    """
    sections = []
    if evaluation.neighbours and evaluation.selection is not None:
        near, far = evaluation.neighbours[:NUM_SHOWN], evaluation.neighbours[::-1][:NUM_SHOWN]
        for title, rows, text in (
            ("Nearest", near, "Is the model copying? If it is, both clips of a pair show the same events."),
            ("Farthest", far, "The worst: generated clips that are unlike any real clip."),
        ):
            pairs = [_pair(pair, evaluation.selection, folder, title) for pair in rows]
            sections.append(f"<h2>{title}</h2>\n<p>{text}</p>\n<div class=pairs>\n" + "\n".join(pairs) + "\n</div>")
    body = _body(evaluation.report, sections)
    write_text(folder / "index.html", page("LAVITA evaluation", body, _STYLE))
    return folder / "index.html"


def _pair(pair: Neighbour, selection: Selection, folder: Path, title: str) -> str:
    figures = []
    for kind, index in (("generated", pair.generated), ("real", pair.real)):
        clips = selection.sets[kind]
        clip = clips.clips[index]
        file = f"clips/{title.lower()}-{pair.generated}-{kind}.mp4"
        write_video(folder / file, read_pixels(clips, clip, selection.resolution), FPS)
        caption = f"{kind}<br>{html.escape(clip.name)}, from frame {clip.start}"
        figures.append(f"<figure>{video(file)}<figcaption>{caption}</figcaption></figure>")
    return f"<div class=pair>{''.join(figures)}<p>distance {pair.distance:.4g}</p></div>"


def _body(report: dict[str, Any], sections: Sequence[str]) -> str:
    protocol = report["protocol"]
    heading = ("score", "value", "95% interval", "limit for many", "real against real", "n real / generated")
    lines = [row(heading, numbers=True, tag="th")]
    for name, score in report["scores"].items():
        lines += [row((label, *cells), numbers=True) for label, cells in feature_rows(name, score)]
        for quoted in score.get("quoted", ()):
            lines.append(
                f"<tr class=quoted><td>{html.escape(quoted['method'])}</td><td class=n>{quoted['value']}</td>"
                f"<td colspan=4>{html.escape(quoted['source'])}</td></tr>"
            )
    warnings = "".join(f"<p class=warning>{html.escape(text)}</p>" for text in report["warnings"])
    blind = [name for name, score in report["scores"].items() if not score["sees_order_of_frames"]]
    blindness = f"<p>Blind to the order of frames: {html.escape(', '.join(blind))}.</p>" if blind else ""
    near = report["neighbours"]
    copying = ""
    if near and near["other_real"]:
        other = near["other_real"]
        copying = (
            f"<p>Median distance to the nearest real clip: {near['median_distance']:.4g} from generated clips, "
            f"{other['median_distance']:.4g} from other real clips. The generated clip is nearer in "
            f"{other['chance_that_generated_is_nearer']:.1%} of pairs; 50% is alike, far more means copying.</p>"
        )
    settings = table(("field", "value"), [(key, str(value)) for key, value in sorted(protocol["settings"].items())])
    return f"""<h1>Evaluation</h1>
<p>{html.escape(protocol["generated"])} against {html.escape(protocol["real"])}: clips of {protocol["num_frames"]}
frames at interval {protocol["frame_interval"]}, {protocol["resolution"]}x{protocol["resolution"]} pixels.</p>
{warnings}
<div class=scroll><table>
{chr(10).join(lines)}
</table></div>
<p>The interval covers the mean score over other samples of the same size, which has the same bias as the score; the
limit is an estimate for infinitely many samples. No model can be expected to score better than real clips do against
other real clips.</p>
{blindness}{copying}
{chr(10).join(sections)}
<h2>Protocol</h2>
{settings}"""
