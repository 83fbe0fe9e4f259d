"""What happened in a run: rows on the device, counts on the host, lines in the ledger."""

import math
import time
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.audit.ledger import Ledger
from hf_adaclip.audit.records import Summary, state_to_json, step_record
from hf_adaclip.audit.ring import COLUMNS, DeviceRing, HostRing, Ring
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason
from hf_adaclip.controllers.ops import Ops, Value
from hf_adaclip.events import ClipEvent, EventTracker
from hf_adaclip.gradients import to_value
from hf_adaclip.gradients.groups import Grouping
from hf_adaclip.statistics import RunStatistics
from hf_adaclip.versions import environment


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
    ) -> None:
        self._events = EventTracker() if events is None else events
        self._ring: Ring = HostRing(capacity) if ops.on_host else DeviceRing(capacity, num_tensors, device)
        self._ops, self._num_tensors = ops, num_tensors
        self._statistics = statistics
        self._next_record = first_step
        self._times: list[float] = []
        self._started = time.monotonic()
        self.ledger = ledger

    @property
    def full(self) -> bool:
        """Whether the rows have to be read before another one fits."""
        return self._ring.full

    def record(
        self,
        norm: Value,
        summary: Summary,
        loss: Value,
        *,
        loss_scale: Tensor | None,
        scaled: bool,
        norms: Value,
        reach: Value | None = None,
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
        """
        ops, reason = self._ops, summary.reason
        if scaled:
            overflow = reason == ops(float(Reason.NONFINITE))
            reason = ops.where(overflow, ops(float(Reason.SCALER_SKIPPED)), reason)
        scale = ops(math.nan) if loss_scale is None else to_value(loss_scale.float().reshape(()), ops)
        led = ops(math.nan) if reach is None else reach
        values = (norm, summary.threshold, summary.coefficient, summary.pace, reason, loss, scale, led)
        self._ring.append(values, norms if self._num_tensors else None)
        self._times.append(time.monotonic() - self._started)

    def set_applied(self, norm: Tensor) -> None:
        """The norm that really reached the optimizer in the newest step, if its row is still here."""
        if len(self._ring):
            self._ring.set_applied(norm)

    def flush(self) -> list[ClipEvent]:
        """Read all rows (one host read), count them, write them down; returns the events that they complete."""
        if not len(self._ring):
            return []
        events: list[ClipEvent] = []
        rows = self._ring.drain()
        times, self._times = self._times, []
        records = []
        for position, (values, seconds) in enumerate(zip(rows.values, times, strict=True)):
            row = dict(zip(COLUMNS, values, strict=True))
            reason = Reason(int(row["reason"]))
            found = list(self._events.feed(self._next_record, row, reason))
            self._statistics.add(row, reason, spike=any(event.kind == "spike" for event in found))
            events.extend(found)
            if self.ledger is not None:
                norms = None if rows.norms is None else rows.norms[position]
                records.append(step_record(self._next_record, row, seconds, norms))
            self._next_record += 1
        if self.ledger is not None:
            self.ledger.steps(records)
        return events

    def finish(self) -> list[ClipEvent]:
        """Events that were still going on when the run ended."""
        return list(self._events.finish())


def is_rank_zero() -> bool:
    """Whether this process writes for all: the only one, or rank 0."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def start_recorder(config: AdaptiveClipConfig, *, writes: bool, exact: bool, ops: Ops, **run: Any) -> Recorder:
    """The recorder of a run that begins or goes on here.

    Args:
        config: The complete config.
        writes: Whether this process writes the ledger.
        exact: Whether a replay gives the same bits.
        ops: The kind of numbers that rows are made of.
        run: As for `ledger_header`.
    """
    ledger = None
    if writes:
        header = ledger_header(config, exact=exact, **run)
        ledger = Ledger(str(config.ledger), header, required=config.ledger_required)
    return Recorder(
        capacity=config.ring_capacity,
        num_tensors=run["num_tensors"],
        ops=ops,
        device=run["device"],
        statistics=run["statistics"],
        first_step=run["first_step"],
        events=EventTracker.of_run(config.to_dict(), run["num_tensors"]),
        ledger=ledger,
    )


def ledger_header(
    config: AdaptiveClipConfig,
    *,
    exact: bool,
    state: tuple[Value, ...],
    static_threshold: float,
    device: torch.device,
    num_tensors: int,
    grouping: Grouping | None,
    first_step: int,
    statistics: RunStatistics,
    parent: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that the decisions of a run follow from, and where it ran: the first line of its segment in the ledger.

    Args:
        config: The complete config.
        exact: Whether a replay gives the same bits.
        state: The controller's state before the first step.
        static_threshold: Threshold of the warm-up.
        device: Where the gradients are.
        num_tensors: Tensors, or groups of them, with a norm of their own; 0 when only the global norm counts.
        grouping: Which tensors are judged together, with names; None when only the global norm counts.
        first_step: Step of the first record.
        statistics: Counts so far, which the footer goes on from.
        parent: For a resumed run, hash and step of the ledger's seal that its checkpoint refers to.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": environment(),
        "config": config.to_dict(),
        "controller": config.controller,
        "exact": exact,
        "static_threshold": static_threshold,
        "device": device.type,
        "world_size": torch.distributed.get_world_size() if distributed else 1,
        "seed": torch.initial_seed(),
        "num_tensors": num_tensors,
        "groups": [] if grouping is None else list(grouping.names),
        "parts": [] if grouping is None else [list(part) for part in grouping.parts],
        "first_step": first_step,
        "counts": statistics.counts_by_name(),
        "initial_state": state_to_json(state),
        "parent": parent,
    }
