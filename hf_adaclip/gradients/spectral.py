"""The spectral range: singular values of each hidden matrix's gradient are brought towards their own level, and its norm is given back.

    t = width x rms(s)          s -> s / sqrt(1 + (s / t)^2)          G <- G |G before|_F / |G|_F

`width` 0 is the limit in which all singular values become equal, infinity leaves everything as it is. The rule does not mind a factor on
the gradient, so a coefficient may be applied before it or after (as a fused step does).
"""

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.matrices import HiddenMatrices, as_matrix
from hf_adaclip.gradients.newton_schulz import clipped_directly, inverse_root
from hf_adaclip.gradients.norms import Gradients, global_norm, tensor_norms
from hf_adaclip.gradients.sharding import is_sharded
from hf_adaclip.gradients.transfer import moved

REVISION: Final = 1
"""Raised with every change of what a step becomes: runs of before are recognised by it."""
MOST_AT_ONCE: Final = 1 << 26
"""Numbers of gradients that are stacked together, 256 MB in float32; a larger matrix is taken alone."""
_SMALLEST: Final = 1e-15
_LARGEST: Final = 1e15
"""Matrices with a norm below or above are left as they are: their squares have no place in float32."""
_MOST_IN_A_STACK: Final = 64


class Effect(NamedTuple):
    """What the range has done to all matrices of a step.

    Attributes:
        altered: Half the squared distance that the gradients were moved, over their squared norm: 0 nothing, 1 at right angles; `[]`.
        norm: Norm over all of these matrices afterwards, shape `[]`.
    """

    altered: Tensor
    norm: Tensor


class SpectralRange:
    """Acts on the hidden matrices among the gradients of a step.

    Args:
        width: Where singular values are clipped, over their root mean square.
        matrices: Tells which parameters are hidden matrices.
    """

    def __init__(self, width: float, matrices: HiddenMatrices) -> None:
        self.width = width
        self._matrices = matrices

    @torch.no_grad()
    def act_(self, gradients: Gradients, *, change: bool = True) -> Effect | None:
        """Bring the singular values into the range, in place.

        Args:
            gradients: Of the step, clipped. A matrix that is zero or not finite stays as it is.
            change: False only finds out what would be done.

        Returns:
            What was done; None where there is no hidden matrix among the gradients.

        Raises:
            UnsupportedSetupError: A gradient is a sum that is still pending over ranks, or spread in a way that is not known.
        """
        there = self._matrices.among([gradients.parameters[i] for i in gradients.present])
        hidden = [g for g, is_one in zip(gradients.tensors, there, strict=True) if is_one]
        if not hidden:
            return None
        if self.width == math.inf:
            return Effect(
                torch.zeros((), dtype=torch.float32, device=hidden[0].device), global_norm(tensor_norms(hidden))
            )
        sums = []
        for batch in _batches(hidden):
            sums.append(moved(_clip_batch_(batch, self.width, change=change), hidden[0].device))
        along, before, after = torch.stack(sums).sum(0).unbind()
        return Effect(torch.where(before > 0, 1 - along / before, 0.0).clamp_(0.0, 1.0), after.sqrt())


def _batches(gradients: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Gradients that are worked on together: stacks of one shape each, all of one small side, device and dtype."""
    kinds: dict[Any, dict[tuple[int, int], list[Tensor]]] = {}
    for gradient in gradients:
        rows, columns = gradient.shape[0], gradient.shape[1:].numel()
        key = (min(rows, columns), gradient.device, gradient.dtype)
        kinds.setdefault(key, {}).setdefault((rows, columns), []).append(gradient)
    for stacks in kinds.values():
        batch: list[list[Tensor]] = []
        room = MOST_AT_ONCE
        for (rows, columns), members in stacks.items():
            at_once = max(1, min(_MOST_IN_A_STACK, MOST_AT_ONCE // (rows * columns)))
            for begin in range(0, len(members), at_once):
                stack = members[begin : begin + at_once]
                size = rows * columns * len(stack)
                if batch and size > room:
                    yield batch
                    batch, room = [], MOST_AT_ONCE
                batch.append(stack)
                room -= size
        yield batch


def _clip_batch_(batch: list[list[Tensor]], width: float, *, change: bool) -> Tensor:
    """Clip stacks of one small side; returns <before, after>, |before|^2 and |after|^2 over all of them, float32, shape `[3]`."""
    whole = [[_whole(g) for g in members] for members in batch]
    half = batch[0][0].device.type != "cpu"
    stacks = [torch.stack(members).to(torch.float32) for members in whole]
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in stacks]
    results = _directly(stacks, norms, width) if half else _on_the_small_side(stacks, norms, width)
    sums = torch.zeros(3, dtype=torch.float32, device=stacks[0].device)
    for members, before, norm, after in zip(batch, stacks, norms, results, strict=True):
        usable = (norm > _SMALLEST) & (norm < _LARGEST)
        after.mul_(norm / torch.linalg.vector_norm(after, dim=(1, 2), keepdim=True))
        after = torch.where(usable, after, before)
        if change:
            _write(members, after)
        values = (torch.linalg.vecdot(before.flatten(1), after.flatten(1)), norm.flatten() ** 2)
        left = torch.linalg.vector_norm(after, dim=(1, 2)) ** 2
        sums += torch.stack([torch.where(usable.flatten(), v, 0.0).sum() for v in (*values, left)])
    return sums


def _on_the_small_side(stacks: list[Tensor], norms: list[Tensor], width: float) -> list[Tensor]:
    """In float32: the squares of all stacks are worked on as one."""
    side = min(stacks[0].shape[1:])
    grams = torch.empty(sum(map(len, stacks)), side, side, dtype=torch.float32, device=stacks[0].device)
    counts = [len(x) for x in stacks]
    for x, norm, gram in zip(stacks, norms, torch.split(grams, counts), strict=True):
        torch.bmm(x, x.mT, out=gram) if x.shape[1] == side else torch.bmm(x.mT, x, out=gram)
        gram.div_(norm * norm)
    roots = torch.split(inverse_root(grams, width), counts)
    return [
        torch.bmm(root, x) if x.shape[1] == side else torch.bmm(x, root) for x, root in zip(stacks, roots, strict=True)
    ]


def _directly(stacks: list[Tensor], norms: list[Tensor], width: float) -> list[Tensor]:
    """In bfloat16, as accelerators multiply fastest."""
    results = []
    for x, norm in zip(stacks, norms, strict=True):
        wide = x.shape[1] < x.shape[2]
        unit = x / norm
        found = clipped_directly(unit.mT if wide else unit, width)
        results.append((found.mT if wide else found).to(torch.float32))
    return results


def _whole(gradient: Tensor) -> Tensor:
    """All of a gradient as a matrix; one that is spread over ranks is gathered (a collective, which every rank calls in the same order)."""
    if is_sharded(gradient):
        for placement in gradient.placements:
            if not (placement.is_replicate() or type(placement).__name__ == "Shard"):
                raise UnsupportedSetupError(
                    f"`spectral_width` must be None where a gradient is spread as {placement}, but is set instead: it is known for rows or "
                    "columns that are split, and for copies. Leave it out, or reduce the gradient before it is clipped."
                )
        return as_matrix(gradient.full_tensor())
    return as_matrix(gradient)


def _write(gradients: list[Tensor], values: Tensor) -> None:
    """Into the gradients; of one that is spread over ranks every rank keeps its part."""
    parts = []
    for gradient, value in zip(gradients, values.unbind(), strict=True):
        value = value.view(gradient.shape)
        parts.append(_own_part(gradient, value) if is_sharded(gradient) else value)
    targets = [g.to_local() if is_sharded(g) else g for g in gradients]
    torch._foreach_copy_(targets, parts)


def _own_part(gradient: Any, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = gradient.device_mesh
    copies = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=gradient.placements).to_local()
