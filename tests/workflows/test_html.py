"""The page builder: self-contained, escaped, aligned."""

import base64
import re
from html.parser import HTMLParser

import pytest

from diffcal.errors import ConfigError
from diffcal.workflows.html import (
    Html,
    Number,
    Page,
    code,
    columns,
    details,
    facts,
    figure,
    format_number,
    image_grid,
    note,
    table,
)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Balance(HTMLParser):
    """Checks that every element closes."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def full_page():
    page = Page("A <title>", "sub & title", footer="end")
    page.section("One", "first\n\nsecond <b>", note("careful", "warning"), code("a < b"))
    page.section("One", facts({"n": 12345, "x": 0.5}), table(["a", "b"], [["<i>", 1.5]], "c"))
    page.section("Three", columns(figure(PNG, "p"), image_grid([PNG, PNG], ["1", "2"])))
    page.section("Four", details("more", "hidden"), Html("<em>kept</em>"))
    return page


def test_page_is_well_formed_and_self_contained():
    text = full_page().html()
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    for name, value in parser.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#")), value
    assert "<script" not in text
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text


def test_text_is_escaped_and_markup_kept():
    text = full_page().html()
    assert "<title>A &lt;title&gt;</title>" in text
    assert "second &lt;b&gt;" in text
    assert "&lt;i&gt;" in text
    assert "a &lt; b" in text
    assert "<em>kept</em>" in text


def test_sections_of_one_name_have_their_own_anchor():
    assert re.findall(r'<section id="([^"]+)"', full_page().html()) == [
        "one", "one-2", "three", "four",
    ]  # fmt: skip


def test_numeric_columns_are_aligned_and_the_best_is_marked():
    rows = [["a", Number(0.2, "20.0", "10–30"), 3], ["b", Number(0.1, "10.0"), None]]
    text = table(["name", "error", "count"], rows, best={1: "lowest"})
    assert text.count('class="number"') == 2 + 3  # two headers, three cells without the best
    assert '<td class="number best">10.0</td>' in text
    assert "<small>10–30</small>" in text
    assert "<td>a</td>" in text
    with pytest.raises(ConfigError, match="3 cells, the header 1"):
        table(["only"], [[1, 2, 3]])
    with pytest.raises(ConfigError, match="lowest"):
        table(["x"], [[1.0], [2.0]], best={0: "least"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (12.3456, "12.35"),
        (1234567, "1\u202f234\u202f567"),
        (-0.5, "−0.5000"),
        (0.00001234, "1.23e−05"),
        (float("inf"), "∞"),
        (float("nan"), "–"),
        (3.0, "3"),
        (0, "0"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_bad_blocks_are_refused():
    with pytest.raises(ConfigError, match="PNG, JPEG or SVG"):
        figure(b"GIF89a")
    with pytest.raises(ConfigError, match="2 images but 1 captions"):
        image_grid([PNG, PNG], ["one"])
    with pytest.raises(ConfigError, match="'info' or 'warning'"):
        note("x", "danger")


def test_write(tmp_path):
    full_page().write(tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text("utf-8").startswith("<!doctype html>")
