"""Figures of a run by plotly: norms and thresholds, pace, loss. One look for all of them."""

import math
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.show import keep_extremes

# Okabe-Ito: told apart with any colour vision, on white and on dark ground.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


_MAX_SPANS = 2000


def norms_figure(
    steps: np.ndarray, norms: np.ndarray, thresholds: np.ndarray, coefficients: np.ndarray, skipped: np.ndarray
) -> Any:
    """Norm before clipping and threshold on a log axis; cut and left-out steps marked. Spikes survive any length of run.

    Args:
        steps, norms, thresholds, coefficients: One value per step.
        skipped: Positions of steps that were left out.
    """
    import plotly.graph_objects as go

    points = keep_extremes(steps, norms)
    figure = go.Figure()
    _line(figure, steps[points], norms[points], "norm", COLOURS[0])
    _line(figure, steps[points], thresholds[points], "threshold", COLOURS[1])
    cut = np.flatnonzero((coefficients < 1) & np.isfinite(norms))
    if len(cut):
        shown = cut[keep_extremes(steps[cut], norms[cut], 2000)]
        _marks(figure, steps[shown], norms[shown], "clipped", COLOURS[4], "triangle-down")
    if len(skipped):
        shown = skipped[np.linspace(0, len(skipped) - 1, min(len(skipped), 1000)).astype(int)]
        level = float(np.nanmedian(np.where(np.isfinite(norms), norms, np.nan))) if np.isfinite(norms).any() else 1.0
        _marks(figure, steps[shown], np.full(len(shown), level), "left out", COLOURS[3], "x")
    return style(figure, "optimizer steps", "gradient norm")


def line_figure(steps: np.ndarray, values: np.ndarray, name: str, *, log: bool = False) -> Any:
    """One quantity over the steps."""
    import plotly.graph_objects as go

    points = keep_extremes(steps, values)
    figure = go.Figure()
    _line(figure, steps[points], values[points], name, COLOURS[2])
    return style(figure, "optimizer steps", name, log=log, height=260)


def phases_figure(steps: np.ndarray, phases: list[str]) -> Any:
    """Which phase the run was in, as bars over the steps; of many short ones the longest 2000 are drawn."""
    import plotly.graph_objects as go

    starts = [i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
    spans = sorted(zip(starts, [*starts[1:], len(phases)], strict=True), key=lambda s: s[0] - s[1])[:_MAX_SPANS]
    figure = go.Figure()
    for position, phase in enumerate(dict.fromkeys(phases)):
        x: list[float | None] = []
        for start, stop in sorted(s for s in spans if phases[s[0]] == phase):
            x += [float(steps[start]), float(steps[stop - 1]) + 1, None]
        y = [phase if v is not None else None for v in x]
        line = {"color": COLOURS[position % len(COLOURS)], "width": 12}
        figure.add_scatter(x=x, y=y, mode="lines", name=phase, line=line, showlegend=False)
    return style(figure, "optimizer steps", "", log=None, height=230)


def style(figure: Any, x: str, y: str, *, log: bool | None = True, height: int = 380) -> Any:
    """One look for all figures: transparent, for a light and a dark page, with the legend below.

    `log` None makes the y axis one of names.
    """
    figure.update_layout(
        xaxis_title=x,
        yaxis_title=y,
        yaxis_type={True: "log", False: "linear", None: "category"}[log],
        height=height,
        margin={"l": 60, "r": 16, "t": 32, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808080", "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    return figure


def _line(figure: Any, x: np.ndarray, y: np.ndarray, name: str, colour: str) -> None:
    values = [v if math.isfinite(v) else None for v in y.tolist()]  # a gap in the line, not a point at infinity
    figure.add_scatter(x=x.tolist(), y=values, mode="lines", name=name, line={"color": colour, "width": 1.5})


def _marks(figure: Any, x: np.ndarray, y: np.ndarray, name: str, colour: str, symbol: str) -> None:
    marker = {"color": colour, "size": 7, "symbol": symbol}
    figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="markers", name=name, marker=marker)
