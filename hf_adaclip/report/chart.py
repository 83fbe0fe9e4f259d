"""A figure as data, and as a light, static SVG: the colours are those of the page, so it is readable by day and by night."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

Place: TypeAlias = Callable[[float], float]
"""From a value to where it is drawn."""

WIDTH: Final = 760
_RIGHT, _TOP, _BOTTOM = 24, 20, 44

COLOURS: Final = {
    "norm": "#0072B2",
    "threshold": "#E69F00",
    "cut": "#D55E00",
    "out": "#CC79A7",
    "loss": "#009E73",
    "pace": "#56B4E9",
    "grey": "#7a7a7a",
}
"""By meaning, out of Okabe and Ito's palette, told apart with any colour vision. Good and bad are never told by colour alone."""

ARM_COLOURS: Final = ("norm", "threshold", "loss", "out", "cut", "pace")
"""For arms of a comparison, in their order."""

PHASE_COLOURS: Final = {
    "warmup": "pace",
    "stable": "norm",
    "held": "grey",
    "vanishing": "out",
    "unstable": "cut",
    "limited": "threshold",
    "frozen": "grey",
    "fallback": "threshold",
    "skipped": "out",
    "trouble": "cut",
}
"""Cool where nothing had to be done, warm where something was."""


@dataclass(frozen=True)
class Line:
    """A line, with gaps where a value is not finite."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    colour: str
    width: float = 1.5
    opacity: float = 1.0
    dashed: bool = False
    named: bool = True


@dataclass(frozen=True)
class Marks:
    """Points of their own: `symbol` is "down" (a triangle) or "cross"."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    colour: str
    symbol: str


@dataclass(frozen=True)
class Bars:
    """A row of bars from `start` to `stop`, at the height of its name."""

    spans: Sequence[tuple[float, float]]
    name: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """What is drawn. With bars the y axis is one of names; else a number, logarithmic where all of it is above 0 and `log` says so;
    `limits` are those of the axis, by default those of the values."""

    x: str
    y: str
    lines: Sequence[Line] = ()
    marks: Sequence[Marks] = ()
    bars: Sequence[Bars] = ()
    log: bool = False
    height: int = 380
    title: str = field(default="", kw_only=True)
    limits: tuple[float, float] | None = field(default=None, kw_only=True)


def svg(chart: Chart) -> str:
    """The chart as SVG for a page that has the styles of `page`."""
    drawn: list[Line | Marks] = [*chart.lines, *chart.marks]
    left = 116 if chart.bars else 64
    xs = [v for part in drawn for v in part.x if math.isfinite(v)]
    xs += [v for bar in chart.bars for span in bar.spans for v in span]
    ys = [v for part in drawn for v in part.y if math.isfinite(v)]
    log = chart.log and all(v > 0 for v in ys)
    x0, x1 = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = chart.limits or _range(ys, log)
    inner = chart.height - _TOP - _BOTTOM

    def px(v: float) -> float:
        return left + (v - x0) / (x1 - x0) * (WIDTH - left - _RIGHT)

    def py(v: float) -> float:
        low, high, at = (math.log10(y0), math.log10(y1), math.log10(v)) if log else (y0, y1, v)
        return _TOP + inner * (1 - (at - low) / (high - low))

    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {chart.height}" role="img" aria-label="{html.escape(chart.title or chart.y)}">'
    ]
    bottom = chart.height - _BOTTOM
    for number, v in enumerate(linear_ticks(x0, x1)):
        out.append(f'<line class="grid" x1="{px(v):.1f}" x2="{px(v):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        odd = " odd" if number % 2 else ""
        out.append(
            f'<text class="tick{odd}" x="{px(v):.1f}" y="{bottom + 18}" text-anchor="middle">{_label(v)}</text>'
        )
    if chart.bars:
        out += _draw_bars(chart, px, inner, left)
    else:
        for v in log_ticks(y0, y1) if log else linear_ticks(y0, y1):
            out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{py(v):.1f}" y2="{py(v):.1f}"/>')
            out.append(f'<text class="tick" x="{left - 6}" y="{py(v) + 4:.1f}" text-anchor="end">{_label(v)}</text>')
    for line in chart.lines:
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        style = f'class="c-{line.colour}" stroke-width="{line.width:g}" stroke-opacity="{line.opacity:g}"{dash}'
        out += [f'<polyline {style} points="{points}"/>' for points in _pieces(line, px, py, log)]
    for marks in chart.marks:
        d = "".join(_mark(marks, px(x), py(y)) for x, y in zip(marks.x, marks.y, strict=True) if _drawable(y, log))
        out.append(f'<path class="m-{marks.symbol} c-{marks.colour}" d="{d}"/>')
    centre = (left + WIDTH - _RIGHT) / 2
    out.append(
        f'<text class="axis" x="{centre:g}" y="{chart.height - 6}" text-anchor="middle">{html.escape(chart.x)}</text>'
    )
    out.append("</svg>")
    return f"<figure><figcaption>{_legend(chart, log)}</figcaption>{''.join(out)}</figure>"


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a log axis in rising order: powers of ten, with 2 and 5 between where there are few, thinned where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**e for e in range(first, last + 1)]
    inside = [v for v in decades if low <= v <= high]
    if len(inside) > 7:
        return inside[:: math.ceil(len(inside) / 7)]
    if len(inside) >= 3:
        return inside
    fine = [v for d in decades for v in (d, 2 * d, 5 * d) if low <= v <= high]
    return fine if len(fine) >= 2 else linear_ticks(low, high)


def linear_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """About so many round numbers within a range."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    unit = 10.0 ** math.floor(math.log10(span / about))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float], log: bool) -> tuple[float, float]:
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _drawable(v: float, log: bool) -> bool:
    return math.isfinite(v) and (v > 0 or not log)


def _pieces(line: Line, px: Place, py: Place, log: bool) -> list[str]:
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if _drawable(y, log):
            pieces[-1].append(f"{px(x):.1f},{py(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    return [" ".join(p if len(p) > 1 else p * 2) for p in pieces if p]


def _mark(marks: Marks, x: float, y: float) -> str:
    return f"M{x - 4:.1f},{y - 9:.1f}h8l-4,7z" if marks.symbol == "down" else f"M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"


def _draw_bars(chart: Chart, px: Place, inner: float, left: int) -> list[str]:
    out = []
    row = inner / len(chart.bars)
    for number, bar in enumerate(chart.bars):
        top = _TOP + number * row
        out.append(
            f'<text class="tick" x="{left - 6}" y="{top + row / 2 + 4:.1f}" text-anchor="end">{html.escape(bar.name)}</text>'
        )
        d = "".join(
            f"M{px(a):.1f},{top + row * 0.2:.1f}h{max(px(b) - px(a), 1):.1f}v{row * 0.6:.1f}H{px(a):.1f}z"
            for a, b in bar.spans
        )
        out.append(f'<path class="b c-{bar.colour}" d="{d}"/>')
    return out


def _legend(chart: Chart, log: bool) -> str:
    signs = [(line.name, line.colour, "&#9472;&#9472;") for line in chart.lines if line.named]
    signs += [(m.name, m.colour, "&#9660;" if m.symbol == "down" else "&#10005;") for m in chart.marks]
    entries = [f'<span><b class="t-{colour}">{sign}</b> {html.escape(name)}</span>' for name, colour, sign in signs]
    axis = f"<span>{html.escape(chart.y)}{', log axis' if log and not chart.bars else ''}</span>" if chart.y else ""
    return axis + "".join(entries)


def _label(v: float) -> str:
    if v == 0:
        return "0"
    if abs(v) >= 1e6 or abs(v) < 1e-3:
        return f"{v:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{v:.10g}" if abs(v) >= 1 else f"{v:.4g}"
