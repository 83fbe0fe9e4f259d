"""From a decision to what is done with a step: a pure function, whose truth table is a test."""

from typing import NamedTuple

from hf_adaclip.controllers.base import Decision, coefficient_of
from hf_adaclip.controllers.numerics.ops import Ops, Value


class StepPlan(NamedTuple):
    """What is done with the gradients and the optimizer's step.

    Attributes:
        coefficient: Multiplier on the gradients, of the decision's shape; or `[]`, where it is one for all of them.
        by_group: Whether it is one for each group that is judged apart.
        taken: Bool, shape `[]`: the step is taken; False leaves it out.
        pace: Multiplier on the learning rate of the step, shape `[]`; None leaves the rate alone.
    """

    coefficient: Value
    by_group: bool
    taken: Value
    pace: Value | None


def plan(
    decision: Decision,
    pace: Value,
    norm: Value,
    finite: Value,
    *,
    static: Value,
    shadow: bool,
    bounded: bool,
    leaves_out: bool,
    paced: bool,
    ops: Ops,
) -> StepPlan:
    """What a decision means for the step.

    Args:
        decision: Of the controller, shape `[]` or `[num_groups]`.
        pace: Of the step as a whole, shape `[]`.
        norm: Global norm, shape `[]`.
        finite: Bool, whether the step is finite.
        static: The static threshold, which is what acts in shadow mode.
        shadow: Whether the decision is only recorded.
        bounded: Whether a rule on units or elements has changed the gradients already.
        leaves_out: Whether the controller leaves a step out by a coefficient of 0.
        paced: Whether there is a pace.
        ops: The kind of numbers that all of these are.
    """
    if shadow:
        stock = ops.where(finite, coefficient_of(norm, static, ops), ops(1.0))
        return StepPlan(stock, by_group=False, taken=finite, pace=None)
    rate = pace if paced else None
    if bounded:
        return StepPlan(ops(1.0), by_group=False, taken=finite, pace=rate)
    taken = finite & (decision.coefficient > ops(0.0)) if leaves_out else finite
    return StepPlan(decision.coefficient, by_group=True, taken=taken, pace=rate)
