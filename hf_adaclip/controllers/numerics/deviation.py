"""How far a norm is from a level, and the way back: d and u of `adaptive`, in + - * / alone."""

from hf_adaclip.controllers.numerics.ops import Ops, Value

INNER_EDGE = 0.6
"""Deviation beyond which the range is bounded by the static threshold: u(0.6, L) = 1.86 L."""


def deviation(norm: Value, level: Value, ops: Ops) -> Value:
    """d(n, L) = 2 (n - L) / (n + L), in [-2, 2]."""
    return ops(2.0) * (norm - level) / (norm + level)


def above(level: Value, deviation: Value, ops: Ops) -> Value:
    """u(e, L) = L (2 + e) / (2 - e), the inverse of `deviation` in its first argument; |e| < 2."""
    two = ops(2.0)
    return level * (two + deviation) / (two - deviation)
