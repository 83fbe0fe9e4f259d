"""Adjustments of a run as events for people: what changed, when, from what to what, and why."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from hf_adaclip.controllers import Reason
from hf_adaclip.run.points import Rewound

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
    "departed",
    "pace_raised",
    "pace_lowered",
    "left_out",
    "rewound",
]
Quantity = Literal["norm", "threshold", "pace"]

ALARMING: Final = frozenset({"trouble", "fallback", "limit", "skipped", "spike", "departed"})
"""Kinds that are logged as warnings. Spikes and skipped steps: of each at most one a minute, with the number of those in between;
the others once per run and reason. All other kinds are only information."""

SPIKE_TIMES: Final = 10.0
"""A norm this many times the median of the 25 finite ones before it is a spike, whatever the controller makes of it."""

_NEIGHBOURS: Final = 25
_FEWEST: Final = 10

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
    Reason.LEFT_OUT: "left_out",
}
_SINGLE: Final = frozenset({"spike", "new_level", "trouble", "held"})
_BY_THRESHOLD: Final = frozenset({"widened", "new_level", "limit", "frozen", "fallback"})
_OF_THE_STEP: Final = (Reason.NONFINITE, Reason.SCALER_SKIPPED, Reason.SKIPPED)
_TOLD_OTHERWISE: Final = (
    *_OF_THE_STEP,
    Reason.SPIKE,
    Reason.NEW_LEVEL,
    Reason.TROUBLE_STATISTICS,
    Reason.TROUBLE_DIVERGENCE,
    Reason.TROUBLE_BUDGET,
)
_OUTLIER: Final = f"The norm is more than {SPIKE_TIMES:g} times the median of the {_NEIGHBOURS} before it."
_PACE_SENTENCES: Final[dict[str, str]] = {
    "pace_raised": "The multiplier on the learning rate rose: the start goes on, or the way travelled so far says that a larger rate is "
    "useful.",
    "pace_lowered": "The multiplier on the learning rate fell: the way says less than before, the norm left its range, a step was left "
    "out, or the controller was put aside.",
}
_DEPARTED: Final = (
    'The learning rate is multiplied from here on, by as much as the way travelled so far says. `clip="guard"`, or `max_pace=1`, '
    "leaves it as it was given."
)
_BY_HEART: Final = (
    "The data is learned by heart (the evaluation loss rose while the training loss fell, or the training loss fell as an epoch began), or "
    "the first of several epochs had no sign that a higher rate is useful. The pace is 1 from here on."
)
_MAX_PACE: Final = "The pace has reached `max_pace` and goes no higher."
_TIGHTENED: Final = "The threshold is lower after an excursion than it was before it."
_LEFT_OUT: Final = "left out: no weight, moment or counter moved."
_SHADOW: Final = "Shadow mode: what the static threshold says was applied instead."


@dataclass(frozen=True)
class ClipEvent:
    """One adjustment, or a run of the same adjustment in consecutive steps.

    Attributes:
        step: First optimizer step concerned, counted from 0.
        until: Last one.
        kind: What happened.
        before, after: Of `quantity`. A norm: the largest one of these steps (the smallest, where they vanish), and what was let through
            of it, 0 of a step that was left out. A threshold or a pace: before these steps, and in the last of them.
        reason: Why, in a sentence.
        quantity: What `before` and `after` are: "norm", "threshold" or "pace".
        code: The [`Reason`] by name; empty where there is none of that name.
        done: What became of the gradients, in a sentence; empty where `reason` says it.
    """

    step: int
    until: int
    kind: Kind
    before: float
    after: float
    reason: str
    quantity: Quantity = "threshold"
    code: str = ""
    done: str = ""

    @property
    def sentences(self) -> str:
        """Why, and what became of the gradients."""
        return f"{self.reason} {self.done}".strip()

    @property
    def change(self) -> str:
        """From what to what, with the quantity named: "norm 12.3, cut to 1.1", "threshold 1.2 -> 1.3"."""
        if self.kind in ("left_out", "rewound"):
            return "no gradient" if self.kind == "left_out" else "undone"
        if self.quantity != "norm":
            same = self.before == self.after
            return f"{self.quantity} {self.before:.4g}" + ("" if same else f" -> {self.after:.4g}")
        done = "cut" if self.done != _SHADOW else "to be cut"
        if self.after == 0 and self.before != 0:
            return f"norm {self.before:.4g}, " + ("left out" if done == "cut" else "to be left out")
        if self.after == self.before:
            return f"norm {self.before:.4g}, left as it was"
        return f"norm {self.before:.4g}, {done} to {self.after:.4g}"

    def __str__(self) -> str:
        steps = f"step {self.step}" if self.step == self.until else f"steps {self.step}-{self.until}"
        return f"{steps}: {self.kind.replace('_', ' ')}, {self.change}. {self.sentences}"


def of_rewound(rewound: Rewound) -> ClipEvent:
    """For listeners; the log has a line of its own."""
    return ClipEvent(rewound.first, rewound.last, "rewound", math.nan, math.nan, rewound.reason, "norm")


@dataclass
class _Run:
    kind: Kind
    code: str
    cause: str
    quantity: Quantity
    first: int
    last: int
    before: float
    after: float
    cut: int = 0
    out: int = 0
    shadow: bool = False
    spoiled: bool = False

    def event(self) -> ClipEvent | None:
        if self.kind == "widened" and not self.after > self.before:
            return None  # the width grew, but the norms sank faster: nobody would call that wider
        span = (self.first, self.last, self.kind, self.before, self.after)
        return ClipEvent(*span, self.cause, self.quantity, self.code, self._consequence())

    def _consequence(self) -> str:
        """What became of the gradients of these steps."""
        steps, code = self.last - self.first + 1, self.code
        if self.quantity == "pace":
            return _SHADOW if self.shadow else ""
        if code in (Reason.SCALER_SKIPPED.name, Reason.LEFT_OUT.name):
            return ""
        if self.shadow and code != Reason.NONFINITE.name:
            return _SHADOW
        if self.spoiled:
            return "The gradient was multiplied by what is no number."
        if self.out == steps:
            return f"The step was {_LEFT_OUT}" if steps == 1 else f"The {steps} steps were {_LEFT_OUT}"
        if self.cut == steps:
            return "The gradient was scaled down." if steps == 1 else f"All {steps} gradients were scaled down."
        if not self.cut and not self.out:
            return "The gradient was left as it was." if steps == 1 else "The gradients were left as they were."
        parts = [f"{self.cut} of {steps} gradients were scaled down."] if self.cut else []
        return " ".join(parts + ([f"{self.out} of {steps} steps were {_LEFT_OUT}"] if self.out else []))


class EventTracker:
    """Turns steps, one after another, into events. The same rows always give the same events, live or from a ledger.

    Args:
        max_pace: The config's limit on the pace; reaching it is an event of its own.
        shadow: Whether decisions are only recorded.
        split: Whether parts of the gradient are judged apart. The row's threshold is then the norm that was to be left.
    """

    def __init__(self, max_pace: float = 1.0, *, shadow: bool = False, split: bool = False) -> None:
        self._max_pace = float(np.float32(max_pace))
        self._shadow, self._split = shadow, split
        self._edge: float | None = None
        self._pace: float | None = None
        self._run: _Run | None = None
        self._pace_run: _Run | None = None
        self._narrowed = False
        self._held = self._by_heart = self._departed = False
        self._norms: deque[float] = deque(maxlen=_NEIGHBOURS)

    @classmethod
    def of_run(cls, config: Any, num_tensors: int) -> "EventTracker":
        """For a run.

        Args:
            config: Fields of its config by name.
            num_tensors: Parts with a norm of their own; 0 when only the global norm counts.
        """
        max_pace = config.get("max_pace")
        number = max_pace if isinstance(max_pace, int | float) and not isinstance(max_pace, bool) else 1.0
        return cls(number, shadow=config.get("shadow") is True, split=bool(num_tensors))

    def feed(self, step: int, row: dict[str, float], reason: Reason) -> Iterator[ClipEvent]:
        """Events that this step completes.

        Args:
            step: Optimizer step.
            row: At least `norm`, `threshold`, `coefficient` and `pace`; `reach` where there is a pace.
            reason: The step's reason.
        """
        # A ledger holds the shortest decimals of float32 numbers.
        if reason is Reason.LEFT_OUT:
            yield from self._step(_Run("left_out", reason.name, reason.sentence, "norm", step, step, 0.0, 0.0))
            return
        norm, threshold, coefficient = (float(np.float32(row[key])) for key in ("norm", "threshold", "coefficient"))
        finite = math.isfinite(norm)
        applied = norm * coefficient if finite and coefficient else 0.0
        quiet = coefficient == 1 and finite
        kind, cause = _KINDS.get(reason), self._cause(reason)
        outlier = self._outlies(norm, reason)
        if outlier:
            kind, cause = "spike", _OUTLIER
        if kind == "held":  # said once, or every other step might be an event
            kind, self._held = (None if self._held else kind), True
        if self._split and kind == "widened":
            kind = None  # which threshold, of many?
        before = self._edge if self._edge is not None else threshold
        if self._narrowed and quiet:
            self._narrowed = False
            if self._edge is not None and threshold < self._edge and not self._split:
                yield ClipEvent(step, step, "tightened", self._edge, threshold, _TIGHTENED)
                before = threshold
        if kind is not None:
            by_threshold = (kind in _BY_THRESHOLD or reason is Reason.TROUBLE_STATISTICS) and not self._split
            values = (before, threshold) if by_threshold and kind != "spike" else (norm, applied)
            quantity: Quantity = "threshold" if by_threshold and kind != "spike" else "norm"
            now = _Run(kind, reason.name, cause, quantity, step, step, *values, shadow=self._shadow)
            now.cut, now.out = int(finite and 0 < coefficient < 1), int(not finite or coefficient == 0)
            now.spoiled = math.isnan(coefficient)
            yield from self._step(now)
        else:
            yield from self._end("_run")
        yield from self._pace_step(step, row["pace"], row.get("reach", math.nan))
        if reason is Reason.SPIKE:
            self._narrowed = True
        if quiet:
            self._edge = threshold

    def finish(self) -> Iterator[ClipEvent]:
        """Events that were still open at the end of the run."""
        yield from self._end("_run")
        yield from self._end("_pace_run")

    def _cause(self, reason: Reason) -> str:
        sentence = reason.sentence
        if self._split and reason not in _OF_THE_STEP:
            return f"For some of the parameters: {sentence[0].lower()}{sentence[1:]}"
        return sentence

    def _outlies(self, norm: float, reason: Reason) -> bool:
        """Whether a norm that the controller has no word for stands far above those before it."""
        if reason is Reason.NEW_LEVEL:
            self._norms.clear()
        known = self._norms
        far = (
            reason not in _TOLD_OTHERWISE
            and len(known) >= _FEWEST
            and math.isfinite(norm)
            and norm > SPIKE_TIMES * sorted(known)[len(known) // 2]
        )
        if math.isfinite(norm) and norm > 0:  # of many steps without a gradient the median says nothing
            known.append(norm)
        return far

    def _end(self, name: str) -> Iterator[ClipEvent]:
        run: _Run | None = getattr(self, name)
        setattr(self, name, None)
        if run is not None and (event := run.event()) is not None:
            yield event

    def _step(self, now: _Run) -> Iterator[ClipEvent]:
        run = self._run
        if run is not None and now.kind not in _SINGLE and (now.kind, now.cause) == (run.kind, run.cause):
            run.last, run.cut, run.out = now.last, run.cut + now.cut, run.out + now.out
            if now.quantity != "norm":
                run.after = now.after
            elif now.before < run.before if now.kind == "vanishing" else now.before > run.before:
                run.before, run.after = now.before, now.after
            return
        yield from self._end("_run")
        if now.kind in _SINGLE:
            event = now.event()
            assert event is not None
            yield event
        else:
            self._run = now

    def _pace_step(self, step: int, pace: float, reach: float) -> Iterator[ClipEvent]:
        pace = float(np.float32(pace))
        before, self._pace = self._pace, pace
        if pace > 1 and not (self._departed or self._shadow):
            self._departed = True
            if before is not None:  # a run that is gone on with has departed before
                yield ClipEvent(step, step, "departed", 1.0, pace, _DEPARTED, "pace")
        if reach == -math.inf and not self._by_heart:
            self._by_heart = True
            if not self._departed and not self._shadow:
                return  # nothing changes
            yield from self._end("_pace_run")
            done = _SHADOW if self._shadow else ""
            yield ClipEvent(
                step, step, "pace_lowered", pace if before is None else before, pace, _BY_HEART, "pace", done=done
            )
            return
        if before is None or pace == before:
            return
        kind: Kind = "pace_raised" if pace > before else "pace_lowered"
        run = self._pace_run
        if run is not None and run.kind == kind:
            run.last, run.after = step, pace
        else:
            yield from self._end("_pace_run")
            self._pace_run = _Run(
                kind, "", _PACE_SENTENCES[kind], "pace", step, step, before, pace, shadow=self._shadow
            )
        if pace == self._max_pace > 1:
            done = _SHADOW if self._shadow else ""
            yield ClipEvent(step, step, "limit", before, pace, _MAX_PACE, "pace", done=done)
