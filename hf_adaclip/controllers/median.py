"""`median`: a multiple of the running median.

    threshold_t = factor * median(n_{t-1}, ..., n_{t-W})
    coefficient = min(1, threshold / n_t)

Source: `ScaledAdam` of k2-fsa/icefall (`clipping_scale`; factor 2, W = 100 there and here), the optimizer of the Zipformer recipes, Yao
et al. 2024 (arXiv 2310.11230). Half of the window has to be far away before the median follows, so spikes do not move it, and a lasting
rise is accepted after about W / 2 steps.

Differs from icefall in:
1. the median is taken anew in every step, not every 100 steps (10, 20 and 40 at first);
2. the norm is the plain one; theirs weights every tensor by the root mean square of its parameters, which belongs to their optimizer;
3. a NaN or infinite norm leaves the step out, where there the gradient is zeroed and the momentum still moves the weights;
4. the current norm is judged before it enters the window, and zero norms do not enter it;
5. until `warmup_observations` norms are known the static threshold rules, where icefall doubles the factor at first.
"""

from dataclasses import dataclass
from typing import ClassVar

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Ops, Shape, ops_of
from hf_adaclip.controllers.numerics.window import Window, empty_window, quantile_of, remember
from hf_adaclip.controllers.settings import setting, warmup


@dataclass(frozen=True)
class MedianController(Controller[Window]):
    """Clip to a multiple of the median of the norms of the past.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = MedianController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        2.0
    """

    idea: ClassVar[str] = "twice the running median"
    source: ClassVar[str] = "icefall, ScaledAdam"
    choose: ClassVar[str] = "a plain guard that a spike cannot move"
    revision: ClassVar[int] = 2

    factor: float = setting(
        2.0, help="Multiple of the median that is the threshold.", range="[1, inf)", key="median_factor"
    )
    window: int = setting(
        100, help="How many past norms the median is taken over.", range="[10, 1000000]", key="median_window"
    )
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> Window:
        return empty_window(ops, shape, self.window)

    def update(self, state: Window, observation: Observation) -> tuple[Decision, Window]:
        norm = observation.norm
        ops = ops_of(norm)
        threshold = ops(self.factor) * quantile_of(state, 0.5, ops)
        warm = state.count < ops(float(self.warmup_observations))
        decision, usable = decide_by_threshold(norm, threshold, observation.static_threshold, warm=warm, ops=ops)
        return decision, remember(state, norm, usable, ops)
