"""A page of text, tables and pictures, written as Markdown beside its PNGs and as one HTML file that holds them."""

from __future__ import annotations

import html
import io
import json
import re
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmpi.engine.record import write_aside, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[str]]
"""Rows of cells; the first row is the header."""

_STYLE = """\
body { font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; white-space: nowrap }
img { max-width: 100% }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto } div { overflow-x: auto }"""


class _Block(NamedTuple):
    markdown: str
    html: str


class Page:
    """Collects blocks; backticks in text are code, all else is plain."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks = [_Block(f"# {title}", f"<h1>{_inline(title)}</h1>")]
        self._pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self._blocks.append(_Block(f"## {text}", f"<h2>{_inline(text)}</h2>"))

    def text(self, text: str) -> None:
        self._blocks.append(_Block(text, f"<p>{_inline(text)}</p>"))

    def code(self, lines: str, language: str = "sh") -> None:
        self._blocks.append(_Block(f"```{language}\n{lines}\n```", f"<pre>{html.escape(lines)}</pre>"))

    def table(self, rows: Table, left: int = 1) -> None:
        """Cells of the first ``left`` columns are words, the others numbers."""
        self._blocks.append(_Block(markdown_table(rows, left), _html_table(rows, left)))

    def picture(self, name: str, png: bytes, caption: str) -> None:
        self._pictures[f"{name}.png"] = png
        data = b64encode(png).decode()
        tag = f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></p>'
        self._blocks.append(_Block(f"![{caption}]({name}.png)", f"{tag}<p>{_inline(caption)}</p>"))

    def markdown(self) -> str:
        return "\n\n".join(block.markdown for block in self._blocks) + "\n"

    def html(self) -> str:
        body = "\n".join(block.html for block in self._blocks)
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        return f"<!doctype html>{head}<style>{_STYLE}</style>\n{body}\n"

    def write(self, folder: Path, name: str, numbers: dict[str, Any] | None = None) -> list[Path]:
        """Write ``name.md``, ``name.html``, the pictures, and ``numbers`` as ``name.json``; returns the paths.

        Raises:
          ConfigError: the folder cannot be written.
        """
        files = {
            **self._pictures,
            f"{name}.md": self.markdown().encode(),
            f"{name}.html": self.html().encode(),
        }
        if numbers is not None:
            files[f"{name}.json"] = dump(numbers)
        for file, data in files.items():
            write(folder / file, data, "--out")
        return [folder / file for file in files]


def write(path: Path, data: bytes, argument: str) -> None:
    """A whole file or none, its folder made where it is missing.

    Raises:
      ConfigError: it cannot be written; names the command line's ``argument``.
    """
    prepare(path.parent, argument)
    with writing(path.parent, argument):
        write_aside(path, data)


def prepare(folder: Path, argument: str) -> None:
    """Make a folder: before long work, too, whose results will go there.

    Raises:
      ConfigError: it cannot be made or written to; names the command line's ``argument``.
    """
    with writing(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def dump(numbers: dict[str, Any]) -> bytes:
    """JSON of a line for each entry of the first two levels: short, and a change shows in a diff."""
    text = json.dumps(_rounded(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of plain numbers and words go on one line.
    flat = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text)
    return (flat + "\n").encode()


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these measurements has; what is no number is null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


FORMATS = ("png", "svg", "pdf")


def png(figure: Figure, format: str = "png") -> bytes:
    """The picture of a figure, by default as PNG; SVG and PDF hold no date, so that equal pictures are equal files."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
    with mpl.rc_context({"svg.hashsalt": "fedmpi"}):
        figure.savefig(buffer, format=format, metadata=undated)
    return buffer.getvalue()


def text_table(rows: Table, left: int = 1) -> str:
    """Columns aligned with spaces; the first ``left`` to the left."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        pairs = list(zip(row, widths, strict=True))
        words = [cell.ljust(width) for cell, width in pairs[:left]]
        lines.append("  ".join([*words, *(cell.rjust(width) for cell, width in pairs[left:])]))
    return "\n".join(lines)


def markdown_table(rows: Table, left: int = 1) -> str:
    marks = [":--" if i < left else "--:" for i in range(len(rows[0]))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [rows[0], marks, *rows[1:]]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def _html_table(rows: Table, left: int) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left" if i < left else "right" for i in range(len(cells))]
        pairs = zip(cells, sides, strict=True)
        return "".join(f'<{tag} style="text-align:{side}">{_inline(c)}</{tag}>' for c, side in pairs)

    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows[1:])
    return f"<div><table><tr>{line(rows[0], 'th')}</tr>\n{body}</table></div>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
