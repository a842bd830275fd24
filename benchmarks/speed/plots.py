"""Plots of a benchmark: ratios to the floor, and scaling."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import Section

BARS = "times_the_floor.png"
SCALING = "scaling.png"
OURS_COLOUR, BASELINE_COLOUR, THEORY_COLOUR = "#2b6cb0", "#a0aec0", "#718096"


def draw(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Draws the plots of the sections into an existing folder."""
    files = []
    floored = [section for section in sections if section.base == "the floor"]
    barred = [section for section in floored if any(row.floor for row in section.rows)]
    if barred:
        files.append(_bars(barred, folder / BARS))
    files += [_scaling(section, folder / SCALING) for section in sections if section.name == "scaling"]
    return files


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(sections: Sequence[Section], path: Path) -> Path:
    """One panel per section: medians, with the range of the rounds."""
    counts = [sum(row.floor is not None for row in section.rows) for section in sections]
    figure = _figure(9, 0.9 * len(sections) + 0.32 * sum(counts))
    panels = figure.subplots(len(sections), 1, squeeze=False, height_ratios=[count + 1 for count in counts])[:, 0]
    for section, panel in zip(sections, panels, strict=True):
        rows = [(row, section.ratio(row, row.floor)) for row in section.rows]
        shown = [(row, ratio) for row, ratio in rows if ratio is not None]
        medians = [ratio.median for _, ratio in shown]
        errors = [[ratio.median - ratio.least for _, ratio in shown], [ratio.most - ratio.median for _, ratio in shown]]
        baselines = ("plain", "diffusers")
        colours = [BASELINE_COLOUR if row.name.startswith(baselines) else OURS_COLOUR for row, _ in shown]
        positions = range(len(shown))
        panel.barh(positions, medians, xerr=errors, color=colours, height=0.7, error_kw={"elinewidth": 1})
        for position, (_, ratio) in zip(positions, shown, strict=True):
            panel.annotate(f" {ratio.median:.2f}", (ratio.most, position), va="center", fontsize=8)
        panel.set_yticks(list(positions), [row.name for row, _ in shown], fontsize=8)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.12 * max(1.0, *(ratio.most for _, ratio in shown)))
        panel.set_title(f"{section.title}: times its floor", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _scaling(section: Section, path: Path) -> Path:
    """One panel per axis: measured points, and a line of the multiply-accumulates through their middle."""
    axes: dict[str, Any] = section.facts["axes"]
    figure = _figure(3.2 * len(axes), 3.4)
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, (axis, values) in zip(panels, axes.items(), strict=True):
        sizes, seconds, macs = values["sizes"], values["seconds"], values["macs"]
        # The rate that fits the formula's costs to the measured seconds best.
        rate = statistics.geometric_mean([second / mac for second, mac in zip(seconds, macs, strict=True)])
        panel.plot(sizes, [mac * rate for mac in macs], color=THEORY_COLOUR, label=f"formula: {values['theory']:.2f}")
        panel.plot(sizes, seconds, "o", color=OURS_COLOUR, label=f"measured: {values['measured']:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set_ylabel("seconds per forward pass" if panel is panels[0] else "")
        panel.legend(title="exponent", fontsize=8, title_fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path
