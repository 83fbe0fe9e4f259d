"""Leave a step out where a controller would cut it: the same judgement, another consequence.

    D_t, s      = the controller's own decision and state
    coefficient = 0,  reason = SKIPPED        where D_t cuts (reason CLIPPED or SPIKE, coefficient < 1)

What is learned is what the controller learns. A step that a limit cut (ceiling, floor, bound, fall-back), or the static threshold in the
warm-up or as a held ceiling, is not left out. Only for the norm of all gradients together: a step is left out as a whole or not at all.
"""

from dataclasses import dataclass
from typing import Any

from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason
from hf_adaclip.controllers.numerics.ops import Ops, Shape, ops_of


@dataclass(frozen=True)
class SkippingController(Controller[Any]):
    """A controller whose cuts become skips.

    Args:
        inner: The controller.
    """

    inner: Controller[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_fields", self.inner.new_fields)
        object.__setattr__(self, "revision", self.inner.revision)

    @property
    def of_the_run(self) -> frozenset[str]:
        return self.inner.of_the_run

    def init(self, ops: Ops, shape: Shape) -> Any:
        return self.inner.init(ops, shape)

    def update(self, state: Any, observation: Observation) -> tuple[Decision, Any]:
        decision, state = self.inner.update(state, observation)
        ops = ops_of(observation.norm)
        reason = decision.reason
        cut = (reason == ops(float(Reason.CLIPPED))) | (reason == ops(float(Reason.SPIKE)))
        cut = cut & (decision.coefficient < ops(1.0))
        return decision._replace(
            coefficient=ops.where(cut, ops(0.0), decision.coefficient),
            reason=ops.where(cut, ops(float(Reason.SKIPPED)), reason),
        ), state

    def narrowed(self, state: Any, ops: Ops) -> Any:
        return self.inner.narrowed(state, ops)
