"""Rows of a run wait here until somebody looks: on the device, so that the loop never waits for the host."""

import math
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_adaclip.gradients.transfer import HOST, moved

COLUMNS: Final = ("norm", "threshold", "coefficient", "pace", "reason", "loss", "loss_scale", "reach", "applied_norm")
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

    def __len__(self) -> int: ...

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        """Add a row: one float32 value per column but the last, which is filled in by `set_applied`."""

    def set_applied(self, norm: Tensor) -> None:
        """Fill in the norm that really reached the optimizer, for the newest row."""

    def drain(self) -> Rows:
        """Read everything and start over."""


class DeviceRing:
    """A ring buffer on an accelerator; `drain` is the only host read.

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
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def full(self) -> bool:
        return self._filled == len(self._rows)

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        torch.stack((*values, self._nan), out=self._rows[self._filled])
        if self._norms is not None:
            self._norms[self._filled].copy_(norms)
        self._filled += 1

    def set_applied(self, norm: Tensor) -> None:
        self._rows[self._filled - 1, _APPLIED].copy_(norm)

    def drain(self) -> Rows:
        used, self._filled = self._filled, 0
        return Rows(self._rows[:used].tolist(), None if self._norms is None else self._norms[:used].tolist())


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

    def append(self, values: tuple[Any, ...], norms: Any = None) -> None:
        self._rows.append([*map(float, values), math.nan])
        if norms is not None:
            self._norms.append(norms.tolist())

    def set_applied(self, norm: Tensor) -> None:
        self._rows[-1][_APPLIED] = float(moved(norm, HOST).numpy())

    def drain(self) -> Rows:
        rows = Rows(self._rows, self._norms or None)
        self._rows, self._norms = [], []
        return rows
