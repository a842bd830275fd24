"""Table 3 of the paper: parameters and operations of the four variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lavita.models.presets import preset_sizes
from lavita.studies.complexity import MLP, TABLE3_BATCH, Complexity, measure, truncated

TABLE3_PAPER = {1: (673.68, 5572.69), 2: (673.68, 5572.69), 3: (676.33, 6153.15), 4: (676.44, 1545.15)}
"""Parameters in millions and FLOPs in billions of each variant, as printed in the paper."""


@dataclass(frozen=True)
class Table3Row:
    """One row of Table 3: the paper's figures and our count."""

    variant: int
    paper_parameters: float
    """Parameters in millions."""
    paper_flops: float
    """FLOPs in billions."""
    counted: Complexity


def table3() -> list[Table3Row]:
    """Counts the four variants at XL/2, unconditional, on a batch of (3, 16, 4, 32, 32)."""
    return [
        Table3Row(variant, *paper, measure({**preset_sizes("XL/2", variant), "variant": variant}, TABLE3_BATCH))
        for variant, paper in TABLE3_PAPER.items()
    ]


def table3_to_json(rows: Sequence[Table3Row]) -> list[dict[str, Any]]:
    """The rows ready for JSON, as plain counts instead of millions."""
    return [
        {
            "variant": row.variant,
            "paper": {"num_parameters": round(row.paper_parameters * 1e6), "macs": round(row.paper_flops * 1e9)},
            "counted_alike": {"num_parameters": row.counted.table3_parameters, "macs": row.counted.table3_macs},
            "executed": {"num_parameters": row.counted.num_parameters, "macs": row.counted.macs},
        }
        for row in rows
    ]


def print_table3(rows: Sequence[Table3Row], console: Console | None = None) -> None:
    """Prints the paper's Table 3 next to our count, and explains the differences."""
    console = console or Console()
    table = Table(title=f"Table 3: XL/2, unconditional, {TABLE3_BATCH} clips of 16 x 4 x 32 x 32", title_justify="left")
    for heading in (
        "variant",
        "blocks",
        "paper\nparams, M",
        "\nFLOPs, G",
        "ours\nparams, M",
        "\nFLOPs, G",
        "executed\nMACs, G",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        counted = row.counted
        table.add_row(
            str(row.variant),
            str(counted.config["num_blocks"]),
            f"{row.paper_parameters:.2f}",
            f"{row.paper_flops:,.2f}",
            truncated(counted.table3_parameters, 10**6),
            truncated(counted.table3_macs, 10**9),
            f"{counted.macs / 1e9:,.2f}",
        )
    console.print(table)
    third, fourth = rows[2].counted, rows[3].counted
    mlp = fourth.parts[MLP].macs
    for note in (
        "FLOPs: the paper counts multiply-accumulates as the profiler thop does, and so do we here: linear and "
        "convolution layers, 2 per element of a LayerNorm, no attention products, S-AdaLN layers repeated for every "
        "frame and every patch, truncated decimals.",
        "executed: the multiply-accumulates that our model really executes, with the attention products, and with the "
        "S-AdaLN vectors computed once per sample.",
        "Variant 3: counted without its patch embedding, as in the paper; with it, the model has "
        f"{third.num_parameters / 1e6:.2f} M parameters.",
        f"Variant 4: {rows[3].paper_flops:,.2f} G cannot follow from the text. The MLPs alone of its "
        f"{fourth.config['num_blocks']} blocks over {fourth.num_tokens:,} tokens are "
        f"{mlp / fourth.batch_size / 1e9:,.0f} G per clip, {mlp / 1e9:,.0f} G for {fourth.batch_size}. Ours is built "
        "as the text describes it.",
    ):
        console.print(note, highlight=False)
