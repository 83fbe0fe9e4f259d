"""What happened in a run: rows on the device, counts on the host, lines in the ledger."""

import time
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.audit.ledger import Ledger
from hf_adaclip.audit.records import step_record
from hf_adaclip.audit.ring import COLUMNS, DeviceRing, HostRing, Ring
from hf_adaclip.controllers import Reason
from hf_adaclip.controllers.ops import Ops
from hf_adaclip.statistics import RunStatistics


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
    ) -> None:
        self._ring: Ring = HostRing(capacity) if ops.on_host else DeviceRing(capacity, num_tensors, device)
        self._statistics = statistics
        self._next_record = first_step
        self._times: list[float] = []
        self._started = time.monotonic()
        self.ledger = ledger

    @property
    def full(self) -> bool:
        """Whether the rows have to be read before another one fits."""
        return self._ring.full

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        """Add the row of one step: a float32 value per column but `applied_norm`."""
        self._ring.append(values, norms)
        self._times.append(time.monotonic() - self._started)

    def set_applied(self, norm: Tensor) -> None:
        """The norm that really reached the optimizer in the newest step, if its row is still here."""
        if len(self._ring):
            self._ring.set_applied(norm)

    def flush(self) -> None:
        """Read all rows (one host read), count them, write them down."""
        if not len(self._ring):
            return
        rows = self._ring.drain()
        times, self._times = self._times, []
        records = []
        for position, (values, seconds) in enumerate(zip(rows.values, times, strict=True)):
            row = dict(zip(COLUMNS, values, strict=True))
            self._statistics.add(row, Reason(int(row["reason"])))
            if self.ledger is not None:
                norms = None if rows.norms is None else rows.norms[position]
                records.append(step_record(self._next_record, row, seconds, norms))
            self._next_record += 1
        if self.ledger is not None:
            self.ledger.steps(records)
