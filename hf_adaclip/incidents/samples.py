"""The samples of a batch one by one, and the few of many that a gradient comes from."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor

MOST_ALONE: Final = 256
"""Samples up to which each is measured alone; of more, halves are measured, and halved again where the norm is."""
_FOUND: Final = 10
_NAMES: Final = ("labels", "input_ids", "pixel_values", "completion_ids")
"""Entries that have one row per sample, where others of a batch have not."""


class Sample(NamedTuple):
    """One sample, measured alone.

    Attributes:
        micro_batch: Which one of the step.
        row: Its place there.
        loss: Of it alone.
        norm: Of the gradient of that.
    """

    micro_batch: int
    row: int
    loss: float
    norm: float


def count_of(batch: Any) -> int:
    """Samples in a micro-batch; 0 where nothing tells."""
    sizes = {len(leaf) for leaf in _leaves(batch)}
    if len(sizes) == 1:
        return sizes.pop()
    named = [batch[n] for n in _NAMES if n in batch] if isinstance(batch, Mapping) else []
    return next((len(value) for value in named if _has_rows(value)), 0)


def rows_of(batch: Any, first: int, last: int) -> Any:
    """The samples from `first` up to `last` of a micro-batch; what has no row for each of them stays whole."""
    return _cut(batch, count_of(batch), slice(first, last))


def _cut(value: Any, count: int, rows: slice) -> Any:
    if _has_rows(value):
        return value[rows] if len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _cut(inner, count, rows) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if value and not any(isinstance(inner, Tensor | np.ndarray | Mapping | list | tuple) for inner in value):
            return value[rows] if len(value) == count else value
        return type(value)(_cut(inner, count, rows) for inner in value)
    return value


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def _leaves(value: Any) -> Iterator[Any]:
    if _has_rows(value):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)


def bisect(micro_batches: list[Any], measure: Callable[[int, Any], tuple[float, float]]) -> list[Sample]:
    """Samples by the norm of their gradient, the largest first; those that are not finite before all others.

    Args:
        micro_batches: Of the step; one whose samples cannot be told apart is left out.
        measure: Gives loss and norm of some samples of a micro-batch, from its number and what is fed.

    Returns:
        All samples, where they are at most `MOST_ALONE`; else those that halving has led to, about ten.
    """
    counts = [count_of(batch) for batch in micro_batches]

    def look(number: int, first: int, last: int) -> tuple[float, float]:
        return measure(number, rows_of(micro_batches[number], first, last))

    if sum(counts) <= MOST_ALONE:
        alone = [(number, row) for number, count in enumerate(counts) for row in range(count)]
        found = [Sample(number, row, *look(number, row, row + 1)) for number, row in alone]
    else:
        found = list(_halved(counts, look))
    return sorted(found, key=lambda sample: -_size(sample.norm))


def _halved(counts: list[int], look: Callable[[int, int, int], tuple[float, float]]) -> Iterator[Sample]:
    """Best first: of all groups the one with the largest norm is halved next, until enough single samples are left over."""
    order, looks, found = itertools.count(), 0, 0
    groups: list[tuple[float, int, int, int, int, float, float]] = []

    def add(number: int, first: int, last: int) -> None:
        loss, norm = look(number, first, last)
        # A mean over many hides one of them.
        heapq.heappush(groups, (-_size(norm) * (last - first), next(order), number, first, last, loss, norm))

    for number, count in enumerate(counts):
        if count:
            add(number, 0, count)
            looks += 1
    while groups and found < _FOUND and looks < MOST_ALONE:
        _, _, number, first, last, loss, norm = heapq.heappop(groups)
        if last - first == 1:
            found += 1
            yield Sample(number, first, loss, norm)
            continue
        middle = (first + last) // 2
        add(number, first, middle)
        add(number, middle, last)
        looks += 2


def _size(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm
