"""The report of one run: what its ledger holds, as a page, a picture, Markdown or JSON."""

import csv
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.audit import markdown as md
from hf_adaclip.audit import page
from hf_adaclip.audit.ingest import Series, ledger_records, load_series
from hf_adaclip.audit.schema import parse_number, plain
from hf_adaclip.audit.show import keep_extremes
from hf_adaclip.audit.verify import VerifyReport, verify_ledger
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Reason
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
        repeated: Steps that were done again after a resumption; each counts once everywhere else.
        rates: Learning rate by step, as far as `trainer_state.json` beside the ledger logged it.
        points: Lines of `convergence.jsonl` beside the ledger, if it is there.
    """

    name: str
    series: Series
    header: dict[str, Any]
    events: list[ClipEvent]
    verdict: VerifyReport
    points: list[dict[str, Any]]
    repeated: int = 0
    rates: dict[int, float] = field(default_factory=dict)


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
    events, records = _events(ledger, series.header or {})
    return RunReport(
        name=str(path),
        series=series,
        header=series.header or {},
        events=events,
        verdict=verify_ledger(ledger),
        points=_points(ledger.parent / "convergence.jsonl"),
        repeated=max(records - len(series), 0),
        rates=_rates(ledger.parent),
    )


def _events(ledger: Path, header: dict[str, Any]) -> tuple[list[ClipEvent], int]:
    """All adjustments, over resumptions as if the run had never stopped: steps that were done again count once. And all step records."""
    limits = _limits(ledger)
    config, parts = header.get("config"), header.get("num_tensors")
    tracker = EventTracker.of_run(config if isinstance(config, dict) else {}, parts if isinstance(parts, int) else 0)
    records = 0
    events: list[ClipEvent] = []
    segment = -1
    for line in ledger_records(ledger):
        if line["kind"] == "header":
            segment += 1
        elif line["kind"] == "step":
            records += 1
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
    return events, records


def _limits(ledger: Path) -> list[float]:
    """Per segment, the first step that a later segment did again."""
    starts = [line.get("first_step", 0) for line in ledger_records(ledger) if line["kind"] == "header"]
    return [min((s for s in starts[i + 1 :] if isinstance(s, int)), default=float("inf")) for i in range(len(starts))]


def _points(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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


def _rates(folder: Path) -> dict[int, float]:
    """Learning rates that a Trainer logged, by the step (counted from 0) before the log line."""
    try:
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        logged = {int(e["step"]) - 1: float(e["learning_rate"]) for e in history if "learning_rate" in e}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return {}
    return {step: rate for step, rate in logged.items() if math.isfinite(rate)}


def summary(report: RunReport) -> dict[str, Any]:
    """Numbers of the run, JSON-ready."""
    series = report.series
    reasons = series.reasons or []
    counts = {name: reasons.count(name) for name in sorted(set(reasons))}
    _, coefficients = series.decisions()
    out = left_out(series)
    cut = (coefficients < 1) & ~out
    finite = series.norms[np.isfinite(series.norms)]
    paces = np.ones(1, np.float32) if series.paces is None or not len(series) else series.paces
    config = report.header.get("config") or {}
    return {
        "run": report.name,
        "verified": report.verdict.ok,
        "verification": report.verdict.summary(),
        "controller": report.header.get("controller"),
        "shadow": config.get("shadow") is True,
        "steps": len(series),
        "repeated": report.repeated,
        "altered": int(cut.sum()),
        "altered_in_warmup": int((cut & np.array([r == Reason.WARMUP.name for r in reasons], dtype=bool)).sum()),
        "left_out": int(out.sum()),
        "not_finite": int((~np.isfinite(series.norms)).sum()),
        "spikes": sum(e.kind == "spike" for e in report.events),
        "largest_norm": float(finite.max()) if len(finite) else None,
        "largest_applied": float((series.norms * coefficients)[~out].max()) if (~out).any() else None,
        "max_grad_norm": report.header.get("static_threshold"),
        "max_pace": config.get("max_pace"),
        "largest_pace": float(paces.max()),
        "mean_pace": float(paces.mean(dtype=np.float64)),
        "effective_rate": _effective_rate(report),
        "counts": counts,
        "events": [{**asdict(e), "change": e.change} for e in report.events],
        "config": report.header.get("config"),
        "versions": report.header.get("versions"),
    }


def left_out(series: Series) -> np.ndarray:
    """Bool per step: whether it was left out, for its norm or because the controller wanted that."""
    _, coefficients = series.decisions()
    out: np.ndarray = ~np.isfinite(series.norms) | (coefficients == 0)
    return out


def _effective_rate(report: RunReport) -> float | None:
    """The largest learning rate that a logged step was made with: the schedule's, times the pace. None where no rate was logged."""
    paces = dict(zip(report.series.steps.tolist(), _applied_paces(report), strict=True))
    return max((rate * paces[step] for step, rate in report.rates.items() if step in paces), default=None)


def _applied_paces(report: RunReport) -> list[float]:
    shadow = (report.header.get("config") or {}).get("shadow") is True
    paces = report.series.paces
    return [1.0] * len(report.series) if paces is None or shadow else paces.tolist()


def answer(report: RunReport) -> str:
    """Whether clipping did anything, in words and numbers: what people look for first."""
    n = summary(report)
    steps, cut, out = n["steps"], n["altered"], n["left_out"]
    if n["shadow"]:
        return (
            f"Shadow run: the static threshold {n['max_grad_norm']:g} was applied. The controller would have scaled down {cut} of {steps} "
            f"gradients ({cut / max(steps, 1):.1%}) and left out {out} steps, of which {n['not_finite']} were left out, not being finite."
        )
    pace = ""
    if n["largest_pace"] > 1:
        largest, mean = f"{n['largest_pace']:.3g}", f"{n['mean_pace']:.3g}"
        pace = f" The pace raised the learning rate up to {largest} times the schedule's, {mean} times on average."
    elif n["mean_pace"] < 1:
        pace = " The pace held the learning rate down at the start."
    if not cut and not out:
        return f"No: clipping left all {steps} gradients as they were; the largest norm was {_g(n['largest_norm'])}.{pace}"
    parts = [f"Yes: clipping scaled down {cut} of {steps} gradients ({cut / max(steps, 1):.1%})"]
    if n["altered_in_warmup"]:
        parts.append(f", {n['altered_in_warmup']} of them in the warm-up, where the static threshold rules")
    if out:
        parts.append(f", and left out {out} {'step' if out == 1 else 'steps'} ({n['not_finite']} not finite)")
    top = int(np.nanargmax(np.where(np.isfinite(report.series.norms), report.series.norms, -1)))
    norm, coefficient = float(report.series.norms[top]), float(report.series.decisions()[1][top])
    if math.isfinite(norm):
        what = (
            "was left out"
            if coefficient == 0
            else "was left as it was"
            if coefficient == 1
            else f"was cut to {norm * coefficient:.3g}"
        )
        parts.append(f". The largest norm, {norm:.4g} at step {int(report.series.steps[top])}, {what}")
    return "".join(parts) + f".{pace}"


def _g(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def write_html(report: RunReport, path: Path, *, zoom: bool = False) -> Path:
    """One page: whether clipping did anything, norms and thresholds, pace, loss, events, settings, environment, verdict.

    Args:
        report: The run.
        path: File to write.
        zoom: Figures by plotly, to zoom into; the page is 4.8 MB larger for it.
    """
    from hf_adaclip.audit.figures import line_chart, norms_chart, phases_chart

    series, header = report.series, report.header
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
    ]
    phases = [Reason[name].phase if name in Reason.__members__ else "unknown" for name in series.reasons or []]
    parts += [page.heading("Phases"), page.figure(phases_chart(series.steps, phases), zoom=zoom)]
    if series.paces is not None and (series.paces != 1).any():
        parts += [page.heading("Pace"), page.figure(line_chart(series.steps, series.paces, "pace", "pace"), zoom=zoom)]
    if np.isfinite(series.losses).any():
        chart = line_chart(series.steps, series.losses, "training loss", "loss")
        parts += [page.heading("Training loss"), page.figure(chart, zoom=zoom)]
    parts += _evaluations(report, zoom)
    parts += [
        page.heading("Reasons"),
        page.table(["reason", "steps", "meaning"], reason_rows(series), words=["meaning"]),
    ]
    parts += [page.heading(f"Adjustments ({len(report.events)})"), *_event_table(report.events)]
    parts += [page.heading("Settings"), *_settings(header.get("config") or {})]
    return page.write_page(path, f"Run {report.name}", f"{header.get('created', '')} · {versions}", parts)


def reason_rows(series: Series) -> list[list[str]]:
    """The reasons of a ledger's steps, the most frequent first: name, steps, meaning."""
    counts = Counter(series.reasons or [])
    return [
        [name, str(count), Reason[name].sentence if name in Reason.__members__ else "Not known to this version."]
        for name, count in counts.most_common()
    ]


def _settings(config: dict[str, Any]) -> list[page.Part]:
    """What differs from the defaults first; the rest is folded away."""
    defaults = {f.name: f.default for f in fields(AdaptiveClipConfig)}
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
    facts = {
        "controller": f"{n['controller']}{shadow}",
        "steps": f"{n['steps']}{again}",
        "scaled down": f"{n['altered']} ({n['altered'] / steps:.2%})",
        "left out": n["left_out"],
        "spikes": n["spikes"],
        "max_grad_norm": _g(n["max_grad_norm"]) if isinstance(n["max_grad_norm"], int | float) else n["max_grad_norm"],
        "max_pace": n["max_pace"],
        "pace": f"largest {n['largest_pace']:.3g}, mean {n['mean_pace']:.3g}{shadow if n['largest_pace'] > 1 else ''}",
    }
    if n["effective_rate"] is not None:
        facts["effective learning rate"] = (
            f"at most {n['effective_rate']:.3g} in a logged step (the schedule's rate times the pace)"
        )
    elif n["largest_pace"] != 1:
        facts["effective learning rate"] = f"at most {n['largest_pace']:.3g} times the schedule's rate"
    else:
        facts["effective learning rate"] = "the schedule's rate"
    return facts


def _evaluations(report: RunReport, zoom: bool) -> list[page.Part]:
    from hf_adaclip.audit.figures import line_chart

    points = [p for p in report.points if isinstance(p["metrics"].get("eval_loss"), int | float)]
    if len(points) < 2:
        return []
    steps = np.array([p["step"] for p in points])
    losses = np.array([float(p["metrics"]["eval_loss"]) for p in points])
    return [page.heading("Evaluation loss"), page.figure(line_chart(steps, losses, "eval loss", "loss"), zoom=zoom)]


def _event_table(events: list[ClipEvent]) -> list[page.Part]:
    if not events:
        return [page.text("None: the controller never changed anything.")]
    # Rare kinds first in line for the space that there is, then in order of time.
    kinds = {e.kind: sum(o.kind == e.kind for o in events) for e in events}
    shown = sorted(sorted(events, key=lambda e: kinds[e.kind])[:MAX_EVENTS], key=lambda e: e.step)
    rows = [_event_row(e) for e in shown]
    parts = [page.table(_EVENT_LABELS, rows, words=["why", "what"])]
    if len(shown) < len(events):
        parts.append(
            page.text(f"{len(events) - len(shown)} more of the frequent kinds are in the JSON (`--format json`).")
        )
    return parts


_EVENT_LABELS: Final = ["steps", "what", "change", "why"]


def _event_row(event: ClipEvent) -> list[str]:
    steps = str(event.step) if event.step == event.until else f"{event.step}-{event.until}"
    return [steps, event.kind.replace("_", " "), event.change, event.sentences]


def write_markdown(report: RunReport, path: Path) -> Path:
    """The same in Markdown, without the pictures."""
    reasons = [[md.code(name), count, md.text(meaning)] for name, count, meaning in reason_rows(report.series)]
    events = [[md.text(cell) for cell in _event_row(e)] for e in report.events[:MAX_EVENTS]]
    parts = [
        f"# Run {md.text(report.name)}",
        md.text(answer(report)),
        md.text(_verdict(report)),
        _facts_table(report),
        "## Reasons",
        md.table(["reason", "steps", "meaning"], reasons),
        f"## Adjustments ({len(report.events)})",
        md.table(_EVENT_LABELS, events),
    ]
    if len(report.events) > MAX_EVENTS:
        parts.append(f"{len(report.events) - MAX_EVENTS} more are in the JSON (`--format json`).")
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
    pace = max(_applied_paces(report), default=1.0)
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
                f"Last seal of `clip_ledger.jsonl`: {md.code(seal)}. Check it with `hf-adaclip verify clip_ledger.jsonl`.",
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
