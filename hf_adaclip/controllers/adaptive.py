"""`adaptive`: a range around the running level of the norm that widens while training is stable and narrows when it is not.

    d(n, L)   = 2 (n - L) / (n + L)                 signed deviation, about log(n / L), bounded by 2
    u(e, L)   = L (2 + e) / (2 - e)                 the norm at deviation e above L, exact inverse of d
    x_t       = d(n_t, L_{t-1})
    far       = min(w_{t-1} S_{t-1}, max_edge)      the edge of the range; near = min(near_width S_{t-1}, max_near)
    edge      = max(u(min(far, 0.6), L), min(u(far, L), static))
    high, low = x_t > far, x_t < -far               an excursion, as is a norm beyond the edge
    threshold = u(near, L) if high else edge        what is high is cut well below the edge
    L_t       = u(a clip(x_t, -far, far), L_{t-1})  a = max(1 / (count + 1), 1 - decay)
    S_t       = max(min_spread, S_{t-1} + a (min(|x_t|, far) - S_{t-1}))
    w_t       = max(min_far_width, w narrow_factor) if high else min(max_far_width, w + widen_step)

    c_t       = c_{t-1} + (1 - decay) ([n_t > static] - c_{t-1})   share of norms that the static threshold cuts; c_0 over the warm-up
    held      = c_0 > ceiling_share, as long as c > ceiling_share / 5, and then never again
    threshold = min(threshold, static) while held

Where static clipping acts in most steps it is no guard but part of the optimizer: every gradient has the same length. Opening the
range would train otherwise than whoever set the threshold has it, and measurably worse where it was tuned (model_cards/RESEARCH.md, 15
to 17). So there the static threshold stays the ceiling, and the range works below it, until norms have sunk so far that it hardly acts.

`accept_after` norms in a row beyond min(far, 0.6) that agree with their own mean (within far of it) are a lasting new level, not spikes:
L jumps there and the step passes. Norms that keep growing do not agree with each other and are not accepted.

Where norms scatter widely, the edge is far out. Beyond 1.86 times the level (a deviation of 0.6) it lets nothing pass that the static
threshold would cut: what is unusual and too large for whoever set that threshold is cut to it, and no farther.

Two numbers, a far edge and a near target, give "no harm when calm" and "small applied spikes" at once; one threshold cannot.
The deviation is rational (the [1/1] Pade approximant of the logarithm), so the update needs only + - * / and comparisons: a
replay gives the same bits on every IEEE device, and no single norm can move the statistics by more than a bounded amount.

Source: this package. Related: log-space tracking with bounded learning in lingvo's GradNormTracker; a robust location and scale
by a bounded influence function, Huber 1964.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    is_finite_norm,
)
from hf_adaclip.controllers.ops import Ops, Shape, Value, ops_of
from hf_adaclip.controllers.pace import Pace, PaceState, update_pace

MAX_DEVIATION = 1.9
"""Largest deviation used for an edge: u(1.9, L) = 39 L. At 2 the inverse would be infinite."""

INNER_EDGE = 0.6
"""Deviation beyond which the range is bounded by the static threshold: u(0.6, L) = 1.86 L."""

RELEASE = 0.2
"""The ceiling is given up when the static threshold cuts this part of `ceiling_share` of recent steps: a tenth of them, by default."""

PACE_START = 50
"""Steps of the pace's start where nothing says how long the run is."""


class AdaptiveState(NamedTuple):
    """State of the controller, each of the norm's shape.

    Attributes:
        level: Running level of the norm.
        spread: Running mean absolute deviation from it.
        width: Half-width of the range, in spreads.
        candidate: Mean norm of the excursions in the current run.
        run: Length of that run; 0 when the last norm was inside the range.
        count: Usable norms seen.
        acted: Norms of the warm-up that the static threshold cut; then the share of recent ones, 0 for good without a ceiling.
        pace, best_reach, pace_steps: See `hf_adaclip.controllers.pace`.
    """

    level: Value
    spread: Value
    width: Value
    candidate: Value
    run: Value
    count: Value
    acted: Value
    pace: Value
    best_reach: Value
    pace_steps: Value


@dataclass(frozen=True)
class AdaptiveController(Controller[AdaptiveState]):
    """The package's own controller.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.ops import SCALAR
        >>> rule = AdaptiveController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        1.21
    """

    idea: ClassVar[str] = (
        "a range around the running level; widens while stable, narrows after a spike; six excursions at one level are the new level"
    )
    source: ClassVar[str] = "this package"
    choose: ClassVar[str] = "by default"
    paces: ClassVar[bool] = True

    decay: float = 0.97
    warmup_observations: int = 50
    far_width: float = 5.0
    near_width: float = 1.5
    min_far_width: float = 4.5
    max_far_width: float = 8.0
    widen_step: float = 0.01
    narrow_factor: float = 0.8
    accept_after: int = 6
    min_spread: float = 0.05
    max_edge: float = 1.3
    max_near: float = 0.2
    ceiling_share: float = 0.5
    max_pace: float = 1.0
    pace_start: int | None = None
    pace_trust: float = 3.0
    pace_hold: float = 1 / 3
    pace_growth: float = 1.1
    pace_shrink: float = 0.95

    @property
    def of_the_run(self) -> frozenset[str]:
        return frozenset({"pace", "best_reach", "pace_steps"})

    @property
    def _start(self) -> float:
        return float(PACE_START if self.pace_start is None else self.pace_start)

    def init(self, ops: Ops, shape: Shape) -> AdaptiveState:
        return AdaptiveState(
            level=ops.full(shape, 0.0),
            spread=ops.full(shape, self.min_spread),
            width=ops.full(shape, self.far_width),
            candidate=ops.full(shape, 0.0),
            run=ops.full(shape, 0.0),
            count=ops.full(shape, 0.0),
            acted=ops.full(shape, 0.0),
            pace=ops.full(shape, 1.0 if self.max_pace == 1 else 1.0 / self._start),
            best_reach=ops.full(shape, 0.0),
            pace_steps=ops.full(shape, 0.0),
        )

    def _edge(self, level: Value, far: Value, observation: Observation, ops: Ops) -> Value:
        """The edge as a norm: `far` above the level, but beyond the inner edge no farther than the static threshold."""
        inner = _above(level, ops.minimum(far, ops(INNER_EDGE)), ops)
        return ops.maximum(inner, ops.minimum(_above(level, far, ops), observation.static_threshold))

    def update(self, state: AdaptiveState, observation: Observation) -> tuple[Decision, AdaptiveState]:
        norm = observation.norm
        ops = ops_of(norm)
        one, zero, edge = ops(1.0), ops(0.0), ops(MAX_DEVIATION)
        finite = is_finite_norm(norm, ops)
        # A zero norm is finite but says nothing about the level: learned, it would end at a threshold of zero.
        usable = finite & (norm > zero)
        warm = state.count < ops(float(self.warmup_observations))

        level = ops.where(state.count > zero, state.level, norm)
        x = _deviation(norm, level, ops)
        far = ops.minimum(state.width * state.spread, ops(self.max_edge))
        near = ops.minimum(ops(self.near_width) * state.spread, ops(self.max_near))
        ready = usable & ~warm
        high = ready & (x > far)
        low = ready & (x < -far)
        beyond = ready & (norm > self._edge(level, far, observation, ops))
        excursion = high | low | beyond
        # Six in a row that are only beyond the inner edge are a new level too: in a noisy run it would be found slowly otherwise.
        unusual = ready & (abs(x) > ops.minimum(far, ops(INNER_EDGE)))

        agrees = abs(_deviation(norm, state.candidate, ops)) <= far
        run = ops.where(unusual, ops.where(agrees, state.run, zero) + one, zero)
        candidate = ops.where(agrees & (state.run > zero), state.candidate, norm)
        candidate = candidate + (norm - candidate) / ops.maximum(run, one)
        accepted = run >= ops(float(self.accept_after))
        spike = high & ~accepted

        threshold = ops.where(accepted, candidate, level)
        threshold = ops.where(spike, _above(threshold, near, ops), self._edge(threshold, far, observation, ops))
        # An accepted step passes even when it is itself a little beyond the new range.
        threshold = ops.where(accepted, ops.maximum(threshold, norm), threshold)
        over = usable & (norm > observation.static_threshold)
        first = state.count <= ops(float(self.warmup_observations))
        share = ops.where(first, state.acted / ops(float(self.warmup_observations)), state.acted)
        held = ~warm & (share > ops(self.ceiling_share) * ops.where(first, one, ops(RELEASE)))
        kept = held & (threshold > observation.static_threshold)
        threshold = ops.where(warm | kept, observation.static_threshold, threshold)
        coefficient = ops.where(finite, coefficient_of(norm, threshold, ops), one)

        gain = ops.maximum(one / (state.count + one), ops(1.0 - self.decay))
        reach = ops.where(warm, edge, far)
        learned = ops.minimum(ops.maximum(x, -reach), reach)
        new_level = ops.where(accepted, candidate, _above(level, gain * learned, ops))
        new_spread = ops.maximum(state.spread + gain * (abs(learned) - state.spread), ops(self.min_spread))
        wider = ops.minimum(state.width + ops(self.widen_step), ops(self.max_far_width))
        narrower = ops.maximum(state.width * ops(self.narrow_factor), ops(self.min_far_width))
        cut = ops.where(over, one, ops(0.0))
        share = ops.where(held, share + ops(1.0 - self.decay) * (cut - share), ops(0.0))
        calm = ready & ~excursion & ~accepted
        new_width = ops.where(spike, narrower, ops.where(calm, wider, state.width))

        widened = (new_width > state.width) & ~kept
        reason = ops.where(widened, ops(float(Reason.WIDENED)), ops(float(Reason.WITHIN)))
        reason = ops.where(warm, ops(float(Reason.WARMUP)), reason)
        reason = ops.where(low | ~usable, ops(float(Reason.VANISHING)), reason)
        reason = ops.where(accepted, ops(float(Reason.NEW_LEVEL)), reason)
        reason = ops.where(ready & (norm > threshold), ops(float(Reason.HELD)), reason)
        reason = ops.where(spike, ops(float(Reason.SPIKE)), reason)
        reason = ops.where(finite, reason, ops(float(Reason.NONFINITE)))

        paced = PaceState(state.pace, state.best_reach, state.pace_steps)
        if self.max_pace > 1:
            parameters = Pace(
                self.max_pace, self._start, self.pace_trust, self.pace_hold, self.pace_growth, self.pace_shrink
            )
            reach = ops(float("nan")) if observation.reach is None else observation.reach
            paced = update_pace(
                parameters,
                paced,
                ops.expand(reach, ops.shape(norm)),
                trouble=high,
                left_out=observation.left_out(finite),
                ops=ops,
            )

        return Decision(threshold, coefficient, paced.pace, reason), AdaptiveState(
            level=ops.where(usable, new_level, state.level),
            spread=ops.where(usable, new_spread, state.spread),
            width=new_width,
            candidate=ops.where(usable, candidate, state.candidate),
            run=ops.where(usable, ops.where(accepted, zero, run), state.run),
            count=ops.where(usable, state.count + one, state.count),
            acted=ops.where(usable, ops.where(warm, state.acted + cut, share), state.acted),
            pace=paced.pace,
            best_reach=paced.best,
            pace_steps=paced.steps,
        )


def _deviation(norm: Value, level: Value, ops: Ops) -> Value:
    """d(n, L) = 2 (n - L) / (n + L), in [-2, 2]."""
    return ops(2.0) * (norm - level) / (norm + level)


def _above(level: Value, deviation: Value, ops: Ops) -> Value:
    """u(e, L) = L (2 + e) / (2 - e), the inverse of `_deviation` in its first argument; |e| < 2."""
    two = ops(2.0)
    return level * (two + deviation) / (two - deviation)
