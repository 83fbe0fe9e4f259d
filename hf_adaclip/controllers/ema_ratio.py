"""`ema_ratio`: AdaGC.

    warm-up     g_t = min(g_{t-1}, min(n_t, max_grad_norm))          the smallest norm after static clipping; g_0 = inf
    afterwards  threshold_t = factor * g_{t-1}
                g_t = decay g_{t-1} + (1 - decay) min(n_t, threshold_t)

Source: Wang et al. 2025, "AdaGC: Improving Training Stability for Large Language Model Pretraining" (arXiv 2502.11034), algorithm 1,
with factor 1.05 and decay 0.98. Made for every tensor on its own, which is
the usual granularity here too.

Properties that come with the rule, here as in the paper: at factor 1.05 about half of all steps are cut when nothing is wrong, and since
it learns only what it has let through, the threshold rises by at most 1 + (1 - decay) (factor - 1) = 0.1 % a step: a lasting 3x rise is
clipped for more than a thousand steps.

Differs from the paper in:
1. in the warm-up each tensor is held to the static threshold by its own norm (with granularity "tensor"), where the paper scales all of
   them by one global coefficient; on the global norm it is the same;
2. the warm-up is `warmup_observations` norms (100 there), for all controllers alike;
3. a step that is not finite is left out and not learned; the paper does not treat it. Zero norms are not learned either: as running
   minimum, one of them would hold the tensor at 0 for ever.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of
from hf_adaclip.controllers.settings import setting, warmup


class EmaRatioState(NamedTuple):
    """`average`: EMA of what was let through, +inf before the first norm; `count` of norms learned."""

    average: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


@dataclass(frozen=True)
class EmaRatioController(Controller[EmaRatioState]):
    """Clip to a multiple of the average of what was let through.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = EmaRatioController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        0.84
    """

    idea: ClassVar[str] = "a multiple of the average of what was let through, for each tensor"
    source: ClassVar[str] = "AdaGC, Wang et al. 2025"
    choose: ClassVar[str] = "to repeat AdaGC in pre-training; never where norms rise for good"
    granularities: ClassVar[tuple[str, ...]] = ("tensor", "module", "global")
    revision: ClassVar[int] = 2

    factor: float = setting(
        1.05, help="Multiple of the average of what was let through.", range="[1, inf)", key="ema_factor"
    )
    decay: float = setting(0.98, help="Decay of that average per step.", range="(0, 1)", key="ema_decay")
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> EmaRatioState:
        return EmaRatioState(ops.full(shape, float("inf")), ops.full(shape, 0.0))

    def update(self, state: EmaRatioState, observation: Observation) -> tuple[Decision, EmaRatioState]:
        norm = observation.norm
        ops = ops_of(norm)
        one = ops(1.0)
        warm = state.count < ops(float(self.warmup_observations))
        threshold = ops(self.factor) * state.average
        decision, usable = decide_by_threshold(norm, threshold, observation.static_threshold, warm=warm, ops=ops)

        passed = ops.minimum(norm, decision.threshold)
        moved = ops(self.decay) * state.average + ops(1.0 - self.decay) * passed
        average = ops.where(warm, ops.minimum(state.average, passed), moved)
        return decision, EmaRatioState(
            average=ops.where(usable, average, state.average),
            count=ops.where(usable, state.count + one, state.count),
        )
