"""From gradients to what a controller looks at."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.ops import Ops, Value, tensor_ops
from hf_adaclip.gradients.norms import Gradients


def to_value(tensor: Tensor, ops: Ops) -> Value:
    """A float32 tensor as the kind of number that `ops` works on. Only memory of the host is ever looked into."""
    return tensor.numpy()[()] if ops.on_host else tensor


class TensorNorms:
    """Norms of every trainable parameter, NaN where it has no gradient: a fixed shape while gradients come and go."""

    def __init__(self) -> None:
        self._present: list[int] | None = None
        self._index: Any = None

    def spread(self, gradients: Gradients, norms: Tensor, finite: Value, ops: Ops) -> Value:
        """Norms by parameter.

        Args:
            gradients: The gradients of this step.
            norms: Their norms, shape `[len(gradients.tensors)]`.
            finite: Bool, whether the global norm is finite. One tensor that is not skips the whole step, so then no tensor may
                learn from it and every norm is NaN.
            ops: The kind of numbers wanted.

        Returns:
            float32, shape `[len(gradients.parameters)]`.
        """
        nan = ops(math.nan)
        values = ops.where(finite, to_value(norms, ops), nan)
        if len(gradients.present) == len(gradients.parameters):
            return values
        full = ops.full((len(gradients.parameters),), math.nan)
        full[self._places(gradients, norms.device, ops)] = values
        return full

    def gather(self, gradients: Gradients, values: Value, device: torch.device, ops: Ops) -> Value:
        """Of one value per parameter, those that belong to the gradients of this step."""
        if len(gradients.present) == len(gradients.parameters):
            return values
        return values[self._places(gradients, device, ops)]

    def _places(self, gradients: Gradients, device: torch.device, ops: Ops) -> Any:
        if self._present != gradients.present:
            self._present = gradients.present
            on_host = np.array(gradients.present)
            self._index = on_host if ops.on_host else torch.from_numpy(on_host).to(device)
        return self._index


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
