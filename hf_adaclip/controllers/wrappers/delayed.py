"""One step late: for engines that clip inside their own step, before anybody outside can see the norm (DeepSpeed).

    T_t     = E_{t-1}                                   what the engine was told before the backward pass of step t
    c_t     = min(1, T_t / (n_t + 1e-6))
    D_t, s  = the controller's own decision on n_t, and its state after it
    E_t     = threshold of the controller from state s, were a norm like min(n_t, D_t.threshold) to come again

E_0 is the static threshold, within the limits. A step that is not finite teaches nothing, so E_t = E_{t-1} there. What the controller
learns is the same as without the delay; only what is applied is older. So a spike is bounded by the edge of the range, not cut back to
its level: the engine has to be told one number for calm steps and spikes alike.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason, coefficient_of, is_finite_norm
from hf_adaclip.controllers.numerics.ops import SCALAR, Ops, Shape, ops_of
from hf_adaclip.controllers.wrappers.states import joined


@dataclass(frozen=True)
class LateController(Controller[Any]):
    """A controller whose thresholds are applied one step after they were found.

    Args:
        inner: The controller.
    """

    paces: ClassVar[bool] = False
    revision: ClassVar[int] = 2

    inner: Controller[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_fields", self.inner.new_fields)
        object.__setattr__(self, "revision", max(self.inner.revision, type(self).revision))

    @property
    def of_the_run(self) -> frozenset[str]:
        return self.inner.of_the_run

    @cached_property
    def _inner_type(self) -> Any:
        return type(self.inner.init(SCALAR, ()))

    def init(self, ops: Ops, shape: Shape) -> Any:
        """The state of `inner`, and `late_threshold`: NaN until a first norm is known."""
        inner = self.inner.init(ops, shape)
        return joined("LateState", inner, {"late_threshold": ops.full(shape, float("nan"))})

    def update(self, state: Any, observation: Observation) -> tuple[Decision, Any]:
        norm = observation.norm
        ops = ops_of(norm)
        one = ops(1.0)
        finite = is_finite_norm(norm, ops)
        known = abs(state.late_threshold) < ops(float("inf"))
        start = self.inner.start_threshold(observation.static_threshold, ops)
        threshold = ops.where(known, state.late_threshold, start)
        own, after = self.inner.update(self._inner_type(*state[:-1]), observation)
        again = observation._replace(norm=ops.minimum(norm, own.threshold))
        ahead, _ = self.inner.update(after, again)

        coefficient = ops.where(finite, coefficient_of(norm, threshold, ops), one)
        cut = coefficient < one
        reason = own.reason
        clipped, spike = ops(float(Reason.CLIPPED)), ops(float(Reason.SPIKE))
        # What the controller says of a gradient that it would have cut is not so when the engine did not cut it, and the other way round.
        bounded = (reason == ops(float(Reason.HELD))) | (reason == ops(float(Reason.BOUNDED)))
        quiet = (reason < clipped) & (reason != ops(float(Reason.WARMUP))) & ~bounded
        # Nor is what it says of a range that was widened: the engine was told of it a step before.
        uncut = ~cut & ((reason == clipped) | (reason == spike) | bounded | (reason == ops(float(Reason.WIDENED))))
        reason = ops.where(cut & quiet, clipped, ops.where(uncut, ops(float(Reason.WITHIN)), reason))
        told = ops.where(finite, ahead.threshold, threshold)
        return Decision(threshold, coefficient, own.pace, reason), type(state)(*after, told)

    def narrowed(self, state: Any, ops: Ops) -> Any:
        return type(state)(*self.inner.narrowed(self._inner_type(*state[:-1]), ops), state[-1])
