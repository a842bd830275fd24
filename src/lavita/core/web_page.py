"""The frame, style and building blocks that all our HTML pages share."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.2rem 0 .5rem; } h3 { margin: 1rem 0 .25rem; font-size: 1rem; }
.small { font-size: .85rem; opacity: .8; } .warning { color: #b60; } .bad { color: #c33; font-weight: 600; }
.cards { display: flex; gap: 1rem; flex-wrap: wrap; margin-top: 1rem; }
.card { flex: 1 1 20rem; max-width: 40rem; padding: .6rem 1rem; border: 1px solid #8886; border-top-width: 5px;
  border-radius: 8px; }
.card h3 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; } .card table { width: 100%; }
.big { font-size: 2rem; font-weight: 600; }
progress { width: 100%; height: .5rem; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid #8884; padding: .2rem .6rem .2rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } .n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: .75rem; }
.panels svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
.videos { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
video { width: 144px; height: 144px; image-rendering: pixelated; border-radius: 4px; background: #8883; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; } img { max-width: 100%; }
code { font-size: .85rem; } summary { cursor: pointer; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A complete HTML document.

    Args:
        title: plain text, shown by the browser; the body has its own heading.
        body: HTML.
        style: CSS rules beside the shared ones.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def video(source: str) -> str:
    """A video that plays by itself in a loop; `source` is relative to the page."""
    return f'<video src="{html.escape(source)}" autoplay loop muted playsinline></video>'


def row(cells: Iterable[str], numbers: bool = False, tag: str = "td") -> str:
    """A table row of plain-text cells; all but the first are aligned as numbers where `numbers` is set."""
    parts = [
        f"<{tag}{' class=n' if numbers and place else ''}>{html.escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    ]
    return f"<tr>{''.join(parts)}</tr>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table of plain-text cells; see `row`."""
    lines = [row(head, numbers, "th"), *(row(cells, numbers) for cells in rows)]
    return "<table>" + "\n".join(lines) + "</table>"
