"""Where the weight went: token weights laid over decoded text, as a page and as a picture.

The weight of token `j` is the mean over the heads `k` that predict it, of `w[j-k-1, k]`. Colours diverge from 1 (white,
what a token weighs unweighted): blue is less, orange more; on a grey printer both are darker the farther they are.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp.data import Tokenizer

COLUMNS = 100  # of the picture
LINES = 60  # of an example in the picture; the page has all
LOW, HIGH = (49, 104, 190), (222, 110, 20)


@dataclass(frozen=True)
class Example:
    """A document: what is shown of each token, and what it weighs (NaN: nobody predicts it)."""

    name: str
    texts: list[str]
    weights: list[float]


def token_weights(w_sh: Tensor, mask_sh: Tensor) -> list[float]:
    """The mean weight of each token of one document, from the `[s, H]` of its positions; NaN: none predicts it."""
    length, heads = w_sh.shape
    total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for k in range(min(heads, length - 1)):
        valid = mask_sh[: length - k - 1, k]
        total[k + 1 :] += torch.where(valid, w_sh[: length - k - 1, k].double(), 0)
        count[k + 1 :] += valid
    return (total / count).tolist()


def shown_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the decoded text; a character that is split over tokens stands at the last of them."""
    texts, before = [], ""
    start = 0
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[start:end])
        # An unfinished character decodes to U+FFFD; what comes next may mend it.
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        # Decoding from far back each time is quadratic; a line's end is a safe place to begin anew.
        if now.endswith("\n"):
            start, before = end - 1, tokenizer.decode(ids[end - 1 : end])
    return texts


def colour(weight: float, least: float, most: float) -> tuple[int, int, int]:
    """White at 1, towards `LOW` at ``least`` and `HIGH` at ``most``; grey for NaN."""
    if weight != weight:
        return 225, 225, 225
    end, reach = (LOW, 1 - least) if weight < 1 else (HIGH, most - 1)
    share = min(1.0, abs(weight - 1) / reach) if reach > 0 else 0.0
    red, green, blue = (round(255 + (c - 255) * share) for c in end)
    return red, green, blue


def scale_of(examples: Sequence[Example]) -> tuple[float, float]:
    """The ends of the colour scale: the least and the greatest weight, and at least 1 -+ 0.05."""
    known = [w for example in examples for w in example.weights if w == w] or [1.0]
    return min(0.95, *known), max(1.05, *known)


def write_heatmap(stem: Path, examples: Sequence[Example], title: str) -> tuple[Path, Path]:
    """Write ``stem``.html and ``stem``.png; returns both."""
    page, picture = stem.with_suffix(".html"), stem.with_suffix(".png")
    page.write_text(_page(examples, title), encoding="utf-8")
    _draw(picture, examples, title)
    return page, picture


def _page(examples: Sequence[Example], title: str) -> str:
    least, most = scale_of(examples)
    parts = []
    for example in examples:
        spans = []
        for text, weight in zip(example.texts, example.weights, strict=True):
            background = _hex(colour(weight, least, most))
            told = "not predicted" if weight != weight else f"weight {weight:.3f}"
            # A line's end gets a mark, so that its weight can be seen.
            visible = html.escape(text.replace("\n", "\u21b5\n"))
            ink = "#fff" if _dark(colour(weight, least, most)) else "#111"
            spans.append(f'<span style="background:{background};color:{ink}" title="{told}">{visible}</span>')
        parts.append(f"<h2>{html.escape(example.name)}</h2>\n<pre>{''.join(spans)}</pre>")
    steps = [least + (most - least) * i / 8 for i in range(9)]
    scale = "".join(
        f'<span style="background:{_hex(colour(s, least, most))};'
        f'color:{"#fff" if _dark(colour(s, least, most)) else "#111"}">{s:.2f}</span>'
        for s in steps
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#111}"
        "pre{font:13px/1.6 ui-monospace,monospace;white-space:pre-wrap;border:1px solid #ccc;padding:1em}"
        "pre span{print-color-adjust:exact;-webkit-print-color-adjust:exact}"
        ".scale span{display:inline-block;width:4.5em;text-align:center;print-color-adjust:exact}"
        "h2{font-size:1em;margin:1.5em 0 .3em}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>The weight of each token, the mean over the heads that predict it; 1 is "
        "unweighted. Grey: no head predicts it. Point at a token for its figure.</p>\n"
        f'<p class="scale">{scale}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _dark(rgb: tuple[int, int, int]) -> bool:
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue < 125


def _cells(example: Example) -> list[list[tuple[str, float]]]:
    """The text as lines of (character, weight), broken where the text breaks or at the picture's width."""
    lines: list[list[tuple[str, float]]] = [[]]
    for text, weight in zip(example.texts, example.weights, strict=True):
        for character in text.expandtabs(4).replace("\n", "\u21b5\n"):
            if character == "\n":
                lines.append([])
                continue
            if len(lines[-1]) == COLUMNS:
                lines.append([])
            lines[-1].append((character, weight))
    lines = [line for line in lines if line] or [[(" ", float("nan"))]]
    if len(lines) > LINES:
        told = f"… {len(lines) - LINES} more lines in the page"
        lines = [*lines[:LINES], [(character, float("nan")) for character in told]]
    return lines


def _draw(path: Path, examples: Sequence[Example], title: str) -> None:
    """The same as a picture, a character a cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    least, most = scale_of(examples)
    blocks = [_cells(example) for example in examples]
    rows = sum(len(block) + 2 for block in blocks)
    wide, high, margin = 0.08, 0.185, 0.4  # inches: a cell, and the edge
    width, height = COLUMNS * wide + 2 * margin, rows * high + 1.35
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    figure.text(margin / width, 1 - 0.3 / height, title, fontsize=13, weight="bold", va="center")
    axes: Any = figure.add_axes((margin / width, 0.2 / height, COLUMNS * wide / width, rows * high / height))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    at = 0
    for example, block in zip(examples, blocks, strict=True):
        axes.text(0, at + 0.9, example.name, fontsize=9.5, va="center", color="#444444")
        at += 2
        for line in block:
            for column, (character, weight) in enumerate(line):
                rgb = colour(weight, least, most)
                axes.add_patch(Rectangle((column, at - 0.5), 1, 1, facecolor=[c / 255 for c in rgb], linewidth=0))
                if character != " ":
                    axes.text(
                        column + 0.5,
                        at,
                        character,
                        family="DejaVu Sans Mono",
                        fontsize=9,
                        ha="center",
                        va="center",
                        color="white" if _dark(rgb) else "#111111",
                        parse_math=False,
                    )
            at += 1
    stops = [least + (most - least) * i / 64 for i in range(65)]
    norm = TwoSlopeNorm(1.0, least, most)
    colours = LinearSegmentedColormap.from_list(
        "weights", sorted((float(norm(s)), tuple(c / 255 for c in colour(s, least, most))) for s in stops)
    )
    bar_axes = figure.add_axes((margin / width, 1 - 0.78 / height, 3.2 / width, 0.13 / height))
    bar_axes.imshow(
        [[float(norm(s)) for s in stops]], cmap=colours, vmin=0, vmax=1, aspect="auto", extent=(least, most, 0, 1)
    )
    bar_axes.set_yticks([])
    bar_axes.set_xticks([least, 1.0, most], [f"{least:.2f}", "1", f"{most:.2f}"], fontsize=8)
    figure.text(
        (margin + 3.4) / width,
        1 - 0.72 / height,
        "weight of a token; grey: no head predicts it",
        fontsize=8.5,
        va="center",
    )
    with warnings.catch_warnings():
        # A character that the picture's font lacks is a box there; the page has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path)
