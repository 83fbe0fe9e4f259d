"""One run of a controller: its state, the record of its decisions, and both across checkpoints. No gradient is seen here."""

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.alerts import Alerts
from hf_adaclip.audit.records import (
    Summary,
    state_fields,
    state_from_tensors,
    state_to_json,
    state_to_tensors,
    summarise,
)
from hf_adaclip.checkpoint import read_state, write_state
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Decision, Observation, build_controller
from hf_adaclip.controllers.ops import Ops, Value, ops_for
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.events import ClipEvent
from hf_adaclip.gradients.groups import Grouping
from hf_adaclip.recorder import Recorder, start_recorder
from hf_adaclip.statistics import RunStatistics
from hf_adaclip.support import check_device

BESIDE: Final = "reach."
"""Prefix of the names, in a state file, of what is not the controller's."""


class Run:
    """Decides step by step, records, and can be saved and gone on with.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up and of a ceiling that is held, unless the config sets one.
        writes_ledger: Whether this process writes the ledger, if there is one.
        scaled: Whether a loss scaler is active.
    """

    def __init__(
        self, config: AdaptiveClipConfig, *, static_threshold: float, writes_ledger: bool, scaled: bool
    ) -> None:
        self.config = config
        self.static_threshold = static_threshold if config.static_threshold is None else config.static_threshold
        self.statistics = RunStatistics()
        self.alerts = Alerts()
        self.step = 0
        self.num_tensors = 0  # or groups of them, that have a norm of their own; 0 when only the global norm counts
        self._num_parameters = 0
        self._groups: tuple[str, ...] = ()
        self._loaded_groups: tuple[str, ...] = ()
        self._controller = build_controller(config)
        self._scaled = scaled
        self._writes = writes_ledger and config.ledger not in (None, "none", "auto")
        # Made at the first step, when device and number of tensors are known.
        self._state: tuple[Value, ...] | None = None
        self._ops: Ops | None = None
        self._static: tuple[float, Value] | None = None
        self.recorder: Recorder | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._parent: dict[str, Any] | None = None
        self._checkpoint: str | None = None
        self.beside: dict[str, Tensor] = {}  # of a state that was loaded: what `save` was given

    @property
    def state(self) -> dict[str, Value]:
        """The controller's state by name; of a run that was loaded and has not gone on yet, as tensors; empty before the first step."""
        if self._state is None:
            return dict(self._loaded or {})
        return state_fields(self._state)

    @property
    def ceiling_held(self) -> bool | None:
        """Whether the static threshold is the ceiling of `adaptive`; None in its warm-up, and for all others. Reads the device."""
        state = self.state
        if "acted" not in state or state["acted"].shape or not state["count"] > self.config.warmup_observations:
            return None
        return bool(state["acted"] > 0)

    @property
    def ops(self) -> Ops:
        """The kind of numbers that this run works with, known from the first step on."""
        assert self._ops is not None
        return self._ops

    @property
    def static(self) -> Value:
        """The static threshold as a number of the run's kind. Not one of the constants that are kept: a schedule has one for every step."""
        if self._static is None or self._static[0] != self.static_threshold:
            self._static = self.static_threshold, self.ops.full((), self.static_threshold)[()]
        return self._static[1]

    def set_static_threshold(self, value: float, *, in_engine: bool) -> None:
        """See `AdaptiveClipper.set_static_threshold`."""
        if not 0 < value < math.inf:
            raise ConfigError(f"`static_threshold` must be above 0 and finite, but is {value}.")
        if in_engine:
            raise ConfigError(
                f"`static_threshold` must stay what the DeepSpeed config says, but is to become {value:g}: the engine clips."
            )
        self.static_threshold = value

    def begin(self, count: int, device: torch.device, grouping: Grouping | None = None) -> Ops:
        """Get ready for a step with this many tensors; all work is done in the first one.

        Args:
            count: Trainable tensors.
            device: Where the norms are.
            grouping: Which of them are judged together; None for all.

        Raises:
            StateError: The state was loaded from, or made for, other parameters.
            UnsupportedSetupError: The device cannot do what controllers need.
        """
        if self._ops is not None:
            if grouping is not None and count != self._num_parameters:
                raise StateError(
                    f"`parameters` must be the {self._num_parameters} trainable tensors that the state was made for when "
                    f"`granularity` is '{self.config.granularity}', but are {count} instead. Use one clipper per set of parameters."
                )
            return self._ops
        check_device(device)
        groups = () if grouping is None else grouping.names
        if grouping is not None:
            self._controller = build_controller(self.config, grouping.parts)
            self._num_parameters = count
        if self._loaded_groups and self._loaded_groups != groups:
            raise StateError(_other_groups(self._checkpoint, self._loaded_groups, groups))
        self._groups, self._loaded_groups = groups, ()
        shape = (len(groups),) if groups else ()
        ops = ops_for(device, shape)
        if self._loaded is None:
            self._state = self._controller.init(ops, shape)
        else:
            try:
                self._state = state_from_tensors(self._controller, self._loaded, ops, shape, device)
            except ValueError as error:
                raise StateError(f"`{self._checkpoint}` does not fit: {error}. Resume with the same model.") from error
        self._ops, self.num_tensors, self._loaded = ops, len(groups), None
        self.recorder = start_recorder(
            self.config,
            writes=self._writes,
            exact=self._controller.exact,
            state=self._state,
            static_threshold=self.static_threshold,
            ops=ops,
            device=device,
            num_tensors=len(groups),
            grouping=grouping,
            first_step=self.step,
            statistics=self.statistics,
            parent=self._parent,
        )
        return ops

    def decide(
        self,
        norm: Value,
        observed: Value,
        loss: Value,
        finite: Value,
        *,
        loss_scale: Tensor | None,
        left: Value | None = None,
        reach: Value | None = None,
    ) -> tuple[Decision, Value]:
        """Decide on one step, learn from it, record it.

        Args:
            norm: Global norm, shape `[]`.
            observed: What the controller looks at: the same, or the norms by tensor, shape `[num_tensors]`.
            loss: Training loss, shape `[]`; NaN when it is not known.
            finite: Bool, whether the step is finite.
            loss_scale: The loss scaler's scale, on the device.
            left: The norm that a rule on units or elements has left.
            reach: What the pace goes by; None when it is off.

        Returns:
            The decision, and the pace of the step as a whole.
        """
        assert self._state is not None
        assert self._ops is not None
        assert self.recorder is not None
        self._look()
        with np.errstate(all="ignore"):  # both branches of a `where` are computed, as on a device
            seen = Observation(observed, loss, self.static, finite, left, reach)
            decision, self._state = self._controller.update(self._state, seen)
            summary = Summary(*decision) if not self.num_tensors else summarise(norm, observed, *decision)
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
        return decision, summary.pace

    def flush(self) -> None:
        """Read the rows that wait on the device (the one host read), count them, write the ledger, tell of events.

        Raises:
            NonFiniteGradientError: `max_consecutive_nonfinite` steps in a row were skipped.
            TrainingTroubleError: Trouble was found and `on_trouble` is 'stop'.
            LedgerError: The ledger cannot be written and `ledger_required` is set.
        """
        if self.recorder is not None:
            self._act_on(self.recorder.flush())

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
        """Write the state file (nothing before the first step); `beside` is what the pace needs and the controller does not know."""
        if self._state is None or self.recorder is None:
            return
        self.flush()
        ledger = self.recorder.ledger
        if ledger is not None:
            ledger.sync()
        self._checkpoint = str(path.parent)
        write_state(
            path,
            state_to_tensors(self._state) | {f"{BESIDE}{name}": value for name, value in (beside or {}).items()},
            self.config,
            step=self.step,
            static_threshold=self.static_threshold,
            statistics=self.statistics.to_dict(),
            ledger=None if ledger is None else ledger.head,
            groups=self._groups,
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
        tensors, self.step, self.static_threshold, self.statistics, head, self._loaded_groups = read
        self.beside = {name.removeprefix(BESIDE): v for name, v in tensors.items() if name.startswith(BESIDE)}
        tensors = {name: v for name, v in tensors.items() if not name.startswith(BESIDE)}
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
