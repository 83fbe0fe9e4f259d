"""From gradients to what a controller looks at."""

import math

import torch
from torch import Tensor

from hf_adaclip.controllers.ops import Ops, Value, tensor_ops


def to_value(tensor: Tensor, ops: Ops) -> Value:
    """A float32 tensor as the kind of number that `ops` works on. Only memory of the host is ever looked into."""
    return tensor.numpy()[()] if ops.on_host else tensor


def observe_loss(loss: Tensor | float | None, device: torch.device, ops: Ops, *, average: bool) -> Value:
    """The training loss of a step, shape `[]`; NaN when it is not known.

    Args:
        loss: A scalar, or None.
        device: Device of the gradients.
        ops: The kind of number wanted.
        average: Average over ranks, which see different batches: where the loss decides, all must see the same. One scalar
            crosses the network.
    """
    if loss is None:
        return ops(math.nan)
    seen = torch.as_tensor(loss).detach()
    if seen.device != device:
        seen = seen.to(device, non_blocking=True)
    seen = seen.to(torch.float32).reshape(())
    if average and torch.distributed.is_available() and torch.distributed.is_initialized():
        seen = seen.clone()
        torch.distributed.all_reduce(seen)
        seen = seen / tensor_ops(device)(float(torch.distributed.get_world_size()))
    return to_value(seen, ops)
