"""What takes the gradients of a matrix to equal singular values: the inverse root of the average of their squares on the small side.

    A <- A + w (G'G / |G|^2 - A)        w = max(1 / steps, 1 - memory)
    G <- G (A / tr A + t^2)^(-1/2)

The average tells the directions in which a matrix is mostly moved from those of one batch. It has the present step in it, so that a
direction which was never seen before is not blown up: an average of earlier steps alone, or a root that is kept for a while, was worse.

Source: Shampoo, Gupta et al. 2018, arXiv 1802.09568, section 3, on one side and with a decaying average.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from hf_adaclip.gradients.newton_schulz import floor_of, inverse_root
from hf_adaclip.gradients.transfer import HOST, moved

_CLOCK: Final = "preconditioner"
_PREFIX: Final = "preconditioner."


class Preconditioner:
    """Keeps the averages for all matrices of a run, by name.

    Args:
        width: t over the root mean square of the singular values.
        memory: Share of the average that a step leaves.
    """

    def __init__(self, width: float, memory: float) -> None:
        self._width, self._memory = width, memory
        self._steps = 0
        self._squares: dict[str, Tensor] = {}  # each `[side, side]`, float32, where it can a part of a stack
        self._stacks: dict[tuple[str, ...], Tensor] = {}

    def begin_step(self) -> None:
        """Called once in each step in which the range would act, also where the step is left out."""
        self._steps += 1

    def roots(self, names: Sequence[str], squares: Tensor, usable: Tensor) -> Tensor:
        """What to multiply these matrices by in the present step.

        Args:
            names: Of their parameters.
            squares: G'G / |G|^2, shape `[count, side, side]`, float32.
            usable: Which of them may go into the average, shape `[count, 1, 1]`.

        Returns:
            (A / tr A + t^2)^(-1/2), each up to a factor, shape `[count, side, side]`; the identity where nothing is known yet.
        """
        stack = self._stacks.get(tuple(names))
        if stack is None:
            stack = self._stack(tuple(names), squares)
        stack.lerp_(torch.where(usable, squares, stack), max(1 / self._steps, 1 - self._memory))
        trace = stack.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        known = trace > 0
        unit = torch.eye(squares.shape[-1], dtype=torch.float32, device=squares.device)
        found = torch.where(known, stack / trace, unit)
        return torch.where(known, inverse_root(found, self._width, floor_of(found.device)), unit)

    def _stack(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """One of what is kept for these matrices already, and of zeros for the others; those that share a matrix with it are given up."""
        stack = torch.zeros_like(like)
        for place, name in enumerate(names):
            kept = self._squares.get(name)
            # A module may have been replaced by one of another size.
            if kept is not None and kept.shape == stack.shape[1:]:
                stack[place].copy_(moved(kept, like.device))
            self._squares[name] = stack[place]
        for key in [key for key in self._stacks if not set(names).isdisjoint(key)]:
            del self._stacks[key]
            for name in set(key).difference(names):
                self._squares[name] = self._squares[name].clone()  # so that the stack can go
        self._stacks[names] = stack
        return stack

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, in host memory: the number of steps, and for each matrix its average, shape `[side, side]`."""
        if not self._steps:
            return {}
        clock = torch.tensor([self._steps], dtype=torch.float64, device=HOST)
        return {_CLOCK: clock} | {f"{_PREFIX}{name}": moved(s.clone(), HOST) for name, s in self._squares.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; from nothing where it gave nothing."""
        self._steps = max(0, int(tensors[_CLOCK].item())) if _CLOCK in tensors else 0
        kept = {name.removeprefix(_PREFIX): s for name, s in tensors.items() if name.startswith(_PREFIX)}
        self._squares, self._stacks = {name: s.clone() for name, s in kept.items()}, {}
