"""Limits around any controller: what it may not do, when it stops adapting, and when it is put aside.

    freeze      from step F on the controller's state stays as it is
    floor/ceil  T_t = min(max(T_t, min_threshold), max_threshold), in every step: in the warm-up and after a fallback too
    widening    T_t <= W * E,  E the threshold of the last step that was not cut back from a spike; T_t <= W100 * A, A the smallest such
                threshold of the last 100 to 109 steps (both from the end of the warm-up on)
    divergence  bad_t = bad_{t-1} + 1 while the loss is more than k spreads, and a fifth, above its best (`trend.py`), else 0; trouble
                when bad_t >= M. A loss that is not finite changes nothing
    budget      trouble when more than B steps have been left out
    statistics  trouble when a threshold is not a positive finite number
    fallback    from the step of trouble on (policy `fallback`): T_t = static threshold, within the limits; pace 1

All of it is state in, state out, on the device, so that it is recorded, verified and replayed like the controller's own decisions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    cut_to,
    is_finite_norm,
)
from hf_adaclip.controllers.numerics.ops import SCALAR, Ops, Shape, Value, ops_of
from hf_adaclip.controllers.numerics.trend import LossTrend, far_from_best, follow_loss, known_trend
from hf_adaclip.controllers.wrappers.states import joined

_OF_THE_NORM = ("edge", "floors")  # the others go on when the set of parameters changes

SLACK = 0.2
"""Part of the best loss that is never far above it: a restart of the learning rate or a harder stretch of data is no divergence."""

BLOCK, BLOCKS = 10, 11
"""The smallest threshold is kept for each of the last 11 blocks of 10 steps, the present one among them: at least 100 steps back."""


class OversightState(NamedTuple):
    """What the limits remember, each of the norm's shape.

    Attributes:
        steps: Steps seen, those left out among them.
        edge: Threshold of the last step that was not cut back, 0 before the first.
        skipped: Steps left out.
        loss_mean, loss_spread, loss_best, loss_seen: See `hf_adaclip.controllers.numerics.trend`.
        bad: Steps in a row with the loss far above its best.
        held_pace: Pace of the last step before the freeze.
        trouble: 0, or the code of the `Reason` that this step was found in trouble for; under the policy `fallback`, of the first.
        floors: Smallest threshold of each of the last blocks, shape `[11, *norm.shape]`; +inf where there is none.
    """

    steps: Value
    edge: Value
    skipped: Value
    loss_mean: Value
    loss_spread: Value
    loss_best: Value
    bad: Value
    held_pace: Value
    trouble: Value
    loss_seen: Value
    floors: Value


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
    revision: ClassVar[int] = 2

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

    def __post_init__(self) -> None:
        # What an instance says of its state and its rule covers the controller inside.
        object.__setattr__(self, "new_fields", self.inner.new_fields | {"oversight_loss_seen", "oversight_floors"})
        object.__setattr__(self, "revision", max(self.inner.revision, type(self).revision))

    @property
    def of_the_run(self) -> frozenset[str]:
        mine = {f"oversight_{name}" for name in OversightState._fields if name not in _OF_THE_NORM}
        return self.inner.of_the_run | mine

    @cached_property
    def _inner_type(self) -> Any:
        return type(self.inner.init(SCALAR, ()))

    def init(self, ops: Ops, shape: Shape) -> Any:
        inner = self.inner.init(ops, shape)
        nothing = OversightState(*(ops.full(shape, 0.0) for _ in OversightState._fields))
        mine = nothing._replace(held_pace=ops.full(shape, 1.0), floors=ops.full((BLOCKS, *shape), float("inf")))
        return joined("GovernedState", inner, {f"oversight_{n}": v for n, v in mine._asdict().items()})

    def start_threshold(self, static_threshold: Value, ops: Ops) -> Value:
        return self._within(self.inner.start_threshold(static_threshold, ops), ops)[0]

    def update(self, state: Any, observation: Observation) -> tuple[Decision, Any]:
        norm = observation.norm
        ops = ops_of(norm)
        split = len(state) - len(OversightState._fields)
        before, mine = self._inner_type(*state[:split]), OversightState(*state[split:])

        decision, after = self.inner.update(before, observation)
        finite = is_finite_norm(norm, ops)
        one, zero = ops(1.0), ops(0.0)
        warm = decision.reason == ops(float(Reason.WARMUP))
        wanted, coefficient, pace, reason = decision

        if self.freeze_after is not None:
            frozen = mine.steps >= ops(float(self.freeze_after))
            after = self._inner_type(*(ops.where(frozen, b, a) for b, a in zip(before, after, strict=True)))
            pace = ops.where(frozen, mine.held_pace, pace)
            quiet = frozen & (coefficient == one) & finite
            reason = ops.where(quiet, ops(float(Reason.FROZEN)), reason)

        trouble, watched = self._watch(mine, observation, wanted, finite=finite, ops=ops)
        aside = (trouble > zero) & (trouble < zero)
        if self.fallback:
            found = trouble
            earlier = mine.trouble > zero
            watched = watched._replace(trouble=ops.where(earlier, mine.trouble, found))
            trouble = ops.where(
                earlier, zero, found
            )  # of this step; what an earlier step found is kept only where it decides
            aside = watched.trouble > zero
            static = ops.expand(observation.static_threshold, ops.shape(norm))
            wanted = ops.where(aside, static, wanted)
            coefficient = ops.where(aside & finite, coefficient_of(norm, static, ops), coefficient)
            pace = ops.where(aside, one, pace)
            reason = ops.where(aside & finite, ops(float(Reason.FALLBACK)), reason)

        threshold, limited, floors = self._bound(wanted, reason, mine, known=~warm, ops=ops)
        reason = ops.where(finite & ~aside, limited, reason)
        coefficient = ops.where((threshold != wanted) & finite, cut_to(norm, threshold, ops), coefficient)
        reason = ops.where(trouble > zero, trouble, reason)

        # The near target of a spike is not the width of the range.
        counts = finite & ~warm & (aside | (decision.reason != ops(float(Reason.SPIKE))))
        slot = _slot(mine.steps, ops)
        floor = ops.minimum(ops.pick(floors, slot), threshold)
        watched = watched._replace(
            edge=ops.where(counts, threshold, mine.edge),
            floors=ops.put(floors, slot, floor, ~counts),
            held_pace=pace,
        )
        return Decision(threshold, coefficient, pace, reason), type(state)(*after, *watched)

    def narrowed(self, state: Any, ops: Ops) -> Any:
        split = len(state) - len(OversightState._fields)
        mine = OversightState(*state[split:])
        before = self._inner_type(*state[:split])
        after = [*self.inner.narrowed(before, ops), *mine._replace(held_pace=ops.minimum(mine.held_pace, ops(1.0)))]
        if self.freeze_after is not None:  # what is frozen keeps range and pace
            frozen = mine.steps >= ops(float(self.freeze_after))
            after = [ops.where(frozen, b, a) for b, a in zip(state, after, strict=True)]
        return type(state)(*after)

    def _bound(
        self, wanted: Value, reason: Value, mine: OversightState, *, known: Value, ops: Ops
    ) -> tuple[Value, Value, Value]:
        """Threshold and reason under all limits, and the floors without those that are more than 100 steps old."""
        threshold = wanted
        whole = ops.floor(mine.steps / ops(float(BLOCK))) * ops(float(BLOCK))
        old = mine.steps == whole
        floors = ops.put(mine.floors, _slot(mine.steps, ops), ops.full(ops.shape(wanted), float("inf")), ~old)
        bounds = []
        if self.max_widening_step is not None:
            edge = ops.where(mine.edge > ops(0.0), mine.edge, ops(float("inf")))
            bounds.append(edge * ops(self.max_widening_step))
        if self.max_widening_100 is not None:
            bounds.append(ops.sort(floors)[0] * ops(self.max_widening_100))
        for bound in bounds:
            over = known & (bound < ops(float("inf"))) & ~(threshold <= bound)
            threshold = ops.where(over, bound, threshold)
            reason = ops.where(over, ops(float(Reason.LIMIT_WIDENING)), reason)
        inside, over, under = self._within(threshold, ops)
        reason = ops.where(over, ops(float(Reason.LIMIT_CEILING)), reason)
        reason = ops.where(under, ops(float(Reason.LIMIT_FLOOR)), reason)
        return inside, reason, floors

    def _within(self, threshold: Value, ops: Ops) -> tuple[Value, Value, Value]:
        """The threshold between floor and ceiling, and where either of them holds. What is no number is above."""
        over = under = (threshold > ops(0.0)) & (threshold < ops(0.0))
        if self.max_threshold is not None:
            over = ~(threshold <= ops(self.max_threshold))
            threshold = ops.where(over, ops(self.max_threshold), threshold)
        if self.min_threshold is not None:
            under = threshold < ops(self.min_threshold)
            threshold = ops.where(under, ops(self.min_threshold), threshold)
        return threshold, over, under

    def _watch(
        self, mine: OversightState, observation: Observation, wanted: Value, *, finite: Value, ops: Ops
    ) -> tuple[Value, OversightState]:
        """The trouble that this step was found in (0: none), and what is remembered of it."""
        one, zero = ops(1.0), ops(0.0)
        left_out = observation.left_out(finite)
        skipped = ops.where(left_out, mine.skipped + one, mine.skipped)
        # Infinite is what a static threshold may be that never acts, and nothing else.
        endless = (wanted == ops(float("inf"))) & (observation.static_threshold < wanted)
        sane = ~finite | ((wanted > zero) & ~endless)
        trouble = ops.where(sane, zero, ops(float(Reason.TROUBLE_STATISTICS)))
        mine = mine._replace(steps=mine.steps + one, skipped=skipped)
        if self.divergence_spreads > 0:
            loss = ops.expand(observation.loss, ops.shape(observation.norm))
            known = abs(loss) < ops(float("inf"))
            trend = LossTrend(mine.loss_mean, mine.loss_spread, mine.loss_best, mine.loss_seen)
            trend = follow_loss(trend, loss, self.divergence_spreads, SLACK, ops)
            far = known_trend(trend, ops) & far_from_best(trend, self.divergence_spreads, SLACK, ops)
            bad = ops.where(known, ops.where(far, mine.bad + one, zero), mine.bad)
            # Again after every further M steps: a run that is resumed into its divergence is not left alone.
            patience = ops(float(self.divergence_steps))
            due = (bad >= patience) & (bad - ops.floor(bad / patience) * patience == zero)
            trouble = ops.where(known & due, ops(float(Reason.TROUBLE_DIVERGENCE)), trouble)
            mine = mine._replace(
                loss_mean=trend.mean,
                loss_spread=trend.spread,
                loss_best=trend.best,
                loss_seen=trend.seen,
                bad=bad,
            )
        if self.max_skipped is not None:
            spent = left_out & (skipped > ops(float(self.max_skipped)))
            trouble = ops.where(spent, ops(float(Reason.TROUBLE_BUDGET)), trouble)
        return trouble, mine._replace(trouble=trouble)


def _slot(steps: Value, ops: Ops) -> Value:
    block = ops.floor(steps / ops(float(BLOCK)))
    return block - ops.floor(block / ops(float(BLOCKS))) * ops(float(BLOCKS))
