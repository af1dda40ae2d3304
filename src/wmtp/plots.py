"""The pictures of a report, each an SVG text: made of a run's record, as wide as a telephone, legible in print.

Labels stand at the lines. Colours are those of Okabe and Ito (2008), which colour-blind people tell apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from wmtp.ledger import ORDER, Ledger

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
POINTS = 600  # of a line: more than the width has
WIDE, HIGH = 4.7, 2.9  # inches
_KIND_COLOURS = {
    "training": "#009E73",
    "redone": "#D55E00",
    "lost": "#8B0000",
    "saving": "#0072B2",
    "sync": "#56B4E9",
    "evaluation": "#CC79A7",
    "load": "#E69F00",
    "scoring": "#F0E442",
    "pretraining": "#5B4B8A",
    "data": "#B08D57",
}


def svg(draw: Callable[[Axes], None], title: str, high: float = HIGH) -> str:
    """What ``draw`` puts on one pair of axes, as an SVG element with a title for those who can't see it."""
    with mpl.rc_context({"font.size": 8.5, "svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDE, high), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e2e2", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    # A page says how wide; a picture that is looked at alone has its view box.
    found = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", found, count=1), count=1
    )
    # Names inside a picture are its own: several stand on one page.
    mark = re.sub(r"\W+", "-", title.lower())
    found = re.sub(r'(id="|href="#|url\(#)', rf"\1{mark}-", found)
    return found.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def thinned(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """As many points as are seen; each the mean of its neighbours, so that no peak is drawn that isn't one."""
    size = math.ceil(len(values) / POINTS) or 1
    out = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        out.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return out


def series(rows: Sequence[dict[str, Any]], key: str, x: str = "step") -> list[tuple[float, float]]:
    """``(x, value)`` of the rows that have both; null is left out."""
    return thinned([(r[x], r[key]) for r in rows if r.get(key) is not None and r.get(x) is not None])


def labelled(
    axes: Axes,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]], str]],
    marked: bool = False,
) -> None:
    """Lines with their names at the right end, kept apart where they end together."""
    ends: list[tuple[float, str, str]] = []
    for name, points, colour in lines:
        if points:
            few = len(points) < 3
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1.3,
                marker="o" if marked or few else None,
                markersize=3,
            )
            ends.append((points[-1][1], name, colour))
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    places: list[float] = []
    for value, _, _ in sorted(ends):
        places.append(max(value, places[-1] + gap) if places else value)
    top = high
    for n in reversed(range(len(places))):  # what would be above the axes moves down, and what is below it with it
        places[n] = min(places[n], top)
        top = places[n] - gap
    for at, (_, name, colour) in zip(places, sorted(ends), strict=True):
        axes.annotate(
            name,
            (1, at),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def loss_plot(steps: list[dict[str, Any]]) -> str:
    def draw(axes: Axes) -> None:
        heads = sorted(k for k in (steps[-1] if steps else {}) if k.startswith("ce_head_"))
        lines = [(f"head {k[8:]}", series(steps, k), COLOURS[n % len(COLOURS)]) for n, k in enumerate(heads)]
        labelled(axes, [*lines, ("weighted", series(steps, "wmtp_loss"), "#999999")])
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")

    return svg(draw, "Training loss: cross-entropy of each head")


def held_out_plot(evals: list[dict[str, Any]]) -> str:
    def draw(axes: Axes) -> None:
        heads = max((len(e["ce"]) for e in evals), default=0)
        lines = [
            (f"head {k}", [(e["step"], e["ce"][k]) for e in evals if k < len(e["ce"])], COLOURS[k % len(COLOURS)])
            for k in range(heads)
        ]
        labelled(axes, lines, marked=True)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")

    return svg(draw, "Held-out loss: cross-entropy of each head")


def line_plot(
    steps: list[dict[str, Any]], key: str, title: str, unit: str, zero: bool = True, log: bool = False
) -> str:
    def draw(axes: Axes) -> None:
        labelled(axes, [("", series(steps, key), COLOURS[0])])
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter("{x:g}")  # 0.9, where the default says 9 x 10^-1
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
        elif zero:
            axes.set_ylim(bottom=0)

    return svg(draw, title)


def weights_plot(steps: list[dict[str, Any]]) -> str:
    def draw(axes: Axes) -> None:
        heads = sorted(k for k in (steps[-1] if steps else {}) if k.startswith("w_mean_head_"))
        lines = [(f"head {k[12:]}", series(steps, k), COLOURS[n % len(COLOURS)]) for n, k in enumerate(heads)]
        for name, key, colour in (
            ("smallest", "w_min", "#444444"),
            ("largest", "w_max", "#444444"),
            ("ESS share", "w_ess", "#999999"),
        ):
            lines.append((name, series(steps, key), colour))
        known = [y for _, points, _ in lines for _, y in points] or [1.0]
        axes.set_ylim(min(0.95, *known), max(1.05, *known))  # what differs is seen, and noise is not made large
        labelled(axes, lines)
        axes.set_xlabel("step")
        axes.set_ylabel("weight (1: unweighted)")

    return svg(draw, "Weights: mean of each head, smallest, largest")


def gpu_plot(node: list[dict[str, Any]]) -> str:
    began = node[0]["at"]

    def draw(axes: Axes) -> None:
        gpus = sorted({g["index"] for line in node for g in line.get("gpus", [])})
        lines = []
        for n, index in enumerate(gpus):
            points = [
                ((line["at"] - began) / 60, g["utilization_percent"])
                for line in node
                for g in line["gpus"]
                if g["index"] == index and g["utilization_percent"] is not None
            ]
            lines.append((f"GPU {index}", thinned(points), COLOURS[n % len(COLOURS)]))
        if not gpus:
            rows = [{**line, "minute": (line["at"] - began) / 60} for line in node]
            lines = [("CPU", series(rows, "cpu_percent", "minute"), COLOURS[0])]
        axes.set_ylim(0, 105)
        labelled(axes, lines)
        axes.set_xlabel("minutes")
        axes.set_ylabel("percent busy")

    return svg(draw, "How busy the node was")


def shares_of(ledger: Ledger) -> dict[str, list[float]]:
    """Of each kind, its share of each of `POINTS` equal pieces of the seconds that were paid for."""
    piece = max(ledger.total, 1e-9) / POINTS
    found: dict[str, list[float]] = {kind: [0.0] * POINTS for kind in ledger.seconds}
    right = 0.0
    for s in ledger.stretches:  # one after the other, without a gap
        left, right = right, right + s.ended - s.began
        for n in range(int(left / piece), min(math.ceil(right / piece), POINTS)):
            found[s.kind][n] += max(min(right, (n + 1) * piece) - max(left, n * piece), 0.0) / piece
    return found


def waterfall(ledger: Ledger) -> str:
    """A row for each kind of second, over the hours that were paid for; pauses between parts are cut out.

    A row is as thick as the kind's share of the moment: the steps of a long run are closer than a line is wide.
    """
    kinds = [kind for kind in ORDER if ledger.seconds.get(kind, 0) > 0.0005 * max(ledger.total, 1e-9)]
    found = shares_of(ledger)

    def draw(axes: Axes) -> None:
        unit, name = (
            (3600, "hours") if ledger.total > 7200 else (60, "minutes") if ledger.total > 180 else (1, "seconds")
        )
        at = [n * ledger.total / POINTS / unit for n in range(POINTS + 1)]
        for row, kind in enumerate(kinds):
            # What there is of it is seen, however thin.
            half = [0.35 * max(share, 0.15) if share else 0.0 for share in (*found[kind], 0.0)]
            low, high = [row - h for h in half], [row + h for h in half]
            axes.fill_between(at, low, high, step="post", color=_KIND_COLOURS.get(kind, "#999999"), linewidth=0)
        offset = 0.0
        for part in ledger.parts[:-1]:
            offset += part.ended - part.began
            axes.axvline(offset / unit, color="black", linewidth=0.8, linestyle=":")
        shares = [
            f"{kind}  {ledger.seconds[kind]:.0f} s" if ledger.seconds[kind] >= 1 else f"{kind}  <1 s" for kind in kinds
        ]
        axes.set_yticks(range(len(kinds)), shares)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(
            f"{name} that were paid for" + (", a dotted line where a part ends" if len(ledger.parts) > 1 else "")
        )

    return svg(draw, "Where the time went", high=max(HIGH, 0.9 + 0.24 * len(kinds)))


def overlay(runs: Sequence[tuple[str, list[tuple[float, float]]]], title: str, unit: str, marked: bool = False) -> str:
    """One figure of several runs."""

    def draw(axes: Axes) -> None:
        labelled(axes, [(name, points, COLOURS[n % len(COLOURS)]) for n, (name, points) in enumerate(runs)], marked)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)

    return svg(draw, title)
