"""Table 3 of the paper: parameters and operations of the four variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lavita.models.presets import preset_sizes
from lavita.studies.complexity import TABLE3_BATCH, Complexity, measure, truncated

TABLE3_PAPER = {1: (673.68, 5572.69), 2: (673.68, 5572.69), 3: (676.33, 6153.15), 4: (676.44, 1545.15)}
"""Parameters in millions and FLOPs in billions of each variant, as printed in the paper."""
PRESETS = {1: "XL/2", 2: "XL/2", 3: "XL/2", 4: "XL/4"}
"""The presets that the paper's figures follow from: those of Variant 4 only at patch size 4."""


@dataclass(frozen=True)
class Table3Row:
    """One row of Table 3: the paper's figures and our count."""

    variant: int
    preset: str
    paper_parameters: float
    """Parameters in millions."""
    paper_flops: float
    """FLOPs in billions."""
    counted: Complexity


def table3() -> list[Table3Row]:
    """Counts the four variants at XL, unconditional, on a batch of (3, 16, 4, 32, 32)."""
    return [
        Table3Row(variant, PRESETS[variant], *paper, count_variant(variant, PRESETS[variant]))
        for variant, paper in TABLE3_PAPER.items()
    ]


def count_variant(variant: int, preset: str) -> Complexity:
    """Parameters and operations of a variant of a preset on the batch of Table 3."""
    return measure({**preset_sizes(preset, variant), "variant": variant}, TABLE3_BATCH)


def table3_to_json(rows: Sequence[Table3Row]) -> list[dict[str, Any]]:
    """The rows ready for JSON, as plain counts instead of millions."""
    return [
        {
            "variant": row.variant,
            "preset": row.preset,
            "paper": {"num_parameters": round(row.paper_parameters * 1e6), "macs": round(row.paper_flops * 1e9)},
            "counted_alike": {"num_parameters": row.counted.table3_parameters, "macs": row.counted.table3_macs},
            "executed": {"num_parameters": row.counted.num_parameters, "macs": row.counted.macs},
        }
        for row in rows
    ]


def print_table3(rows: Sequence[Table3Row], console: Console | None = None) -> None:
    """Prints the paper's Table 3 next to our count, and explains the differences."""
    console = console or Console()
    table = Table(
        title=f"Table 3: XL, unconditional, {TABLE3_BATCH} clips of 16 x 4 x 32 x 32",
        title_justify="left",
        pad_edge=False,
    )
    for heading in ("variant", "patch", "blocks", "paper\nM", "\nG", "ours\nM", "\nG", "executed\nG"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.variant),
            str(row.counted.config["patch_size"]),
            str(row.counted.config["num_blocks"]),
            f"{row.paper_parameters:.2f}",
            f"{row.paper_flops:,.2f}",
            truncated(row.counted.table3_parameters, 10**6),
            truncated(row.counted.table3_macs, 10**9),
            f"{row.counted.macs / 1e9:,.2f}",
        )
    console.print(table)
    third, fourth = (rows[index].counted for index in (2, 3))
    small = count_variant(4, "XL/2")
    for note in (
        "M: millions of parameters. G: billions of operations, the FLOPs of the paper, which are multiply-accumulates "
        "as the profiler thop counts them, and here, too: linear and convolution layers, 2 per element of a LayerNorm, "
        "no attention products, S-AdaLN layers repeated for every frame and every patch, truncated decimals.",
        "executed: the multiply-accumulates that our model really executes, with the attention products, and with the "
        "S-AdaLN vectors computed once per sample.",
        "Variants 3 and 4: counted without their patch embeddings, as in the paper; with them, the models have "
        f"{third.num_parameters / 1e6:.2f} and {fourth.num_parameters / 1e6:.2f} M parameters.",
        "Variant 4: the paper's figures are those of patch size 4, the other variants' those of patch size 2, so its "
        "quarter of the FLOPs is the patch's. At patch size 2, Variant 4 has "
        f"{truncated(small.table3_parameters, 10**6)} M parameters and {truncated(small.table3_macs, 10**9)} G.",
    ):
        console.print(note, highlight=False)
