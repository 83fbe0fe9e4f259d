"""`static`: the stock Trainer's rule, as the control arm.

    threshold_t   = max_grad_norm
    coefficient_t = min(1, threshold / (n_t + 1e-6))

Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), algorithm 1, in the arithmetic of
`torch.nn.utils.clip_grad_norm_`, whose bits it reproduces.

Differs from `torch.nn.utils.clip_grad_norm_` in:
1. a NaN or infinite norm leaves the step out instead of writing NaN into the weights.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    is_finite_norm,
)
from hf_adaclip.controllers.numerics.ops import SCALAR, Ops, Shape, Value, ops_of  # noqa: F401 - SCALAR is for the doctest


class StaticState(NamedTuple):
    """`count`: finite norms seen, for reports only."""

    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


@dataclass(frozen=True)
class StaticController(Controller[StaticState]):
    """A constant threshold.

    Example:
        >>> import numpy as np
        >>> controller = StaticController()
        >>> seen = Observation(norm=np.float32(4.0), loss=np.float32("nan"), static_threshold=np.float32(1.0))
        >>> decision, _ = controller.update(controller.init(SCALAR, ()), seen)
        >>> round(float(decision.coefficient), 4)
        0.25
    """

    idea: ClassVar[str] = "a constant threshold: the stock Trainer, bit for bit"
    source: ClassVar[str] = "Pascanu et al. 2013"
    choose: ClassVar[str] = "as the baseline, or where a threshold has been tuned"

    def init(self, ops: Ops, shape: Shape) -> StaticState:
        return StaticState(count=ops.full(shape, 0.0))

    def update(self, state: StaticState, observation: Observation) -> tuple[Decision, StaticState]:
        norm = observation.norm
        ops = ops_of(norm)
        finite = is_finite_norm(norm, ops)
        threshold = ops.expand(observation.static_threshold, ops.shape(norm))
        coefficient = ops.where(finite, coefficient_of(norm, threshold, ops), ops(1.0))
        clipped = ops.where(coefficient < ops(1.0), ops(float(Reason.CLIPPED)), ops(float(Reason.WITHIN)))
        reason = ops.where(finite, clipped, ops(float(Reason.NONFINITE)))
        count = ops.where(finite, state.count + ops(1.0), state.count)
        return Decision(threshold, coefficient, ops.expand(ops(1.0), ops.shape(norm)), reason), StaticState(count)
