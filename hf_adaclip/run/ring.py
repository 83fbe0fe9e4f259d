"""Rows of a run wait here until somebody looks: on the device, so that the loop never waits for the host."""

import math
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_adaclip.gradients.transfer import HOST, moved, start_copy
from hf_adaclip.ledger.schema import SHAPE_FIELDS

DECIDED: Final = ("norm", "threshold", "coefficient", "pace", "reason", "loss", "loss_scale", "reach")
COLUMNS: Final = (*DECIDED, *SHAPE_FIELDS, "applied_norm")
"""The last ones are filled in after the decision, and NaN where that does not happen."""
LOOK_EVERY: Final = 12
"""Steps between two looks at rows that are on an accelerator: what ends a run is noticed 12 to 24 steps later, and without waiting."""
_APPLIED: Final = COLUMNS.index("applied_norm")


class Rows(NamedTuple):
    """Rows as the host sees them.

    Attributes:
        values: One row per step, in the order of `COLUMNS`.
        norms: Norm of every tensor per step when the granularity is per tensor, else None.
    """

    values: list[list[float]]
    norms: list[list[float]] | None


class Ring(Protocol):
    """One row per optimizer step."""

    @property
    def full(self) -> bool: ...

    def __len__(self) -> int:
        """Rows that nobody has been given yet."""

    @property
    def newest(self) -> Tensor | list[float]:
        """The newest row that nobody has been given yet, as far as it is filled in: where it lies, on the device or on the host."""

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        """Add a row: one float32 value per column but the last, which is filled in by `set_applied`."""

    def set_applied(self, norm: Tensor) -> None:
        """Fill in the norm that really reached the optimizer, for the newest row."""

    def fill(self, column: str, value: Any) -> None:
        """Fill in another value of the newest row: a number, or a tensor of shape `[]`."""

    def look(self) -> Rows:
        """Rows that can be had without waiting, oldest first; none when it is not time. The newest row must be complete."""

    def drain(self) -> Rows:
        """Read everything and start over."""


class DeviceRing:
    """A ring buffer on an accelerator; `drain` is the only host read that waits.

    At every `LOOK_EVERY`-th step `look` starts a copy of the newest rows, and hands it out when it starts the next: by then it has landed.
    That goes by steps alone, so every rank is given the same rows in the same step, whatever its device is at.

    Args:
        capacity: Rows kept before they must be drained.
        num_tensors: Width of the per-tensor record; 0 keeps none.
        device: Where the rows are made.
    """

    def __init__(self, capacity: int, num_tensors: int, device: torch.device) -> None:
        self._rows = torch.full((capacity, len(COLUMNS)), math.nan, dtype=torch.float32, device=device)
        of_tensors = (capacity, num_tensors)
        self._norms = torch.full(of_tensors, math.nan, dtype=torch.float32, device=device) if num_tensors else None
        self._nan = torch.tensor(math.nan, dtype=torch.float32, device=device)
        # Where a copy to the host can be waited for by an event it needs pinned memory; elsewhere it is made at once.
        self._event = torch.Event(device) if device.type in ("cuda", "xpu") else None
        self._landing = [
            torch.empty(
                (min(LOOK_EVERY, capacity), t.shape[1]),
                dtype=torch.float32,
                device=HOST,
                pin_memory=self._event is not None,
            )
            for t in (self._rows, self._norms)
            if t is not None
        ]
        self._filled = self._given = self._copied = 0

    def __len__(self) -> int:
        return self._filled - self._given

    @property
    def full(self) -> bool:
        return self._filled == len(self._rows)

    @property
    def newest(self) -> Tensor:
        return self._rows[self._filled - 1]

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        torch.stack((*values, self._nan), out=self._rows[self._filled])
        if self._norms is not None:
            self._norms[self._filled].copy_(norms)
        self._filled += 1

    def set_applied(self, norm: Tensor) -> None:
        self._rows[self._filled - 1, _APPLIED].copy_(norm)

    def fill(self, column: str, value: Any) -> None:
        place = self._rows[self._filled - 1, COLUMNS.index(column)]
        place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)

    def look(self) -> Rows:
        if self._filled - self._copied < LOOK_EVERY:
            return Rows([], None)
        rows = self._take_copy()
        count = self._filled - self._copied
        for landing, source in zip(self._landing, (self._rows, self._norms), strict=False):
            assert source is not None
            start_copy(landing[:count], source[self._copied : self._filled], awaited=self._event is not None)
        if self._event is not None:
            self._event.record()
        self._copied = self._filled
        return rows

    def drain(self) -> Rows:
        rows = self._take_copy()
        left = slice(self._given, self._filled)
        values = rows.values + self._rows[left].tolist()
        norms = None if self._norms is None else [*(rows.norms or []), *self._norms[left].tolist()]
        self._filled = self._given = self._copied = 0
        return Rows(values, norms)

    def _take_copy(self) -> Rows:
        count, self._given = self._copied - self._given, self._copied
        if not count:
            return Rows([], None)
        if self._event is not None:
            self._event.synchronize()  # of a copy that many steps ago: it has landed, or the host was too far ahead
        values, *norms = (landing[:count].numpy().tolist() for landing in self._landing)
        return Rows(values, norms[0] if norms else None)


class HostRing:
    """The same for numbers that are in host memory already."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: list[list[float]] = []
        self._norms: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        return len(self._rows) == self._capacity

    @property
    def newest(self) -> list[float]:
        return self._rows[-1]

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        self._rows.append([*map(float, values), math.nan])
        if norms is not None:
            self._norms.append(norms.tolist())

    def set_applied(self, norm: Tensor) -> None:
        self._rows[-1][_APPLIED] = float(moved(norm, HOST).numpy())

    def fill(self, column: str, value: Any) -> None:
        self._rows[-1][COLUMNS.index(column)] = float(
            moved(value, HOST).numpy() if isinstance(value, Tensor) else value
        )

    def look(self) -> Rows:
        return self.drain()

    def drain(self) -> Rows:
        rows = Rows(self._rows, self._norms or None)
        self._rows, self._norms = [], []
        return rows
