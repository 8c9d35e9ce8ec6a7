"""Draws message.svg, the way of one client's gradient, with bytes measured on the messages: python docs/message.py"""

from __future__ import annotations

from html import escape
from pathlib import Path

from fedmpi.analysis.listing import measured
from fedmpi.methods import build, parse
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec
from fedmpi.tasks.models import build as model

SVG = Path(__file__).with_name("message.svg")
METHODS = (
    ("topk, 1 %", {"name": "topk", "ratio": 0.01}),
    ("signsgd", "signsgd"),
    ("intrinsic, d = 65,536", {"name": "intrinsic", "dim": 65536}),
)
BOXES = (  # title, what it does, what lies there
    ("Client", "computes a gradient", "D numbers"),
    ("Message", "compress", "upload"),
    ("Sum", "all-reduce or aggregator", "mean of all messages"),
    ("Server", "new parameters", "θ, D numbers"),
    ("Download", "what changed", "to the next clients"),
)
WIDTH, HEIGHT, LEFT, TOP, STEP, BOX = 960, 290, 20, 20, 190, 160


def text(x: float, y: float, words: str, **style: str) -> str:
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}"{given}>{escape(words)}</text>'


def draw() -> str:
    """The picture as SVG."""
    spec = Spec.of(model("resnet9", (3, 32, 32), 10, 0))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        '  font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">',
        '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
    ]
    for i, (title, does, holds) in enumerate(BOXES):
        x = LEFT + i * STEP
        fill = "#e3f0fa" if title in ("Message", "Download") else "#f4f4f4"
        parts.append(
            f'<rect x="{x}" y="{TOP}" width="{BOX}" height="84" rx="8" fill="{fill}" stroke="#444"/>'
        )
        middle = {"text_anchor": "middle", "fill": "#222"}
        parts.append(text(x + BOX / 2, TOP + 26, title, font_weight="bold", **middle))
        parts.append(text(x + BOX / 2, TOP + 48, does, **middle))
        parts.append(text(x + BOX / 2, TOP + 68, holds, **middle))
        if i:
            line = f'x1="{x - STEP + BOX}" y1="{TOP + 42}" x2="{x - 2}" y2="{TOP + 42}"'
            parts.append(f'<line {line} stroke="#444" marker-end="url(#tip)"/>')
    full = 4 * spec.size
    rows = [("", "uncompressed gradient", "upload", "", "download")]
    for label, options in METHODS:
        up, _, down = measured(build(parse(options), spec, Setup()), spec)
        rows.append((label, f"{full:,} B", f"{up:,} B", f"{full / up:.0f}x smaller", f"{down:,} B"))
    for r, row in enumerate(rows):
        y = TOP + 128 + 26 * r
        style = {"fill": "#222"} if r else {"fill": "#666"}
        for x, cell in zip((LEFT, 250, 430, 570, LEFT + 4 * STEP), row, strict=True):
            parts.append(text(x, y, cell, **style))
    caption = f"Bytes of one client and round, measured for ResNet-9, D = {spec.size:,} parameters."
    parts.append(text(LEFT, HEIGHT - 14, caption, fill="#666"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    SVG.write_text(draw())
