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

The bound. Norms that agree with each other prove nothing about the training: those of a divergence do so too.

    g_0   = level at the end of the warm-up
    g_t   = max(g, min(1.5 L_t, 1.03 g)) at a new best of the loss; min(L_t, static) while held
    bound = max(min(static, 50 g), k g)             none while held; k = 1 where the loss is known to be high: its mean more
                                                    than 2 spreads above its best, or that of the step more than 4
                                                    (`trend.py`); k = 1.25 otherwise
                                                    with ceiling_share 1 (and tensor by tensor) k = 4 for 1, and 8 for 1.25

So what the static threshold lets through is followed. Beyond it only progress takes the range, a little with each new best of the loss.
Where no loss is known there is no evidence of progress, and a quarter more than the level that was given is all.

Lasting levels. `accept_after` norms in a row beyond min(far, 0.6) that agree with their own mean (within far of it) are a lasting new
level, not spikes: L jumps there and the step passes. Norms that keep growing do not agree with each other and are not accepted.

Recurring levels. A second source of data comes back without ever coming six times in a row. Two rivals (a level and a number of hits,
which fades by 0.3 % a step) are kept. Counted are norms beyond min(far, 0.6) above L where the one before was not, and lasting levels,
as two: a norm within 0.75 of a rival is a hit and moves it; any other that is over the top takes the place of the weaker one. Four hits
make a rival C, the remembered level: norms up to max(far, 0.6) above it pass from then on and do not teach L and S; C follows those
within 0.6 of it, and is forgotten 900 steps after the last of them. Spikes of differing sizes do not agree, and those of one size,
hundreds of steps apart, have faded before there are four.

Where norms scatter widely, the edge is far out. Beyond 1.86 times the level (a deviation of 0.6) it lets nothing pass that the static
threshold would cut: what is unusual and too large for whoever set that threshold is cut to it, and no farther.

Two numbers, a far edge and a near target, give "no harm when calm" and "small applied spikes" at once; one threshold cannot.
The deviation is rational (the [1/1] Pade approximant of the logarithm), so the update needs only + - * / and comparisons: a
replay gives the same bits on every IEEE device, and no single norm can move the statistics by more than a bounded amount.
Norms below the smallest normal float32 count as that.

Source: this package. Related: log-space tracking with bounded learning in lingvo's GradNormTracker; a robust location and scale
by a bounded influence function, Huber 1964; two counters for what comes back most often, Misra and Gries 1982.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    cut_to,
    is_finite_norm,
)
from hf_adaclip.controllers.numerics.ops import SMALLEST_NORMAL, Ops, Shape, Value, ops_of
from hf_adaclip.controllers.numerics.trend import LossTrend, far_from_best, follow_loss, known_trend, spread_of
from hf_adaclip.controllers.pace import Pace, PaceState, update_pace
from hf_adaclip.controllers.settings import setting, warmup

MAX_DEVIATION = 1.9
"""Largest deviation used for an edge: u(1.9, L) = 39 L. At 2 the inverse would be infinite."""

INNER_EDGE = 0.6
"""Deviation beyond which the range is bounded by the static threshold: u(0.6, L) = 1.86 L."""

RELEASE = 0.2
"""The ceiling is given up when the static threshold cuts this part of `ceiling_share` of recent steps: a tenth of them, by default."""

PACE_START = 50
"""Steps of the pace's start where nothing says how long the run is."""

ALLOWANCE, REACH, RENEWAL, HEADROOM = 1.25, 50.0, 1.03, 1.5
"""How far the range may leave the given level beyond the static threshold, and how far below it; by how much a new best of the loss lets
the given level follow, and how far above the running one."""

WIDE, WORSE = 8.0, 4.0
"""How far it may leave the given level where the static threshold is never the ceiling (a tensor of many), and while the loss is worse."""

LOSS_BAR, OWN_BAR = 2.0, 4.0
"""Spreads above its best at which the loss speaks against a wider range: its mean, and that of the step itself."""

HITS, LASTING, FADE, ALIKE, FORGOTTEN = 4.0, 2.0, 0.997, 0.75, 0.5
"""Hits that make a rival the remembered level; those of a lasting level; what is left of them a step later; deviation that is a hit; hits
that are none."""

REMEMBERED, FOLLOW = 60.0, 0.1
"""Hits that a remembered level starts with; part of the way that it moves to a norm."""


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
        crest, memory: The remembered second level, and what is left of its hits.
        rival, hits, other, other_hits: The two rivals.
        above: 1 where the last usable norm was unusual upward, else 0.
        loss_mean, loss_spread, loss_best, loss_seen: See `hf_adaclip.controllers.numerics.trend`.
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


class _Ceiling(NamedTuple):
    """`bound`: no threshold is above it. `held`: the static threshold is the ceiling. `share`: of norms that it cuts.

    `given`: what the bound goes by. `trusted`: the loss does not speak against a wider range.
    """

    bound: Value
    held: Value
    share: Value
    given: Value
    trusted: Value


class _Judgement(NamedTuple):
    """A norm and where it stands; bools are False in the warm-up and for norms that say nothing.

    Attributes:
        norm: Not below the smallest normal number.
        finite, usable, warm, ready: Finite; and above zero; in the warm-up; usable and after it.
        level, x, far, near, edge, top: See the formulas.
        over, low, recurring: Above the top; below the range; above the edge and explained by the remembered level.
        unusual, upward, accepted, spike: Beyond the inner edge; upward; the last of a run that is a new level; cut back to near the level.
        candidate, run: Of the run, with this norm.
    """

    norm: Value
    finite: Value
    usable: Value
    warm: Value
    ready: Value
    level: Value
    x: Value
    far: Value
    near: Value
    edge: Value
    top: Value
    high: Value
    over: Value
    low: Value
    recurring: Value
    unusual: Value
    upward: Value
    accepted: Value
    spike: Value
    candidate: Value
    run: Value


class _Memory(NamedTuple):
    """What is remembered of levels that come back."""

    crest: Value
    memory: Value
    rival: Value
    hits: Value
    other: Value
    other_hits: Value


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
    revision: ClassVar[int] = 2
    looks_at_loss: ClassVar[bool] = True
    new_fields: ClassVar[frozenset[str]] = frozenset(
        {"given", "quiet", *_Memory._fields, "above", "loss_mean", "loss_spread", "loss_best", "loss_seen"}
    )

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
    max_pace: float = setting(
        1.0,
        help="Largest multiplier on the learning rate of a step. 1.0 switches the pace off; 64 leaves it room to find a rate that is far "
        "above the given one.",
        range="[1, inf)",
    )
    pace_start: int | None = setting(
        None,
        help="Steps in which the pace rises to 1 at the start. Unset: in a Trainer a tenth of its steps less those of the schedule's own "
        "warm-up, 50 in a hand-written loop.",
        range="[1, inf)",
    )
    pace_trust: float = setting(
        3.0,
        help="The pace leaves 1 where the useful rate is estimated at this many times the given one.",
        range="[1, inf)",
    )
    pace_hold: float = setting(
        1 / 3, help="Part of the largest estimate that the pace keeps when the estimate falls.", range="[0, 1]"
    )
    pace_growth: float = setting(1.1, help="Largest factor by which the pace grows per step.", range="(1, 2]")
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
        return frozenset({"pace", "best_reach", "pace_steps", "loss_mean", "loss_spread", "loss_best", "loss_seen"})

    @property
    def _start(self) -> float:
        return float(PACE_START if self.pace_start is None else self.pace_start)

    def init(self, ops: Ops, shape: Shape) -> AdaptiveState:
        zeros = AdaptiveState(*(ops.full(shape, 0.0) for _ in AdaptiveState._fields))
        return zeros._replace(
            spread=ops.full(shape, self.min_spread),
            width=ops.full(shape, self.far_width),
            pace=ops.full(shape, 1.0 if self.max_pace == 1 else 1.0 / self._start),
        )

    def update(self, state: AdaptiveState, observation: Observation) -> tuple[Decision, AdaptiveState]:
        ops = ops_of(observation.norm)
        ceiling = self._ceiling(state, observation, ops)
        judged = self._judge(state, observation, ceiling, ops)
        threshold, coefficient, kept = self._threshold(judged, observation, ceiling, ops)
        reason = self._reason(state, judged, observation, threshold, kept, ops)
        paced = self._pace(state, judged, observation, ops)
        learned = self._learn(state, judged, observation, ceiling, ops)._replace(
            quiet=ops.where(judged.ready & (judged.norm <= threshold), threshold, state.quiet),
            pace=paced.pace,
            best_reach=paced.best,
            pace_steps=paced.steps,
        )
        return Decision(threshold, coefficient, paced.pace, reason), learned

    # -- judging -------------------------------------------------------------------------------------------------

    def _ceiling(self, state: AdaptiveState, observation: Observation, ops: Ops) -> _Ceiling:
        """What no threshold may be above, from the past alone."""
        one = ops(1.0)
        warmup = ops(float(self.warmup_observations))
        first = state.count <= warmup
        share = ops.where(first, state.acted / warmup, state.acted)
        past = state.count >= warmup
        held = past & (share > ops(self.ceiling_share) * ops.where(first, one, ops(RELEASE)))
        given = ops.where(state.given > ops(0.0), state.given, state.level)
        trend = _trend_of(state)
        known = known_trend(trend, ops)
        trusted = ~(known & far_from_best(trend, LOSS_BAR, 0.0, ops))
        own = observation.loss <= trend.best + ops(OWN_BAR) * spread_of(trend, ops)
        # A static threshold that is never the ceiling says nothing of the level, which may be far above it.
        usual, worse = (ALLOWANCE, 1.0) if self.ceiling_share < 1 else (WIDE, WORSE)
        allowed = given * ops.where(known & ~(trusted & own), ops(worse), ops(usual))
        bound = ops.maximum(ops.minimum(observation.static_threshold, given * ops(REACH)), allowed)
        # Held, the static threshold is bound enough, and the level is free to be above it.
        bound = ops.where(held, ops(float("inf")), bound)
        return _Ceiling(bound, held, share, given, trusted)

    def _edge(self, level: Value, far: Value, observation: Observation, ops: Ops) -> Value:
        """The edge as a norm: `far` above the level, but beyond the inner edge no farther than the static threshold."""
        inner = _above(level, ops.minimum(far, ops(INNER_EDGE)), ops)
        return ops.maximum(inner, ops.minimum(_above(level, far, ops), observation.static_threshold))

    def _judge(self, state: AdaptiveState, observation: Observation, ceiling: _Ceiling, ops: Ops) -> _Judgement:
        """Where the norm stands, from the past alone."""
        one, zero, inner = ops(1.0), ops(0.0), ops(INNER_EDGE)
        finite = is_finite_norm(observation.norm, ops)
        # A zero norm is finite but says nothing about the level: learned, it would end at a threshold of zero.
        usable = finite & (observation.norm > zero)
        warm = state.count < ops(float(self.warmup_observations))
        ready = usable & ~warm
        norm = ops.maximum(observation.norm, ops(SMALLEST_NORMAL))

        level = ops.where(state.count > zero, state.level, norm)
        x = _deviation(norm, level, ops)
        far = ops.minimum(state.width * state.spread, ops(self.max_edge))
        near = ops.minimum(ops(self.near_width) * state.spread, ops(self.max_near))
        edge = self._edge(level, far, observation, ops)
        crest = ops.where(state.memory >= ops(HITS), _above(state.crest, ops.maximum(far, inner), ops), edge)
        known = ops.maximum(edge, crest)
        top = ops.minimum(known, ceiling.bound)
        over = ready & (norm > top)
        high = ready & (norm > known) & (x > far)

        # Six in a row that are only beyond the inner edge are a new level too: in a noisy run it would be found slowly otherwise.
        unusual = ready & (abs(x) > ops.minimum(far, inner))
        agrees = abs(_deviation(norm, state.candidate, ops)) <= far
        run = ops.where(unusual, ops.where(agrees, state.run, zero) + one, zero)
        candidate = ops.where(agrees & (state.run > zero), state.candidate, norm)
        candidate = candidate + (norm - candidate) / ops.maximum(run, one)
        accepted = run >= ops(float(self.accept_after))
        return _Judgement(
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
        self, judged: _Judgement, observation: Observation, ceiling: _Ceiling, ops: Ops
    ) -> tuple[Value, Value, Value]:
        """Threshold and coefficient, and whether the static threshold is what holds."""
        j, static = judged, observation.static_threshold
        # An accepted step passes even when it is itself a little beyond the new range.
        accepted = ops.maximum(self._edge(j.candidate, j.far, observation, ops), ops.maximum(j.norm, j.top))
        threshold = ops.where(j.spike, _above(j.level, j.near, ops), ops.where(j.accepted, accepted, j.top))
        threshold = ops.minimum(threshold, ceiling.bound)
        kept = ceiling.held & (threshold > static)
        threshold = ops.where(j.warm | kept, static, threshold)
        # Where the static threshold rules, the bits are those of the stock Trainer.
        stock = ops.where(
            j.warm | kept, coefficient_of(observation.norm, threshold, ops), cut_to(j.norm, threshold, ops)
        )
        return threshold, ops.where(j.finite, stock, ops(1.0)), kept

    def _reason(
        self,
        state: AdaptiveState,
        judged: _Judgement,
        observation: Observation,
        threshold: Value,
        kept: Value,
        ops: Ops,
    ) -> Value:
        j = judged
        # Against the last step that was left alone: the threshold of a spike is its target and not the width of the range.
        wider = (threshold > state.quiet) & (state.quiet > ops(0.0)) & ~kept & ~j.unusual
        reason = ops.where(wider, ops(float(Reason.WIDENED)), ops(float(Reason.WITHIN)))
        reason = ops.where(j.warm, ops(float(Reason.WARMUP)), reason)
        reason = ops.where(j.low | ~j.usable, ops(float(Reason.VANISHING)), reason)
        reason = ops.where(j.accepted, ops(float(Reason.NEW_LEVEL)), reason)
        held = ops.where(
            threshold == observation.static_threshold, ops(float(Reason.HELD)), ops(float(Reason.BOUNDED))
        )
        reason = ops.where(j.ready & (j.norm > threshold), held, reason)
        reason = ops.where(j.spike, ops(float(Reason.SPIKE)), reason)
        return ops.where(j.finite, reason, ops(float(Reason.NONFINITE)))

    # -- learning ------------------------------------------------------------------------------------------------

    def _learn(
        self, state: AdaptiveState, judged: _Judgement, observation: Observation, ceiling: _Ceiling, ops: Ops
    ) -> AdaptiveState:
        """The state after the step, but for the pace."""
        j, one, zero = judged, ops(1.0), ops(0.0)
        gain = ops.maximum(one / (state.count + one), ops(1.0 - self.decay))
        gain = ops.where(j.recurring, zero, gain)
        reach = ops.where(j.warm, ops(MAX_DEVIATION), j.far)
        learned = ops.minimum(ops.maximum(j.x, -reach), reach)
        level = ops.where(j.accepted, j.candidate, _above(j.level, gain * learned, ops))
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
        renewed = ops.minimum(level * ops(HEADROOM), ceiling.given * ops(RENEWAL))
        given = ops.where(better, ops.maximum(ceiling.given, renewed), ceiling.given)
        given = ops.where(ceiling.held, ops.minimum(level, observation.static_threshold), given)
        memory = self._remember(state, j, ceiling, ops)
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
        )

    def _remember(self, state: AdaptiveState, judged: _Judgement, ceiling: _Ceiling, ops: Ops) -> _Memory:
        """Levels that come back: count the hits of the rivals, and follow the one that is remembered."""
        j, one, zero, alike = judged, ops(1.0), ops(0.0), ops(ALIKE)
        fade, norm = ops(FADE), judged.norm
        hits, other_hits = state.hits * fade, state.other_hits * fade
        # Only the first in a row: norms that go on growing are unusual all along. A whole run that agrees counts once more.
        event = j.upward & ceiling.trusted & (j.accepted | ~(state.above > zero))
        weight = ops.where(j.accepted, ops(LASTING), one)
        first = event & (hits >= ops(FORGOTTEN)) & (abs(_deviation(norm, state.rival, ops)) <= alike)
        second = event & ~first & (other_hits >= ops(FORGOTTEN))
        second = second & (abs(_deviation(norm, state.other, ops)) <= alike)
        new = event & j.over & ~j.recurring & ~first & ~second
        weaker = hits < other_hits
        into, instead = new & weaker, new & ~weaker
        hits = ops.where(into, weight, ops.where(first, hits + weight, hits))
        other_hits = ops.where(instead, weight, ops.where(second, other_hits + weight, other_hits))
        moved = state.rival + (norm - state.rival) / ops.maximum(hits, one)
        rival = ops.where(into, norm, ops.where(first, moved, state.rival))
        moved = state.other + (norm - state.other) / ops.maximum(other_hits, one)
        other = ops.where(instead, norm, ops.where(second, moved, state.other))

        enough = ops(HITS)
        won, other_won = first & (hits >= enough), second & (other_hits >= enough)
        known = state.memory >= enough
        back = known & j.ready & (abs(_deviation(norm, state.crest, ops)) <= ops(INNER_EDGE))
        step = ops.minimum(ops.maximum(_deviation(norm, state.crest, ops), -j.far), j.far)
        crest = ops.where(back, _above(state.crest, ops(FOLLOW) * step, ops), state.crest)
        memory = ops.where(back, ops(REMEMBERED), state.memory * fade)
        crest = ops.where(won, rival, ops.where(other_won, other, crest))
        memory = ops.where(won | other_won, ops(REMEMBERED), memory)
        return _Memory(crest, memory, rival, ops.where(won, zero, hits), other, ops.where(other_won, zero, other_hits))

    def _pace(self, state: AdaptiveState, judged: _Judgement, observation: Observation, ops: Ops) -> PaceState:
        paced = PaceState(state.pace, state.best_reach, state.pace_steps)
        if self.max_pace == 1:
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
            ops=ops,
        )


def _trend_of(state: AdaptiveState) -> LossTrend:
    return LossTrend(state.loss_mean, state.loss_spread, state.loss_best, state.loss_seen)


def _deviation(norm: Value, level: Value, ops: Ops) -> Value:
    """d(n, L) = 2 (n - L) / (n + L), in [-2, 2]."""
    return ops(2.0) * (norm - level) / (norm + level)


def _above(level: Value, deviation: Value, ops: Ops) -> Value:
    """u(e, L) = L (2 + e) / (2 - e), the inverse of `_deviation` in its first argument; |e| < 2."""
    two = ops(2.0)
    return level * (two + deviation) / (two - deviation)
