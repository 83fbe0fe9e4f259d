"""`quantile`: one number that climbs when it is exceeded and sinks when it is not, so that it settles at a quantile.

    threshold_t = C_{t-1} f(rate * (1 - quantile))
    C_t         = C_{t-1} f(rate * ([n_t > C_{t-1}] - (1 - quantile)))          f(x) = (2 + x) / (2 - x), about exp(x)

In balance a share 1 - quantile of all norms is above C. No history is kept, only the order counts (how far above does not), and a scale
factor on all norms is a scale factor on C.

Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping" (arXiv 1905.03871), section
2.1, equation 1, the geometric update; there quantile 0.5 and rate 0.2.

Differs from the paper in:
1. it is the norm of the step's gradient that is counted, one a step, not those of the samples of a batch (nor is noise added);
2. hence quantile 0.99 and rate 0.05: a median would cut every second step;
3. f is the rational form of the exponential, equal to 1e-5 at these rates, so that a replay gives the same bits on every device;
4. C starts at the first norm, and in the warm-up the rate is at least 1 / count, so that it comes to its place in time;
5. norms that are not finite, and zeros, move nothing;
6. the threshold is C before its last step down, a hair (0.05 %) above it: a norm that is constant is never cut.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of
from hf_adaclip.controllers.settings import setting, warmup


class QuantileState(NamedTuple):
    """`bound`: the tracked quantile, 0 before the first norm; `count` of norms learned."""

    bound: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


@dataclass(frozen=True)
class QuantileController(Controller[QuantileState]):
    """Clip to a quantile of the norm that is tracked without a history.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = QuantileController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        1.65
    """

    idea: ClassVar[str] = "one number that climbs when exceeded and sinks when not, and settles at a quantile"
    source: ClassVar[str] = "Andrew et al. 2021"
    choose: ClassVar[str] = "per tensor in very large models: two numbers each"
    revision: ClassVar[int] = 2

    quantile: float = setting(0.99, help="Share of norms that stays below the threshold.", range="(0, 1)")
    rate: float = setting(
        0.05, help="Relative step of the threshold when it is exceeded.", range="(0, 1)", key="quantile_rate"
    )
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> QuantileState:
        return QuantileState(ops.full(shape, 0.0), ops.full(shape, 0.0))

    def update(self, state: QuantileState, observation: Observation) -> tuple[Decision, QuantileState]:
        norm = observation.norm
        ops = ops_of(norm)
        one, two, zero = ops(1.0), ops(2.0), ops(0.0)
        warm = state.count < ops(float(self.warmup_observations))
        down = ops(self.rate * (1.0 - self.quantile) * 1.001)  # a little more, for the rounding of a step
        threshold = state.bound * (two + down) / (two - down)
        decision, usable = decide_by_threshold(norm, threshold, observation.static_threshold, warm=warm, ops=ops)

        rate = ops(self.rate)
        rate = ops.where(warm, ops.maximum(rate, one / (state.count + one)), rate)
        move = rate * (ops.where(norm > state.bound, one, zero) - ops(1.0 - self.quantile))
        bound = ops.where(state.count > zero, state.bound * (two + move) / (two - move), norm)
        return decision, QuantileState(
            bound=ops.where(usable, bound, state.bound),
            count=ops.where(usable, state.count + one, state.count),
        )
