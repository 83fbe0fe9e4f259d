"""One run of a controller: its state, the record of its decisions, and both across checkpoints. No gradient is seen here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.numerics.fused import failures
from hf_adaclip.controllers.numerics.ops import SCALAR, Lane, Ops, Value, ops_for
from hf_adaclip.controllers.wrappers.states import Keeping, carry_over
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.gradients.groups import Grouping
from hf_adaclip.ledger.records import (
    Summary,
    state_fields,
    state_from_tensors,
    state_to_json,
    state_to_tensors,
)
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.checkpoint import BESIDE, read_state, write_state
from hf_adaclip.run.counts import RunStatistics
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.moments import Moments, apart
from hf_adaclip.run.plan import Decided, StepPlan, rules_of
from hf_adaclip.run.points import Point, Rewound, own
from hf_adaclip.run.ranks import RankCheck
from hf_adaclip.run.recorder import Recorder, start_recorder
from hf_adaclip.support import check_device


class Run(Moments):
    """Decides step by step, records, and can be saved and gone on with.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up and of a ceiling that is held, unless the config sets one.
        writes_ledger: Whether this process writes the ledger, if there is one.
        scaled: Whether a loss scaler is active.
        lane: Chooses the kind of numbers that it works with.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        *,
        static_threshold: float,
        writes_ledger: bool,
        scaled: bool,
        lane: Lane = ops_for,
    ) -> None:
        self.config = config
        self._lane = lane
        self.static_threshold = static_threshold if config.static_threshold is None else config.static_threshold
        self.statistics = RunStatistics()
        self.alerts = Alerts(speaks=writes_ledger)
        self.step = 0
        self.steps_before = 0  # of the Trainer, where a checkpoint without our state was gone on from
        self._keeping = Keeping(build_controller(config), (), ())
        self._parameters: tuple[str, ...] | None = None
        self.loaded_parameters: tuple[str, ...] | None = None  # names of those that a loaded state was kept for
        self._scaled = scaled
        self._writes = writes_ledger and config.ledger_path is not None
        # Made at the first step, when device and number of tensors are known.
        self._state: tuple[Value, ...] | None = None
        self._ops: Ops | None = None
        self._rules: list[Callable[..., Any]] | None = None
        self._device = torch.device("cpu")
        self._static: tuple[float, Value] | None = None
        self.recorder: Recorder | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._loaded_keeping: Keeping | None = None
        self._parent: dict[str, Any] | None = None
        self._checkpoint: str | None = None
        self._begun: Point | None = None  # where this run began, or was gone on with
        self._pending = 0  # steps left out before there was a state
        self.ranks: RankCheck | None = None  # where several ranks have to decide alike
        self.beside: dict[str, Tensor] = {}  # of a state that was loaded: what `save` was given

    @property
    def state(self) -> dict[str, Value]:
        """The controller's state by name; of a run that was loaded and has not gone on yet, as tensors; empty before the first step."""
        if self._state is None:
            return dict(self._loaded or {})
        return state_fields(self._state)

    @property
    def start_threshold(self) -> Value:
        """What rules before the first norm is known: the static threshold, within the limits."""
        return self._keeping.controller.start_threshold(SCALAR(self.static_threshold), SCALAR)

    @property
    def ceiling_held(self) -> bool | None:
        """Whether the static threshold is the ceiling of `adaptive`; None in its warm-up, and for all others. Reads the device."""
        state, settings = self.state, self.config.settings
        if not isinstance(settings, AdaptiveController) or "acted" not in state or state["acted"].shape:
            return None
        if not state["count"] > settings.warmup_observations:
            return None
        return bool(state["acted"] > 0)

    @property
    def pace_ended(self) -> bool:
        """Whether little is left to learn, by the training loss (`hf_adaclip.controllers.pace`). Reads the device."""
        best = self.state.get("best_reach")
        return best is not None and not best.shape and bool(best < 0)

    @property
    def last_pace(self) -> float | None:
        """Of the last step; None before the first one, and without a pace of the whole run. Reads the device."""
        pace = self.state.get("pace") if self.step else None
        return None if pace is None or pace.shape else float(pace)

    @property
    def ops(self) -> Ops:
        """The kind of numbers that this run works with, known from the first step on."""
        assert self._ops is not None
        return self._ops

    @property
    def begun(self) -> bool:
        """Whether a step has been got ready for, of this run or since a load."""
        return self._ops is not None

    @property
    def num_tensors(self) -> int:
        """Tensors, or groups of them, that have a norm of their own; 0 when only the global norm counts."""
        return len(self._keeping.groups)

    @property
    def static(self) -> Value:
        """The static threshold as a number of the run's kind. Not one of the constants that are kept: a schedule has one for every step."""
        if self._static is None or self._static[0] != self.static_threshold:
            self._static = self.static_threshold, self.ops.full((), self.static_threshold)[()]
        return self._static[1]

    def set_static_threshold(self, value: float) -> None:
        """See `AdaptiveClipper.set_static_threshold`."""
        check_static_threshold(value)
        self.static_threshold = value

    def begin(
        self,
        device: torch.device,
        grouping: Grouping | None = None,
        parameters: Sequence[str] | None = None,
        restarted: Sequence[str] = (),
    ) -> Ops:
        """Get ready for the first step, of this run or after a load.

        Args:
            device: Where the norms are.
            grouping: Which parameters are judged together; None for all.
            parameters: Their names, where they are known, for a state that is saved.
            restarted: As for `regroup`; of a state that was loaded.

        Raises:
            StateError: The state was loaded from, or made for, other parameters.
            UnsupportedSetupError: The device cannot do what controllers need.
        """
        self._parameters = None if parameters is None else tuple(parameters)
        if self._ops is not None:
            return self._ops
        check_device(device)
        keeping = self._keep(grouping)
        shape = (len(keeping.groups),) if keeping.groups else ()
        ops = self._lane(device, shape)
        moved = False
        if self._loaded is None:
            self._state = keeping.controller.init(ops, shape)
        else:
            loaded = self._keep_loaded(keeping)
            shape = (len(loaded.groups),) if loaded.groups else ()
            try:
                self._state = state_from_tensors(loaded.controller, self._loaded, ops, shape, device)
            except ValueError as error:
                raise StateError(f"`{self._checkpoint}` does not fit: {error}. Resume with the same model.") from error
            moved = bool(restarted) or loaded.groups != keeping.groups
            if moved:
                self._state = carry_over(self._state, loaded, keeping, restarted, ops)
        self._ops, self._device, self._keeping, self._loaded, self._loaded_keeping = ops, device, keeping, None, None
        self._rules = None
        pending, self._pending = self._pending, 0
        self.step -= pending
        self._start_recorder(restarted if moved else None)
        self._begun = Point(self.step, own(self._state), self._keeping, self._here())
        for _ in range(pending):
            self.leave_out()
        return ops

    def regroup(self, grouping: Grouping | None, parameters: Sequence[str] | None, restarted: Sequence[str]) -> None:
        """Go on with other parameters: a new segment of the ledger, and a state that was carried over.

        Args:
            grouping: Which of them are judged together; None for all.
            parameters: Names of all of them, where they are known.
            restarted: Groups that begin anew, because parameters have joined them; any name where only the global norm counts.
        """
        assert self._state is not None
        keeping = self._keep(grouping)
        self._parameters = None if parameters is None else tuple(parameters)
        if keeping.groups == self._keeping.groups and not restarted:
            return
        self._state = carry_over(self._state, self._keeping, keeping, restarted, self.ops)
        self._next_segment(keeping, restarted)

    def _next_segment(self, keeping: Keeping, restarted: Sequence[str] | None) -> None:
        self.flush()
        self._parent = self._here()
        self._keeping, self._rules = keeping, None
        self._follow_on(restarted)

    def _follow_on(self, restarted: Sequence[str] | None, rewound: Rewound | None = None) -> None:
        """Open the next segment of the ledger; all rows of the present one have been read."""
        assert self.recorder is not None
        if self.recorder.ledger is not None:
            self.recorder.ledger.close()
        before = self.recorder
        self._start_recorder(restarted, rewound)
        self.recorder.take_over(before)

    def _here(self) -> dict[str, Any] | None:
        """The present end of the ledger, as a segment names its parent."""
        ledger = None if self.recorder is None else self.recorder.ledger
        return None if ledger is None else {"sha256": ledger.head, "step": self.step}

    def _start_recorder(self, restarted: Sequence[str] | None, rewound: Rewound | None = None) -> None:
        assert self._state is not None
        _, groups, parts = self._keeping
        self.recorder = start_recorder(
            self.config,
            writes=self._writes,
            state=self._state,
            static_threshold=self.static_threshold,
            ops=self.ops,
            device=self._device,
            num_tensors=len(groups),
            groups=groups,
            parts=parts,
            restarted=restarted,
            first_step=self.step,
            statistics=self.statistics,
            parent=self._parent,
            rewound=rewound,
            steps_before=self.steps_before,
        )

    def _keep(self, grouping: Grouping | None) -> Keeping:
        if grouping is None:
            return Keeping(build_controller(self.config), (), ())
        return Keeping(build_controller(self.config, grouping.parts), grouping.names, grouping.parts)

    def _keep_loaded(self, now: Keeping) -> Keeping:
        """Whom a loaded state was kept for.

        Raises:
            StateError: For others than the parameters there are now, and nothing tells who is who.
        """
        loaded = self._loaded_keeping
        if loaded is None or not loaded.groups or loaded.groups == now.groups:
            return now
        if self.loaded_parameters is None or not loaded.parts or not set(loaded.groups) <= set(now.groups):
            raise StateError(_other_groups(self._checkpoint, loaded.groups, now.groups))
        return loaded

    def decide(
        self,
        norm: Value,
        observed: Value,
        loss: Value,
        finite: Value | None,
        *,
        loss_scale: Tensor | None,
        left: Value | None = None,
        reach: Value | None = None,
    ) -> StepPlan:
        """Decide on one step, learn from it, record it.

        Args:
            norm: Global norm, shape `[]`.
            observed: What the controller looks at: the same, or the norms by tensor, shape `[num_tensors]`.
            loss: Training loss, shape `[]`; NaN when it is not known.
            finite: Bool, whether the step is finite; None where there is one norm only, which tells.
            loss_scale: The loss scaler's scale, on the device.
            left: The norm that a rule on units or elements has left.
            reach: What the pace goes by; None when it is off.

        Returns:
            What is to be done with the step.
        """
        assert self._state is not None
        assert self._ops is not None
        assert self.recorder is not None
        self._look()  # before the state moves on: a ledger that cannot be written keeps the one after its last row
        with np.errstate(all="ignore"):  # both branches of a `where` are computed, as on a device
            seen = Observation(observed, loss, self.static, finite, left, reach)
            self._state, decided, summary = self._decide(norm, seen)
        if not self._ops.on_host:
            for sentence in failures(self._device):
                self.alerts.warn_once(sentence)
        if self.ranks is not None:
            self.ranks.add(self.step, norm, summary.threshold, decided.kept, summary.pace)
            if self._ops.on_host:
                self.ranks.require()
        self.recorder.record(
            norm,
            summary,
            loss,
            loss_scale=loss_scale,
            scaled=self._scaled,
            norms=observed,
            reach=reach,
            static_threshold=self.static_threshold,
        )
        return decided.planned

    def _decide(self, norm: Value, seen: Observation) -> tuple[Any, Decided, Summary]:
        """State, plan and summary of one step; on an accelerator in as few launches as can be."""
        if self._rules is None:
            device = None if self.ops.on_host else self._device
            self._rules = rules_of(self.config, self._keeping.controller, self.num_tensors, device)
        if not self.num_tensors:
            [rule] = self._rules
            state, decided = rule(self._state, seen._replace(step_finite=None))
            return state, decided, Summary(*decided.decision)
        each, together = self._rules
        state, decision, squares, extremes = each(self._state, seen, norm)
        # In one launch they stand in one tensor; made operation by operation, or on the host, they do not.
        largest = extremes.amax(dim=1).unbind() if isinstance(extremes, Tensor) else [row.max() for row in extremes]
        unused: Any = None
        rest = seen._replace(norm=unused, loss=unused, step_finite=None, reach=None)
        summary, planned, kept = together((), norm, squares.sum(), *largest, rest)
        if planned.by_group:
            planned = planned._replace(coefficient=decision.coefficient)
        return state, Decided(decision, planned, kept), summary

    def flush(self) -> None:
        """Read the rows that wait on the device (the one host read), count them, write the ledger, tell of events.

        Raises:
            NonFiniteGradientError: `max_consecutive_nonfinite` steps in a row were skipped.
            TrainingTroubleError: Trouble was found and `on_trouble` is 'stop'.
            LedgerError: The ledger cannot be written and `ledger_required` is set.
            RankDisagreementError: The ranks of a distributed run do not decide alike.
        """
        if self.recorder is None:
            return
        if self.ranks is not None:
            self.ranks.require()
        self._act_on(self.recorder.flush(lambda: state_to_json(self._state or ())))

    def _look(self) -> None:
        """Look at the steps before this one as soon as that is cheap: what ends a run must not wait for a log line."""
        assert self.recorder is not None
        if self.recorder.full:
            self.flush()
        else:
            self._act_on(self.recorder.look())

    def _act_on(self, events: list[ClipEvent]) -> None:
        assert self.recorder is not None
        self.alerts.tell(events)
        if self.recorder.altered is not None:
            self.alerts.warn_once(self.recorder.altered)
        self.statistics.stop_if_hopeless(
            self.config.max_consecutive_nonfinite, last_step=self.recorder.next_step - 1, checkpoint=self._checkpoint
        )
        self.alerts.stop_on_trouble(self.config.on_trouble, events)

    def close(self, *, clean: bool, counted_steps: int | None = None) -> None:
        """Write what is left; a ledger of a run that did not end as it should gets no footer."""
        try:
            self.flush()
            if self.recorder is not None:
                self.alerts.tell(self.recorder.finish())
        finally:
            if self.recorder is not None and self.recorder.ledger is not None and self._state is not None:
                footer = {
                    "steps": self.step,
                    "counts": self.statistics.counts_by_name(),
                    "final_state": state_to_json(self._state),
                }
                if counted_steps is not None:
                    footer["counted_steps"] = counted_steps
                self.recorder.ledger.close(footer if clean else None)

    def save(self, path: Path, beside: dict[str, Tensor] | None = None) -> None:
        """Write the state file (nothing before the first step); `beside` is what the controller does not know."""
        if self._state is not None and self.recorder is not None:
            self.flush()
            ledger = self.recorder.ledger
            if ledger is not None:
                ledger.sync()
            tensors, keeping, parameters = state_to_tensors(self._state), self._keeping, self._parameters
            head = None if ledger is None else ledger.head
        elif self._loaded is not None and self._loaded_keeping is not None:  # no step since
            tensors, keeping, parameters = self._loaded, self._loaded_keeping, self.loaded_parameters
            head = None if self._parent is None else self._parent["sha256"]
        else:
            return
        self._checkpoint = str(path.parent)
        write_state(
            path,
            tensors | {f"{BESIDE}{name}": value for name, value in {**self.beside, **(beside or {})}.items()},
            self.config,
            step=self.step - self._pending,
            static_threshold=self.static_threshold,
            statistics=self.statistics.to_dict(),
            ledger=head,
            groups=keeping.groups,
            parts=keeping.parts,
            parameters=parameters,
        )

    def load(self, path: Path) -> bool:
        """Read what `save` wrote; False when there is no such file.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        read = read_state(path, self.config)
        if read is None:
            return False
        if self.recorder is not None:
            # Going back within a run: what was recorded stays, and the next step opens a segment that names where it goes on from.
            self.flush()
            if self.recorder.ledger is not None:
                self.recorder.ledger.close()
            self.recorder = self._ops = self._state = None
        tensors, self.step, self.static_threshold, self.statistics, head = read[:5]
        parts = tuple((pattern, size) for pattern, size in read.parts)
        self._loaded_keeping = Keeping(build_controller(self.config, parts), read.groups, parts)
        self.loaded_parameters = read.parameters
        tensors, self.beside = apart(tensors)
        self._loaded, self._parent = tensors, None if head is None else {"sha256": head, "step": self.step}
        self._checkpoint = str(path.parent)
        return True


def _other_groups(checkpoint: str | None, before: tuple[str, ...], now: tuple[str, ...]) -> str:
    gone, new = ([n for n in a if n not in b][:3] for a, b in ((before, now), (now, before)))
    what = f"{', '.join(gone) or 'none'} gone, {', '.join(new) or 'none'} new" if gone or new else "in another order"
    return (
        f"`parameters` must be those that `{checkpoint}` was written for ({len(before)} with a norm of their own), but they are "
        f"{len(now)} now: {what}. Resume with the same model and the same frozen parameters."
    )


def check_static_threshold(value: float) -> None:
    """Whether a static threshold can act.

    Raises:
        ConfigError: It is not above 0.
    """
    if not value > 0:
        raise ConfigError(f"`static_threshold` must be above 0, but is {value}.")
