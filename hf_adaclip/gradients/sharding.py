"""Gradients that are spread over ranks: `DTensor`, as FSDP2 (`fully_shard`) and tensor parallelism make them.

Every rank takes the norm of the part it holds; the squares are then added over the mesh, those of all tensors of one layout in one
small collective. (`DTensor.full_tensor` on each norm, the obvious way, is one collective per tensor and step.)
"""

from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


Layout: TypeAlias = tuple[object, tuple[int, ...]]
"""A device mesh, and the dimensions of it over which a tensor is split."""


def is_sharded(gradient: Tensor) -> "TypeGuard[DTensor]":
    """Whether a gradient is a `DTensor`, whatever its placement."""
    # Not by isinstance: importing the class takes a second, which only those who have one should pay.
    return type(gradient) is not Tensor and hasattr(gradient, "device_mesh")


def local_part(gradient: Tensor) -> Tensor:
    """What this rank holds of a gradient, as real numbers, sharing its memory; a plain real tensor is its own part."""
    part = gradient.to_local() if is_sharded(gradient) else gradient
    return real_view(part) if part.is_complex() else part


def real_view(tensor: Tensor) -> Tensor:
    """The numbers of a complex tensor in an axis of length 2 at its end, sharing its memory.

    Its norm is that of the complex tensor, and scaling it scales that. Of a tensor that is only marked as conjugated the signs in
    memory are those before, which neither a norm nor a factor minds.
    """
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def summed_part(gradient: Tensor) -> Tensor:
    """As `local_part`, but with a pending sum (a `Partial` placement, from sequence parallelism) carried out first.

    Of a pending sum the norms of the parts say nothing about the norm of the whole, so this is one more collective for such a tensor.
    """
    if is_sharded(gradient) and any(p.is_partial() for p in gradient.placements):
        from torch.distributed.tensor import Replicate

        placements = [Replicate() if p.is_partial() else p for p in gradient.placements]
        return local_part(gradient.redistribute(placements=placements))
    return local_part(gradient)


def layout_of(tensor: Tensor) -> Layout | None:
    """How a tensor is spread; None when every rank holds all of it (a pending sum counts as carried out)."""
    if not is_sharded(tensor):
        return None
    split = tuple(d for d, p in enumerate(tensor.placements) if not (p.is_replicate() or p.is_partial()))
    return (tensor.device_mesh, split) if split else None


def sum_over_ranks_(values: Tensor, layout: Layout) -> Tensor:
    """Add up, in place, what the ranks have of tensors of one layout.

    Raises:
        UnsupportedSetupError: The numbers are in host memory, and the ranks speak to each other over accelerators.
    """
    mesh, split = layout
    kind = mesh.device_type  # type: ignore[attr-defined]
    if kind != values.device.type:
        raise UnsupportedSetupError(
            f"`parameters` must have their gradients on {kind}, over which their device mesh is, but they are on {values.device.type} "
            "instead: sharding with CPU offload has not been run. Train without `CPUOffloadPolicy`, or keep the stock clipping there."
        )
    for dimension in split:
        torch.distributed.all_reduce(values, group=mesh.get_group(dimension))  # type: ignore[attr-defined]
    return values


def norms_over_ranks(gradients: list[Tensor], norms: Tensor) -> Tensor:
    """From the norm of every rank's part to the norm of the whole.

    Args:
        gradients: The gradients.
        norms: Norms of their parts on this rank, float32, shape `[len(gradients)]`.

    Returns:
        float32, shape `[len(gradients)]`, the same bits on every rank.
    """
    layouts: dict[Layout, list[int]] = {}
    for position, gradient in enumerate(gradients):
        layout = layout_of(gradient)
        if layout is not None:
            layouts.setdefault(layout, []).append(position)
    if not layouts:
        return norms
    # In float64: squares of a float32 norm overflow above 1e19 and vanish below 1e-23.
    squares = norms.double().square()
    for layout, positions in layouts.items():
        everything = len(positions) == len(gradients)
        part = sum_over_ranks_(squares if everything else squares[positions], layout)
        if not everything:
            squares[positions] = part
    return squares.sqrt().float()
