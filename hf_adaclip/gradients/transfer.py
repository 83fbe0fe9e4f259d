"""Copies between devices: the only place that makes them.

A copy to an accelerator need not be waited for: what reads it is queued behind it on the same stream. A copy to host memory that nobody
waits for is read before it has landed, because torch pins the memory of such a copy and returns at once.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

HOST: Final = torch.device("cpu")


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on that device, itself if it is there; in host memory it can be read at once."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in as few kernels as may be; in host memory the targets can be read at once.

    Args:
        targets: At least one tensor, all on one device.
        sources: As many, of any device and dtype.
    """
    torch._foreach_copy_(list(targets), list(sources), non_blocking=targets[0].device.type != "cpu")


def start_copy(target: Tensor, source: Tensor, *, awaited: bool) -> None:
    """Copy to the host without waiting, into pinned memory that is read only after an event that follows.

    Args:
        target: In host memory.
        source: Of the same shape, on any device.
        awaited: Whether there is such an event; without one the copy has landed when this returns.
    """
    target.copy_(source, non_blocking=awaited)
