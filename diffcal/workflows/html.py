"""Self-contained HTML pages: sections, tables, figures and image grids in one file.

    page = Page("Calibration", "Three models on CIFAR-10")
    page.section("Summary", "Plain strings become paragraphs.", table(["model", "ECE"], rows))
    page.section("Figures", figure(svg_bytes, "Reliability before and after."))
    page.write(Path("report.html"))

No external assets and no scripts; readable on paper, on a phone, and in light and dark mode. Text is
escaped; only :class:`Html` (what the functions here return) goes in as it is.
"""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcal.core.runs import write_text
from diffcal.errors import ConfigError

__all__ = [
    "Html",
    "Number",
    "Page",
    "code",
    "columns",
    "details",
    "facts",
    "figure",
    "format_number",
    "image_grid",
    "note",
    "paragraph",
    "table",
]


class Html(str):
    """Markup that is safe to insert as it is."""

    __slots__ = ()


class Page:
    """A page under construction: a title, then sections in order."""

    def __init__(self, title: str, subtitle: str = "", footer: str = "") -> None:
        self.title, self.subtitle, self.footer = title, subtitle, footer
        self._sections: list[tuple[str, str, list[Html]]] = []

    def section(self, title: str, *blocks: str | Html) -> None:
        """Append a section; plain strings become paragraphs."""
        taken = {name for _, name, _ in self._sections}
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        self._sections.append((title, name, [_block(block) for block in blocks]))

    def html(self) -> str:
        """The whole document."""
        links = "".join(
            f'<a href="#{name}">{html.escape(title)}</a>' for title, name, _ in self._sections
        )
        contents = f"<nav>{links}</nav>" if len(self._sections) > 2 else ""
        body = "\n".join(
            f'<section id="{name}"><h2>{html.escape(title)}</h2>\n'
            + "\n".join(blocks)
            + "</section>"
            for title, name, blocks in self._sections
        )
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        footer = f"<footer>{html.escape(self.footer)}</footer>" if self.footer else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_CSS}</style></head>\n"
            f"<body><header><h1>{html.escape(self.title)}</h1>{subtitle}</header>\n"
            f"{contents}\n<main>\n{body}\n</main>\n{footer}</body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the document atomically."""
        write_text(path, self.html())


def paragraph(text: str) -> Html:
    """Text as paragraphs, split at empty lines."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return Html("".join(f"<p>{html.escape(part)}</p>" for part in parts))


def note(text: str, kind: str = "info") -> Html:
    """A remark that stands out; ``kind`` is ``info`` or ``warning``."""
    if kind not in ("info", "warning"):
        raise ConfigError(f"a note is 'info' or 'warning', not '{kind}'")
    return Html(f'<div class="note {kind}">{paragraph(text)}</div>')


def code(text: str) -> Html:
    """Preformatted text, such as a command or a configuration."""
    return Html(f"<pre><code>{html.escape(text)}</code></pre>")


def facts(values: Mapping[str, Any]) -> Html:
    """Names with values as small cards in a row, for the few figures that matter most."""
    cards = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{_cell(value)}</dd></div>"
        for name, value in values.items()
    )
    return Html(f'<dl class="facts">{cards}</dl>')


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    caption: str = "",
    best: Mapping[int, str] | None = None,
) -> Html:
    """A table; columns of numbers are aligned on the right and set in tabular figures.

    Args:
        rows: Cells: numbers are shortened to four significant digits, None becomes a dash, strings
            are escaped, :class:`Html` is kept.
        best: Column index to ``"lowest"`` or ``"highest"``: these numbers are emphasised.

    Raises:
        ConfigError: a row of another length than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ConfigError(f"table row has {len(row)} cells, the header {len(header)}")
    numeric = [
        all(_is_number(row[i]) or row[i] is None or isinstance(row[i], Number) for row in rows)
        and len(rows) > 0
        for i in range(len(header))
    ]
    winners = {
        (row, index)
        for index, kind in (best or {}).items()
        for row in _winners([row[index] for row in rows], kind)
    }
    head = "".join(
        f"<th{_class(numeric[i])}>{html.escape(name)}</th>" for i, name in enumerate(header)
    )
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(
            f"<td{_class(numeric[i], (number, i) in winners)}>{_cell(value)}</td>"
            for i, value in enumerate(row)
        )
        body += f"<tr>{cells}</tr>"
    text = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{text}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


class Number(Html):
    """Markup that stands for ``value`` in a table: right-aligned, and comparable for ``best``."""

    value: float

    def __new__(cls, value: float | int, text: str, small: str = "") -> "Number":
        """``text`` is shown for ``value``, with ``small`` print behind it."""
        extra = f"<small>{html.escape(small)}</small>" if small else ""
        made = super().__new__(cls, html.escape(text) + extra)
        made.value = value
        return made


def figure(image: bytes, caption: str = "", width: int | None = None) -> Html:
    """An SVG or PNG picture with its caption; ``width`` in CSS pixels limits it."""
    style = f' style="max-width:{width}px"' if width else ""
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure{style}>{_image(image, caption)}{text}</figure>")


def columns(*blocks: str | Html) -> Html:
    """Blocks beside each other where the page is wide enough."""
    return Html('<div class="columns">' + "".join(_block(block) for block in blocks) + "</div>")


def details(summary: str, *blocks: str | Html) -> Html:
    """Blocks that open on a click, for long tables."""
    inside = "".join(_block(block) for block in blocks)
    return Html(f"<details><summary>{html.escape(summary)}</summary>{inside}</details>")


def image_grid(
    images: Sequence[bytes],
    captions: Sequence[str] = (),
    per_row: int = 8,
    size: int = 96,
    pixelated: bool = True,
    caption: str = "",
) -> Html:
    """Small pictures (PNG bytes) in rows, each with an optional caption.

    Args:
        per_row: Pictures in a row on a wide screen.
        size: Width of a picture in CSS pixels.
        pixelated: Enlarge without smoothing, right for images of few pixels.
        caption: Text under the whole grid.

    Raises:
        ConfigError: captions that do not match the pictures in number.
    """
    if captions and len(captions) != len(images):
        raise ConfigError(f"{len(images)} images but {len(captions)} captions")
    cells = ""
    for index, image in enumerate(images):
        text = captions[index] if captions else ""
        below = f"<span>{html.escape(text)}</span>" if text else ""
        cells += f"<div>{_image(image, text or 'image')}{below}</div>"
    kind = "grid pixelated" if pixelated else "grid"
    style = f"grid-template-columns:repeat({per_row},minmax(0,{size}px))"
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return Html(
        f'<figure class="plain"><div class="{kind}" style="{style}">{cells}</div>{text}</figure>'
    )


def format_number(value: float | int, digits: int = 4) -> str:
    """A number for reading: ``digits`` significant ones, integers in full, no exponent if avoidable."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or (
        math.isfinite(value) and value == round(value) and abs(value) < 1e15
    ):
        return f"{int(value):,}".replace(",", "\u202f")
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "–")
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e7):
        return f"{value:.{max(digits - 2, 1)}e}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, digits)}f}".replace("-", "−")


def _image(data: bytes, alt: str) -> str:
    if data.startswith(b"\x89PNG"):
        kind = "image/png"
    elif data.startswith(b"\xff\xd8"):
        kind = "image/jpeg"
    elif b"<svg" in data[:1024]:
        kind = "image/svg+xml"
    else:
        raise ConfigError("a picture must be PNG, JPEG or SVG bytes")
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:{kind};base64,{encoded}" alt="{html.escape(alt, quote=True)}">'


def _block(block: str | Html) -> Html:
    return block if isinstance(block, Html) else paragraph(block)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Html):
        return str(value)
    return format_number(value) if _is_number(value) else html.escape(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _winners(values: Sequence[Any], kind: str) -> list[int]:
    if kind not in ("lowest", "highest"):
        raise ConfigError(f"best must be 'lowest' or 'highest', not '{kind}'")
    numbers = {
        index: (value.value if isinstance(value, Number) else value)
        for index, value in enumerate(values)
        if isinstance(value, Number) or _is_number(value)
    }
    numbers = {index: value for index, value in numbers.items() if math.isfinite(value)}
    if len(numbers) < 2:
        return []
    best = (min if kind == "lowest" else max)(numbers.values())
    return [index for index, value in numbers.items() if value == best]


def _class(numeric: bool, best: bool = False) -> str:
    names = " ".join(name for name, on in (("number", numeric), ("best", best)) if on)
    return f' class="{names}"' if names else ""


_CSS = """
:root{--ink:#1d2733;--muted:#66727f;--line:#dfe4ea;--back:#fbfbfa;--card:#fff;--accent:#2f6db3;
--good:#e6f2ea;--warn:#fdf1dc;--info:#eaf1f9}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ed;--muted:#9aa6b2;--line:#343d47;
--back:#15191e;
--card:#1d2329;--accent:#7fb2ea;--good:#1f3a2b;--warn:#41331a;--info:#1d2f42}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:2.5rem 1.5rem 4rem;background:var(--back);
color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:2rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.015em}
h2{font-size:1.3rem;margin:2.8rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
p{max-width:46rem;margin:.6rem 0}
.subtitle{color:var(--muted);font-size:1.05rem;margin:0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:1.4rem 0 0;font-size:.92rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.92rem;min-width:24rem}
caption{caption-side:bottom;text-align:left;color:var(--muted);padding-top:.5rem;font-size:.88rem}
th{font-weight:600;text-align:left;border-bottom:1.5px solid var(--ink);white-space:nowrap;
vertical-align:bottom}
td{border-bottom:1px solid var(--line);vertical-align:top}
th,td{padding:.38rem .9rem .38rem 0}
th+th,td+td{padding-left:.4rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.best{font-weight:650;background:var(--good)}
td small,dd small{display:block;color:var(--muted);font-weight:400;font-size:.8em;line-height:1.35}
dd small{font-size:.6em}
figure{margin:1.2rem 0;padding:1rem;background:#fff;border:1px solid var(--line);border-radius:10px;
width:fit-content;max-width:100%}
figure.plain{background:none;border:0;padding:0}
figure img{display:block;max-width:100%;height:auto}
figcaption{color:#66727f;font-size:.88rem;line-height:1.45;margin-top:.7rem;max-width:46rem}
figure.plain figcaption{color:var(--muted)}
.columns{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
.columns>*{margin:.5rem 0}
.columns>figure{flex:1 1 21rem}
.grid{display:grid;gap:.55rem}
.grid img{width:100%;border-radius:4px;background:var(--line)}
.pixelated img{image-rendering:pixelated}
.grid span{display:block;font-size:.74rem;line-height:1.3;color:var(--muted);margin-top:.25rem;
overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.facts>div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.7rem 1.1rem;min-width:8rem}
dt{color:var(--muted);font-size:.84rem}dd{margin:0;font-size:1.35rem;font-weight:600;
font-variant-numeric:tabular-nums}
.note{border-left:3px solid var(--accent);background:var(--info);padding:.4rem 1rem;
border-radius:0 8px 8px 0;margin:1rem 0;max-width:48rem}
.note.warning{border-color:#d9822b;background:var(--warn)}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;
overflow-x:auto;font-size:.86rem}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--accent)}
footer{margin-top:3.5rem;padding-top:.8rem;border-top:1px solid var(--line);color:var(--muted);
font-size:.85rem}
@media print{body{max-width:none;padding:0}section{break-inside:avoid-page}nav{display:none}}
"""
