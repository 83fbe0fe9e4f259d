"""The last norms, for rules that look at their order or their moments: a ring of bounded size, and what is asked of it."""

from typing import NamedTuple

from hf_adaclip.controllers.numerics.ops import SMALLEST_NORMAL, Ops, Shape, Value


class Window(NamedTuple):
    """A ring of norms.

    Attributes:
        history: Norms, shape `[size, *norm.shape]`; +inf where empty, so that empty places sort to the end.
        slot: Where the next norm goes.
        count: Norms seen in all.
    """

    history: Value
    slot: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


def empty_window(ops: Ops, shape: Shape, size: int) -> Window:
    """A window of `size` places for norms of this shape."""
    return Window(ops.full((size, *shape), float("inf")), ops.full(shape, 0.0), ops.full(shape, 0.0))


def remember(window: Window, norm: Value, usable: Value, ops: Ops) -> Window:
    """The window with `norm` in it, where it is `usable`; the oldest one makes room."""
    one, size = ops(1.0), ops(float(len(window.history)))
    after = window.slot + one
    return Window(
        history=ops.put(window.history, window.slot, norm, ~usable),
        slot=ops.where(usable, ops.where(after < size, after, ops(0.0)), window.slot),
        count=ops.where(usable, window.count + one, window.count),
    )


def quantile_of(window: Window, q: float, ops: Ops) -> Value:
    """The q-quantile of what is in the window, q in [0, 1], with straight lines between order statistics (as `numpy.quantile`)."""
    one, zero = ops(1.0), ops(0.0)
    ordered = ops.sort(window.history)
    last = ops.maximum(known_in(window, ops) - one, zero)
    position = last * ops(q)
    below = ops.floor(position)
    above = ops.minimum(below + one, last)
    low, high = ops.pick(ordered, below), ops.pick(ordered, above)
    return low + (high - low) * (position - below)


def known_in(window: Window, ops: Ops) -> Value:
    """How many norms the window holds."""
    return ops.minimum(window.count, ops(float(len(window.history))))


def mean_and_sd(window: Window, ops: Ops) -> tuple[Value, Value]:
    """Mean and sample standard deviation (over count - 1) of what is in the window; the deviation of fewer than two is 0.

    Squares are taken in units of a power of two near the mean: exact, and they neither overflow nor vanish.
    """
    one = ops(1.0)
    known = ops.maximum(known_in(window, ops), one)
    there = window.history < ops(float("inf"))
    mean = _total(ops.filled(window.history) / known)
    unit = unit_of(mean, ops)
    off = (ops.filled(window.history) - mean) * there * unit
    return mean, ops.sqrt(_total(off * off) / ops.maximum(known - one, one)) / unit


def unit_of(norm: Value, ops: Ops) -> Value:
    """The power of two that brings a norm near 1; norms so small or large that it is none are brought as near as goes."""
    exponent, _ = ops.take_apart(ops.maximum(norm, ops(SMALLEST_NORMAL)))
    return ops.power_of_two(ops.minimum(ops.maximum(-exponent, ops(-100.0)), ops(100.0)))


def _total(values: Value) -> Value:
    """Sum over the first axis in an order that is the same on every device: halves are added until one is left."""
    while len(values) > 1:
        half = len(values) // 2
        rest = values[2 * half :]
        values = values[:half] + values[half : 2 * half]
        if len(rest):
            values[:1] += rest
    return values[0]
