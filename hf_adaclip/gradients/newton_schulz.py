"""Singular values brought towards one value without a singular value decomposition: matrix products only.

Of a matrix X the soft clip at t is X (X'X + t^2)^(-1/2), which turns every singular value s into s / sqrt(s^2 + t^2). The inverse root is a
product of odd polynomials of degree 5, each the best one for the interval in which the singular values are known to be by then.

    H = (X'X + t^2) / bound      R = I
    repeat:  Q = a + b H + c H^2;   R = R Q;   H = Q H Q

In float32 all of this is done on the small side, where it costs the least (`inverse_root`). Half precision cannot hold the squares of
singular values, so there the polynomials act on [X; t] itself, whose singular values are the roots of those of H (`clipped_directly`).

Sources: Polar Express, Amsel et al. 2025, arXiv 2505.16932 (the polynomials); Muon, Jordan et al. 2024 (five products in bfloat16).
"""

import functools
import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

FLOOR: Final = 2e-3
"""Singular values below this part of the largest are hardly told apart from 0 in float32: `width` 0 clips there."""
HALF_FLOOR: Final = 1e-2
"""The same where the matrix itself is rounded to 8 bits: below is what rounding has made."""
TF32_FLOOR: Final = 3e-2
"""The same where squares are rounded to 10 bits: their eigenvalues below a thousandth of the largest are noise, and may be negative."""
TOLERANCE: Final = 0.05
"""Largest relative error of a value that `inverse_root` and `clipped_directly` give, rounding left aside."""
_CUSHION: Final = 0.024
"""The smallest part of an interval that a polynomial is made for, as in the source: beyond it would overshoot in rounded numbers."""
_SAFETY: Final = 1.01
"""What rounding to bfloat16 may add to the largest singular value."""

Quintic = tuple[float, float, float]


def smallest_value(width: float, side: int, floor: float = FLOOR) -> float:
    """The smallest singular value of [X; t], over a bound of its largest one.

    Args:
        width: t over the root mean square of the singular values of X.
        side: Number of singular values.
        floor: What it is at least.
    """
    return max(width / math.sqrt(side + width * width), floor)


@functools.cache
def quintics(smallest: float) -> tuple[Quintic, ...]:
    """Coefficients of a x + b x^3 + c x^5, one after the other, that together take [smallest, 1] to within `TOLERANCE` of 1."""
    low, high = smallest, 1.0
    found: list[Quintic] = []
    while 1 - low > TOLERANCE:
        a, b, c = _best_quintic(max(low, _CUSHION * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        centred = 2 / sum(ends)
        found.append((a * centred, b * centred, c * centred))
        low = ends[0] * centred
        high = 2 - low
    return tuple(found)


def _best_quintic(low: float, high: float) -> Quintic:
    """The odd polynomial of degree 5 that is nearest to 1 on an interval (Remez: its error takes its largest value four times)."""
    if low / high > 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = ((3 * low + high) / 4, (low + 3 * high) / 4)
    error, before = math.inf, math.nan
    a = b = c = 0.0
    while not abs(before - error) <= 1e-15:
        before = error
        points = (low, *inner, high)
        rows = np.array([[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)])
        a, b, c, error = np.linalg.solve(rows, np.ones(4)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def in_tf32(device: torch.device) -> bool:
    """Whether torch may multiply float32 in TF32 there. Its older switches set this one too, and cannot be read once it is set."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def floor_of(device: torch.device) -> float:
    """The floor for products of float32 as torch makes them there."""
    return TF32_FLOOR if in_tf32(device) else FLOOR


def inverse_root(grams: Tensor, width: float, floor: float = FLOOR) -> Tensor:
    """(X'X + t^2)^(-1/2) of matrices X, each up to a factor.

    Args:
        grams: X'X of matrices whose Frobenius norm is 1, float32, shape `[count, side, side]`; written over.
        width: t over the root mean square of the singular values.
        floor: What part of the largest singular value t is at least.

    Returns:
        float32, shape `[count, side, side]`.
    """
    side = grams.shape[-1]
    smallest = smallest_value(width, side, floor)
    bound = torch.linalg.vector_norm(grams, dim=(1, 2), keepdim=True)  # of the largest eigenvalue, and not above 1
    # Where the bound is below 1 the interval that is made sure of is wider than it has to be.
    shift = torch.clamp(bound * floor**2, min=width * width / side)
    rest = grams.div_(bound + shift)
    rest.diagonal(dim1=1, dim2=2).add_((shift / (bound + shift))[..., 0])
    root = torch.eye(side, dtype=torch.float32, device=grams.device).expand_as(grams)
    factor, spare, other = (
        torch.empty_like(grams) for _ in range(3)
    )  # kept for all products: memory costs as much as they do
    steps = quintics(smallest)
    for position, (a, b, c) in enumerate(steps, start=1):
        torch.baddbmm(rest, rest, rest, beta=b, alpha=c, out=factor)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        if position == 1:
            root = factor.clone()
        else:
            torch.bmm(root, factor, out=other)
            root, other = other, root
        if position < len(steps):
            torch.bmm(rest, factor, out=spare)
            torch.bmm(spare, factor, out=rest)
    return root


def clipped_directly(stack: Tensor, width: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """X (X'X + t^2)^(-1/2) of matrices X, each up to a factor, in half precision.

    Args:
        stack: Tall matrices whose Frobenius norm is 1, shape `[count, rows, side]`.
        width: t over the root mean square of the singular values.
        dtype: What products are rounded to; they are summed in float32.

    Returns:
        `dtype`, shape `[count, rows, side]`.
    """
    count, rows, side = stack.shape
    smallest = smallest_value(width, side, HALF_FLOOR)
    shift = smallest / math.sqrt(1 - smallest * smallest)
    bound = math.sqrt(1 + shift * shift) * _SAFETY
    below = torch.eye(side, dtype=dtype, device=stack.device).mul_(shift / bound).expand(count, side, side)
    x = torch.cat([(stack / bound).type(dtype), below], dim=1)
    for a, b, c in quintics(smallest / _SAFETY):
        gram = torch.bmm(x.mT, x)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a)
    return x[:, :rows]
