"""The newest row of a run on the host, as soon as it can be had without waiting.

The recorder looks at rows on an accelerator once in `LOOK_EVERY` steps, when the batch has long been let go. Here every row is copied by
itself into pinned memory, and taken when its event has passed. The host is seldom more than a step ahead of its device.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.transfer import HOST, start_copy

SLOTS: Final = 32
"""Rows that may be on their way. Only a host that is further ahead than that waits, for the oldest."""


class RowCopies:
    """Copies of single rows that nobody waits for.

    Args:
        width: Numbers in a row.
        device: Where rows are made.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._awaited = device.type in ("cuda", "xpu")
        self._landing = torch.empty((SLOTS, width), dtype=torch.float32, device=HOST, pin_memory=self._awaited)
        self._memory = self._landing.numpy()  # once: a look at memory that is the host's own waits for nothing
        self._events: list[Any] = [torch.Event(device) if self._awaited else None for _ in range(SLOTS)]
        self._flying: deque[tuple[int, int]] = deque()
        self._next = 0

    def start(self, step: int, row: Tensor) -> None:
        """Start the copy of one step's row; there must be a slot left (see `landed`)."""
        slot, self._next = self._next, (self._next + 1) % SLOTS
        start_copy(self._landing[slot], row, awaited=self._awaited)
        if self._awaited:
            self._events[slot].record()
        self._flying.append((step, slot))

    def landed(self, *, wait: bool = False) -> Iterator[tuple[int, list[float]]]:
        """Steps and their rows, oldest first, that are here by now; all of them where the host is to wait."""
        while self._flying:
            step, slot = self._flying[0]
            if wait or len(self._flying) == SLOTS:
                if self._awaited:
                    self._events[slot].synchronize()
            elif not self._passed(slot):
                return
            self._flying.popleft()
            yield step, self._memory[slot].tolist()

    def _passed(self, slot: int) -> bool:
        return not self._awaited or bool(self._events[slot].query())


def as_row(columns: tuple[str, ...], values: list[float]) -> dict[str, float]:
    """A row by column; a reason that is no number counts as the first."""
    row = dict(zip(columns, values, strict=True))
    row["reason"] = row["reason"] if math.isfinite(row["reason"]) else 0.0
    return row
