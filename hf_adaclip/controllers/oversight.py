"""Limits around any controller: what it may not do, when it stops adapting, and when it is put aside.

    freeze      from step F on the controller's state stays as it is
    floor/ceil  T_t = min(max(T_t, min_threshold), max_threshold)
    widening    T_t <= W * E,  E the edge of the last step that was not cut back; T_t <= W100 * A, A the edge at the last multiple of 100
                steps (both from the end of the warm-up on)
    divergence  m_t = 0.9 m_{t-1} + 0.1 loss_t;  dev_t likewise of |loss_t - m_{t-1}|;  best_t = min over m;
                bad_t = bad_{t-1} + 1 while m_t > best_t + k dev_t, else 0;  trouble when bad_t >= M
    budget      trouble when more than B steps have been left out
    statistics  trouble when a threshold is not a positive finite number
    fallback    from the step of trouble on (policy `fallback`): T_t = static threshold, pace 1

All of it is state in, state out, on the device, so that it is recorded, verified and replayed like the controller's own decisions.
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple

from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason, coefficient_of, is_finite_norm
from hf_adaclip.controllers.ops import SCALAR, Ops, Shape, Value, ops_of

_OF_THE_NORM = ("edge", "anchor")  # the others go on when the set of parameters changes
LOSS_DECAY = 0.9
BLOCK = 100


class OversightState(NamedTuple):
    """What the limits remember, each of the norm's shape.

    Attributes:
        steps: Steps seen, those left out among them.
        edge: Threshold of the last step that was not cut back, 0 before the first.
        anchor: The same at the last multiple of 100 steps.
        skipped: Steps left out.
        loss_mean, loss_spread, loss_best: Of the training loss; NaN until one is known.
        bad: Steps in a row with the loss far above its best.
        held_pace: Pace of the last step before the freeze.
        trouble: 0, or the code of the `Reason` that this step was found in trouble for; under the policy `fallback`, of the first.
    """

    steps: Value
    edge: Value
    anchor: Value
    skipped: Value
    loss_mean: Value
    loss_spread: Value
    loss_best: Value
    bad: Value
    held_pace: Value
    trouble: Value


@cache
def _state_type(inner: tuple[str, ...]) -> Any:
    """One flat tuple for both states, so that ledger and checkpoint know of no difference."""
    return namedtuple("GovernedState", (*inner, *(f"oversight_{name}" for name in OversightState._fields)))


@dataclass(frozen=True)
class GovernedController(Controller[Any]):
    """A controller under limits.

    Args:
        inner: The controller.
        freeze_after: First step that is frozen, None for never.
        min_threshold, max_threshold: Floor and ceiling of the threshold; None for none.
        max_widening_step, max_widening_100: Largest factor on the threshold from one step to the next, and over 100 steps.
        max_skipped: Steps that may be left out before it counts as trouble; None for any number.
        divergence_spreads, divergence_steps: k and M above; k = 0 does not look at the loss.
        fallback: Whether trouble puts the controller aside.
    """

    paces: ClassVar[bool] = True

    inner: Controller[Any]
    freeze_after: int | None = None
    min_threshold: float | None = None
    max_threshold: float | None = None
    max_widening_step: float | None = None
    max_widening_100: float | None = None
    max_skipped: int | None = None
    divergence_spreads: float = 0.0
    divergence_steps: int = 50
    fallback: bool = False

    @property
    def of_the_run(self) -> frozenset[str]:
        mine = {f"oversight_{name}" for name in OversightState._fields if name not in _OF_THE_NORM}
        return self.inner.of_the_run | mine

    @cached_property
    def _inner_type(self) -> Any:
        return type(self.inner.init(SCALAR, ()))

    def init(self, ops: Ops, shape: Shape) -> Any:
        inner = self.inner.init(ops, shape)
        nan = float("nan")
        mine = OversightState(*(ops.full(shape, v) for v in (0.0, 0.0, 0.0, 0.0, nan, nan, nan, 0.0, 1.0, 0.0)))
        return _state_type(inner._fields)(*inner, *mine)

    def update(self, state: Any, observation: Observation) -> tuple[Decision, Any]:
        norm = observation.norm
        ops = ops_of(norm)
        split = len(state) - len(OversightState._fields)
        before, mine = self._inner_type(*state[:split]), OversightState(*state[split:])

        decision, after = self.inner.update(before, observation)
        finite = is_finite_norm(norm, ops)
        one, zero = ops(1.0), ops(0.0)
        warm = decision.reason == ops(float(Reason.WARMUP))
        threshold, reason, pace = decision.threshold, decision.reason, decision.pace

        frozen = ops.full(ops.shape(norm), 0.0) > zero
        if self.freeze_after is not None:
            frozen = mine.steps >= ops(float(self.freeze_after))
            after = self._inner_type(*(ops.where(frozen, b, a) for b, a in zip(before, after, strict=True)))
            pace = ops.where(frozen, mine.held_pace, pace)
            quiet = frozen & (decision.coefficient == one) & finite
            reason = ops.where(quiet, ops(float(Reason.FROZEN)), reason)

        bounded, reason = self._bound(threshold, reason, mine, warm=warm, ops=ops)
        reason = ops.where(finite, reason, decision.reason)
        moved = bounded != threshold
        coefficient = ops.where(moved & finite, coefficient_of(norm, bounded, ops), decision.coefficient)

        mine = self._watch(mine, observation, decision, bounded, warm=warm, finite=finite, ops=ops)
        found = mine.trouble  # of this step; what an earlier step found is kept only where it decides
        if self.fallback:
            earlier = state[split + OversightState._fields.index("trouble")]
            mine = mine._replace(trouble=ops.where(earlier > zero, earlier, found))
            found = ops.where(earlier > zero, zero, found)
            aside = mine.trouble > zero
            static = ops.expand(observation.static_threshold, ops.shape(norm))
            bounded = ops.where(aside, static, bounded)
            coefficient = ops.where(aside & finite, coefficient_of(norm, static, ops), coefficient)
            pace = ops.where(aside, one, pace)
            reason = ops.where(aside & finite, ops(float(Reason.FALLBACK)), reason)
        reason = ops.where(found > zero, found, reason)
        mine = mine._replace(held_pace=pace)
        return Decision(bounded, coefficient, pace, reason), type(state)(*after, *mine)

    def _bound(
        self, threshold: Value, reason: Value, mine: OversightState, *, warm: Value, ops: Ops
    ) -> tuple[Value, Value]:
        def limit(threshold: Value, reason: Value, bound: Value, code: Reason, when: Value) -> tuple[Value, Value]:
            over = when & (threshold > bound)
            return ops.where(over, bound, threshold), ops.where(over, ops(float(code)), reason)

        known = ~warm & (mine.edge > ops(0.0))
        if self.max_widening_step is not None:
            bound = mine.edge * ops(self.max_widening_step)
            threshold, reason = limit(threshold, reason, bound, Reason.LIMIT_WIDENING, known)
        if self.max_widening_100 is not None:
            bound = mine.anchor * ops(self.max_widening_100)
            threshold, reason = limit(
                threshold, reason, bound, Reason.LIMIT_WIDENING, known & (mine.anchor > ops(0.0))
            )
        if self.max_threshold is not None:
            always = threshold == threshold
            threshold, reason = limit(threshold, reason, ops(self.max_threshold), Reason.LIMIT_CEILING, always)
        if self.min_threshold is not None:
            under = threshold < ops(self.min_threshold)
            threshold = ops.where(under, ops(self.min_threshold), threshold)
            reason = ops.where(under, ops(float(Reason.LIMIT_FLOOR)), reason)
        return threshold, reason

    def _watch(
        self,
        mine: OversightState,
        observation: Observation,
        decision: Decision,
        threshold: Value,
        *,
        warm: Value,
        finite: Value,
        ops: Ops,
    ) -> OversightState:
        one, zero = ops(1.0), ops(0.0)
        # An edge is learned from steps that were not cut back: the near target of a spike is not the width of the range.
        quiet = finite & ~warm & (decision.coefficient == one)
        steps = mine.steps + one
        edge = ops.where(quiet, threshold, mine.edge)
        block = ops(float(BLOCK))
        at_block = steps - ops.floor(steps / block) * block == zero
        anchor = ops.where((at_block | ~(mine.anchor > zero)) & quiet, threshold, mine.anchor)
        left_out = observation.left_out(finite)
        skipped = ops.where(left_out, mine.skipped + one, mine.skipped)

        loss = ops.expand(observation.loss, ops.shape(observation.norm))
        known = abs(loss) < ops(float("inf"))
        started = mine.loss_mean == mine.loss_mean
        keep, take = ops(LOSS_DECAY), ops(1.0 - LOSS_DECAY)
        mean = ops.where(started, mine.loss_mean * keep + loss * take, loss)
        spread = ops.where(started, mine.loss_spread * keep + abs(loss - mine.loss_mean) * take, zero)
        best = ops.where(started, ops.minimum(mine.loss_best, mean), mean)
        bad = ops.where(mean > best + ops(self.divergence_spreads) * spread, mine.bad + one, zero)

        # Infinite is what a static threshold may be that never acts, and nothing else.
        endless = (threshold == ops(float("inf"))) & (observation.static_threshold < threshold)
        sane = ~finite | ((threshold > zero) & ~endless)
        trouble = ops.where(sane, zero, ops(float(Reason.TROUBLE_STATISTICS)))
        if self.divergence_spreads > 0:
            # Again after every further M steps: a run that is resumed into its divergence is not left alone.
            patience = ops(float(self.divergence_steps))
            due = (bad >= patience) & (bad - ops.floor(bad / patience) * patience == zero)
            trouble = ops.where(known & due, ops(float(Reason.TROUBLE_DIVERGENCE)), trouble)
        if self.max_skipped is not None:
            spent = left_out & (skipped > ops(float(self.max_skipped)))
            trouble = ops.where(spent, ops(float(Reason.TROUBLE_BUDGET)), trouble)
        return OversightState(
            steps=steps,
            edge=edge,
            anchor=anchor,
            skipped=skipped,
            loss_mean=ops.where(known, mean, mine.loss_mean),
            loss_spread=ops.where(known, spread, mine.loss_spread),
            loss_best=ops.where(known, best, mine.loss_best),
            bad=ops.where(known, bad, mine.bad),
            held_pace=mine.held_pace,
            trouble=trouble,
        )
