"""From a decision to what is done with a step: a pure function, whose truth table is a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import leaves_out
from hf_adaclip.controllers.base import Controller, Decision, Observation, coefficient_of, is_finite_norm
from hf_adaclip.controllers.numerics.fused import Fused
from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value, ops_of
from hf_adaclip.gradients.fused import scale_of
from hf_adaclip.ledger.records import Summary, shares, whole


class StepPlan(NamedTuple):
    """What is done with the gradients and the optimizer's step.

    Attributes:
        coefficient: Multiplier on the gradients, of the decision's shape; or `[]`, where it is one for all of them.
        by_group: Whether it is one for each group that is judged apart.
        taken: Bool, shape `[]`: the step is taken; False leaves it out.
        pace: Multiplier on the learning rate of the step, shape `[]`; None leaves the rate alone.
        left_out: 1 where the step is not taken, else 0; float32, shape `[]`. Only of a step that was decided on in one launch.
        fold: What a step that scales has to divide by, shape `[]`; only of such a step too.
        told: `left_out` and `pace` beside each other, for a host that has to read them; shape `[2]`, or two of shape `[]`.
    """

    coefficient: Value
    by_group: bool
    taken: Value
    pace: Value | None
    left_out: Value | None = None
    fold: Value | None = None
    told: Value | list[Value] | None = None


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


def _told(planned: StepPlan, ops: Ops) -> StepPlan:
    left_out = ops.where(planned.taken, ops(0.0), ops(1.0))
    return planned._replace(left_out=left_out, told=None if planned.pace is None else [left_out, planned.pace])


class Decided(NamedTuple):
    """What became of one step.

    Attributes:
        decision: Of the controller.
        planned: What is done with the step.
        kept: The coefficient of the whole, -1 where the step says nothing: what ranks compare. Shape `[]`.
    """

    decision: Decision
    planned: StepPlan
    kept: Value


@dataclass(frozen=True, kw_only=True)
class _StepRule:
    """What follows from a decision on the step as a whole.

    Args:
        shadow, leaves_out, paced: As for `plan`.
    """

    shadow: bool
    leaves_out: bool
    paced: bool

    def planned(self, decision: Decision, norm: Value, finite: Value, seen: Observation) -> tuple[StepPlan, Value]:
        """The plan, and what ranks compare; of `seen`, the static threshold and `left`."""
        ops = ops_of(norm)
        planned = plan(
            decision,
            decision.pace,
            norm,
            finite,
            static=seen.static_threshold,
            shadow=self.shadow,
            bounded=seen.left is not None,
            leaves_out=self.leaves_out,
            paced=self.paced,
            ops=ops,
        )
        kept = ops.where(finite & (norm > ops(0.0)), decision.coefficient, ops(-1.0))
        return planned if ops.on_host else _told(planned, ops), kept


@dataclass(frozen=True)
class GlobalRule(_StepRule):
    """All that is decided on a step by its global norm, as one function: on an accelerator one launch.

    Args:
        controller: Who decides.
        shadow, leaves_out, paced: As for `plan`.
    """

    controller: Controller[Any]

    def __call__(self, state: Any, seen: Observation) -> tuple[Any, Decided]:
        """The state after the step, and what was decided."""
        ops = ops_of(seen.norm)
        finite = is_finite_norm(seen.norm, ops)
        decision, after = self.controller.update(state, seen._replace(step_finite=finite))
        planned, kept = self.planned(decision, seen.norm, finite, seen)
        if not ops.on_host:
            planned = planned._replace(fold=scale_of(planned.coefficient, ops))
        return after, Decided(decision, planned, kept)


@dataclass(frozen=True)
class GroupRule:
    """The part that is decided for each group by itself, and what it adds to the step as a whole.

    Args:
        controller: Who decides.
    """

    controller: Controller[Any]

    def __call__(self, state: Any, seen: Observation, norm: Value) -> tuple[Any, Decision, Value, Any]:
        """The state after the step, the decision, and what `shares` gives; `norm` is that of all groups together."""
        decision, after = self.controller.update(state, seen)
        ops = ops_of(seen.norm)
        pace = ops.expand(decision.pace, ops.shape(seen.norm))
        return after, decision, *shares(norm, seen.norm, decision.coefficient, pace, decision.reason, ops)


@dataclass(frozen=True)
class WholeRule(_StepRule):
    """What follows for the step as a whole where groups are judged apart.

    Args:
        shadow, leaves_out, paced: As for `plan`.
    """

    def __call__(
        self, _: Any, norm: Value, squares: Value, worst: Value, altered: Value, slowest: Value, seen: Observation
    ) -> tuple[Summary, StepPlan, Value]:
        """Summary, plan (but for the coefficients of the groups), and what ranks compare; of `seen`, the static threshold and `left`."""
        ops = ops_of(norm)
        summary = whole(norm, squares, worst, altered, slowest, ops=ops)
        return summary, *self.planned(Decision(*summary), norm, is_finite_norm(norm, ops), seen)


def rules_of(
    config: AdaptiveClipConfig, controller: Controller[Any], groups: int, device: torch.device | None
) -> list[Callable[..., Any]]:
    """The rules of a run: one for its global norm; or one for each group, and one for what follows for the step.

    Args:
        config: The settings.
        controller: Who decides.
        groups: How many norms are judged apart; 0 for the global one.
        device: Of the numbers, on an accelerator: then each rule is a launch. None on the host.
    """
    ways = {"shadow": config.shadow, "leaves_out": leaves_out(config), "paced": config.max_pace > 1}
    rules: list[tuple[Callable[..., Any], Shape]] = [(GlobalRule(controller, **ways), ())]
    if groups:
        rules = [(GroupRule(controller), (groups,)), (WholeRule(**ways), ())]
    return [rule if device is None else Fused(rule, device, shape) for rule, shape in rules]
