"""CONTRIBUTING.md names files and definitions: they must exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_answers_in_contributing_exist() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:Where|Which|What|How) .*\?.*", page, flags=re.MULTILINE)
    assert len(rows) == 12
    for row in rows:
        answer = row.split("|")[2]
        found = re.findall(r"`([a-z_/]+\.py)`(?:: `(\w+)`)?", answer)
        assert found, row
        for file, name in found:
            tree = ast.parse((REPOSITORY / "src" / "lavita" / file).read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert not name or name in defined, f"{file} does not define {name}"
