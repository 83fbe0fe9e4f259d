"""Adjustments of a run as events for people: what changed, when, from what to what, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from hf_adaclip.controllers import Reason

Kind = Literal[
    "widened",
    "tightened",
    "spike",
    "held",
    "clipped",
    "new_level",
    "vanishing",
    "limit",
    "frozen",
    "fallback",
    "trouble",
    "skipped",
    "pace_raised",
    "pace_lowered",
]

ALARMING: Final = frozenset({"trouble", "fallback", "limit", "skipped"})
"""Kinds that are logged as warnings, each once per run (skipped steps each time); the others are only information."""

_KINDS: Final[dict[Reason, Kind]] = {
    Reason.WIDENED: "widened",
    Reason.FROZEN: "frozen",
    Reason.VANISHING: "vanishing",
    Reason.NEW_LEVEL: "new_level",
    Reason.LIMIT_FLOOR: "limit",
    Reason.LIMIT_CEILING: "limit",
    Reason.LIMIT_WIDENING: "limit",
    Reason.HELD: "held",
    Reason.BOUNDED: "clipped",
    Reason.CLIPPED: "clipped",
    Reason.SPIKE: "spike",
    Reason.FALLBACK: "fallback",
    Reason.SCALER_SKIPPED: "skipped",
    Reason.NONFINITE: "skipped",
    Reason.SKIPPED: "skipped",
    Reason.TROUBLE_STATISTICS: "trouble",
    Reason.TROUBLE_DIVERGENCE: "trouble",
    Reason.TROUBLE_BUDGET: "trouble",
}
_SINGLE: Final = frozenset({"spike", "new_level", "trouble", "held"})
_PACE_SENTENCES: Final[dict[str, str]] = {
    "pace_raised": "The start, or the way travelled so far says that a larger rate is useful; the learning rate of the step was raised.",
    "pace_lowered": "The way says less than before, the norm left its range, or the step was left out; the learning rate was taken back.",
}
_MAX_PACE: Final = "The pace has reached `max_pace` and goes no higher."
_TIGHTENED: Final = "The range is narrower after an excursion; it widens again while training is stable."


@dataclass(frozen=True)
class ClipEvent:
    """One adjustment, or a run of the same adjustment in consecutive steps.

    Attributes:
        step: First optimizer step concerned, counted from 0.
        until: Last one.
        kind: What happened.
        before, after: For `spike`, `held` and `clipped` the largest norm and what was applied of it; for `pace_*` the pace; otherwise the
            threshold.
        reason: Why, in a sentence.
    """

    step: int
    until: int
    kind: Kind
    before: float
    after: float
    reason: str

    def __str__(self) -> str:
        steps = f"step {self.step}" if self.step == self.until else f"steps {self.step}-{self.until}"
        return f"{steps}: {self.kind.replace('_', ' ')}, {self.before:.4g} -> {self.after:.4g}. {self.reason}"


@dataclass
class _Run:
    kind: Kind
    reason: str
    first: int
    last: int
    before: float
    after: float

    def event(self) -> ClipEvent:
        return ClipEvent(self.first, self.last, self.kind, self.before, self.after, self.reason)


class EventTracker:
    """Turns steps, one after another, into events. The same rows always give the same events, live or from a ledger.

    Args:
        max_pace: The config's limit on the pace; reaching it is an event of its own.
    """

    def __init__(self, max_pace: float = 1.0) -> None:
        self._max_pace = float(np.float32(max_pace))
        self._edge: float | None = None
        self._pace: float | None = None
        self._run: _Run | None = None
        self._pace_run: _Run | None = None
        self._narrowed = False
        self._held = False

    def feed(self, step: int, row: dict[str, float], reason: Reason) -> Iterator[ClipEvent]:
        """Events that this step completes.

        Args:
            step: Optimizer step.
            row: At least `norm`, `threshold`, `coefficient` and `pace`.
            reason: The step's reason.
        """
        threshold, quiet = row["threshold"], row["coefficient"] == 1
        kind = _KINDS.get(reason)
        if kind == "held":  # said once, or every other step might be an event
            kind, self._held = (None if self._held else kind), True
        before, after = (self._edge if self._edge is not None else threshold), threshold
        if kind in ("spike", "held", "clipped"):
            before, after = row["norm"], row["norm"] * row["coefficient"]
        if self._narrowed and quiet and kind != "skipped":
            self._narrowed = False
            if self._edge is not None and threshold < self._edge:
                yield ClipEvent(step, step, "tightened", self._edge, threshold, _TIGHTENED)
                before = threshold
        yield from self._step(kind, step, before, after, reason.sentence)
        yield from self._pace_step(step, row["pace"])
        if kind == "spike":
            self._narrowed = True
        if quiet and kind != "skipped":
            self._edge = threshold

    def finish(self) -> Iterator[ClipEvent]:
        """Events that were still open at the end of the run."""
        for run in (self._run, self._pace_run):
            if run is not None:
                yield run.event()
        self._run = self._pace_run = None

    def _step(self, kind: Kind | None, step: int, before: float, after: float, reason: str) -> Iterator[ClipEvent]:
        run = self._run
        if run is not None and kind == run.kind and reason == run.reason and kind not in _SINGLE:
            run.last = step
            if kind == "clipped" and before > run.before:
                run.before, run.after = before, after
            elif kind != "clipped":
                run.after = after
            return
        if run is not None:
            yield run.event()
        self._run = None
        if kind in _SINGLE:
            assert kind is not None
            yield ClipEvent(step, step, kind, before, after, reason)
        elif kind is not None:
            self._run = _Run(kind, reason, step, step, before, after)

    def _pace_step(self, step: int, pace: float) -> Iterator[ClipEvent]:
        pace = float(np.float32(pace))  # a ledger holds its shortest decimal
        before, self._pace = self._pace, pace
        if before is None or pace == before:
            return
        kind: Kind = "pace_raised" if pace > before else "pace_lowered"
        run = self._pace_run
        if run is not None and run.kind == kind:
            run.last, run.after = step, pace
        else:
            if run is not None:
                yield run.event()
            self._pace_run = _Run(kind, _PACE_SENTENCES[kind], step, step, before, pace)
        if pace == self._max_pace > 1:
            yield ClipEvent(step, step, "limit", before, pace, _MAX_PACE)
