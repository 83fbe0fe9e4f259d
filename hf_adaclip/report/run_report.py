"""The report of one run: what its ledger holds, as a page, a picture, Markdown or JSON."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.config import AdaptiveClipConfig, as_written_now
from hf_adaclip.controllers import CONTROLLERS, Reason
from hf_adaclip.ledger.schema import plain
from hf_adaclip.report import markdown as md
from hf_adaclip.report import page, shape_facts
from hf_adaclip.report.incidents import markdown_rows
from hf_adaclip.report.incidents import section as incident_section
from hf_adaclip.report.run_facts import RunReport, answer, applied_paces, left_out, load_run, shortly, summary
from hf_adaclip.report.tables import keep_extremes
from hf_adaclip.run.events import ClipEvent

__all__ = [
    "RunReport",
    "answer",
    "clipping_section",
    "left_out",
    "load_run",
    "summary",
    "write_csv",
    "write_html",
    "write_json",
    "write_markdown",
    "write_png",
]

MAX_EVENTS = 500
"""Events shown in a table; further ones are counted, and all of them are in the JSON."""
MAX_MOVES = 8
"""Of them, rises of the pace and falls of the pace, each; the figure has them all."""


def write_html(report: RunReport, path: Path, *, zoom: bool = False) -> Path:
    """One page: whether clipping did anything, norms and thresholds, pace, loss, events, settings, environment, verdict.

    Args:
        report: The run.
        path: File to write.
        zoom: Figures by plotly, to zoom into; the page is 4.8 MB larger for it.
    """
    from hf_adaclip.report.figures import line_chart, norms_chart, phases_chart, shape_chart, spans_decades

    series, header, numbers = report.series, report.header, summary(report)
    thresholds, coefficients = series.decisions()
    skipped = np.flatnonzero(left_out(series))
    versions = " · ".join(f"{k} {v}" for k, v in (header.get("versions") or {}).items())
    hint = " (drag to zoom, double-click to reset)" if zoom else ""
    parts = [
        page.text(answer(report), "lead"),
        page.text(_verdict(report), "good" if report.verdict.ok else "bad"),
        *([] if report.verdict.ok else [page.bullets([str(f) for f in report.verdict.findings])]),
        page.facts([[k, str(v)] for k, v in _facts(report).items()]),
        page.heading(f"Gradient norm and threshold{hint}"),
        page.figure(norms_chart(series.steps, series.norms, thresholds, coefficients, skipped), zoom=zoom),
        *_remark(shape_facts.threshold_remark(numbers)),
    ]
    phases = [Reason[name].phase if name in Reason.__members__ else "unknown" for name in series.reasons or []]
    parts += [page.heading("Phases"), page.figure(phases_chart(series.steps, phases), zoom=zoom)]
    paces = np.ones(0, np.float32) if series.paces is None else series.paces
    moves = bool((paces != 1).any())
    if moves or numbers["by_heart_step"] is not None:
        parts.append(page.heading("Pace"))
        if moves:
            parts.append(page.figure(line_chart(series.steps, paces, "pace", "pace"), zoom=zoom))
        parts += _remark(shape_facts.pace_remark(numbers))
    shapes = shape_chart(series.steps, series.altered_energies, series.agreeing_shares)
    if shapes is not None:
        parts += [page.heading("Spectral range and sign agreement"), page.figure(shapes, zoom=zoom)]
        parts += _remark(shape_facts.waiting_remark(numbers))
    if np.isfinite(series.losses).any():
        chart = line_chart(series.steps, series.losses, "training loss", "loss", log=spans_decades(series.losses))
        parts += [page.heading("Training loss"), page.figure(chart, zoom=zoom)]
    parts += _evaluations(report, zoom)
    parts += [
        page.heading("Reasons"),
        page.table(["reason", "steps", "meaning"], reason_rows(series), words=["meaning"]),
    ]
    parts += [page.heading(f"Adjustments ({len(report.events)})"), *_event_table(report.events)]
    parts += incident_section(Path(report.name))
    parts += [page.heading("Settings"), *_settings(header.get("config") or {})]
    return page.write_page(path, f"Run {report.name}", f"{header.get('created', '')} · {versions}", parts)


def _remark(sentences: str) -> list[page.Part]:
    return [page.text(sentences)] if sentences else []


def reason_rows(series: Series) -> list[list[str]]:
    """The reasons of a ledger's steps, the most frequent first: name, steps, meaning."""
    counts = Counter(series.reasons or [])
    return [
        [name, str(count), Reason[name].sentence if name in Reason.__members__ else "Not known to this version."]
        for name, count in counts.most_common()
    ]


def _settings(config: dict[str, Any]) -> list[page.Part]:
    """What differs from the defaults first; the rest is folded away."""
    config = as_written_now(config)
    name = config.get("controller")
    defaults = AdaptiveClipConfig(controller=name).to_dict() if name in CONTROLLERS else {}
    defaults["controller"] = AdaptiveClipConfig.controller
    usual = _filled_in(config)
    changed = [k for k, v in config.items() if v != defaults.get(k) and k not in usual]
    rest = [[k, json.dumps(v)] for k, v in config.items() if k not in changed]
    rows = [[k, json.dumps(config[k]), json.dumps(defaults.get(k))] for k in changed]
    parts = [
        page.table(["changed", "value", "default"], rows, marked=range(len(rows)))
        if rows
        else page.text("All settings are the defaults.")
    ]
    return [
        *parts,
        page.folded(f"{len(rest)} settings at their defaults, or filled in by the package", ["field", "value"], rest),
    ]


def _filled_in(config: dict[str, Any]) -> set[str]:
    """Fields that the package fills in by itself."""
    kind = CONTROLLERS.get(str(config.get("controller")))
    usual = {"ledger", "pace_start"}
    if kind is not None and config.get("granularity") == kind.granularities[0]:
        usual.add("granularity")
    if config.get("granularity") != "global" and config.get("ceiling_share") == 1:
        usual.add("ceiling_share")
    return usual


def _verdict(report: RunReport) -> str:
    """The verification without the path, and what its count of steps means after a resumption."""
    text = report.verdict.summary().removeprefix(f"{report.verdict.path}: ")
    if not report.repeated:
        return text
    return f"{text} The run has {len(report.series)} steps: {report.repeated} were done again after a resumption, and count once here."


def _facts(report: RunReport) -> dict[str, Any]:
    n = summary(report)
    steps = max(n["steps"], 1)
    again = f" ({report.repeated} done again after a resumption, counted once)" if report.repeated else ""
    shadow = " (shadow: not applied)" if n["shadow"] else ""
    facts: dict[str, Any] = {
        "controller": f"{n['controller']}{shadow}",
        "steps": f"{n['steps']}{again}",
        "scaled down": f"{n['altered']} ({n['altered'] / steps:.2%})",
        "left out": n["left_out"],
        "spikes": n["spikes"],
        "max_grad_norm": shortly(n["max_grad_norm"])
        if isinstance(n["max_grad_norm"], int | float)
        else n["max_grad_norm"],
    }
    if n["max_pace"] is not None:  # a controller without a pace has none to tell of
        facts["max_pace"] = n["max_pace"]
        facts["pace"] = (
            f"largest {n['largest_pace']:.3g}, mean {n['mean_pace']:.3g}{shadow if n['largest_pace'] > 1 else ''}"
        )
    if n["effective_rate"] is not None:
        facts["effective learning rate"] = (
            f"at most {n['effective_rate']:.3g} in a logged step (the schedule's rate times the pace)"
        )
    elif n["largest_pace"] != 1:
        facts["effective learning rate"] = f"at most {n['largest_pace']:.3g} times the schedule's rate"
    else:
        facts["effective learning rate"] = "the schedule's rate"
    return facts | shape_facts.facts(n)


def _evaluations(report: RunReport, zoom: bool) -> list[page.Part]:
    from hf_adaclip.report.figures import line_chart

    points = [p for p in report.points if isinstance(p["metrics"].get("eval_loss"), int | float)]
    if len(points) < 2:
        return []
    steps = np.array([p["step"] for p in points])
    losses = np.array([float(p["metrics"]["eval_loss"]) for p in points])
    return [page.heading("Evaluation loss"), page.figure(line_chart(steps, losses, "eval loss", "loss"), zoom=zoom)]


def _event_table(events: list[ClipEvent]) -> list[page.Part]:
    if not events:
        return [page.text("None: the controller never changed anything.")]
    shown = _shown(events)
    rows = [_event_row(e) for e in shown]
    parts = [page.table(_EVENT_LABELS, rows, words=["why"], short=["steps", "what", "change"])]
    if len(shown) < len(events):
        parts.append(
            page.text(f"{len(events) - len(shown)} more of the frequent kinds are in the JSON (`--format json`).")
        )
    return parts


def _shown(events: list[ClipEvent]) -> list[ClipEvent]:
    """In order of their first steps; rare kinds are first in line for the space that there is, and of the pace's moves the largest."""
    kinds = Counter((e.kind, e.reason) for e in events)
    ordered = sorted(events, key=lambda e: (kinds[e.kind, e.reason], -_factor(e)))
    shown: list[ClipEvent] = []
    moves: Counter[tuple[str, str]] = Counter()
    for event in ordered:
        moves[event.kind, event.reason] += event.kind in ("pace_raised", "pace_lowered")
        if moves[event.kind, event.reason] <= MAX_MOVES and len(shown) < MAX_EVENTS:
            shown.append(event)
    return sorted(shown, key=lambda e: e.step)


def _factor(event: ClipEvent) -> float:
    """How far the pace moved, as the absolute logarithm of the factor; 0 of other events."""
    known = event.quantity == "pace" and event.before > 0 and event.after > 0
    return abs(math.log(event.after / event.before)) if known else 0.0


_EVENT_LABELS: Final = ["steps", "what", "change", "why"]


def _event_row(event: ClipEvent) -> list[str]:
    steps = str(event.step) if event.step == event.until else f"{event.step}-{event.until}"
    return [steps, event.kind.replace("_", " "), event.change, event.sentences]


def write_markdown(report: RunReport, path: Path) -> Path:
    """The same in Markdown, without the pictures."""
    reasons = [[md.code(name), count, md.text(meaning)] for name, count, meaning in reason_rows(report.series)]
    shown = _shown(report.events)
    events = [[md.text(cell) for cell in _event_row(e)] for e in shown]
    parts = [
        f"# Run {md.text(report.name)}",
        md.text(answer(report)),
        md.text(_verdict(report)),
        _facts_table(report),
        *(md.prose(remark) for remark in shape_facts.remarks(summary(report))),
        "## Reasons",
        md.table(["reason", "steps", "meaning"], reasons),
        f"## Adjustments ({len(report.events)})",
        md.table(_EVENT_LABELS, events),
    ]
    if len(shown) < len(report.events):
        parts.append(f"{len(report.events) - len(shown)} more are in the JSON (`--format json`).")
    labels, incidents = markdown_rows(Path(report.name))
    if incidents:
        rows = [[md.text(cell) for cell in row] for row in incidents]
        parts += [f"## Incidents ({len(incidents)})", md.table(labels, rows)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def write_csv(report: RunReport, path: Path) -> Path:
    """The adjustments, one a row, with the quantity that `before` and `after` are of."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "until", "kind", "quantity", "before", "after", "code", "reason", "done"])
        for e in report.events:
            # A name or sentence that begins like a formula is none: all of these are the package's own words.
            writer.writerow([e.step, e.until, e.kind, e.quantity, e.before, e.after, e.code, e.reason, e.done])
    return path


def _facts_table(report: RunReport) -> str:
    return md.table(["", ""], [[md.text(k), md.text(v)] for k, v in _facts(report).items()])


def clipping_section(report: RunReport, seal: str, *, learning_rate: float | None = None) -> str:
    """A section for a model's card: what clipping did in the run that made it, and how to check that.

    Args:
        report: The run.
        seal: Hash of the ledger's last seal.
        learning_rate: The largest rate of the schedule, where it is known: then the effective rate is told in numbers.
    """
    facts = _facts(report)
    pace = max(applied_paces(report), default=1.0)
    if learning_rate is not None:
        facts["effective learning rate"] = (
            f"at most {learning_rate * pace:.3g}: the given {learning_rate:.3g} times a pace of at most {pace:.3g}"
        )
    return (
        "\n\n".join(
            [
                "## Gradient clipping",
                "Gradients were clipped by [hf_adaclip](https://pypi.org/project/hf_adaclip/), which recorded every decision.",
                md.text(answer(report)),
                md.table(["", ""], [[md.text(k), md.text(v)] for k, v in facts.items()]),
                f"Ledger: {md.text(_verdict(report))}",
                f"Last seal of `clip_ledger.jsonl`: {md.code(seal)}. "
                f"Check it with {md.code(f'hf-adaclip verify clip_ledger.jsonl --seal {seal}')}.",
            ]
        )
        + "\n"
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
    cut = np.flatnonzero((coefficients < 1) & (coefficients > 0))
    axis.plot(series.steps[cut], series.norms[cut], "v", color="#D55E00", markersize=4, label="clipped")
    axis.set(yscale="log", xlabel="optimizer steps", ylabel="gradient norm")
    axis.set_title(report.name.replace("$", r"\$"), loc="left", fontsize=10)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(frameon=False, ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    return path
