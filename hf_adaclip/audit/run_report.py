"""The report of one run: what its ledger holds, as a page, a picture, Markdown or JSON."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit import page
from hf_adaclip.audit.ingest import Series, ledger_records, load_series
from hf_adaclip.audit.reader import open_regular
from hf_adaclip.audit.schema import parse_number, plain
from hf_adaclip.audit.show import keep_extremes
from hf_adaclip.audit.verify import VerifyReport, verify_ledger
from hf_adaclip.controllers import Reason
from hf_adaclip.errors import LedgerError
from hf_adaclip.events import ClipEvent, EventTracker

MAX_EVENTS = 500
"""Events shown in a table; further ones are counted, and all of them are in the JSON."""


@dataclass(frozen=True)
class RunReport:
    """What there is to say about a run.

    Attributes:
        name: For the title.
        series: Norms and decisions.
        header: Of the last segment.
        events: All adjustments.
        verdict: Of the verification.
        points: Lines of `convergence.jsonl` beside the ledger, if it is there.
    """

    name: str
    series: Series
    header: dict[str, Any]
    events: list[ClipEvent]
    verdict: VerifyReport
    points: list[dict[str, Any]]


def load_run(path: str | Path) -> RunReport:
    """Read a run from its ledger, or from the folder that holds it.

    Raises:
        LedgerError: There is no ledger, or it cannot be read.
    """
    path = Path(path)
    ledger = path / "clip_ledger.jsonl" if path.is_dir() else path
    if path.is_dir() and not ledger.is_file():
        raise LedgerError(f"{path} must hold comparison.json or clip_ledger.jsonl, but holds neither.")
    series = load_series(ledger)
    if series.source != "ledger":
        raise LedgerError(
            f"{ledger} must be a ledger of hf_adaclip, but is {series.source} instead. See `hf-adaclip advise`."
        )
    return RunReport(
        name=str(path),
        series=series,
        header=series.header or {},
        events=_events(ledger, (series.header or {}).get("config") or {}),
        verdict=verify_ledger(ledger),
        points=_points(ledger.parent / "convergence.jsonl"),
    )


def _events(ledger: Path, config: dict[str, Any]) -> list[ClipEvent]:
    """All adjustments, over resumptions as if the run had never stopped: steps that were done again count once."""
    limits = _limits(ledger)
    max_pace = config.get("max_pace")
    tracker = EventTracker(max_pace if isinstance(max_pace, float) else 1.0)
    events: list[ClipEvent] = []
    segment = -1
    for line in ledger_records(ledger):
        if line["kind"] == "header":
            segment += 1
        elif line["kind"] == "step":
            try:
                step = parse_number(line["step"])
                if step >= (limits[segment] if segment >= 0 else math.inf):
                    continue
                row = {key: parse_number(line[key]) for key in ("norm", "threshold", "coefficient", "pace")}
                reason = Reason[line["reason"]]
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                raise LedgerError(f"{ledger}: step {line.get('step')} cannot be understood: {error}.") from error
            events.extend(tracker.feed(int(step), row, reason))
    events.extend(tracker.finish())
    return events


def _limits(ledger: Path) -> list[float]:
    """Per segment, the first step that a later segment did again."""
    starts = [line.get("first_step", 0) for line in ledger_records(ledger) if line["kind"] == "header"]
    return [min((s for s in starts[i + 1 :] if isinstance(s, int)), default=float("inf")) for i in range(len(starts))]


def _points(path: Path) -> list[dict[str, Any]]:
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    points = []
    for line in lines:
        try:
            point = json.loads(line)
            points.append({"step": int(point["step"]), "metrics": dict(point["metrics"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return points


def summary(report: RunReport) -> dict[str, Any]:
    """Numbers of the run, JSON-ready."""
    series = report.series
    reasons = series.reasons or []
    counts = {name: reasons.count(name) for name in sorted(set(reasons))}
    _, coefficients = series.decisions()
    return {
        "run": report.name,
        "verified": report.verdict.ok,
        "verification": report.verdict.summary(),
        "controller": report.header.get("controller"),
        "steps": len(series),
        "altered": int((coefficients < 1).sum()),
        "left_out": int((~np.isfinite(series.norms)).sum()),
        "largest_pace": 1.0 if series.paces is None else float(series.paces.max(initial=1.0)),
        "counts": counts,
        "events": [asdict(e) for e in report.events],
        "config": report.header.get("config"),
        "versions": report.header.get("versions"),
    }


def write_html(report: RunReport, path: Path) -> Path:
    """One page: norms and thresholds, pace, loss, events, settings, environment, verdict."""
    from hf_adaclip.audit.figures import line_figure, norms_figure, phases_figure

    series, header = report.series, report.header
    thresholds, coefficients = series.decisions()
    skipped = np.flatnonzero(~np.isfinite(series.norms))
    versions = " · ".join(f"{k} {v}" for k, v in (header.get("versions") or {}).items())
    parts = [
        page.text(report.verdict.summary().split(": ", 1)[-1], "good" if report.verdict.ok else "bad"),
        *([] if report.verdict.ok else [page.bullets([str(f) for f in report.verdict.findings])]),
        page.table(["", ""], [[k, str(v)] for k, v in _facts(report).items()]),
        page.heading("Gradient norm and threshold (drag to zoom, double-click to reset)"),
        page.figure(norms_figure(series.steps, series.norms, thresholds, coefficients, skipped)),
    ]
    phases = [Reason[name].phase if name in Reason.__members__ else "unknown" for name in series.reasons or []]
    parts += [page.heading("Phases"), page.figure(phases_figure(series.steps, phases))]
    if series.paces is not None and series.paces.max(initial=1.0) > 1:
        parts += [page.heading("Pace"), page.figure(line_figure(series.steps, series.paces, "pace"))]
    if np.isfinite(series.losses).any():
        parts += [
            page.heading("Training loss"),
            page.figure(line_figure(series.steps, series.losses, "training loss")),
        ]
    parts += _evaluations(report)
    parts += [page.heading(f"Adjustments ({len(report.events)})"), *_event_table(report.events)]
    config = header.get("config") or {}
    parts += [
        page.heading("Settings"),
        page.table(["field", "value"], [[k, json.dumps(v)] for k, v in config.items()]),
    ]
    return page.write_page(path, f"Run {report.name}", f"{header.get('created', '')} · {versions}", parts)


def _facts(report: RunReport) -> dict[str, Any]:
    numbers = summary(report)
    return {
        "controller": numbers["controller"],
        "steps": numbers["steps"],
        "altered": f"{numbers['altered']} ({numbers['altered'] / max(numbers['steps'], 1):.2%})",
        "left out": numbers["left_out"],
        "largest pace": f"{numbers['largest_pace']:.3g}",
        **{f"steps {name}": count for name, count in numbers["counts"].items()},
    }


def _evaluations(report: RunReport) -> list[page.Part]:
    from hf_adaclip.audit.figures import line_figure

    points = [p for p in report.points if isinstance(p["metrics"].get("eval_loss"), int | float)]
    if len(points) < 2:
        return []
    steps = np.array([p["step"] for p in points])
    losses = np.array([float(p["metrics"]["eval_loss"]) for p in points])
    return [page.heading("Evaluation loss"), page.figure(line_figure(steps, losses, "eval loss"))]


def _event_table(events: list[ClipEvent]) -> list[page.Part]:
    if not events:
        return [page.text("None: the controller never changed anything.")]
    # Rare kinds first in line for the space that there is, then in order of time.
    kinds = {e.kind: sum(o.kind == e.kind for o in events) for e in events}
    shown = sorted(sorted(events, key=lambda e: kinds[e.kind])[:MAX_EVENTS], key=lambda e: e.step)
    rows = [_event_row(e) for e in shown]
    parts = [page.table(["steps", "what", "before", "after", "why"], rows, words=["why", "what"])]
    if len(shown) < len(events):
        parts.append(
            page.text(f"{len(events) - len(shown)} more of the frequent kinds are in the JSON (`--format json`).")
        )
    return parts


def _event_row(event: ClipEvent) -> list[str]:
    steps = str(event.step) if event.step == event.until else f"{event.step}-{event.until}"
    return [steps, event.kind.replace("_", " "), f"{event.before:.4g}", f"{event.after:.4g}", event.reason]


def write_markdown(report: RunReport, path: Path) -> Path:
    """The same in Markdown, without the pictures."""
    lines = [f"# Run {report.name}", "", report.verdict.summary(), ""]
    lines += ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in _facts(report).items()), ""]
    lines += [
        f"## Adjustments ({len(report.events)})",
        "",
        "| steps | what | before | after | why |",
        "| --- " * 5 + "|",
    ]
    lines += ["| " + " | ".join(_event_row(e)) + " |" for e in report.events[:MAX_EVENTS]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def clipping_section(report: RunReport, seal: str) -> str:
    """A section for a model's card: what clipping did in the run that made it, and how to check that.

    Args:
        report: The run.
        seal: Hash of the ledger's last seal.
    """
    rows = [f"| {k} | {v} |" for k, v in _facts(report).items()]
    return "\n".join(
        [
            "## Gradient clipping",
            "",
            "Gradients were clipped by [hf_adaclip](https://pypi.org/project/hf_adaclip/), which recorded every decision.",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            f"Ledger: {report.verdict.summary().split(': ', 1)[-1]}",
            f"Last seal of `clip_ledger.jsonl`: `{seal}`. "
            f"Check it with `hf-adaclip verify clip_ledger.jsonl --seal {seal}`.",
            "",
        ]
    )


def write_json(report: RunReport, path: Path) -> Path:
    """Numbers, events, settings and verdict as strict JSON."""
    path.write_text(json.dumps(plain(summary(report)), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_png(report: RunReport, path: Path) -> Path:
    """Norms, thresholds and cut steps as a picture."""
    from matplotlib.figure import Figure

    series = report.series
    thresholds, coefficients = series.decisions()
    figure = Figure(figsize=(11, 4), layout="constrained")
    axis = figure.subplots()
    points = keep_extremes(series.steps, series.norms)
    axis.plot(series.steps[points], series.norms[points], color="#0072B2", linewidth=0.8, label="norm")
    axis.plot(series.steps[points], thresholds[points], color="#E69F00", linewidth=1, label="threshold")
    cut = np.flatnonzero(coefficients < 1)
    axis.plot(series.steps[cut], series.norms[cut], "v", color="#D55E00", markersize=4, label="clipped")
    axis.set(yscale="log", xlabel="optimizer steps", ylabel="gradient norm")
    axis.set_title(report.name.replace("$", r"\$"), loc="left", fontsize=10)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(frameon=False, ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    return path
