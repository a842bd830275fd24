"""Draws curves of several runs as SVG to be embedded in a page, in the page's own colours and fonts."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = ("#2a6fdb", "#e07b00", "#1f9d62", "#c2388f", "#8458d8", "#a5790a", "#0aa0b0", "#d2403a")
INK = "#010203"  # placeholder, replaced by the page's text colour
SIZE = (5.4, 3.0)  # inches of 72 units
MAX_BINS = 600  # of a long curve: the extreme values of each bin are drawn, so that no spike is lost
SMOOTHED_FROM = 50  # values; shorter curves are drawn without an average

Axes = Any


@dataclass(frozen=True)
class Curve:
    """One line of a panel: values over steps."""

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    """Standard errors of the values."""


def colour_of(index: int) -> str:
    """The colour of the run with this index in the report."""
    return COLOURS[index % len(COLOURS)]


def smooth(values: Sequence[float]) -> list[float]:
    """A bias-corrected exponential average over about a 25th of the values.

    Args:
        values: finite numbers.
    """
    keep = 1 - 1 / max(1.0, len(values) / 25)
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Reduces a long curve to the lowest and the highest value of each of `MAX_BINS` bins; keeps a short one."""
    if len(steps) <= 2 * MAX_BINS:
        return list(steps), list(values)
    x, y = np.asarray(steps), np.asarray(values)
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), MAX_BINS):
        kept += sorted({int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])})
    return x[kept].tolist(), y[kept].tolist()


def draw_panel(
    title: str,
    curves: Sequence[Curve],
    smoothed: bool = False,
    points: Sequence[Curve] = (),
    marks: Sequence[tuple[float, str]] = (),
    stops: Sequence[tuple[float, str]] = (),
) -> str:
    """Draws one quantity over the steps.

    Args:
        title: name of the quantity, with its unit.
        curves: one curve per run; values that are not finite are left out.
        smoothed: draw the values pale, and their average on top.
        points: curves drawn as diamonds.
        marks: step and colour of each resume, drawn as a dotted line.
        stops: step and colour of each alarming event, such as a spike, drawn as a cross at the top.

    Returns:
        SVG; empty if there is nothing to draw.
    """
    drawn = [_finite(curve) for curve in (*curves, *points)]
    if not any(curve.steps for curve in drawn):
        return ""
    with _Panel(title) as panel:
        axes = panel.axes
        for step, colour in marks:
            axes.axvline(step, color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
        for curve in drawn[: len(curves)]:
            _draw_curve(axes, curve, smoothed)
        for curve in drawn[len(curves) :]:
            axes.plot(curve.steps, curve.values, "D", color=curve.colour, markersize=4, markeredgecolor=INK)
        for step, colour in stops:
            axes.plot([step], [0.97], "x", color=colour, markersize=6, transform=axes.get_xaxis_transform())
        _scale(axes, [value for curve in drawn for value in curve.values])
        axes.set_xlabel("step")
    return panel.svg


def draw_levels(title: str, steps: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    """Draws one curve over the steps for each noise level.

    Args:
        title: name of the quantity.
        steps: the steps of the measurements.
        rows: the values of each measurement, from the least to the most noise.
    """
    from matplotlib import colormaps

    count = len(rows[-1])
    colours = [colormaps["plasma"](0.2 + 0.65 * index / max(1, count - 1)) for index in range(count)]
    with _Panel(title) as panel:
        for index in range(count):
            pairs = [(step, row[index]) for step, row in zip(steps, rows, strict=True) if len(row) == count]
            panel.axes.plot(
                *zip(*pairs, strict=True),
                color=colours[index],
                linewidth=1.4,
                marker="o",
                markersize=2.5,
                label=level_name(index, count),
            )
        _scale(panel.axes, [value for row in rows for value in row])
        panel.axes.set_xlabel("step")
        panel.axes.legend(
            title="noise", reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8
        )
    return panel.svg


def draw_profile(title: str, curves: Sequence[tuple[Curve, Sequence[float] | None]]) -> str:
    """Draws a quantity over the noise levels: the last measurement of each run, and its first one dashed and pale."""
    with _Panel(title) as panel:
        for curve, first in curves:
            if first is not None:
                panel.axes.plot(curve.steps, first, color=curve.colour, linewidth=1.2, linestyle="--", alpha=0.5)
            panel.axes.plot(curve.steps, curve.values, color=curve.colour, linewidth=1.8, marker="o", markersize=4)
        _scale(panel.axes, [value for curve, first in curves for value in (*curve.values, *(first or ()))])
        count = len(curves[0][0].steps)
        panel.axes.set_xticks(range(count), [level_name(index, count) for index in range(count)], fontsize=7)
        panel.axes.set_xlabel("part of the noise schedule")
    return panel.svg


def level_name(index: int, count: int) -> str:
    """The part of the noise schedule that a noise level covers."""
    return f"{100 * index // count}-{100 * (index + 1) // count}%"


def _finite(curve: Curve) -> Curve:
    kept = [index for index, value in enumerate(curve.values) if np.isfinite(value)]
    errors = None if curve.errors is None else [curve.errors[index] for index in kept]
    return Curve(
        curve.label,
        curve.colour,
        [curve.steps[index] for index in kept],
        [curve.values[index] for index in kept],
        errors,
    )


def _draw_curve(axes: Axes, curve: Curve, smoothed: bool) -> None:
    style: dict[str, Any] = {"color": curve.colour, "linewidth": 1.5}
    if curve.errors is not None:
        axes.errorbar(curve.steps, curve.values, curve.errors, marker="o", markersize=4, capsize=3, **style)
        return
    if len(curve.steps) <= 40:
        style.update(marker="o", markersize=3)
    if smoothed and len(curve.steps) >= SMOOTHED_FROM:
        axes.plot(*thin(curve.steps, curve.values), color=curve.colour, linewidth=0.8, alpha=0.35)
        style = {"color": curve.colour, "linewidth": 1.8}
        axes.plot(*thin(curve.steps, smooth(curve.values)), **style)
        return
    axes.plot(*thin(curve.steps, curve.values), **style)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Makes the axis logarithmic if the values are positive and span more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [value for value in values if np.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 10:
        axes.set_yscale("log")
        wide = max(finite) / min(finite) > 1e4
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


class _Panel:
    """A figure that is rendered to SVG, in the page's own colours, when its `with` block ends."""

    def __init__(self, title: str) -> None:
        self.title, self.svg = title, ""

    def __enter__(self) -> _Panel:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        style: Any = {"svg.fonttype": "none", "svg.hashsalt": self.title, "font.size": 9}
        style.update(dict.fromkeys(inks, INK))
        self._style = rc_context(style)
        self._style.__enter__()
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        self.axes: Axes = figure.subplots()
        self.axes.set_title(self.title, fontsize=10, loc="left", parse_math=False)
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.grid(alpha=0.25, linewidth=0.6)
        self.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        self._figure = figure
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.svg = self._render()
        finally:
            self._style.__exit__(kind, value, trace)

    def _render(self) -> str:
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self._figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
        svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the rest of the page
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids must be unique on a page
        svg = re.sub(
            r'<svg ([^>]*?)(?:width|height)="[^"]*" ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1\2", svg, count=1
        )
        label = html.escape(self.title, quote=True)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
