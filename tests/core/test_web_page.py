"""Building blocks of HTML pages: text stays text."""

from __future__ import annotations

from lavita.core.web_page import page, row, table, video


def test_text_is_never_taken_as_html() -> None:
    assert row(["<b>", "a & b"]) == "<tr><td>&lt;b&gt;</td><td>a &amp; b</td></tr>"
    assert "<title>&lt;i&gt;</title>" in page("<i>", "")
    assert 'src="a&quot;b.mp4"' in video('a"b.mp4')


def test_all_cells_but_the_first_are_numbers() -> None:
    assert row(["x", "1"], numbers=True) == "<tr><td>x</td><td class=n>1</td></tr>"
    assert table(("score", "n"), [("kvd", "3"), ("kid", "4")], numbers=True) == (
        "<table><tr><th>score</th><th class=n>n</th></tr>\n"
        "<tr><td>kvd</td><td class=n>3</td></tr>\n<tr><td>kid</td><td class=n>4</td></tr></table>"
    )
