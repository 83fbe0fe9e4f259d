"""`mean_sd`: leave out steps that are many standard deviations above the mean of a window.

    threshold_t = mean(W_t) + width * sd(W_t)        W_t the last `window` learned norms, sd with count - 1
    learned_t   = min(n_t, threshold_t)
    a step with n_t > threshold_t is left out        (`on_spike="clip"`: cut to the threshold instead)

Source: `SkipStepOptimizer` of allenai/OLMo-core (width 6, window 128 there and here).

Differs from OLMo-core in:
1. only the norm is judged; theirs leaves a step out when norm *or* loss is too high. The ledger's replay would need the loss of every
   step, which hand-written loops need not give;
2. what is learned is bounded by the threshold. Raw spikes, learned as there, make the next threshold tens of times higher, and one NaN
   blocks the method for a whole window;
3. a step that is left out moves nothing at all; there the update is multiplied by 0, and 0 * NaN is NaN in the moments;
4. until `warmup_observations` norms are known (64 there) the static threshold rules, where OLMo-core does nothing;
5. the state is in the checkpoint; there each resumption starts with an empty window;
6. a standard deviation below a thousandth of the mean counts as that: a norm that is constant is never left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Ops, Shape, ops_of
from hf_adaclip.controllers.numerics.window import Window, empty_window, mean_and_sd, remember
from hf_adaclip.controllers.settings import setting, warmup

MIN_SD = 1e-3
"""Smallest standard deviation, as part of the mean."""


@dataclass(frozen=True)
class MeanSdController(Controller[Window]):
    """Bound the norm by mean plus some standard deviations of a window.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = MeanSdController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        1.98
    """

    idea: ClassVar[str] = "mean + 6 sd of a window; the step is left out"
    source: ClassVar[str] = "OLMo-core, SkipStepOptimizer"
    choose: ClassVar[str] = "as log_zscore, if you come from OLMo-core"
    skips: ClassVar[bool] = True
    revision: ClassVar[int] = 2

    width: float = setting(
        6.0,
        help="Standard deviations above the mean at which a step is left out.",
        range="(0, inf)",
        key="sd_width",
    )
    window: int = setting(
        128, help="How many past norms mean and deviation are taken over.", range="[10, 1000000]", key="sd_window"
    )
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> Window:
        return empty_window(ops, shape, self.window)

    def update(self, state: Window, observation: Observation) -> tuple[Decision, Window]:
        norm = observation.norm
        ops = ops_of(norm)
        mean, sd = mean_and_sd(state, ops)
        bound = mean + ops(self.width) * ops.maximum(sd, ops(MIN_SD) * mean)
        warm = state.count < ops(float(self.warmup_observations))
        decision, usable = decide_by_threshold(norm, bound, observation.static_threshold, warm=warm, ops=ops)
        return decision, remember(state, ops.where(warm, norm, ops.minimum(norm, bound)), usable, ops)
