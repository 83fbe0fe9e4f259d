"""From gradients to what a controller looks at."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Ops, TensorOps, Value, tensor_ops
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients.sharding import is_sharded, summed_part
from hf_adaclip.gradients.transfer import HOST, moved


def to_value(tensor: Tensor, ops: Ops) -> Value:
    """A float32 tensor as the kind of number that `ops` works on, where a run keeps them.

    That is where the first gradient was in its first step. In a model that is partly in host memory (an embedding) another gradient may
    be the first later, or the loss scale be elsewhere.
    """
    if isinstance(ops, TensorOps):
        return moved(tensor, ops.device)
    return moved(tensor, HOST).numpy()[()]


def check_loss(loss: Any) -> None:
    """Whether a loss is one real number, by its kind alone: nothing is read.

    Raises:
        ConfigError: It is not.
    """
    if loss is None or isinstance(loss, int | float):
        return
    if isinstance(loss, Tensor | np.ndarray | np.generic):
        size = loss.numel() if isinstance(loss, Tensor) else loss.size
        number = not loss.is_complex() if isinstance(loss, Tensor) else loss.dtype.kind in "biuf"
        if size == 1 and number and not (isinstance(loss, Tensor) and loss.is_meta):
            return
        found = (
            f"a {type(loss).__name__} of shape {list(loss.shape)} and dtype {str(loss.dtype).removeprefix('torch.')}"
        )
        if size > 1:
            found += " instead: pass its mean, `loss.mean()`"
        else:
            found += " instead"
    else:
        found = f"{type(loss).__name__} instead"
    raise ConfigError(f"`loss` must be one real number, but is {found}.")


def observe_loss(
    loss: Tensor | float | None, device: torch.device, ops: Ops, *, average: bool, group: Any = None
) -> Value:
    """The training loss of a step, shape `[]`; NaN when it is not known.

    Args:
        loss: One number that `check_loss` has let pass, or None.
        device: Device of the gradients.
        ops: The kind of number wanted.
        average: Average over the ranks that know it, which see different batches: where the loss decides, all must see the same. Two
            numbers cross the network, and every rank of the group has to call this, with a loss or without.
        group: The process group of these ranks; None for all.
    """
    average = average and torch.distributed.is_available() and torch.distributed.is_initialized()
    if loss is None:
        if not average:
            return ops(math.nan)
        return to_value(_mean_over_ranks(torch.zeros((), dtype=torch.float32, device=device), 0.0, group), ops)
    if isinstance(loss, Tensor):
        seen = summed_part(loss.detach()) if is_sharded(loss) else loss.detach()
    else:  # no dtype and no device by default: both may have been set to anything
        seen = torch.tensor(_as_float(loss), dtype=torch.float32, device=HOST)
    seen = moved(seen, device).to(torch.float32).reshape(())
    return to_value(_mean_over_ranks(seen, 1.0, group) if average else seen, ops)


def _mean_over_ranks(loss: Tensor, weight: float, group: Any) -> Tensor:
    """The mean over the ranks whose weight is 1; NaN where there are none."""
    both = torch.stack([loss, tensor_ops(loss.device)(weight)])
    torch.distributed.all_reduce(both, group=group)
    return both[0] / both[1]


def _as_float(loss: Any) -> float:
    try:
        return float(loss.item() if isinstance(loss, np.ndarray) else loss)
    except OverflowError:  # a Python int beyond all floats
        return math.inf if loss > 0 else -math.inf
