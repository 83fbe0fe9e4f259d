"""A run that clips by itself, between the backward pass and the optimizer's step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.drivers.lifetime import weakly
from hf_adaclip.gradients import Gradients, Guards, collect, global_norm, scale_, tensor_norms, to_value
from hf_adaclip.gradients.absence import AbsenceCheck, norms_of
from hf_adaclip.gradients.fused import scale_of
from hf_adaclip.gradients.norms import Parameters
from hf_adaclip.gradients.probe import check_torch
from hf_adaclip.incidents.capture import IncidentCapture
from hf_adaclip.ports.plain import Port
from hf_adaclip.run.checkpoint import FRESH
from hf_adaclip.run.fresh_data import FreshData
from hf_adaclip.run.losses import LossObserver
from hf_adaclip.run.overfitting import OverfitWatch
from hf_adaclip.run.per_parameter import PerParameter
from hf_adaclip.run.plan import StepPlan
from hf_adaclip.run.run import Run
from hf_adaclip.run.selftest import FirstStepCheck
from hf_adaclip.run.shape_gate import ShapeGate
from hf_adaclip.run.shaping import Shaping
from hf_adaclip.support import check_capture

MEASURE_EVERY: Final = 50
"""Steps between two measurements of the applied norm, in loops that do not say otherwise."""


class Seen(NamedTuple):
    """One step, as it is judged.

    Attributes:
        gradients: Each in the place of its parameter.
        total: Global norm on the gradients' device, shape `[]`.
        norms: Of each gradient, shape `[number of gradients]`.
        norm: The global one as a number of the run's kind.
        finite: Bool, shape `[]`; None where there is one norm only, which tells.
        observed: What the controller looks at: the norm, or those of groups, shape `[num_groups]`.
        loss: Training loss, shape `[]`; NaN when it is not known.
        left: The norm that a rule on units or elements has left, which acts as it looks; None where there is none.
        reach: What the pace goes by; None when it is off.
        shaped: Whether the estimate learns from what the spectral range leaves of the gradients, after the step was decided on.
    """

    gradients: Gradients
    total: Tensor
    norms: Tensor
    norm: Value
    finite: Value | None
    observed: Value
    loss: Value
    left: Value | None
    reach: Value | None
    shaped: bool


class ClippingDriver:
    """Collects, observes, decides on a plan, applies it, and arms the optimizer's step.

    Args:
        config: The settings.
        run: What decides.
        port: The loop.
        optimizers: Those that are known to step on the gradients.
        models: Gives the models in which names are looked up.
        losses: What makes a training loss of the run's kind.
        incidents: Hears of every step.
        gate: Decides on parts that are on by themselves; None where people have set them.
        fresh: Holds the pace to what the first epoch says; None where it does not.

    Attributes:
        guards: What stands before the optimizers' steps.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        run: Run,
        port: Port,
        optimizers: Sequence[Any],
        models: Callable[[], Sequence[Any]],
        losses: LossObserver,
        incidents: IncidentCapture,
        gate: ShapeGate | None = None,
        fresh: FreshData | None = None,
    ) -> None:
        self._incidents = incidents
        self._config, self._run, self._port, self._losses = config, run, port, losses
        self._optimizers = optimizers
        check_torch()
        shapes = not config.shadow and (config.max_pace > 1 or config.agreement is True)
        self.guards = Guards(optimizers, scaler=port.has_scaler, shapes=shapes)
        self._probe()
        self._check = FirstStepCheck(enabled=config.self_test)
        self._absence = AbsenceCheck(run.alerts.warn_once)
        self._kept = PerParameter(config, run, self.guards, models, run.alerts)
        self._shaping = Shaping(config, run, self.guards, models, gate)
        self._overfit = OverfitWatch() if config.max_pace > 1 else None
        self._fresh = fresh
        self._back: Value | None = None  # what the pace is told then

    @property
    def grip(self) -> Guards:
        return self.guards

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.guards.parameters

    @property
    def why_skipping(self) -> Sequence[str]:
        return self.guards.why

    @property
    def off(self) -> Mapping[str, str]:
        gate, watch = self._shaping.gate, self._overfit
        by_heart = {"pace": watch.found} if watch is not None and watch.found is not None else {}
        return by_heart if gate is None else {**gate.why, **by_heart}

    @property
    def why_scaling(self) -> str | None:
        return self._kept.why_not_folded

    # -- the step ------------------------------------------------------------------------------------------------

    def clip_(self, parameters: Parameters, loss: Tensor | float | None, *, measure: bool | None) -> Tensor:
        gradients = collect(parameters, lambda: self.guards.parameters)
        if not self._port.syncs_now:
            return global_norm(norms_of(gradients))
        self._adopt()
        self.guards.check_owner()
        self._port.unscale(self._optimizers)
        seen = self._observe(gradients, loss)
        planned = self._decide(seen)
        measure = self._run.step % MEASURE_EVERY == 0 if measure is None else measure
        checks = self._check.pending and self.guards.in_use and bool(seen.gradients.tensors)
        fold, coefficient = self._apply_(seen, planned, checks=checks)
        self._learn_reach(seen, planned, 1.0 if fold is not None else coefficient)
        self._arm(seen, planned, fold, measure=measure or checks)
        if self._incidents.on:
            kept = self._kept
            self._incidents.made(seen.norms, seen.gradients.present, lambda: kept.names, self.guards.optimizers)
        self._run.step += 1
        return seen.total

    def _observe(self, gradients: Gradients, loss: Tensor | float | None) -> Seen:
        run, kept = self._run, self._kept
        self._absence.look(gradients)
        norms = norms_of(gradients)
        check_capture(norms.device)
        if not kept.begun:
            run.ranks = self._port.rank_check()
        total = global_norm(norms)  # in the order given, which decides the last bit
        gradients, norms = kept.place(gradients, norms)
        self._shaping.look(kept.joined)
        if self.guards.changed():
            self._check.again()
            self._probe()
            kept.look_again(gradients)
        ops = run.ops
        norm = to_value(total, ops)
        finite = None if kept.scope.grouping is None else is_finite_norm(norm, ops)
        observed = kept.scope.observe(gradients, norms, norm, finite, ops)
        left = kept.scope.limit_(gradients, total, run.step, ops)
        seen_loss = self._losses.observe(loss, total.device)
        # Without a step before there is no reach of it.
        shaped = kept.reach is not None and kept.reach.reach is not None and self._shaping.ranges
        reach: Value | None = None
        if kept.reach is not None:
            reach = kept.reach.reach if shaped else kept.reach.observe(gradients, total, ops)
        if self._fresh is not None and reach is not None:
            reach = self._fresh.held(reach, run.step + run.steps_before - shaped, ops)
        if self._overfit is not None and reach is not None:
            reach = self._judged_by_heart(self._overfit, seen_loss, reach)
        return Seen(gradients, total, norms, norm, finite, observed, seen_loss, left, reach, shaped)

    def _judged_by_heart(self, watch: OverfitWatch, loss: Value, reach: Value) -> Value:
        """The reach; -inf once the data is learned by heart."""
        watch.add(loss)
        if watch.found is None:
            return reach
        if self._back is None:
            self._back = self._run.ops(-math.inf)
            self._run.alerts.warn_once(
                f"The data counts as learned by heart, and the pace is 1 from here on. {watch.found}"
            )
        return self._back

    def _decide(self, seen: Seen) -> StepPlan:
        return self._run.decide(
            seen.norm,
            seen.observed,
            seen.loss,
            seen.finite,
            loss_scale=self._port.loss_scale,
            left=seen.left,
            reach=seen.reach,
        )

    def _learn_reach(self, seen: Seen, planned: StepPlan, scale: Value | float) -> None:
        """From gradients as the optimizer reads them, where the spectral range has made them others; `scale` is what clipping did."""
        estimate = self._kept.reach
        if estimate is None:
            return
        if seen.shaped:
            # The range keeps lengths, so the norm of what is read is known without a look.
            total = seen.total
            if planned.by_group and self._kept.scope.grouping is not None:
                each = torch.as_tensor(scale, dtype=torch.float32, device=seen.norms.device)
                total, scale = global_norm(seen.norms * each), 1.0
            estimate.observe(seen.gradients, total, self._run.ops, scale, planned.taken)
        estimate.pace = 1.0 if planned.pace is None else planned.pace

    def _apply_(self, seen: Seen, planned: StepPlan, *, checks: bool) -> tuple[Tensor | None, Value]:
        """Scale the gradients, unless the optimizer's step is to do it.

        Returns:
            What the step has to divide the gradients by, None where they are scaled; and the coefficient, of all or of each.
        """
        gradients, ops, coefficient = seen.gradients, self._run.ops, planned.coefficient
        if planned.by_group:
            coefficient = self._kept.scope.coefficients(gradients, coefficient, seen.total.device, ops)
        # In the step that is checked nothing is folded, so that a gradient that grows on its way is found before anything has moved.
        fold: Any = None
        if self._kept.why_not_folded is None and not checks:
            fold = scale_of(coefficient, ops) if planned.fold is None else planned.fold
        if fold is None and gradients.tensors:
            scale_(gradients.tensors, coefficient)
        self._shaping.act_(gradients, taken=planned.taken, factor=None if fold is None else planned.coefficient)
        if checks:
            self._check.clipped(gradients.tensors)
        # On the host nothing is folded, and on a device these numbers are tensors.
        folded: Tensor | None = fold
        return folded, coefficient

    def _arm(self, seen: Seen, planned: StepPlan, fold: Tensor | None, *, measure: bool) -> None:
        self.guards.arm(
            seen.gradients,
            finite=planned.taken,
            left_out=planned.left_out,
            told=planned.told,
            pace=planned.pace,
            ops=self._run.ops,
            measure=weakly(self._measure) if measure else None,
            fold=fold,
        )
        self._kept.clipped(seen.gradients)

    def _measure(self, gradients: list[Tensor]) -> None:
        assert self._run.recorder is not None
        self._run.recorder.set_applied(global_norm(tensor_norms(gradients)))
        if warning := self._check.stepping(gradients):
            self._run.alerts.warn_once(warning)

    def _probe(self) -> None:
        if self._config.self_test:
            self.guards.probe(paced=self._config.max_pace > 1 and not self._config.shadow)

    # -- around the steps ----------------------------------------------------------------------------------------

    def check(self) -> None:
        self._port.check_replaced()

    def set_static_threshold(self, value: float) -> None:
        self._run.set_static_threshold(value)

    def take_script_threshold(self, max_norm: float) -> None:
        if self._config.static_threshold is None:
            self.set_static_threshold(max_norm)

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        self._adopt()
        return self.guards.optimizers

    def _adopt(self) -> None:
        if self.guards.adopt(self._port.only_optimizer()):
            self._probe()

    def leave_out(self) -> None:
        if self._overfit is not None:
            self._overfit.pass_over()
        # So that a checkpoint before the first gradient has a state. Which norms are judged apart is known only from gradients.
        whole = self._config.works_on == "global" and not self._config.parameter_rules
        if whole and not self._run.begun and self.parameters:
            self._run.begin(self.parameters[0].device)
        self._run.leave_out()

    def keep(self, tensors: dict[str, Tensor] | None = None) -> Callable[[], None]:
        estimate, matrices = self._kept.keep(tensors), self._shaping.keep(tensors)
        watch = self._overfit
        by_heart = None if watch is None or tensors is not None else watch.keep()
        fresh = self._fresh
        said = None if fresh is None else fresh.tensor() if tensors is None else tensors.get(FRESH)

        def put_back() -> None:
            estimate()
            matrices()
            if fresh is not None and said is not None:
                fresh.restore(said)
            if by_heart is not None:
                by_heart()
            elif watch is not None and tensors is not None and "by_heart" in tensors:
                watch.restore(tensors["by_heart"])

        return put_back

    def kept(self) -> dict[str, Tensor] | None:
        kept = self._shaping.tensors()
        if self._kept.reach is not None and self._overfit is not None:
            kept |= {**self._kept.reach.tensors(), "by_heart": self._overfit.tensor()}
        if self._fresh is not None:
            kept[FRESH] = self._fresh.tensor()
        return kept

    def loaded(self) -> None:
        self._kept.forget()
        kept = self._run.beside or {}
        if self._overfit is not None and "by_heart" in kept:
            self._overfit.restore(kept["by_heart"])
        if self._fresh is not None and FRESH in kept:
            self._fresh.restore(kept[FRESH])
        self._shaping.restore(kept)

    def sees(self, batch: Any) -> None:
        self._shaping.sees(batch)

    def begin_epoch(self) -> None:
        if self._overfit is not None:
            self._overfit.begin_epoch()

    def evaluated(self, loss: float) -> None:
        if self._overfit is not None:
            self._overfit.evaluated(loss)
