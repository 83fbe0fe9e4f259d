"""Base of the rules that bound single units or elements of a gradient by something other than past norms.

What such a rule did to each unit follows from weights or optimizer state, which no ledger holds. So it is the clipper that applies the
bound (`gradients/fine.py`) and tells the controller what was left; the controller records that and can be replayed from there.

    threshold_t   = left_t                                   the global norm after the rule
    coefficient_t = left_t / n_t where that is less, else 1
    warm-up       as `static`, for rules that need one (`left` is None then)
"""

from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from hf_adaclip.controllers.base import (
    Controller,
    Decision,
    Observation,
    Reason,
    coefficient_of,
    is_finite_norm,
)
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of


class FineState(NamedTuple):
    """`count`: steps seen."""

    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


class FineController(Controller[FineState]):
    """A bound on parts of the gradient. Subclasses implement `bound`.

    Class attributes:
        looks_at: What the bound follows from.
    """

    fine: ClassVar[bool] = True
    looks_at: ClassVar[Literal["weights", "second moment"]]

    @property
    def first_step(self) -> int:
        """The first step in which the rule acts; before it the static threshold rules."""
        return 0

    def bound(self, reference: Tensor) -> Tensor:
        """The largest norm (or magnitude) allowed.

        Args:
            reference: Norm of the unit's weights, or square root of the element's second moment; float32, any shape.
        """
        raise NotImplementedError

    def bounds(self, references: list[Tensor]) -> list[Tensor]:
        """The bounds of many tensors on one device."""
        return [self.bound(reference) for reference in references]

    def init(self, ops: Ops, shape: Shape) -> FineState:
        return FineState(ops.full(shape, 0.0))

    def update(self, state: FineState, observation: Observation) -> tuple[Decision, FineState]:
        norm, left = observation.norm, observation.left
        ops = ops_of(norm)
        one = ops(1.0)
        finite = is_finite_norm(norm, ops)
        if left is None:
            threshold, usual = observation.static_threshold, ops(float(Reason.WARMUP))
            coefficient = coefficient_of(norm, threshold, ops)
        else:
            threshold = ops.where(finite, left, observation.static_threshold)
            coefficient = ops.where(left < norm, left / norm, one)
            usual = ops.where(left < norm, ops(float(Reason.CLIPPED)), ops(float(Reason.WITHIN)))
        coefficient = ops.where(finite, coefficient, one)
        reason = ops.where(finite, usual, ops(float(Reason.NONFINITE)))
        return Decision(threshold, coefficient, one, reason), FineState(state.count + one)
