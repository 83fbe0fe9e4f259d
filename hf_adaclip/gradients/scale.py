"""Scaling gradients in place by a number that stays on the device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.gradients.norms import sorted_alike
from hf_adaclip.gradients.sharding import local_part
from hf_adaclip.gradients.transfer import moved


def scale_(gradients: list[Tensor], coefficient: Value) -> None:
    """Multiply gradients in place; a coefficient of exactly 1 leaves them as they are, bit for bit.

    Args:
        gradients: Tensors of any dtype and device.
        coefficient: float32; shape `[]` for one factor on all, `[len(gradients)]` for one each. A tensor is never read by the host;
            a number in host memory that is exactly 1 saves the whole pass.
    """
    if isinstance(coefficient, np.ndarray) and not coefficient.ndim:
        coefficient = coefficient[()]  # one factor on all, of a run whose other numbers are arrays
    if not isinstance(coefficient, Tensor | np.ndarray) and coefficient == 1:
        return
    gradients = [local_part(g) for g in gradients]  # of a DTensor this rank scales what it holds
    if isinstance(coefficient, Tensor):
        _scale_on_device(gradients, coefficient)
    elif isinstance(coefficient, np.ndarray):
        for gradient, factor in zip(gradients, coefficient.tolist(), strict=True):
            if factor != 1.0:
                gradient.mul_(factor)
    else:
        for members in _by_device_and_dtype(gradients):
            # Of a number torch makes a tensor like this anew for every gradient.
            torch._foreach_mul_(members, torch.tensor(coefficient, dtype=members[0].dtype, device=members[0].device))


def _scale_on_device(gradients: list[Tensor], coefficient: Tensor) -> None:
    if coefficient.dim() == 0:
        for members in _by_device_and_dtype(gradients):
            # As in stock clipping; whether torch rounds the factor to a half-precision dtype first is up to the device.
            torch._foreach_mul_(members, moved(coefficient, members[0].device))
        return
    for device in {g.device for g in gradients}:
        factors = moved(coefficient, device).unbind()
        here = [(g, f) for g, f in zip(gradients, factors, strict=True) if g.device == device]
        torch._foreach_mul_([g for g, _ in here], [f for _, f in here])


def _by_device_and_dtype(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    groups = sorted_alike([gradients])
    for [members], _ in groups.values():
        yield members
