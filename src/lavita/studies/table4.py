"""Table 4 of the paper, quoted: what to compare the study of variants with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lavita.evaluation.report.paper_numbers import VARIANT_FVD


def print_table4(console: Console | None = None) -> None:
    """Prints the FVD of the four variants on FaceForensics, as the paper states it."""
    table = Table(title="Table 4, quoted from the paper: FVD on FaceForensics", title_justify="left")
    for heading in ("steps", *(f"Variant {number}" for number in (1, 2, 3, 4))):
        table.add_column(heading, justify="right")
    for thousands, values in VARIANT_FVD.items():
        table.add_row(f"{thousands}k", *(f"{value:.2f}" for value in values))
    console = console or Console()
    console.print(table)
    console.print(
        "We have measured none of these. Variant 4 may have had patch size 4 there, and the others 2: see lavita info "
        "--table 3.",
        highlight=False,
    )
