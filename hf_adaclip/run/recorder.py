"""What happened in a run: rows on the device, counts on the host, lines in the ledger."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason
from hf_adaclip.controllers.base import coefficient_of
from hf_adaclip.controllers.numerics.ops import SCALAR, Ops, Value, host_number
from hf_adaclip.errors import LedgerError
from hf_adaclip.gradients import to_value
from hf_adaclip.ledger.records import Summary, revisions, state_to_json, step_record
from hf_adaclip.ledger.schema import APPLIED_TOLERANCE, SHAPE_FIELDS, plain
from hf_adaclip.ledger.writer import Ledger
from hf_adaclip.run.counts import RunStatistics
from hf_adaclip.run.events import ClipEvent, EventTracker
from hf_adaclip.run.points import Rewound
from hf_adaclip.run.ranks import rank, world_size
from hf_adaclip.run.ring import COLUMNS, DeviceRing, HostRing, Ring, Rows
from hf_adaclip.run.versions import environment

logger = logging.getLogger(__name__)


class Recorder:
    """Gathers one row per optimizer step and brings them to the host together.

    Args:
        capacity: Steps kept before they are read.
        num_tensors: Tensors with a norm of their own; 0 when only the global norm counts.
        ops: The kind of numbers that rows are made of.
        device: Where they live.
        statistics: Counts to go on with.
        first_step: Step of the first row, counted from 0.
        ledger: Where records go, or None.
        events: What makes events of the rows.
        shadow: Whether the static threshold is what is applied.
        static_threshold: That of the ledger's header; a record holds it where it is another.

    Attributes:
        next_step: The first step whose row has not been looked at.
        altered: In words, the first step whose gradient reached the optimizer otherwise than clipping had left it; None until then.
    """

    def __init__(
        self,
        *,
        capacity: int,
        num_tensors: int,
        ops: Ops,
        device: torch.device,
        statistics: RunStatistics,
        first_step: int,
        ledger: Ledger | None,
        events: EventTracker | None = None,
        shadow: bool = False,
        static_threshold: float | None = None,
    ) -> None:
        self._capacity = capacity
        self._shadow, self._static_threshold = shadow, static_threshold
        self._statics: list[float | None] = []
        self._waiting: list[dict[str, Any]] = []
        self.altered: str | None = None
        self._events = EventTracker() if events is None else events
        self._ring: Ring = HostRing(capacity) if ops.on_host else DeviceRing(capacity, num_tensors, device)
        self._ops, self._num_tensors = ops, num_tensors
        self._statistics = statistics
        self.next_step = first_step
        self._times: list[float] = []
        self._notes: dict[int, dict[str, Any]] = {}
        self._started = time.monotonic()
        self.ledger = ledger

    @property
    def full(self) -> bool:
        """Whether the rows have to be read and written before another one fits."""
        return self._ring.full or len(self._waiting) + len(self._ring) >= self._capacity

    @property
    def newest(self) -> Tensor | list[float]:
        """The row of the step that was recorded last; see `Ring.newest`."""
        return self._ring.newest

    def record(
        self,
        norm: Value,
        summary: Summary,
        loss: Value,
        *,
        loss_scale: Tensor | None,
        scaled: bool,
        norms: Value | None,
        reach: Value | None = None,
        static_threshold: float | None = None,
    ) -> None:
        """Add the row of one step.

        Args:
            norm: Global norm before clipping.
            summary: What was decided.
            loss: Training loss, NaN when unknown.
            loss_scale: The loss scaler's scale, on the device; None without one.
            scaled: Whether a loss scaler is active: then it is who leaves a step out that is not finite.
            norms: What the controller looked at; recorded too when the granularity is per tensor.
            reach: What the pace went by; None when it is off.
            static_threshold: That of this step.
        """
        ops, reason = self._ops, summary.reason
        if scaled:
            overflow = reason == ops(float(Reason.NONFINITE))
            reason = ops.where(overflow, ops(float(Reason.SCALER_SKIPPED)), reason)
        scale = ops(math.nan) if loss_scale is None else to_value(loss_scale.float().reshape(()), ops)
        led = ops(math.nan) if reach is None else reach
        later = [ops(math.nan)] * len(SHAPE_FIELDS)
        values = (norm, summary.threshold, summary.coefficient, summary.pace, reason, loss, scale, led, *later)
        self._ring.append(values, norms if self._num_tensors else None)
        self._times.append(time.monotonic() - self._started)
        self._statics.append(None if static_threshold == self._static_threshold else static_threshold)

    def set_applied(self, norm: Tensor) -> None:
        """The norm that really reached the optimizer in the newest step, if its row is still here."""
        if len(self._ring):
            self._ring.set_applied(norm)

    def fill(self, **values: Any) -> None:
        """What was done with the newest step after it was decided on, by column, if its row is still here."""
        for column, value in values.items() if len(self._ring) else ():
            self._ring.fill(column, value)

    def flush(self, state: Callable[[], dict[str, Any]] | None = None) -> list[ClipEvent]:
        """Read all rows (one host read), count them, write them down; returns the events that they complete.

        Args:
            state: Gives the controller's state after the newest row, as JSON: where a ledger goes on after steps that it could not hold.
        """
        events = self._take(self._ring.drain())
        waiting, self._waiting = self._waiting, []
        if self.ledger is not None:
            self.ledger.steps(waiting, state)
        return events

    def look(self) -> list[ClipEvent]:
        """Count the rows that can be had without waiting; the ledger gets them with its next block. Returns the events they complete."""
        return self._take(self._ring.look())

    def _take(self, rows: Rows) -> list[ClipEvent]:
        events: list[ClipEvent] = []
        count = len(rows.values)
        times, self._times = self._times[:count], self._times[count:]
        statics, self._statics = self._statics[:count], self._statics[count:]
        for position, (values, seconds, static) in enumerate(zip(rows.values, times, statics, strict=True)):
            row = dict(zip(COLUMNS, values, strict=True))
            reason = Reason(int(row["reason"]))
            found = list(self._events.feed(self.next_step, row, reason))
            self._statistics.add(row, reason, spike=any(event.kind == "spike" for event in found))
            events.extend(found)
            self._compare_applied(row, self._static_threshold if static is None else static)
            if self.ledger is not None:
                norms = None if rows.norms is None else rows.norms[position]
                record = step_record(self.next_step, row, seconds, norms, static)
                self._waiting.append(record | self._notes.pop(self.next_step, {}))
            self.next_step += 1
        return events

    def note(self, **facts: Any) -> None:
        """Facts that the record of the coming step is to have beside its numbers."""
        if self.ledger is not None:
            self._notes.setdefault(self.next_step + len(self._ring), {}).update(facts)

    def take_over(self, before: "Recorder") -> None:
        """Go on from the recorder of the segment before: its clock, and the events that are still open."""
        self._events, self._started = before._events, before._started

    def _compare_applied(self, row: dict[str, float], static: float | None) -> None:
        norm, applied, coefficient = row["norm"], row["applied_norm"], row["coefficient"]
        if self.altered is not None or not (math.isfinite(norm) and math.isfinite(applied)):
            return
        if self._shadow and static is not None:
            coefficient = float(coefficient_of(host_number(norm), host_number(static), SCALAR))
        intended = norm * coefficient
        if not abs(applied - intended) <= APPLIED_TOLERANCE * max(applied, intended):
            self.altered = (
                f"the optimizer was given a gradient of norm {applied:.4g} in step {self.next_step}, where clipping had left "
                f"{intended:.4g}: something changes it in between. Look at callbacks with `on_pre_optimizer_step`, at hooks on the "
                "optimizer, and whether clipping stands between `backward` and `optimizer.step()`."
            )

    def finish(self) -> list[ClipEvent]:
        """Events that were still going on when the run ended."""
        return list(self._events.finish())


def is_rank_zero() -> bool:
    """Whether this process writes for all: the only one, or rank 0."""
    return rank() == 0


def start_recorder(config: AdaptiveClipConfig, *, writes: bool, ops: Ops, **run: Any) -> Recorder:
    """The recorder of a run that begins or goes on here.

    Args:
        config: The complete config.
        writes: Whether this process writes the ledger.
        ops: The kind of numbers that rows are made of.
        run: As for `ledger_header`.

    Raises:
        LedgerError: The ledger is required and cannot be written. One that is not required is done without, and a warning says why.
    """
    ledger = None
    if writes:
        header = ledger_header(config, **run)
        try:
            ledger = Ledger(str(config.ledger), header, required=config.ledger_required)
        except LedgerError as error:
            if config.ledger_required:
                raise
            logger.warning("%s Training goes on without a ledger.", error)
    return Recorder(
        capacity=config.ring_capacity,
        num_tensors=run["num_tensors"],
        ops=ops,
        device=run["device"],
        statistics=run["statistics"],
        first_step=run["first_step"],
        events=EventTracker.of_run(config.to_dict(), run["num_tensors"]),
        shadow=config.shadow,
        static_threshold=run["static_threshold"],
        ledger=ledger,
    )


def ledger_header(
    config: AdaptiveClipConfig,
    *,
    state: tuple[Value, ...],
    static_threshold: float,
    device: torch.device,
    num_tensors: int,
    groups: Sequence[str],
    parts: Sequence[tuple[str | None, int]],
    restarted: Sequence[str] | None,
    first_step: int,
    statistics: RunStatistics,
    parent: dict[str, Any] | None,
    rewound: Rewound | None = None,
    steps_before: int = 0,
) -> dict[str, Any]:
    """All that the decisions of a run follow from, and where it ran: the first line of its segment in the ledger.

    Args:
        config: The complete config.
        state: The controller's state before the first step.
        static_threshold: Threshold of the warm-up.
        device: Where the gradients are.
        num_tensors: Tensors, or groups of them, with a norm of their own; 0 when only the global norm counts.
        groups: Their names.
        parts: Which pattern of `parameter_rules` they come from (None: from none) and how many they are.
        restarted: Which of them begin anew though the parent had them, because parameters have joined; None where the state is the
            parent's own.
        first_step: Step of the first record.
        statistics: Counts so far, which the footer goes on from.
        parent: For a resumed run, hash and step of the ledger's seal that its checkpoint refers to.
        rewound: Of a run that went back here, to its parent: what was undone.
        steps_before: Steps of a Trainer that were made before the first of the ledger, as by the stock Trainer.
    """
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": environment(),
        "config": config.to_dict(),
        "controller": config.controller,
        **revisions(config),
        "exact": True,  # of schema 1: a replay gives the same bits, with every controller
        "static_threshold": plain(static_threshold),
        "device": device.type,
        "world_size": world_size(),
        "seed": torch.initial_seed(),
        "num_tensors": num_tensors,
        "groups": list(groups),
        "parts": [list(part) for part in parts],
        **({} if restarted is None else {"restarted": list(restarted)}),
        "first_step": first_step,
        "counts": statistics.counts_by_name(),
        "initial_state": state_to_json(state),
        "parent": parent,
        **({} if rewound is None else {"rewound": rewound._asdict()}),
        **({"steps_before": steps_before} if steps_before else {}),
    }
