"""`zscore`: ZClip.

    z_t         = (n_t - mu_{t-1}) / sd_{t-1}               sd = max(sqrt(var), 1e-3 mu)
    threshold_t = mu_{t-1} + z0 * sd_{t-1} * (z0 / z_t)      when z_t > z0 (reciprocal: larger spikes are cut harder)
    threshold_t = mu_{t-1} + z0 * sd_{t-1}                   otherwise: the bound at which clipping would start
    mu_t        = a mu_{t-1} + (1 - a) min(n_t, bound)
    var_t       = a var_{t-1} + (1 - a) (min(n_t, bound) - mu_{t-1})^2

Source: Kumar, Owen, Chowdhury, Guera 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (arXiv 2504.02507),
the reciprocal form with a = 0.97 and z0 = 2.5 (here `decay` and `width`); the authors' code warms up on 25 norms, here
`warmup_observations` do it, for all controllers alike.

Differs from the authors' code in:
1. a NaN or infinite norm is not learned (there, one of them switches the method off for the rest of the run), nor is a zero: a frozen
   phase would make mean and deviation 0, and every later step would be cut to 0;
2. what is learned from an excursion is bounded by mu + z0 sd, not by the cut norm, which with the reciprocal form is
   about mu: that never learns a lasting rise and clips it for ever;
3. the variance is taken around the old mean, not the one that this very norm has just moved;
4. the static cap (`max_grad_norm` 1.0 there) guards the warm-up only: left on, it hides the method;
5. norms are float32 whatever the gradient's dtype, and the state can be saved and restored;
6. a standard deviation below a thousandth of the mean counts as that, where 1e-6 is added there: that is much for small norms, which
   were never spikes, and nothing for large ones, of which a constant one was cut.
"""

from dataclasses import dataclass
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
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of
from hf_adaclip.controllers.numerics.window import unit_of
from hf_adaclip.controllers.settings import setting, warmup
from hf_adaclip.errors import ConfigError

MIN_SD = 1e-3
"""Smallest standard deviation, as part of the mean."""


class ZScoreState(NamedTuple):
    """`mean` and `variance` of the norm, `count` of finite norms seen.

    The variance is that of the norm times `unit`, a power of two that brings the first norm near 1: squares of large norms overflow, and
    those of small ones vanish. 0 in a state of an older version: none.
    """

    mean: Value
    variance: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls
    unit: Value


@dataclass(frozen=True)
class ZScoreController(Controller[ZScoreState]):
    """Clip norms whose z-score is above a threshold, harder the larger they are.

    Example:
        >>> import numpy as np
        >>> from hf_adaclip.controllers.numerics.ops import SCALAR
        >>> rule = ZScoreController(warmup_observations=4)
        >>> state = rule.init(SCALAR, ())
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 10.0):
        ...     seen = Observation(np.float32(norm), loss=np.float32("nan"), static_threshold=np.float32(2.0))
        ...     decision, state = rule.update(state, seen)
        >>> round(float(decision.threshold), 2)
        1.01
    """

    idea: ClassVar[str] = "z-score of the norm, cut harder the larger it is; six faults of the published code mended"
    source: ClassVar[str] = "ZClip, Kumar et al. 2025"
    choose: ClassVar[str] = "to repeat ZClip"
    revision: ClassVar[int] = 2
    new_fields: ClassVar[frozenset[str]] = frozenset({"unit"})

    width: float = setting(
        2.5, help="Standard deviations above the mean at which clipping starts.", range="(0, inf)", key="z_threshold"
    )
    decay: float = setting(
        0.97, help="Decay per step of the running mean and variance: memory of 1/(1-decay) steps.", range="(0, 1)"
    )
    warmup_observations: int = warmup()

    def init(self, ops: Ops, shape: Shape) -> ZScoreState:
        return ZScoreState(*(ops.full(shape, 0.0) for _ in ZScoreState._fields))

    def update(self, state: ZScoreState, observation: Observation) -> tuple[Decision, ZScoreState]:
        norm = observation.norm
        ops = ops_of(norm)
        z0 = ops(self.width)
        finite = is_finite_norm(norm, ops)
        usable = finite & (norm > ops(0.0))
        warm = state.count < ops(float(self.warmup_observations))

        unit = ops.where(state.unit > ops(0.0), state.unit, ops(1.0))
        unit = ops.where(state.count > ops(0.0), unit, unit_of(norm, ops))
        sd = ops.maximum(ops.sqrt(state.variance) / unit, ops(MIN_SD) * state.mean)
        z = (norm - state.mean) / sd
        bound = state.mean + z0 * sd
        excursion = z > z0
        cut = state.mean + z0 * sd * (z0 / ops.where(excursion, z, z0))
        threshold = ops.where(warm, observation.static_threshold, ops.where(excursion, cut, bound))
        # Between z0 and the bound's own rounding nothing may be altered, hence the test and not a plain minimum.
        stock, own = coefficient_of(norm, threshold, ops), cut_to(norm, threshold, ops)
        coefficient = ops.where(finite & warm, stock, ops.where(finite & excursion, own, ops(1.0)))
        reason = ops.where(excursion, ops(float(Reason.CLIPPED)), ops(float(Reason.WITHIN)))
        reason = ops.where(warm, ops(float(Reason.WARMUP)), reason)
        reason = ops.where(usable, reason, ops(float(Reason.VANISHING)))
        reason = ops.where(finite, reason, ops(float(Reason.NONFINITE)))

        # Warm-up: plain mean and population variance, by Welford's recurrence with weight 1 / (count + 1).
        weight = ops.where(warm, ops(1.0) / (state.count + ops(1.0)), ops(1.0 - self.decay))
        learned = ops.where(warm, norm, ops.minimum(norm, bound))
        delta = learned - state.mean
        mean = state.mean + weight * delta
        far = delta * unit
        welford = (ops(1.0) - weight) * (state.variance + weight * far * far)
        ema = (ops(1.0) - weight) * state.variance + weight * far * far
        variance = ops.where(warm, welford, ema)
        new = ZScoreState(
            mean=ops.where(usable, mean, state.mean),
            variance=ops.where(usable, variance, state.variance),
            count=ops.where(usable, state.count + ops(1.0), state.count),
            unit=ops.where(usable, unit, state.unit),
        )
        return Decision(threshold, coefficient, ops.expand(ops(1.0), ops.shape(norm)), reason), new


def from_zclip(
    alpha: float = 0.97,
    z_thresh: float = 2.5,
    max_grad_norm: float | None = 1.0,
    warmup_steps: int = 25,
    mode: str = "zscore",
    clip_option: str = "adaptive_scaling",
) -> dict[str, Any]:
    """What `ZClip(...)` of PyPI `zclip` is here, its static cap included; what differs stands at the top of `controllers/zscore.py`.

    Raises:
        ConfigError: A form of ZClip that is not here, or a value breaks its rule.
    """
    if (mode, clip_option) != ("zscore", "adaptive_scaling"):
        raise ConfigError(
            f"`mode` and `clip_option` must be 'zscore' and 'adaptive_scaling' (the form that the paper recommends), but are {mode!r} and "
            f"{clip_option!r} instead: the other forms are not here."
        )
    return {
        "controller": "zscore",
        "decay": alpha,
        "width": z_thresh,
        "warmup_observations": warmup_steps,
        "static_threshold": max_grad_norm,
        "max_threshold": max_grad_norm,
    }
