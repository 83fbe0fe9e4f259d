"""Which coordinates of large tensors are looked at where a quotient of two sums is wanted: a sample changes its noise, not its size."""

from typing import Final, TypeAlias

from torch import Tensor

EVERY: Final = 31
MOST: Final = 1 << 18
_BLOCK: Final = 16  # coordinates in a row: a cache line of float32

Grid: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a view."""


def spacing(total: int) -> int:
    """One coordinate in how many, of so many: so that not more than about `MOST` are looked at."""
    return max(EVERY, -(-total // MOST))


def grid_of(count: int, every: int) -> Grid:
    """Which coordinates of a tensor are looked at, one in `every`: in blocks, which cost less to read, where there is room for some."""
    size = _BLOCK * every
    if count < size:
        return (-(-count // every),), (every,)
    return (count // size, _BLOCK), (size, 1)


def sample_of(tensor: Tensor, grid: Grid) -> Tensor:
    """These coordinates, numbered along the tensor's rows; a view, unless the memory has gaps or another order."""
    flat = tensor if tensor.is_contiguous() else tensor.reshape(-1)
    return flat.as_strided(*grid)
