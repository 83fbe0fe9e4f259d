"""Natural logarithm and exponential with the same bits on every device.

The libraries' own differ in the last bit between numpy, torch on a CPU and CUDA, and a decision recorded on one would not be the decision
recomputed on another. Here the exponent is taken from the number's bits and the rest is + - * / in float32, each operation rounded once.
Relative error below 4e-7 (absolute for a logarithm near 0).
"""

from hf_adaclip.controllers.numerics.ops import Ops, Value

_SQRT2 = 1.4142135
# log 2 in two parts: the first has few enough bits that its product with an exponent is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_SMALLEST, _LARGEST = 1.2e-38, 88.0


def logarithm(a: Value, ops: Ops) -> Value:
    """log a, for a > 0; what is below the smallest normal float32 counts as that. Meaningless for NaN and infinities."""
    exponent, m = ops.take_apart(ops.maximum(a, ops(_SMALLEST)))
    large = m > ops(_SQRT2)
    m = ops.where(large, m * ops(0.5), m)
    exponent = ops.where(large, exponent + ops(1.0), exponent)
    # log m = 2 atanh(t), |t| < 0.172
    t = (m - ops(1.0)) / (m + ops(1.0))
    u = t * t
    series = ops(1.0 / 7.0) + u * ops(1.0 / 9.0)
    series = ops(1.0 / 5.0) + u * series
    series = ops(1.0 / 3.0) + u * series
    log_m = ops(2.0) * t * (ops(1.0) + u * series)
    return exponent * ops(_LN2_HIGH) + (exponent * ops(_LN2_LOW) + log_m)


def exponential(a: Value, ops: Ops) -> Value:
    """exp a, for |a| <= 88 (beyond, that of 88 or -87)."""
    a = ops.minimum(ops.maximum(a, ops(-87.0)), ops(_LARGEST))
    k = ops.floor(a * ops(1.4426950) + ops(0.5))
    r = a - k * ops(_LN2_HIGH) - k * ops(_LN2_LOW)
    series = ops(1.0 / 720.0) + r * ops(1.0 / 5040.0)
    for factor in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        series = ops(factor) + r * series
    return series * ops.power_of_two(k)
