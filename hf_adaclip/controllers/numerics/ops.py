"""The few operations that controllers are written in, for three kinds of numbers with the same bits.

- `TensorOps`: float32 tensors on an accelerator. Nothing is read by the host. An operation is a kernel, and a step of `adaptive` some 400;
  so a run has a step written down once (`symbols`) and made into one kernel (`kernel`, `fused`), and comes here only where that fails.
- `ScalarOps`: `numpy.float32`, for the global norm of gradients that live in host memory, and for replaying a ledger.
  A 0-dim tensor costs 2 to 3 microseconds an operation on a CPU, a numpy scalar a twentieth of that.
- `ArrayOps`: float32 arrays, the same for per-tensor norms.

All three compute in IEEE float32 and round after each operation, so with + - * / sqrt and comparisons the results are equal bit for
bit; tests/controllers/test_ops.py holds them to it. A controller gets its operations from `ops_of(norm)`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch

Shape: TypeAlias = tuple[int, ...]


class Value(Protocol):
    """A float32 tensor, a `numpy.float32` or a float32 array; of bools, the same: what these have in common.

    Numbers take numbers of their own kind, or Python's. All else is done by [`Ops`].
    """

    @property
    def shape(self) -> Shape: ...
    def __add__(self, other: Any, /) -> "Value": ...
    def __sub__(self, other: Any, /) -> "Value": ...
    def __mul__(self, other: Any, /) -> "Value": ...
    def __truediv__(self, other: Any, /) -> "Value": ...
    def __neg__(self) -> "Value": ...
    def __abs__(self) -> "Value": ...
    def __lt__(self, other: Any, /) -> "Value": ...
    def __le__(self, other: Any, /) -> "Value": ...
    def __gt__(self, other: Any, /) -> "Value": ...
    def __ge__(self, other: Any, /) -> "Value": ...
    def __eq__(self, other: Any, /) -> "Value": ...  # type: ignore[override]
    def __ne__(self, other: Any, /) -> "Value": ...  # type: ignore[override]
    def __and__(self, other: Any, /) -> "Value": ...
    def __or__(self, other: Any, /) -> "Value": ...
    def __invert__(self) -> "Value": ...
    def __getitem__(self, position: Any, /) -> "Value": ...
    def __setitem__(self, position: Any, value: Any, /) -> None: ...
    def __len__(self) -> int: ...
    def __float__(self) -> float: ...
    def __int__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def tolist(self) -> Any: ...


SMALLEST_NORMAL: Final = 2.0**-126
"""Below it float32 has fewer digits; norms that small are counted as this one where a level is learned."""

# The parts of a float32: exponent bias, bits of the fraction, and the bits of 1.0.
_BIAS, _FRACTION, _ONE = 127, 0x007FFFFF, 0x3F800000


class Ops(Protocol):
    """What a controller may do besides arithmetic. `where` takes both branches as values, as `torch.where` does."""

    on_host: bool

    def __call__(self, value: float) -> Value:
        """A constant."""

    def full(self, shape: Shape, value: float) -> Value: ...
    def expand(self, value: Value, shape: Shape) -> Value: ...
    def shape(self, value: Value) -> Shape: ...
    def where(self, condition: Value, yes: Value, no: Value) -> Value: ...
    def minimum(self, a: Value, b: Value) -> Value: ...
    def maximum(self, a: Value, b: Value) -> Value: ...
    def sqrt(self, a: Value) -> Value: ...
    def floor(self, a: Value) -> Value: ...
    def sort(self, history: Value) -> Value:
        """Sorted along the first axis."""

    def pick(self, history: Value, position: Value) -> Value:
        """`history[position]` along the first axis, for whole-numbered float positions of the shape of one row."""

    def put(self, history: Value, position: Value, value: Value, keep: Value) -> Value:
        """A copy of `history` with `history[position] = value`, except where `keep`."""

    def filled(self, history: Value) -> Value:
        """`history` with 0 where it holds +inf."""

    def join(self, values: list[Value]) -> Value:
        """One vector after the other."""

    def take_apart(self, a: Value) -> tuple[Value, Value]:
        """Exponent e and mantissa m in [1, 2) with a = m 2^e, for normal a > 0."""

    def power_of_two(self, exponent: Value) -> Value:
        """2 to a whole-numbered float in [-126, 127]."""


class TensorOps:
    """Operations on tensors of one device. Constants are made once: tensor by tensor costs half of tensor by Python number."""

    on_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[float, torch.Tensor] = {}

    def __call__(self, value: float) -> torch.Tensor:
        known = self._known.get(value)
        if known is None:
            known = torch.tensor(value, dtype=torch.float32, device=self.device)
            if value == value or value is math.nan:  # the one NaN that is found again
                self._known[value] = known
        return known

    def full(self, shape: Shape, value: float) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.float32, device=self.device)

    def expand(self, value: Any, shape: Shape) -> torch.Tensor:
        return value.expand(shape)  # type: ignore[no-any-return]

    def shape(self, value: Any) -> Shape:
        return tuple(value.shape)

    def where(self, condition: Any, yes: Any, no: Any) -> torch.Tensor:
        return torch.where(condition, yes, no)

    def minimum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.maximum(a, b)

    def sqrt(self, a: Any) -> torch.Tensor:
        # torch's own float32 square root is off by one bit in a fifth of all cases on some CPUs (2.13, vectorised kernels);
        # taken in float64 and rounded it is the correctly rounded one, which numpy gives too.
        return torch.sqrt(a.double()).float()

    def floor(self, a: Any) -> torch.Tensor:
        return torch.floor(a)

    def sort(self, history: Any) -> torch.Tensor:
        return torch.sort(history, dim=0).values

    def pick(self, history: Any, position: Any) -> torch.Tensor:
        return history.gather(0, position.long().unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]

    def put(self, history: Any, position: Any, value: Any, keep: Any) -> torch.Tensor:
        places = torch.arange(len(history), dtype=torch.int64, device=self.device).reshape(-1, *([1] * value.dim()))
        return torch.where((places == position) & ~keep, value, history)

    def filled(self, history: Any) -> torch.Tensor:
        return torch.where(history < math.inf, history, 0.0)

    def join(self, values: list[Any]) -> torch.Tensor:
        return torch.cat(values)

    def take_apart(self, a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bits = a.view(torch.int32)
        return ((bits >> 23) - _BIAS).float(), ((bits & _FRACTION) | _ONE).view(torch.float32)

    def power_of_two(self, exponent: Any) -> torch.Tensor:
        return ((exponent.to(torch.int32) + _BIAS) << 23).view(torch.float32)  # type: ignore[no-any-return]


class ArrayOps:
    """Operations on float32 arrays in host memory."""

    on_host = True

    def __init__(self) -> None:
        self._known: dict[float, Any] = {}

    def __call__(self, value: float) -> Any:
        known = self._known.get(value)
        if known is None:
            known = np.float32(value)
            if value == value:  # a NaN is never found again
                self._known[value] = known
        return known

    def full(self, shape: Shape, value: float) -> Any:
        return np.full(shape, value, dtype=np.float32)

    def expand(self, value: Any, shape: Shape) -> Any:
        return np.broadcast_to(value, shape)

    def shape(self, value: Any) -> Shape:
        return tuple(value.shape)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return np.where(condition, yes, no)

    def minimum(self, a: Any, b: Any) -> Any:
        return np.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return np.maximum(a, b)

    def sqrt(self, a: Any) -> Any:
        return np.sqrt(a)

    def floor(self, a: Any) -> Any:
        return np.floor(a)

    def sort(self, history: Any) -> Any:
        return np.sort(history, axis=0)

    def pick(self, history: Any, position: Any) -> Any:
        return np.take_along_axis(history, position.astype(np.int64)[None], axis=0)[0]

    def put(self, history: Any, position: Any, value: Any, keep: Any) -> Any:
        places = np.arange(len(history)).reshape(-1, *([1] * value.ndim))
        return np.where((places == position) & ~keep, value, history)

    def filled(self, history: Any) -> Any:
        return np.where(history < np.inf, history, np.float32(0))

    def join(self, values: list[Any]) -> Any:
        return np.concatenate(values)

    def take_apart(self, a: Any) -> tuple[Any, Any]:
        bits = a.view(np.int32)
        return ((bits >> 23) - _BIAS).astype(np.float32), ((bits & _FRACTION) | _ONE).view(np.float32)

    def power_of_two(self, exponent: Any) -> Any:
        return ((exponent.astype(np.int32) + _BIAS) << 23).view(np.float32)


class ScalarOps(ArrayOps):
    """Operations on `numpy.float32` numbers. Plain Python where numpy's machinery for arrays would cost ten times as much."""

    def full(self, shape: Shape, value: float) -> Any:
        return np.full(shape, value, dtype=np.float32) if shape else np.float32(value)

    def expand(self, value: Any, shape: Shape) -> Any:
        return value

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return yes if condition else no

    # A NaN wins on either side, as it does in torch and in numpy.
    def minimum(self, a: Any, b: Any) -> Any:
        return a if a < b or a != a else b

    def maximum(self, a: Any, b: Any) -> Any:
        return a if a > b or a != a else b

    def pick(self, history: Any, position: Any) -> Any:
        return history[int(position)]

    def put(self, history: Any, position: Any, value: Any, keep: Any) -> Any:
        if keep:
            return history
        changed = history.copy()
        changed[int(position)] = value
        return changed


SCALAR: Final = ScalarOps()
ARRAY: Final = ArrayOps()


def host_number(value: float) -> Value:
    """A `numpy.float32`, which is not kept as a constant of [`Ops`] is."""
    made: Any = np.float32(
        value
    )  # a flag of numpy knows no arithmetic, and its numbers no `~`; both at once is what nobody asks of one
    return made  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def tensor_ops(device: torch.device) -> TensorOps:
    return TensorOps(device)


Lane: TypeAlias = Callable[[torch.device, Shape], Ops]
"""Chooses the operations for norms of a shape whose gradients live on a device."""


def ops_for(device: torch.device, shape: Shape) -> Ops:
    """The lane of every run: gradients in host memory are judged as numbers of the host, all others where they are."""
    if device.type != "cpu":
        return tensor_ops(device)
    return ARRAY if shape else SCALAR


def ops_of(value: Value) -> Ops:
    """The operations for this kind of number."""
    if isinstance(value, torch.Tensor):
        return tensor_ops(value.device)
    if isinstance(value, np.ndarray):
        return ARRAY
    symbolic: Ops = getattr(value, "ops", SCALAR)  # of a `Symbol`, which this module does not know
    return symbolic
