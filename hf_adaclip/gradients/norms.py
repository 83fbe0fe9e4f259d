"""Gradient norms in float32, whatever the gradients' dtype, device or sharding.

`torch.nn.utils.get_total_norm` returns the norm of bfloat16 gradients in bfloat16 (three significant digits) and lets
float16 norms overflow. Here every norm is accumulated in float32; for float32 gradients on one device the result is that
of torch bit for bit, because the same two kernels run in the same order.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.sharding import is_sharded, norms_over_ranks, summed_part

Parameters = Iterable[Tensor] | Tensor

_BUFFER = 1 << 18  # numbers; 1 MB
_LARGE = 1 << 16


class Gradients(NamedTuple):
    """The gradients of one step.

    Attributes:
        parameters: Trainable parameters, each once (tied parameters are one tensor), in the order given.
        present: Positions in `parameters` of those that have a gradient.
        tensors: Their gradients, same order.
    """

    parameters: list[Tensor]
    present: list[int]
    tensors: list[Tensor]

    def required(self) -> "Gradients":
        """These gradients, if there are any.

        Raises:
            ConfigError: No parameter has a gradient.
        """
        if not self.tensors:
            raise ConfigError(
                f"`parameters` must have gradients, but none of the {len(self.parameters)} trainable ones has one instead. "
                "Clip after `backward` and before `optimizer.step()` and `zero_grad()`."
            )
        return self


def collect(parameters: Parameters) -> Gradients:
    """Look up the gradients of any iterable of parameters: a list, a generator, one tensor.

    Frozen parameters are left out; so are parameters without a gradient, which keep their place for per-tensor state.

    Raises:
        ConfigError: There is no parameter at all, most often a generator that was used up before.
        UnsupportedSetupError: A gradient is sparse.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not given:
        raise ConfigError(
            "`parameters` must hold at least one tensor, but is empty instead. A generator such as "
            "`model.parameters()` can be used only once: call it anew in every step."
        )
    # In plain passes, and each tensor once by identity: with thousands of tensors a call in Python for each is felt.
    unique = [p for p in {id(p): p for p in given}.values() if p.requires_grad]
    gradients = [p.grad for p in unique]
    present = [i for i, g in enumerate(gradients) if g is not None]
    tensors = [g for g in gradients if g is not None]
    if True in [g.is_sparse for g in tensors]:
        raise UnsupportedSetupError(
            "`parameters` must have dense gradients, but one of them is sparse instead. "
            "Build the embedding with `sparse=False`."
        )
    return Gradients(unique, present, tensors)


def tensor_norms(gradients: list[Tensor]) -> Tensor:
    """L2 norm of every gradient.

    Args:
        gradients: At least one dense tensor; dtypes and devices may differ, of a `DTensor` every rank holds a part, and the ranks
            add theirs up in one collective per layout.

    Returns:
        float32, shape `[len(gradients)]`, on the device of the first gradient.
    """
    # By the set of types, because with thousands of tensors a call for each is felt.
    if set(map(type, gradients)) == {Tensor} or not any(is_sharded(g) for g in gradients):
        return _norms_of(gradients)
    return norms_over_ranks(gradients, _norms_of([summed_part(g) for g in gradients]))


def global_norm(norms: Tensor) -> Tensor:
    """L2 norm over all tensors from their norms, shape `[num_tensors]` -> `[]`."""
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def _norms_of(gradients: list[Tensor]) -> Tensor:
    groups = _group_tensors_by_device_and_dtype([gradients], with_indices=True)  # type: ignore[list-item]
    if len(groups) == 1:
        return torch.stack(_norms_alike(gradients)).float()
    first = gradients[0].device
    norms: list[Tensor | None] = [None] * len(gradients)
    for (_, _), ([members], positions) in groups.items():
        for position, norm in zip(positions, _norms_alike(members), strict=True):  # type: ignore[arg-type]
            norms[position] = norm.float().to(first, non_blocking=True)
    return torch.stack([n for n in norms if n is not None])


def _norms_alike(gradients: list[Tensor]) -> list[Tensor]:
    if gradients[0].dtype in (torch.bfloat16, torch.float16) and gradients[0].device.type == "cpu":
        large = [i for i, g in enumerate(gradients) if g.numel() >= _LARGE and g.is_contiguous()]
        if large:
            chosen = set(large)
            small = [g for i, g in enumerate(gradients) if i not in chosen]
            norms = iter(torch._foreach_norm(small, 2, dtype=torch.float32) if small else ())
            return [_norm_of_halves(g) if i in chosen else next(norms) for i, g in enumerate(gradients)]
    # float64 gradients keep their precision until the end; asking for float32 would be an error.
    dtype = None if gradients[0].dtype == torch.float64 else torch.float32
    return list(torch._foreach_norm(gradients, 2, dtype))


def _norm_of_halves(gradient: Tensor) -> Tensor:
    """Norm of a large half-precision tensor in host memory, in float32, by way of a small float32 buffer that is kept.

    Asked for a float32 norm, torch's CPU kernel converts the whole tensor into memory that it allocates anew for each: up to three times
    slower, and added up in one long chain whose rounding shows in the fifth digit.
    """
    norms = []
    for part in torch.split(gradient.view(-1), _BUFFER):
        buffer = _buffer()[: part.numel()]
        buffer.copy_(part)
        norms.append(torch.linalg.vector_norm(buffer))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


@functools.cache
def _buffer() -> Tensor:
    return torch.empty(_BUFFER)
