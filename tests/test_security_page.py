"""docs/security.md: every line names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "security.md"


def lines_of(page: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The claims of the page: rows of its tables, each with the tests in its last column, as (file, function)."""
    claims = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or set("".join(cells)) <= set("-: ") or cells[-1] == "test":
            continue
        claims.append((line, re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", cells[-1])))
    return claims


def problems_of(page: str) -> list[str]:
    """What is wrong with the claims of a page."""
    found = []
    for line, tests in lines_of(page):
        if not tests:
            found.append(f"names no test: {line}")
        for file, name in tests:
            path = REPOSITORY / file
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
            if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
                found.append(f"{file} has no {name}: {line}")
    return found


def test_every_line_of_the_page_has_a_test() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(lines_of(page)) >= 20
    assert not (found := problems_of(page)), "\n".join(found)


def test_a_line_without_a_test_would_be_noticed() -> None:
    head = "| what | test |\n| --- | --- |\n"
    good = "| a page | `tests/test_security_page.py::test_every_line_of_the_page_has_a_test` |\n"
    assert problems_of(head + good) == []
    (found,) = problems_of(head + good + "| a claim | none |\n")
    assert found.startswith("names no test: | a claim")
    (found,) = problems_of(head + "| a claim | `tests/test_security_page.py::test_that_is_not_there` |\n")
    assert found.startswith("tests/test_security_page.py has no test_that_is_not_there")
    (found,) = problems_of(head + "| a claim | `tests/no_such_file.py::test_x` |\n")
    assert found.startswith("tests/no_such_file.py has no test_x")
