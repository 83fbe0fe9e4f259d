"""`log_zscore`: leave out steps whose norm is many standard deviations too high on the logarithmic scale.

    x_t         = log n_t
    mu_t        = A_t / w_t,   var_t = max(0, B_t / w_t - mu_t^2)
    threshold_t = exp(mu_{t-1} + width sd_{t-1})
    A_t, B_t    = decay A + (1 - decay) y,  decay B + (1 - decay) y^2        y = min(x_t, log threshold_t);  w_t likewise of 1
    a step with n_t > threshold_t is left out        (`on_spike="clip"`: cut to the threshold instead)

Gradient norms are skewed and positive; their logarithm is close to normal, so a width in standard deviations means there what it says.

Source: `GradNormTracker` of tensorflow/lingvo (width 4, decay 0.995 there and here).

Differs from lingvo in:
1. x is log n, not log(1 + n), which for norms far below 1 is no logarithm but the norm itself; a zero norm is not learned;
2. the squares are taken around the first logarithm seen, which is the same variance without its cancellation in float32;
3. until `warmup_observations` norms are known the static threshold rules, where lingvo does nothing while w < 0.75 (277 steps);
4. there is no `grad_norm_clip_cap_min`: `min_threshold` is that, for all controllers alike;
5. a standard deviation below 1e-3 counts as 1e-3, so that a series of equal norms does not make every change a spike.

Logarithm and exponential are those of `logarithm.py`, whose bits are the same on every device.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.logarithm import exponential, logarithm
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of
from hf_adaclip.controllers.settings import setting, warmup

MIN_SD = 1e-3


class LogZScoreState(NamedTuple):
    """State of the controller, each of the norm's shape.

    Attributes:
        origin: The first logarithm seen; sums are of distances from it.
        total, squares, weight: EMA of the distance, of its square, and of 1.
        count: Norms learned.
    """

    origin: Value
    total: Value
    squares: Value
    weight: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


@dataclass(frozen=True)
class LogZScoreController(Controller[LogZScoreState]):
    """Bound the norm by its z-score on the logarithmic scale.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = LogZScoreController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        1.76
    """

    idea: ClassVar[str] = "z-score of the logarithm; the step is left out"
    source: ClassVar[str] = "lingvo, GradNormTracker"
    choose: ClassVar[str] = "when bad batches should leave no trace at all"
    skips: ClassVar[bool] = True
    revision: ClassVar[int] = 2

    width: float = setting(
        4.0,
        help="Standard deviations of the logarithm at which a step is left out.",
        range="(0, inf)",
        key="log_width",
    )
    decay: float = setting(0.995, help="Decay of mean and deviation per step.", range="(0, 1)", key="log_decay")
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> LogZScoreState:
        return LogZScoreState(*(ops.full(shape, 0.0) for _ in LogZScoreState._fields))

    def update(self, state: LogZScoreState, observation: Observation) -> tuple[Decision, LogZScoreState]:
        norm = observation.norm
        ops = ops_of(norm)
        one, zero = ops(1.0), ops(0.0)
        warm = state.count < ops(float(self.warmup_observations))

        weight = ops.where(state.weight > zero, state.weight, one)
        mean = state.total / weight
        variance = ops.maximum(state.squares / weight - mean * mean, zero)
        cap = mean + ops(self.width) * ops.maximum(ops.sqrt(variance), ops(MIN_SD))
        threshold = exponential(state.origin + cap, ops)
        decision, usable = decide_by_threshold(norm, threshold, observation.static_threshold, warm=warm, ops=ops)

        x = logarithm(norm, ops)
        origin = ops.where(state.count > zero, state.origin, x)
        y = x - origin
        y = ops.where(warm, y, ops.minimum(y, cap))
        keep, take = ops(self.decay), ops(1.0 - self.decay)
        return decision, LogZScoreState(
            origin=ops.where(usable, origin, state.origin),
            total=ops.where(usable, keep * state.total + take * y, state.total),
            squares=ops.where(usable, keep * state.squares + take * y * y, state.squares),
            weight=ops.where(usable, keep * state.weight + take, state.weight),
            count=ops.where(usable, state.count + one, state.count),
        )
