"""What there is to say about a run, from its ledger and the files beside it: numbers, events, and the answer in a sentence."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit.ingest import Series, ledger_records, load_series
from hf_adaclip.audit.verify import VerifyReport, verify_ledger
from hf_adaclip.controllers import Reason
from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.header import Rewound, rewound_of
from hf_adaclip.ledger.reader import open_regular
from hf_adaclip.ledger.schema import LEDGER_FILE, parse_number
from hf_adaclip.report.shape_facts import clause, shape_numbers
from hf_adaclip.run.events import ClipEvent, EventTracker


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
        undone: What the run undid each time that it went back.
    """

    name: str
    series: Series
    header: dict[str, Any]
    events: list[ClipEvent]
    verdict: VerifyReport
    points: list[dict[str, Any]]
    repeated: int = 0
    rates: dict[int, float] = field(default_factory=dict)
    undone: tuple[Rewound, ...] = ()


def load_run(path: str | Path) -> RunReport:
    """Read a run from its ledger, or from the folder that holds it.

    Raises:
        LedgerError: There is no ledger, or it cannot be read.
    """
    path = Path(path)
    ledger = path / LEDGER_FILE if path.is_dir() else path
    if path.is_dir() and not ledger.is_file():
        raise LedgerError(f"{path} must hold comparison.json or {LEDGER_FILE}, but holds neither.")
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
        undone=tuple(_undone(ledger)),
    )


def _undone(ledger: Path) -> Iterator[Rewound]:
    for line in ledger_records(ledger):
        try:
            found = rewound_of(line) if line["kind"] == "header" else None
        except (ValueError, KeyError, TypeError):
            continue  # `verify` tells
        if found is not None:
            yield found


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
                row["reach"] = parse_number(line.get("reach"))
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


def _rates(folder: Path) -> dict[int, float]:
    """Learning rates that a Trainer logged, by the step (counted from 0) before the log line."""
    try:
        with open_regular(folder / "trainer_state.json") as file:
            history = json.loads(file.read().decode("utf-8"))["log_history"]
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
        "undone": [undone._asdict() for undone in report.undone],
        "not_finite": int((~np.isfinite(series.norms)).sum()),
        "spikes": sum(e.kind == "spike" for e in report.events),
        "largest_norm": float(finite.max()) if len(finite) else None,
        "largest_applied": float((series.norms * coefficients)[~out].max()) if (~out).any() else None,
        "max_grad_norm": report.header.get("static_threshold"),
        "max_pace": config.get("max_pace"),
        "largest_pace": float(paces.max()),
        "mean_pace": float(paces.mean(dtype=np.float64)),
        "effective_rate": _effective_rate(report),
        **shape_numbers(series),
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
    paces = dict(zip(report.series.steps.tolist(), applied_paces(report), strict=True))
    return max((rate * paces[step] for step, rate in report.rates.items() if step in paces), default=None)


def applied_paces(report: RunReport) -> list[float]:
    shadow = (report.header.get("config") or {}).get("shadow") is True
    paces = report.series.paces
    return [1.0] * len(report.series) if paces is None or shadow else paces.tolist()


def answer(report: RunReport) -> str:
    """Whether clipping did anything, in words and numbers: what people look for first."""
    spans = "; ".join(f"after step {u.last} to before step {u.first} ({u.reason.rstrip('.')})" for u in report.undone)
    times = "once" if len(report.undone) == 1 else f"{len(report.undone)} times"
    return _answer(report) + (
        f" Training went back {times}, and left out the data in between: {spans}." if spans else ""
    )


def _answer(report: RunReport) -> str:
    n = summary(report)
    steps, cut, out = n["steps"], n["altered"], n["left_out"]
    if n["shadow"]:
        return (
            f"Shadow run: the static threshold {n['max_grad_norm']:g} was applied. The controller would have scaled down {cut} of {steps} "
            f"gradients ({cut / max(steps, 1):.1%}) and left out {out} steps, of which {n['not_finite']} were left out, not being finite."
            f"{clause(n)}"
        )
    pace = ""
    if n["largest_pace"] > 1:
        largest, mean = f"{n['largest_pace']:.3g}", f"{n['mean_pace']:.3g}"
        pace = f" The pace raised the learning rate up to {largest} times the schedule's, {mean} times on average."
    elif n["mean_pace"] < 1:
        pace = " The pace held the learning rate down at the start."
    pace += clause(n)
    if not cut and not out:
        left = f"the norms of all {steps} gradients" if n["altered_energy"] is not None else f"all {steps} gradients"
        return f"No: clipping left {left} as they were; the largest norm was {shortly(n['largest_norm'])}.{pace}"
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


def shortly(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
