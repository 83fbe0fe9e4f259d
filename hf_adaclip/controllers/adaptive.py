"""`adaptive`: a range around the running level of the norm that widens while training is stable and narrows when it is not.

    d(n, L)   = 2 (n - L) / (n + L)                 signed deviation, about log(n / L), bounded by 2
    u(e, L)   = L (2 + e) / (2 - e)                 the norm at deviation e above L, exact inverse of d
    x_t       = d(n_t, L_{t-1})
    far       = min(w_{t-1} S_{t-1}, max_edge)      the edge of the range; near = min(near_width S_{t-1}, max_near)
    edge      = max(u(min(far, 0.6), L), min(u(far, L), static))
    known     = max(edge, u(max(far, 0.6), C)) while a second level C is remembered, else edge
    top       = min(known, bound)
    over      = n_t > top                           an excursion upward; a spike where n_t > known and x_t > far. Downward: x_t < -far
    threshold = min(u(near, L), bound) in a spike, else top
    L_t       = min(u(a clip(x_t, -far, far), L_{t-1}), bound)        a = max(1 / (count + 1), 1 - decay)
    S_t       = max(min_spread, S_{t-1} + a (min(|x_t|, far) - S_{t-1}))
    w_t       = max(min_far_width, w narrow_factor) in a spike, else min(max_far_width, w + widen_step)

    c_t       = c_{t-1} + (1 - decay) ([n_t > static] - c_{t-1})   share of norms that the static threshold cuts; c_0 over the warm-up
    held      = c_0 > ceiling_share, as long as c > ceiling_share / 5, and then never again
    threshold = min(threshold, static) while held

Where static clipping acts in most steps it is no guard but part of the optimizer: every gradient has the same length. Opening the
range would train otherwise than whoever set the threshold has it, and measurably worse where it was tuned (model_cards/RESEARCH.md, 15
to 17). So there the static threshold stays the ceiling, and the range works below it, until norms have sunk so far that it hardly acts.

The bound on all thresholds: `hf_adaclip.controllers.numerics.bound`.

Lasting levels. `accept_after` norms in a row beyond min(far, 0.6) that agree with their own mean (within far of it) are a lasting new
level, not spikes: L jumps there and the step passes. Norms that keep growing do not agree with each other and are not accepted.

Recurring levels, C above: `hf_adaclip.controllers.numerics.recurring`.

Where norms scatter widely, the edge is far out. Beyond 1.86 times the level (a deviation of 0.6) it lets nothing pass that the static
threshold would cut: what is unusual and too large for whoever set that threshold is cut to it, and no farther.

Two numbers, a far edge and a near target, give "no harm when calm" and "small applied spikes" at once; one threshold cannot.
The deviation is rational (the [1/1] Pade approximant of the logarithm), so the update needs only + - * / and comparisons: a
replay gives the same bits on every IEEE device, and no single norm can move the statistics by more than a bounded amount.
Norms below the smallest normal float32 count as that.

Source: this package. Related: log-space tracking with bounded learning in lingvo's GradNormTracker; a robust location and scale
by a bounded influence function, Huber 1964.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    coefficient_of,
    cut_to,
    is_finite_norm,
)
from hf_adaclip.controllers.numerics.bound import LOSS_BAR, Ceiling, ceiling_of, next_given
from hf_adaclip.controllers.numerics.deviation import INNER_EDGE, above, deviation
from hf_adaclip.controllers.numerics.judgement import Judgement, reason_of
from hf_adaclip.controllers.numerics.ops import SMALLEST_NORMAL, Ops, Shape, Value, ops_of
from hf_adaclip.controllers.numerics.recurring import HITS, Memory, remember
from hf_adaclip.controllers.numerics.trend import LossTrend, follow_loss, known_trend
from hf_adaclip.controllers.pace import Pace, PaceState, little_left, update_pace
from hf_adaclip.controllers.settings import setting, warmup

MAX_DEVIATION = 1.9
"""Largest deviation used for an edge: u(1.9, L) = 39 L. At 2 the inverse would be infinite."""

PACE_START = 50
"""Steps of the pace's start where nothing says how long the run is."""


_OF_THE_LOSS = ("loss_mean", "loss_spread", "loss_best", "loss_seen", "loss_first")
"""Fields of the state."""


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
        given: The level that the bound goes by, 0 in the warm-up.
        quiet: Threshold of the last step that was left as it was.
        crest, memory, rival, hits, other, other_hits: See `hf_adaclip.controllers.numerics.recurring`.
        above: 1 where the last usable norm was unusual upward, else 0.
        loss_mean, loss_spread, loss_best, loss_seen: See `hf_adaclip.controllers.numerics.trend`.
        loss_first: Mean of the losses of the first steps.
        pace, best_reach, pace_steps: See `hf_adaclip.controllers.pace`.
    """

    level: Value
    spread: Value
    width: Value
    candidate: Value
    run: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls
    acted: Value
    pace: Value
    best_reach: Value
    pace_steps: Value
    given: Value
    quiet: Value
    crest: Value
    memory: Value
    rival: Value
    hits: Value
    other: Value
    other_hits: Value
    above: Value
    loss_mean: Value
    loss_spread: Value
    loss_best: Value
    loss_seen: Value
    loss_first: Value


@dataclass(frozen=True)
class AdaptiveController(Controller[AdaptiveState]):
    """The package's own controller.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
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
    revision: ClassVar[int] = 5
    looks_at_loss: ClassVar[bool] = True
    new_fields: ClassVar[frozenset[str]] = frozenset({"given", "quiet", *Memory._fields, "above", *_OF_THE_LOSS})

    decay: float = setting(
        0.97, help="Decay per step of the running level and spread: memory of 1/(1-decay) steps.", range="(0, 1)"
    )
    warmup_observations: int = warmup()
    far_width: float = setting(
        5.0, help="First half-width of the range, in spreads. A norm beyond it is an excursion.", range="(0, inf)"
    )
    near_width: float = setting(
        1.5, help="What an excursion is cut back to: this many spreads above the level.", range="(0, inf)"
    )
    min_far_width: float = setting(4.5, help="The range never gets narrower, in spreads.", range="(0, inf)")
    max_far_width: float = setting(8.0, help="The range never gets wider, in spreads.", range="(0, inf)")
    widen_step: float = setting(
        0.01, help="Spreads by which the range widens per step without an excursion.", range="[0, inf)"
    )
    narrow_factor: float = setting(0.8, help="Factor on the range's width after an upward excursion.", range="(0, 1]")
    accept_after: int = setting(
        6, help="Excursions in a row at one level that make it the new level.", range="[2, inf)"
    )
    min_spread: float = setting(
        0.05, help="Floor of the spread, so that a very calm run is not held too tight.", range="(0, 2)"
    )
    max_edge: float = setting(
        1.3,
        help="The edge of the range is never farther than this deviation (1.3: 4.7 x the level), and beyond 0.6 (1.86 x) never above "
        "the static threshold.",
        range="(0, 1.9]",
    )
    max_near: float = setting(
        0.2,
        help="An excursion is never left farther out than this deviation (0.2: 1.22 x the level).",
        range="[0, 1.9]",
    )
    ceiling_share: float = setting(
        0.5,
        help="Where the static threshold cut more than this part of the warm-up, it stays the ceiling of the range, until it cuts less "
        "than a fifth of that. 0: for good if it cut any step; 1: never. Only for the global norm.",
        range="[0, 1]",
    )
    max_pace: float | None = setting(
        None,
        help="Largest multiplier on the learning rate of a step; 1 switches the pace off. Unset: 64, which leaves it room to find a rate "
        "that is far above the given one, where the optimizer is known; else 1.",
        range="[1, inf)",
    )
    pace_start: int | None = setting(
        None,
        help="Steps in which the pace rises to 1 at the start. Unset: in a Trainer a tenth of its steps less those of the "
        "schedule's own warm-up, 50 in a hand-written loop; 1 over several epochs of a model that was trained before.",
        range="[1, inf)",
    )
    pace_trust: float = setting(
        3.0,
        help="The pace leaves 1 once the useful rate is estimated at this many times the given one.",
        range="[1, inf)",
    )
    pace_hold: float = setting(
        1 / 3, help="Part of the largest estimate that the pace keeps when the estimate falls.", range="[0, 1]"
    )
    pace_growth: float = setting(1.25, help="Largest factor by which the pace grows per step.", range="(1, 2]")
    pace_shrink: float = setting(
        0.95,
        help="Factor by which it goes back per step, also after an upward excursion or a skipped step.",
        range="(0, 1)",
    )

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        low, high = self.min_far_width, self.max_far_width
        if not low <= self.far_width <= high:
            yield (
                ("min_far_width", "far_width", "max_far_width"),
                f"`far_width` must be within [`min_far_width`, `max_far_width`] = [{low}, {high}], but is {self.far_width} instead.",
            )
        if not self.near_width < low:
            yield (
                ("near_width", "min_far_width"),
                f"`near_width` must be below `min_far_width` ({low}), but is {self.near_width} instead: a step that is cut back must land "
                "inside the range.",
            )

    def judging_apart(self) -> "AdaptiveController":
        # The static threshold is one for the global norm, so only there it can be a ceiling.
        return replace(self, ceiling_share=1.0)

    @property
    def of_the_run(self) -> frozenset[str]:
        return frozenset({"pace", "best_reach", "pace_steps", *_OF_THE_LOSS})

    @property
    def _paced(self) -> bool:
        return self.max_pace is not None and self.max_pace > 1

    @property
    def _start(self) -> float:
        return float(PACE_START if self.pace_start is None else self.pace_start)

    def init(self, ops: Ops, shape: Shape) -> AdaptiveState:
        zeros = AdaptiveState(*(ops.full(shape, 0.0) for _ in AdaptiveState._fields))
        return zeros._replace(
            spread=ops.full(shape, self.min_spread),
            width=ops.full(shape, self.far_width),
            pace=ops.full(shape, 1.0 / self._start if self._paced else 1.0),
        )

    def update(self, state: AdaptiveState, observation: Observation) -> tuple[Decision, AdaptiveState]:
        ops = ops_of(observation.norm)
        ceiling = ceiling_of(
            observation.static_threshold,
            observation.loss,
            level=state.level,
            given=state.given,
            count=state.count,
            acted=state.acted,
            trend=_trend_of(state),
            warmup=self.warmup_observations,
            ceiling_share=self.ceiling_share,
            ops=ops,
        )
        judged = self._judge(state, observation, ceiling, ops)
        threshold, coefficient, kept = self._threshold(judged, observation, ceiling, ops)
        reason = reason_of(judged, threshold, observation.static_threshold, kept=kept, quiet=state.quiet, ops=ops)
        paced = self._pace(state, judged, observation, ops)
        learned = self._learn(state, judged, observation, ceiling, ops)._replace(
            quiet=ops.where(judged.ready & (judged.norm <= threshold), threshold, state.quiet),
            pace=paced.pace,
            best_reach=paced.best,
            pace_steps=paced.steps,
        )
        return Decision(threshold, coefficient, paced.pace, reason), learned

    def narrowed(self, state: AdaptiveState, ops: Ops) -> AdaptiveState:
        return state._replace(
            width=ops.minimum(state.width, ops(self.min_far_width)), pace=ops.minimum(state.pace, ops(1.0))
        )

    # -- judging -------------------------------------------------------------------------------------------------

    def _edge(self, level: Value, far: Value, observation: Observation, ops: Ops) -> Value:
        """The edge as a norm: `far` above the level, but beyond the inner edge no farther than the static threshold."""
        inner = above(level, ops.minimum(far, ops(INNER_EDGE)), ops)
        return ops.maximum(inner, ops.minimum(above(level, far, ops), observation.static_threshold))

    def _judge(self, state: AdaptiveState, observation: Observation, ceiling: Ceiling, ops: Ops) -> Judgement:
        """Where the norm stands, from the past alone."""
        one, zero, inner = ops(1.0), ops(0.0), ops(INNER_EDGE)
        finite = is_finite_norm(observation.norm, ops)
        # A zero norm is finite but says nothing about the level: learned, it would end at a threshold of zero.
        usable = finite & (observation.norm > zero)
        warm = state.count < ops(float(self.warmup_observations))
        ready = usable & ~warm
        norm = ops.maximum(observation.norm, ops(SMALLEST_NORMAL))

        level = ops.where(state.count > zero, state.level, norm)
        x = deviation(norm, level, ops)
        far = ops.minimum(state.width * state.spread, ops(self.max_edge))
        near = ops.minimum(ops(self.near_width) * state.spread, ops(self.max_near))
        edge = self._edge(level, far, observation, ops)
        crest = ops.where(state.memory >= ops(HITS), above(state.crest, ops.maximum(far, inner), ops), edge)
        known = ops.maximum(edge, crest)
        top = ops.minimum(known, ceiling.bound)
        over = ready & (norm > top)
        high = ready & (norm > known) & (x > far)

        # Six in a row that are only beyond the inner edge are a new level too: in a noisy run it would be found slowly otherwise.
        unusual = ready & (abs(x) > ops.minimum(far, inner))
        agrees = abs(deviation(norm, state.candidate, ops)) <= far
        run = ops.where(unusual, ops.where(agrees, state.run, zero) + one, zero)
        candidate = ops.where(agrees & (state.run > zero), state.candidate, norm)
        candidate = candidate + (norm - candidate) / ops.maximum(run, one)
        accepted = run >= ops(float(self.accept_after))
        return Judgement(
            norm=norm,
            finite=finite,
            usable=usable,
            warm=warm,
            ready=ready,
            level=level,
            x=x,
            far=far,
            near=near,
            edge=edge,
            top=top,
            high=high,
            over=over,
            low=ready & (x < -far),
            recurring=ready & (norm > edge) & (norm <= known) & ~accepted,
            unusual=unusual,
            upward=unusual & (x > zero),
            accepted=accepted,
            spike=high & ~accepted,
            candidate=candidate,
            run=run,
        )

    def _threshold(
        self, judged: Judgement, observation: Observation, ceiling: Ceiling, ops: Ops
    ) -> tuple[Value, Value, Value]:
        """Threshold and coefficient, and whether the static threshold is what holds."""
        j, static = judged, observation.static_threshold
        # An accepted step passes even when it is itself a little beyond the new range.
        accepted = ops.maximum(self._edge(j.candidate, j.far, observation, ops), ops.maximum(j.norm, j.top))
        threshold = ops.where(j.spike, above(j.level, j.near, ops), ops.where(j.accepted, accepted, j.top))
        threshold = ops.minimum(threshold, ceiling.bound)
        kept = ceiling.held & (threshold > static)
        threshold = ops.where(j.warm | kept, static, threshold)
        # Where the static threshold rules, the bits are those of the stock Trainer.
        stock = ops.where(
            j.warm | kept, coefficient_of(observation.norm, threshold, ops), cut_to(j.norm, threshold, ops)
        )
        return threshold, ops.where(j.finite, stock, ops(1.0)), kept

    # -- learning ------------------------------------------------------------------------------------------------

    def _learn(
        self, state: AdaptiveState, judged: Judgement, observation: Observation, ceiling: Ceiling, ops: Ops
    ) -> AdaptiveState:
        """The state after the step, but for the pace."""
        j, one, zero = judged, ops(1.0), ops(0.0)
        gain = ops.maximum(one / (state.count + one), ops(1.0 - self.decay))
        gain = ops.where(j.recurring, zero, gain)
        reach = ops.where(j.warm, ops(MAX_DEVIATION), j.far)
        learned = ops.minimum(ops.maximum(j.x, -reach), reach)
        level = ops.where(j.accepted, j.candidate, above(j.level, gain * learned, ops))
        level = ops.where(j.ready, ops.minimum(level, ceiling.bound), level)
        spread = ops.maximum(state.spread + gain * (abs(learned) - state.spread), ops(self.min_spread))
        wider = ops.minimum(state.width + ops(self.widen_step), ops(self.max_far_width))
        narrower = ops.maximum(state.width * ops(self.narrow_factor), ops(self.min_far_width))
        calm = j.ready & ~j.over & ~j.low & ~j.accepted & ~j.recurring
        width = ops.where(j.spike, narrower, ops.where(calm, wider, state.width))
        # A new level beyond the bound goes on being one, and is not judged as a spike in five steps of six.
        run = ops.where(j.accepted & (j.candidate <= ceiling.bound), zero, j.run)

        cut = ops.where(j.norm > observation.static_threshold, one, zero)
        share = ops.where(ceiling.held, ceiling.share + ops(1.0 - self.decay) * (cut - ceiling.share), zero)
        before = _trend_of(state)
        loss = ops.expand(observation.loss, ops.shape(observation.norm))
        trend = follow_loss(before, loss, LOSS_BAR, 0.0, ops)
        better = known_trend(before, ops) & (trend.best < before.best)
        given = next_given(ceiling, level, better, observation.static_threshold, ops)
        # Only the first in a row: norms that go on growing are unusual all along. A whole run that agrees counts once more.
        event = j.upward & ceiling.trusted & (j.accepted | ~(state.above > zero))
        memory = remember(
            Memory(*(getattr(state, name) for name in Memory._fields)),
            j.norm,
            event=event,
            lasting=j.accepted,
            new=j.over & ~j.recurring,
            ready=j.ready,
            far=j.far,
            ops=ops,
        )
        usable = j.usable
        return AdaptiveState(
            level=ops.where(usable, level, state.level),
            spread=ops.where(usable, spread, state.spread),
            width=width,
            candidate=ops.where(usable, j.candidate, state.candidate),
            run=ops.where(usable, run, state.run),
            count=ops.where(usable, state.count + one, state.count),
            acted=ops.where(usable, ops.where(j.warm, state.acted + cut, share), state.acted),
            pace=state.pace,
            best_reach=state.best_reach,
            pace_steps=state.pace_steps,
            given=ops.where(j.ready, given, state.given),
            quiet=state.quiet,
            crest=ops.where(j.ready, memory.crest, state.crest),
            memory=ops.where(j.ready, memory.memory, state.memory),
            rival=ops.where(j.ready, memory.rival, state.rival),
            hits=ops.where(j.ready, memory.hits, state.hits),
            other=ops.where(j.ready, memory.other, state.other),
            other_hits=ops.where(j.ready, memory.other_hits, state.other_hits),
            above=ops.where(usable, ops.where(j.upward, one, zero), state.above),
            loss_mean=ops.where(usable, trend.mean, state.loss_mean),
            loss_spread=ops.where(usable, trend.spread, state.loss_spread),
            loss_best=ops.where(usable, trend.best, state.loss_best),
            loss_seen=ops.where(usable, trend.seen, state.loss_seen),
            loss_first=ops.where(usable & ~known_trend(before, ops), trend.mean, state.loss_first),
        )

    def _pace(self, state: AdaptiveState, judged: Judgement, observation: Observation, ops: Ops) -> PaceState:
        paced = PaceState(state.pace, state.best_reach, state.pace_steps)
        if self.max_pace is None or not self._paced:
            return paced
        parameters = Pace(
            self.max_pace, self._start, self.pace_trust, self.pace_hold, self.pace_growth, self.pace_shrink
        )
        reach = ops(float("nan")) if observation.reach is None else observation.reach
        return update_pace(
            parameters,
            paced,
            ops.expand(reach, ops.shape(observation.norm)),
            trouble=judged.high,
            left_out=observation.left_out(judged.finite),
            little=little_left(state.loss_first, _trend_of(state), ops),
            ops=ops,
        )


def _trend_of(state: AdaptiveState) -> LossTrend:
    return LossTrend(state.loss_mean, state.loss_spread, state.loss_best, state.loss_seen)
