"""Many small operations on numbers of a device, in one launch.

An update of `adaptive` is some 400 operations on single numbers. As tensor operations each costs the host a few microseconds and the device
a kernel. Here the function is written down once (`symbols`) and made into one kernel (`kernel`). Why so, and not otherwise:

- `torch.compile` needs a C compiler at run time and seconds at the start, and joins multiplications and additions unless several of its
  settings say no; nothing of what it makes for CUDA can be tried on a CPU. Here the text of the kernel is ours, and a test compiles it.
- A captured CUDA graph is one launch for the host, and still 400 kernels for the device; it wants buffers that stay where they are, and a
  memory pool beside the user's own graphs. This kernel keeps nothing: it is launched like any operation of torch, on the current stream.

A kernel is used only after it has given the bits of the tensor operations on planted numbers, on the device itself. Where it cannot be made
or differs, one line says so, and the operations are made one by one as before.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.kernel import Argument, Launch, build
from hf_adaclip.controllers.numerics.ops import Shape
from hf_adaclip.controllers.numerics.symbols import (
    BOOL,
    FLOAT,
    Leaf,
    NotTraceableError,
    Place,
    Program,
    rebuild,
    trace,
)

CHECKED: Final = 512
"""Planted lanes on which a kernel has to give the bits of the tensor operations, before it is used."""


class _Made(NamedTuple):
    """A kernel, and how its results go together."""

    launch: Launch
    program: Program
    outcome: Any
    rows: tuple[int, ...]


class Fused:
    """A function of a state and other numbers, on one device: one launch where that can be, else operation by operation.

    Args:
        function: Takes a state and more; gives (state after it, more), all nested tuples of values, None and bools. Hashable, pure, and
            elementwise: what it does with a lane depends on no other.
        device: Where the values are.
        shape: Of the lanes: `[]`, or `[n]`.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, shape: Shape) -> None:
        self._function, self._device, self._shape = function, device, shape
        self._lanes = shape[0] if shape else 1
        self._made: dict[Any, _Made | None] = {}
        # State as the last launch left it, and the one tensor that its fields are views of.
        self._state: tuple[Any, ...] | None = None
        self._packed: Tensor | None = None

    def __call__(self, state: tuple[Any, ...], *more: Any) -> Any:
        values: list[Any] = []
        kinds: list[tuple[str, int, bool, bool]] = []

        def place(value: Any) -> Any:
            if value is None or isinstance(value, bool):
                return value
            if isinstance(value, Tensor):
                shared = bool(self._shape) and not value.dim()
                kinds.append((BOOL if value.dtype is torch.bool else FLOAT, self._rows_of(value), shared, False))
                value = value.contiguous()
            else:
                kinds.append((FLOAT, 0, True, True))
            values.append(value)
            return Place(len(values) - 1)

        key = (tuple(rebuild(part, place) for part in more), tuple(kinds))
        if key not in self._made:
            self._made[key] = self._make(state, *key)
        made = self._made[key]
        if made is None:
            return self._function(state, *more)
        if state:
            values.insert(0, self._pack(state))
        return self._results(made, made.launch(values, self._lanes), len(state))

    @property
    def launches(self) -> int | None:
        """1 where all is one launch; None where it is one for each operation, or nothing has been done yet."""
        return 1 if self._made and None not in self._made.values() else None

    def _rows_of(self, value: Tensor) -> int:
        return int(value.shape[0]) if value.dim() > len(self._shape) else 0

    def _pack(self, state: tuple[Any, ...]) -> Tensor:
        """A state as one tensor: that of the last launch, or one more launch."""
        if self._packed is not None and self._state is not None and all(map(operator.is_, state, self._state)):
            return self._packed
        return torch.cat([field.reshape(-1, self._lanes) for field in state])

    def _make(self, state: tuple[Any, ...], tree: Any, kinds: tuple[tuple[str, int, bool, bool], ...]) -> _Made | None:
        fields = tuple(Leaf(FLOAT, self._rows_of(field)) for field in state)
        places = map(Place, range(len(fields)))
        whole = rebuild(state, lambda _: next(places))
        shifted = rebuild(tree, lambda leaf: Place(leaf.number + len(fields)) if isinstance(leaf, Place) else leaf)
        others = tuple(Argument(Leaf(kind, rows), shared, by_value) for kind, rows, shared, by_value in kinds)
        return _kernel_of(self._function, whole, shifted, fields, others, bool(self._shape), self._device)

    def _results(self, made: _Made, found: tuple[Tensor | None, Tensor | None], fields: int) -> Any:
        floats, bools = found
        shape = self._shape
        rows = [() if t is None else (t if shape else t.view(-1)).unbind() for t in (floats, bools)]
        taken = [0, 0]
        values: list[Any] = []
        kinds = iter(made.program.kinds)
        for count in made.rows:
            which = next(kinds) == BOOL
            for _ in range(count - 1):
                next(kinds)
            begin = taken[which]
            taken[which] += max(count, 1)
            if count:
                assert floats is not None
                values.append(floats[begin : begin + count].view(count, *shape))
            else:
                values.append(rows[which][begin])
        result = rebuild(made.outcome, lambda leaf: values[leaf.number] if isinstance(leaf, Place) else leaf)
        if fields:
            assert floats is not None
            self._state = result[0]
            self._packed = floats[: sum(max(count, 1) for count in made.rows[:fields])]
        return result


@functools.lru_cache(maxsize=128)
def _kernel_of(
    function: Callable[..., Any],
    state: Any,
    tree: Any,
    fields: tuple[Leaf, ...],
    others: tuple[Argument, ...],
    in_lanes: bool,
    device: torch.device,
) -> _Made | None:
    """One for all runs of a process that do the same. None where operations have to be made one by one."""
    leaves = [*fields, *(a.leaf for a in others)]
    try:
        program, outcome, rows = trace(function, (state, *tree), leaves)
    except NotTraceableError:
        return None
    packed = [Argument(Leaf(FLOAT, sum(max(f.rows, 1) for f in fields)), shared=False)] if fields else []
    try:
        launch = build(program, [*packed, *others], device)
        made = _Made(launch, program, outcome, tuple(rows))
        if not _gives_the_same(made, function, (state, *tree), fields, others, device):
            raise RuntimeError("it differs from tensor operations on planted numbers")
    except Exception as error:  # whatever the compilers of all machines may raise, a training goes on without
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        if why not in (known := _failed.setdefault(device.type, [])):
            known.append(why)
        return None
    return made


def failures(device: torch.device) -> list[str]:
    """In words, why kernels could not be made or used on a kind of device, though they should; for whoever can tell people."""
    return [
        f"a decision on {device.type} costs up to some hundred small launches a step, because no kernel could be made of them ({why}). The "
        "numbers are the same."
        for why in _failed.get(device.type, ())
    ]


_failed: dict[str, list[str]] = {}


def _gives_the_same(
    made: _Made,
    function: Callable[..., Any],
    tree: Any,
    fields: tuple[Leaf, ...],
    others: tuple[Argument, ...],
    device: torch.device,
) -> bool:
    """Whether a kernel gives the bits of tensor operations on planted lanes; but for the sign of a zero, and what is in a NaN."""
    rng = np.random.default_rng(0)
    arguments = [*(Argument(leaf, shared=False) for leaf in fields), *others]
    planted = [_planted(a, rng, strewn=i >= len(fields)) for i, a in enumerate(arguments)]
    tensors = [torch.tensor(p, dtype=torch.bool if p.dtype == bool else torch.float32, device=device) for p in planted]
    given: list[Any] = [
        float(p) if a.by_value else t
        for a, p, t in zip(others, planted[len(fields) :], tensors[len(fields) :], strict=True)
    ]
    if fields:
        given.insert(0, torch.cat([t.reshape(-1, CHECKED) for t in tensors[: len(fields)]]))
    floats, bools = made.launch(given, CHECKED)
    wanted: list[Tensor] = []

    def want(value: Any) -> None:
        for row in value if isinstance(value, list) else [value] if isinstance(value, Tensor) else ():
            wanted.extend(row.expand(*row.shape[:-1], CHECKED).reshape(-1, CHECKED).unbind())

    rebuild(function(*rebuild(tree, lambda leaf: tensors[leaf.number] if isinstance(leaf, Place) else leaf)), want)
    found = [iter(() if t is None else t.unbind()) for t in (floats, bools)]
    same = []
    for right, kind in zip(wanted, made.program.kinds, strict=True):
        got = next(found[kind == BOOL])
        same.append((got == right) | ((got != got) & (right != right)))
    agree = torch.stack(same).all()
    return bool(np.from_dlpack(agree) if device.type == "cpu" else agree)  # the one host read, as a run begins


def _planted(argument: Argument, rng: np.random.Generator, *, strewn: bool) -> np.ndarray[Any, Any]:
    """Numbers near 1, whole ones and zeros; `strewn` with what is no number or endless."""
    (kind, rows), shared, by_value = argument
    shape = () if shared or by_value else (rows, CHECKED) if rows else (CHECKED,)
    if kind == BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    which = rng.integers(0, 12, shape)
    numbers = np.select(
        [which < 6, which < 9, which == 9, (which == 10) & strewn & (shape != ())],
        [np.exp(rng.normal(0, 1, shape)), rng.integers(0, 120, shape), 0.0, np.nan],
        default=np.inf if strewn and shape else 1.0,
    )
    return np.asarray(numbers, dtype=np.float32)
