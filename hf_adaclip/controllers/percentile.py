"""`percentile`: AutoClip.

    threshold_t = q_p(n_{t-1}, ..., n_{t-W})        linear interpolation between order statistics
    threshold_t = min(that, max_grad_norm)           with `capped`
    coefficient = min(1, threshold / n_t)

Source: Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive gradient clipping for source separation
networks" (arXiv 2007.14469), section 3; p = 10 is the value that the paper recommends, so about 90 % of all steps are
clipped: it equalises norms rather than guarding against spikes. The capped mode with p = 95 and 1000 norms of warm-up is
`AdaptiveGradClipper` of microsoft/TRELLIS, where the cap only ever lowers the threshold.

Differs from the paper in:
1. the history is the last `history` norms, not all of them, so that the state is bounded and old norms are forgotten;
2. the current norm is judged before it enters the history: a spike cannot raise its own threshold;
3. NaN, infinite and zero norms never enter the history: one NaN would make every later threshold NaN, and a few zeros (a frozen or
   masked phase) would make it 0, from which nothing ever trains again;
4. until `warmup_observations` norms are known the static threshold rules, where the paper clips to a history of one (and TRELLIS
   waits for the whole history).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_adaclip.controllers.base import Controller, Decision, Observation, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Ops, Shape, ops_of
from hf_adaclip.controllers.numerics.window import Window, empty_window, quantile_of, remember
from hf_adaclip.controllers.settings import setting, warmup
from hf_adaclip.errors import ConfigError


@dataclass(frozen=True)
class PercentileController(Controller[Window]):
    """Clip to a percentile of the norms of the past.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = PercentileController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        0.86
    """

    idea: ClassVar[str] = "a percentile of past norms (p = 10 equalises norms rather than guards them)"
    source: ClassVar[str] = "AutoClip, Seetharaman et al. 2020; capped: TRELLIS"
    choose: ClassVar[str] = "to repeat AutoClip; `percentile=95` as a guard"
    revision: ClassVar[int] = 2

    percentile: float = setting(
        10.0, help="The percentile of past norms that becomes the threshold.", range="(0, 100]"
    )
    capped: bool = setting(
        False, help="The static threshold stays on as a cap, as in TRELLIS.", key="percentile_capped"
    )
    history: int = setting(1000, help="How many past norms are kept.", range="[10, 1000000]")
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> Window:
        return empty_window(ops, shape, self.history)

    def update(self, state: Window, observation: Observation) -> tuple[Decision, Window]:
        norm = observation.norm
        ops = ops_of(norm)
        threshold = quantile_of(state, self.percentile / 100.0, ops)
        if self.capped:
            threshold = ops.minimum(threshold, observation.static_threshold)
        warm = state.count < ops(float(self.warmup_observations))
        decision, usable = decide_by_threshold(norm, threshold, observation.static_threshold, warm=warm, ops=ops)
        return decision, remember(state, norm, usable, ops)


def from_autoclip(quantile: float = 0.9, history_length: int = 1000, global_threshold: bool = False) -> dict[str, Any]:
    """What `QuantileClip(...)` of PyPI `autoclip` is here. For AutoClip's own code, set `controller="percentile"` and `percentile`.

    Raises:
        ConfigError: A value breaks its rule.
    """
    return {
        "controller": "percentile",
        "percentile": 100.0 * quantile,
        "history": history_length,
        "granularity": "global" if global_threshold else "tensor",
        "warmup_observations": 2,
    }


def from_bitsandbytes_percentile(percentile_clipping: int) -> dict[str, Any]:
    """What `percentile_clipping=` of bitsandbytes' optimizers was, before it was removed in 0.50.

    Raises:
        ConfigError: It was 100 (off), or no percentile.
    """
    if not 1 <= percentile_clipping < 100:
        raise ConfigError(
            f"`percentile_clipping` must be in [1, 99], but is {percentile_clipping} instead: 100 was 'off' in bitsandbytes. "
            "Leave adaptive clipping out for that."
        )
    return {
        "controller": "percentile",
        "percentile": float(percentile_clipping),
        "history": 100,
        "granularity": "tensor",
        "warmup_observations": 2,
    }
