"""The spectral range: singular values of each hidden matrix's gradient are brought towards their own level, and its norm is given back.

    t = width x rms(s)          s -> s / sqrt(1 + (s / t)^2)          G <- G |G before|_F / |G|_F

`width` 0 is the limit in which all singular values become equal, infinity leaves everything as it is. With a memory the singular values are
those of an average over steps (see `preconditioner`), so they become equal on average: what one batch alone has is made no larger than it
mostly is. The rule does not mind a factor on the gradient, so a coefficient may be applied before it or after (as a fused step does).
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
from hf_adaclip.gradients.preconditioner import Preconditioner
from hf_adaclip.gradients.sharding import is_sharded
from hf_adaclip.gradients.transfer import moved

REVISION: Final = 2
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
        norm: Norm over all of these matrices, before and after, shape `[]`.
    """

    altered: Tensor
    norm: Tensor


class SpectralRange:
    """Acts on the hidden matrices among the gradients of a step.

    Args:
        width: Where singular values are clipped, over their root mean square.
        matrices: Tells which parameters are hidden matrices.
        memory: Share of the average over steps that a step leaves; 0 looks at each step alone.

    Attributes:
        preconditioner: What is kept between steps; None without a memory.
    """

    def __init__(self, width: float, matrices: HiddenMatrices, memory: float = 0.0) -> None:
        self.width = width
        self._matrices = matrices
        self.preconditioner: Preconditioner | None = None
        self.remember(memory)

    def remember(self, memory: float) -> None:
        """Average over steps from here on, or take each step alone (0)."""
        if not memory > 0 or self.width == math.inf:
            self.preconditioner = None
        elif self.preconditioner is None:
            self.preconditioner = Preconditioner(self.width, memory)

    def begin_step(self) -> None:
        """Called once in each step: by [`act_`], and in its place where the step is left out."""
        if self.preconditioner is not None:
            self.preconditioner.begin_step()

    @torch.no_grad()
    def act_(self, gradients: Gradients, *, change: bool = True, taken: Tensor | None = None) -> Effect | None:
        """Bring the singular values into the range, in place.

        Args:
            gradients: Of the step, clipped. A matrix that is zero or not finite stays as it is.
            change: False only finds out what would be done.
            taken: Bool, shape `[]`, whether the step will be made, so that nothing is learned from one that is left out; None: it will.

        Returns:
            What was done; None where there is no hidden matrix among the gradients.

        Raises:
            UnsupportedSetupError: A gradient is a sum that is still pending over ranks, or spread in a way that is not known.
        """
        self.begin_step()
        parameters = [gradients.parameters[i] for i in gradients.present]
        names = self._matrices.among(parameters)
        hidden = [_Hidden(n, g) for n, g in zip(names, gradients.tensors, strict=True) if n is not None]
        if not hidden:
            return None
        device = hidden[0].gradient.device
        if self.width == math.inf:
            norm = global_norm(tensor_norms([h.gradient for h in hidden]))
            return Effect(torch.zeros((), dtype=torch.float32, device=device), norm)
        sums = [moved(self._clip_(batch, change=change, taken=taken), device) for batch in _batches(hidden)]
        along, squared = torch.stack(sums).sum(0).unbind()
        return Effect(torch.where(squared > 0, 1 - along / squared, 0.0).clamp_(0.0, 1.0), squared.sqrt())

    def _clip_(self, batch: list[list["_Hidden"]], *, change: bool, taken: Tensor | None) -> Tensor:
        """Clip stacks of one small side; returns <before, after> and |before|^2 over all of them, float32, shape `[2]`."""
        stacks = [torch.stack([_whole(h.gradient) for h in members]).to(torch.float32) for members in batch]
        norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in stacks]
        usable = [(norm > _SMALLEST) & (norm < _LARGEST) for norm in norms]
        if self.preconditioner is None and stacks[0].device.type != "cpu":
            results = _directly(stacks, norms, self.width)
        else:
            squares = _squares(stacks, norms)
            if self.preconditioner is None:
                roots = inverse_root(squares, self.width)
            else:
                learned = torch.cat(usable) if taken is None else torch.cat(usable) & moved(taken, squares.device)
                names = [h.name for members in batch for h in members]
                roots = self.preconditioner.roots(names, squares, learned)
            results = [
                torch.bmm(root, x) if x.shape[1] == root.shape[1] else torch.bmm(x, root)
                for x, root in zip(stacks, torch.split(roots, [len(x) for x in stacks]), strict=True)
            ]
        sums = torch.zeros(2, dtype=torch.float32, device=stacks[0].device)
        for members, before, norm, whole, after in zip(batch, stacks, norms, usable, results, strict=True):
            after.mul_(norm / torch.linalg.vector_norm(after, dim=(1, 2), keepdim=True))
            after = torch.where(whole, after, before)
            if change:
                _write([h.gradient for h in members], after)
            along = torch.linalg.vecdot(before.flatten(1), after.flatten(1))
            values = torch.stack([along, norm.flatten() ** 2])
            sums += torch.where(whole.flatten(), values, 0.0).sum(1)
        return sums


class _Hidden(NamedTuple):
    """A hidden matrix that has a gradient."""

    name: str
    gradient: Tensor


def _batches(hidden: list[_Hidden]) -> Iterator[list[list[_Hidden]]]:
    """Matrices that are worked on together: stacks of one shape each, all of one small side, device and dtype."""
    kinds: dict[Any, dict[tuple[int, int], list[_Hidden]]] = {}
    for one in hidden:
        rows, columns = one.gradient.shape[0], one.gradient.shape[1:].numel()
        key = (min(rows, columns), one.gradient.device, one.gradient.dtype)
        kinds.setdefault(key, {}).setdefault((rows, columns), []).append(one)
    for stacks in kinds.values():
        batch: list[list[_Hidden]] = []
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


def _squares(stacks: list[Tensor], norms: list[Tensor]) -> Tensor:
    """Squares on the small side of matrices with a Frobenius norm of 1, in float32, shape `[count, side, side]`."""
    side = min(stacks[0].shape[1:])
    squares = torch.empty(sum(map(len, stacks)), side, side, dtype=torch.float32, device=stacks[0].device)
    parts = torch.split(squares, [len(x) for x in stacks])
    for x, norm, square in zip(stacks, norms, parts, strict=True):
        torch.bmm(x, x.mT, out=square) if x.shape[1] == side else torch.bmm(x.mT, x, out=square)
        square.div_(norm * norm)
    return squares


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
