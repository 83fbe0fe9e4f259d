"""What counts as an incident: pure functions of a run's rows, one after another, on the host. Nothing is read from a device here."""

import math
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Final, Literal, NamedTuple

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason

Kind = Literal[
    "nonfinite", "budget", "divergence", "statistics", "skipped", "spike", "growth", "at_threshold", "zero_loss"
]

WINDOW: Final = 50
"""Finite norms, or losses, that say what is usual."""
SPOILT: Final[frozenset[Kind]] = frozenset({"divergence", "zero_loss"})
"""Kinds that tell of weights that are no good any more."""
_FEWEST: Final = 20
_SPREADS: Final = 7.0
"""A spike is also this many spreads above the median, on a logarithmic scale: where norms scatter widely, a large one is usual.
A fall over the window is no scatter (see `_spread`); without that, 6 would do."""
_RECURRING: Final = 3
"""Norms as large as this one, within `_MEMORY` steps, after which they are usual: another source of data, a schedule that restarts."""
_MEMORY: Final = 1000
_AS_LARGE: Final = 2.0
_NEVER_USUAL: Final = 5.0
"""Times `incident_spike` from which on a norm is an incident however often it comes."""
_OF_A_SERIES: Final = 3
"""Steps of one kind in a row that are incidents; of those that follow the ledger tells."""
_OVERFLOWS: Final = 10
"""Overflows in a row that a loss scaler does not explain: it looks for its scale in fewer."""
_CLOSE: Final = 1e-4
_GONE: Final = 1e-6
_WORSE: Final = 1.25
"""Times the best average from which on a loss is no longer one of those before trouble."""
_LASTS: Final = 3
"""Losses in a row above where they began that are no accident."""
_BLOCKS: Final = 6


class Finding(NamedTuple):
    """Why a step is an incident.

    Attributes:
        kind: What it is.
        sentence: In words.
        usual: Median of the norms before it; NaN where too few are known.
        lasts: For how many steps, this one included, weights have been no good by the losses; 0 where no rule on losses found it.
    """

    kind: Kind
    sentence: str
    usual: float
    lasts: int = 0


class IncidentRules:
    """Judges the steps of a run, each with those before it.

    Args:
        config: The settings.
        split: Whether parts of the gradient are judged apart: then a row's threshold follows its norm.
    """

    def __init__(self, config: AdaptiveClipConfig, *, split: bool = False) -> None:
        self._config, self._split = config, split
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._outliers: deque[tuple[int, float]] = deque(maxlen=_MEMORY)
        self._last: dict[str, int] = {}
        self._length: dict[str, int] = {}
        self._overflows = 0
        self._growth = _Growth(config.incident_steps, config.incident_growth)
        self._losses = _Losses(config.incident_steps)
        self._at = 0

    def feed(self, step: int, row: dict[str, float], reason: Reason, static: float) -> Finding | None:
        """The incident that this step is, the gravest where it is several; None for nearly all steps.

        Args:
            step: Optimizer step.
            row: At least `norm`, `threshold`, `coefficient` and `loss`.
            reason: The step's reason.
            static: The static threshold.
        """
        norm, loss = row["norm"], row["loss"]
        usual = median(self._norms) if len(self._norms) >= _FEWEST else math.nan
        found = list(self._single(step, norm, loss, reason, usual))
        lasting = [*self._lasting(norm, row["threshold"], static), *self._losses.feed(loss)]
        if math.isfinite(norm) and norm > 0:
            self._norms.append(norm)
        admitted = [(kind, said) for kind, said in found if self._begins(kind, step)]
        # Weights that are spoilt come before the spike in which that is found.
        spoilt = [(kind, said) for kind, said in lasting if kind in SPOILT]
        for kind, said in [*spoilt, *admitted, *lasting]:
            return Finding(kind, said, usual, self._losses.lasts if (kind, said) in spoilt else 0)
        return None

    def _single(self, step: int, norm: float, loss: float, reason: Reason, usual: float) -> Iterator[tuple[Kind, str]]:
        overflow = reason is Reason.SCALER_SKIPPED
        self._overflows = self._overflows + 1 if overflow else 0
        finite = math.isfinite(norm)
        if reason is Reason.TROUBLE_BUDGET:
            yield "budget", reason.sentence
        elif reason is Reason.TROUBLE_DIVERGENCE:
            yield "divergence", reason.sentence
        elif reason is Reason.TROUBLE_STATISTICS:
            yield "statistics", reason.sentence
        if overflow and self._overflows == _OVERFLOWS:
            yield "nonfinite", f"The loss scaler has found overflows in {_OVERFLOWS} steps in a row."
        elif not finite and not overflow:
            what = "NaN" if math.isnan(norm) else "infinite"
            known = f", while the loss is finite ({loss:.4g})" if math.isfinite(loss) else ""
            yield "nonfinite", f"The norm is {what}{known}."
        elif math.isinf(loss):
            yield "nonfinite", "The loss is infinite, while the norm is finite." if finite else "The loss is infinite."
        if reason is Reason.SKIPPED:
            yield "skipped", reason.sentence
        if finite and self._spikes(step, norm, usual):
            yield (
                "spike",
                f"The norm is {norm / usual:.3g} times the median of the {len(self._norms)} before it ({usual:.4g}).",
            )

    def _spikes(self, step: int, norm: float, usual: float) -> bool:
        if not norm > self._config.incident_spike * usual:  # False for NaN
            return False
        while self._outliers and self._outliers[0][0] <= step - _MEMORY:
            self._outliers.popleft()
        alike = sum(_AS_LARGE * other >= norm for _, other in self._outliers)
        self._outliers.append((step, norm))
        if alike >= _RECURRING and norm <= _NEVER_USUAL * self._config.incident_spike * usual:
            return False
        if norm <= 1.5 * sorted(self._norms)[-1 - _RECURRING]:  # of two sources that take turns the median tells one
            return False
        return math.log(norm / usual) > _SPREADS * self._spread(usual)

    def _spread(self, usual: float) -> float:
        """How widely norms scatter, in logarithms: about their median or, where they fall or rise, from one step to the next."""
        logarithms = [math.log(n / usual) for n in self._norms]
        about = median(map(abs, logarithms))
        onward = median(abs(b - a) for a, b in pairwise(logarithms)) / math.sqrt(2)
        return 1.4826 * min(about, onward)

    def _begins(self, kind: Kind, step: int) -> bool:
        """Whether a step is among the first of a series of its kind."""
        length = self._length.get(kind, 0) + 1 if self._last.get(kind) == step - 1 else 1
        self._last[kind], self._length[kind] = step, length
        return length <= _OF_A_SERIES

    def _lasting(self, norm: float, threshold: float, static: float) -> Iterator[tuple[Kind, str]]:
        if (growth := self._growth.feed(norm)) is not None:
            yield "growth", growth
        known = (static,) if self._split else (threshold, static)
        self._at = self._at + 1 if any(abs(norm - t) <= _CLOSE * t < math.inf for t in known) else 0
        if self._at == self._config.incident_steps:
            yield (
                "at_threshold",
                f"The norm has been exactly the threshold ({norm:.6g}) for {self._at} steps: something else clips or scales gradients "
                "before they are looked at, or the model has stopped learning.",
            )


class _Growth:
    """Medians of blocks of steps that rise, one after another."""

    def __init__(self, steps: int, times: float) -> None:
        self._size, self._times = max(steps // 2, 1), times
        self._block: list[float] = []
        self._rising: list[float] = []
        self._first: float | None = None
        self._told = False

    def feed(self, norm: float) -> str | None:
        if not (math.isfinite(norm) and norm > 0):
            return None
        self._block.append(norm)
        if len(self._block) < self._size:
            return None
        now, self._block = median(self._block), []
        if self._first is None:
            self._first = now
        if self._rising and not now > self._rising[-1]:
            self._rising, self._told = [], False
        self._rising.append(now)
        # Above where the run began, too: norms that have fallen far and come back a little are usual.
        grown = now >= self._times * self._rising[0] and now > 2 * self._first
        if self._told or len(self._rising) < _BLOCKS or not grown:
            return None
        self._told = True
        steps = len(self._rising) * self._size
        return f"The norm has grown over {steps} steps in a row, from {self._rising[0]:.4g} to {now:.4g} (medians of {self._size})."


class _Losses:
    """A loss that is 0 all at once, and one that had fallen and is above its beginning."""

    def __init__(self, steps: int) -> None:
        self._recent: deque[float] = deque(maxlen=steps)
        self._start: float | None = None
        self._best = math.inf
        self._steps, self._zeros, self._positive = steps, 0, True
        self._diverged = False
        self.lasts = 0

    def feed(self, loss: float) -> Iterator[tuple[Kind, str]]:
        if not math.isfinite(loss):
            return
        usual = median(map(abs, self._recent)) if len(self._recent) >= _FEWEST else 0.0
        # That of a policy is 0 wherever its rewards are alike.
        if self._positive and usual > 0 and abs(loss) <= _GONE * usual:
            self._zeros += 1
            if self._zeros == max(self._steps // 5, 1):
                self.lasts = self._zeros
                yield (
                    "zero_loss",
                    f"The loss has been {loss:.3g} for {self._zeros} steps, after a median of {usual:.4g}.",
                )
            return
        self._zeros = 0
        self._positive = self._positive and loss > 0  # others, such as those of policies, say nothing by their level
        self._recent.append(loss)
        if len(self._recent) < self._steps or not self._positive:
            return
        mean = math.fsum(self._recent) / self._steps
        if self._start is None:
            self._start = mean
        self._best = min(self._best, mean)
        # It must have fallen first: a loss that is a growing penalty begins near 0.
        above = self._best < 0.9 * self._start and mean > max(1.1 * self._start, 1.5 * self._best)
        # One loss out of all bounds makes a mean that is, and is a spike.
        newest = max(_LASTS, self._steps // 10)
        above = above and min(list(self._recent)[-newest:]) > 1.1 * self._start
        if above and not self._diverged:
            good = next(
                (i for i, loss in enumerate(reversed(self._recent)) if loss <= _WORSE * self._best), self._steps
            )
            self.lasts = good
            yield (
                "divergence",
                f"The loss, averaged over {self._steps} steps, is {mean:.4g}: above its beginning ({self._start:.4g}), after a best of "
                f"{self._best:.4g}.",
            )
        self._diverged = above
