"""Gradients that are spread over ranks: `DTensor`, as FSDP2 (`fully_shard`) and tensor parallelism make them.

Every rank takes the norm of the part it holds; the squares are then added over the mesh, those of all tensors of one layout in one
small collective. (`DTensor.full_tensor` on each norm, the obvious way, is one collective per tensor and step.)
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(gradient: Tensor) -> "TypeGuard[DTensor]":
    """Whether a gradient is a `DTensor`, whatever its placement."""
    # Not by isinstance: importing the class takes a second, which only those who have one should pay.
    return type(gradient) is not Tensor and hasattr(gradient, "device_mesh")


def local_part(gradient: Tensor) -> Tensor:
    """What this rank holds of a gradient, sharing its memory; a plain tensor is its own part."""
    return gradient.to_local() if is_sharded(gradient) else gradient


def summed_part(gradient: Tensor) -> Tensor:
    """As `local_part`, but with a pending sum (a `Partial` placement, from sequence parallelism) carried out first.

    Of a pending sum the norms of the parts say nothing about the norm of the whole, so this is one more collective for such a tensor.
    """
    if is_sharded(gradient) and any(p.is_partial() for p in gradient.placements):
        from torch.distributed.tensor import Replicate

        placements = [Replicate() if p.is_partial() else p for p in gradient.placements]
        return gradient.redistribute(placements=placements).to_local()
    return local_part(gradient)


def norms_over_ranks(gradients: list[Tensor], norms: Tensor) -> Tensor:
    """From the norm of every rank's part to the norm of the whole.

    Args:
        gradients: The gradients.
        norms: Norms of their parts on this rank, float32, shape `[len(gradients)]`.

    Returns:
        float32, shape `[len(gradients)]`, the same bits on every rank.
    """
    layouts: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for position, gradient in enumerate(gradients):
        if is_sharded(gradient):
            split = tuple(d for d, p in enumerate(gradient.placements) if not (p.is_replicate() or p.is_partial()))
            if split:
                layouts.setdefault((gradient.device_mesh, split), []).append(position)
    if not layouts:
        return norms
    # In float64: squares of a float32 norm overflow above 1e19 and vanish below 1e-23.
    squares = norms.double().square()
    for (mesh, split), positions in layouts.items():
        everything = len(positions) == len(gradients)
        part = squares if everything else squares[positions]
        for dimension in split:
            torch.distributed.all_reduce(part, group=mesh.get_group(dimension))  # type: ignore[attr-defined]
        if not everything:
            squares[positions] = part
    return squares.sqrt().float()
