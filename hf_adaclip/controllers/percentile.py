"""`percentile`: AutoClip.

    threshold_t = q_p(n_{t-1}, ..., n_{t-W})        linear interpolation between order statistics
    coefficient = min(1, threshold / (n_t + 1e-6))

Source: Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive gradient clipping for source separation
networks" (arXiv 2007.14469), section 3; p = 10 is the value that the paper recommends, so about 90 % of all steps are
clipped: it equalises norms rather than guarding against spikes.

Differs from the paper in:
1. the history is the last `history` norms, not all of them, so that the state is bounded and old norms are forgotten;
2. the current norm is judged before it enters the history: a spike cannot raise its own threshold;
3. NaN, infinite and zero norms never enter the history: one NaN would make every later threshold NaN, and a few zeros (a frozen or
   masked phase) would make it 0, from which nothing ever trains again;
4. until `warmup_observations` norms are known the static threshold rules, where the paper clips to a history of one.
"""

from dataclasses import dataclass
from typing import NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    is_finite_norm,
)
from hf_adaclip.controllers.ops import Ops, Shape, Value, ops_of


class PercentileState(NamedTuple):
    """State of the controller.

    Attributes:
        history: Ring of past norms, shape `[window, *norm.shape]`, +inf where empty.
        slot: Where the next norm goes.
        count: Norms seen.
    """

    history: Value
    slot: Value
    count: Value


@dataclass(frozen=True)
class PercentileController(Controller[PercentileState]):
    """Clip to a percentile of the norms of the past."""

    percentile: float = 10.0
    history: int = 1000
    warmup_observations: int = 50

    def init(self, ops: Ops, shape: Shape) -> PercentileState:
        return PercentileState(
            history=ops.full((self.history, *shape), float("inf")),
            slot=ops.full(shape, 0.0),
            count=ops.full(shape, 0.0),
        )

    def update(self, state: PercentileState, observation: Observation) -> tuple[Decision, PercentileState]:
        norm = observation.norm
        ops = ops_of(norm)
        window = ops(float(self.history))
        finite = is_finite_norm(norm, ops)
        usable = finite & (norm > ops(0.0))

        # Empty places hold +inf and sort to the end, so the first `known` order statistics are the history.
        ordered = ops.sort(state.history)
        known = ops.minimum(state.count, window)
        position = ops.maximum((known - ops(1.0)) * ops(self.percentile / 100.0), ops(0.0))
        below = ops.floor(position)
        above = ops.minimum(below + ops(1.0), ops.maximum(known - ops(1.0), ops(0.0)))
        low = ops.pick(ordered, below)
        high = ops.pick(ordered, above)
        quantile = low + (high - low) * (position - below)

        warm = state.count < ops(float(self.warmup_observations))
        threshold = ops.where(warm, observation.static_threshold, quantile)
        coefficient = ops.where(finite, coefficient_of(norm, threshold, ops), ops(1.0))
        reason = ops.where(coefficient < ops(1.0), ops(float(Reason.CLIPPED)), ops(float(Reason.WITHIN)))
        reason = ops.where(warm, ops(float(Reason.WARMUP)), reason)
        reason = ops.where(usable, reason, ops(float(Reason.VANISHING)))
        reason = ops.where(finite, reason, ops(float(Reason.NONFINITE)))

        history = ops.put(state.history, state.slot, norm, ~usable)
        after = state.slot + ops(1.0)
        slot = ops.where(usable, ops.where(after < window, after, ops(0.0)), state.slot)
        count = ops.where(usable, state.count + ops(1.0), state.count)
        decision = Decision(threshold, coefficient, ops.expand(ops(1.0), ops.shape(norm)), reason)
        return decision, PercentileState(history, slot, count)
