"""Figures of a run: norms and thresholds, pace, loss, phases. Data first (`Chart`); drawn as a light SVG, or by plotly to zoom in."""

import html
import math
from typing import Any, Final

import numpy as np

from hf_adaclip.controllers.base import PHASES
from hf_adaclip.report.chart import COLOURS, PHASE_COLOURS, Bars, Chart, Line, Marks
from hf_adaclip.report.tables import keep_extremes

_MAX_SPANS: Final = 2000
_MAX_MARKS: Final = 1000
_STEPS: Final = "optimizer steps"


def norms_chart(
    steps: np.ndarray,
    norms: np.ndarray,
    thresholds: np.ndarray,
    coefficients: np.ndarray,
    skipped: np.ndarray,
    *,
    points: int = 1500,
) -> Chart:
    """Norm before clipping and threshold on a log axis; cut and left-out steps marked. Spikes survive any length of run.

    Args:
        steps, norms, thresholds, coefficients: One value per step.
        skipped: Positions of steps that were left out.
        points: About how many points a line may have.
    """
    kept = keep_extremes(steps, norms, points)
    lines = [_line(steps[kept], norms[kept], "norm"), _line(steps[kept], thresholds[kept], "threshold")]
    marks = []
    cut = np.flatnonzero((coefficients < 1) & (coefficients > 0) & np.isfinite(norms))
    if len(cut):
        shown = cut[keep_extremes(steps[cut], norms[cut], _MAX_MARKS)]
        marks.append(Marks(steps[shown].tolist(), norms[shown].tolist(), "scaled down", "cut", "down"))
    if len(skipped):
        shown = skipped[np.linspace(0, len(skipped) - 1, min(len(skipped), _MAX_MARKS)).astype(int)]
        level = float(np.nanmedian(np.where(np.isfinite(norms), norms, np.nan))) if np.isfinite(norms).any() else 1.0
        heights = [v if math.isfinite(v) else level for v in norms[shown].tolist()]
        marks.append(Marks(steps[shown].tolist(), heights, "left out", "out", "cross"))
    return Chart(_STEPS, "gradient norm", lines, marks, log=True)


def line_chart(
    steps: np.ndarray,
    values: np.ndarray,
    name: str,
    colour: str,
    *,
    log: bool = False,
    height: int = 260,
    points: int = 1500,
) -> Chart:
    """One quantity over the steps."""
    kept = keep_extremes(steps, values, points)
    return Chart(_STEPS, name, [_line(steps[kept], values[kept], name, colour, named=False)], log=log, height=height)


def spans_decades(values: np.ndarray) -> bool:
    """Whether a linear axis would be flat but for a few spikes: all of it is above 0, and the largest is 20 times the median or more."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and (finite > 0).all() and finite.max() >= 20 * np.median(finite))


def shape_chart(
    steps: np.ndarray, altered: np.ndarray | None, agreeing: np.ndarray | None, *, points: int = 200, height: int = 260
) -> Chart | None:
    """What shaped the step, 0 to 1: how far the spectral range moved the gradients, and which share of the components agreed.

    Args:
        steps: Optimizer steps.
        altered, agreeing: One value per step, NaN where that part did not act; None where it is not known.
        points: About how many points a line may have.
        height: Of the figure.

    Returns:
        None where neither acted.
    """
    lines = []
    for values, name, colour in ((altered, "altered energy", "pace"), (agreeing, "agreeing share", "out")):
        there = np.flatnonzero(np.isfinite(values)) if values is not None else np.array([], dtype=np.int64)
        if values is None or not len(there):
            continue
        kept = there[keep_extremes(steps[there], values[there], points)]
        lines.append(_line(steps[kept], values[kept], name, colour))
    if not lines:
        return None
    return Chart(_STEPS, "shares", lines, height=height, title="what shapes the step", limits=(0.0, 1.0))


def phases_chart(steps: np.ndarray, phases: list[str]) -> Chart:
    """Which phase the run was in, as bars over the steps; of many short ones the longest 2000 are drawn."""
    starts = [i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
    spans = sorted(zip(starts, [*starts[1:], len(phases)], strict=True), key=lambda s: s[0] - s[1])[:_MAX_SPANS]
    bars = []
    for phase in sorted(set(phases), key=lambda p: PHASES.index(p) if p in PHASES else len(PHASES)):
        own = [(float(steps[a]), float(steps[b - 1]) + 1) for a, b in sorted(spans) if phases[a] == phase]
        bars.append(Bars(own, phase, PHASE_COLOURS.get(phase, "grey")))
    return Chart(_STEPS, "", bars=bars, height=70 + 32 * len(bars), title="phases")


def interactive(chart: Chart) -> Any:
    """The chart as a plotly figure."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for line in chart.lines:
        y = [v if math.isfinite(v) else None for v in line.y]  # a gap in the line, not a point at infinity
        style = {"color": COLOURS[line.colour], "width": line.width, "dash": "dash" if line.dashed else "solid"}
        figure.add_scatter(
            x=list(line.x),
            y=y,
            mode="lines",
            name=html.escape(line.name),
            line=style,
            opacity=line.opacity,
            showlegend=line.named,
        )
    for marks in chart.marks:
        symbol = {
            "color": COLOURS[marks.colour],
            "size": 7,
            "symbol": "x" if marks.symbol == "cross" else "triangle-down",
        }
        name = html.escape(marks.name)
        figure.add_scatter(x=list(marks.x), y=list(marks.y), mode="markers", name=name, marker=symbol)
    for bar in chart.bars:
        x: list[float | None] = [v for a, b in bar.spans for v in (a, b, None)]
        names = [None if v is None else bar.name for v in x]
        figure.add_scatter(
            x=x,
            y=names,
            mode="lines",
            name=bar.name,
            line={"color": COLOURS[bar.colour], "width": 12},
            showlegend=False,
        )
    kind = "category" if chart.bars else ("log" if chart.log else "linear")
    figure.update_layout(
        xaxis_title=html.escape(chart.x),
        yaxis_title=html.escape(chart.y),
        yaxis_type=kind,
        height=chart.height,
        margin={"l": 60, "r": 16, "t": 32, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808080", "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        hovermode="x unified",
    )
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid, **({"dtick": 1, "exponentformat": "power"} if kind == "log" else {}))
    if chart.limits is not None:
        figure.update_yaxes(range=list(chart.limits))
    return figure


def _line(x: np.ndarray, y: np.ndarray, name: str, colour: str | None = None, *, named: bool = True) -> Line:
    return Line(x.tolist(), y.tolist(), name, colour or name, named=named)
