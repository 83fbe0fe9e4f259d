"""What takes the gradients of a matrix to equal singular values: the inverse root of the average of their squares on the small side.

    A <- A + w (G'G / |G|^2 - A)        w = max(1 / steps, 1 - memory)
    G <- G (A / tr A + t^2)^(-1/2)

The average tells the directions in which a matrix is mostly moved from those of one batch. It has the present step in it, so that a
direction which was never seen before is not blown up: an average of earlier steps alone, or a root that is kept for a while, was worse.

Source: Shampoo, Gupta et al. 2018, arXiv 1802.09568, section 3, on one side and with a decaying average.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.gradients.newton_schulz import floor_of, inverse_root
from hf_adaclip.gradients.transfer import HOST, moved

_CLOCK: Final = "preconditioner"
_PREFIX: Final = "preconditioner."


class _Stack(NamedTuple):
    """Matrices that are worked on together.

    Attributes:
        owners: Their parameters.
        squares: A of each, shape `[count, side, side]`, float32.
    """

    owners: list["weakref.ref[Tensor]"]
    squares: Tensor


class Preconditioner:
    """Keeps the averages for all matrices of a run.

    Args:
        width: t over the root mean square of the singular values.
        memory: Share of the average that a step leaves.
    """

    def __init__(self, width: float, memory: float) -> None:
        self._width, self._memory = width, memory
        self._steps = 0
        self._stacks: dict[tuple[int, ...], _Stack] = {}
        self._apart: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # restored, or of a stack that is no more

    @property
    def bytes(self) -> int:
        """Memory that all of it takes."""
        return sum(stack.squares.numel() * stack.squares.element_size() for stack in self._stacks.values())

    def begin_step(self) -> None:
        """Called once in each step, also in one that is left out."""
        self._steps += 1

    def roots(self, owners: Sequence[Tensor], squares: Tensor, usable: Tensor) -> Tensor:
        """What to multiply these matrices by in the present step.

        Args:
            owners: Their parameters.
            squares: G'G / |G|^2, shape `[count, side, side]`, float32.
            usable: Which of them may go into the average, shape `[count, 1, 1]`.

        Returns:
            (A / tr A + t^2)^(-1/2), each up to a factor, shape `[count, side, side]`; the identity where nothing is known yet.
        """
        key = tuple(map(id, owners))
        stack = self._stacks.get(key)
        if stack is None or not all(ref() is one for ref, one in zip(stack.owners, owners, strict=True)):
            stack = self._stacks[key] = self._gather(owners, squares)
        weight = max(1 / self._steps, 1 - self._memory)
        stack.squares.lerp_(torch.where(usable, squares, stack.squares), weight)
        trace = stack.squares.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        known = trace > 0
        unit = torch.eye(squares.shape[-1], dtype=torch.float32, device=squares.device)
        found = torch.where(known, stack.squares / trace, unit)
        return torch.where(known, inverse_root(found, self._width, floor_of(found.device)), unit)

    def _gather(self, owners: Sequence[Tensor], like: Tensor) -> _Stack:
        """A stack of what is kept for these matrices already, and of zeros for the others."""
        self._break_up(owners)
        squares = torch.zeros_like(like)
        for place, owner in enumerate(owners):
            ref, kept = self._apart.pop(id(owner), (None, None))
            if ref is not None and ref() is owner and kept is not None:
                squares[place].copy_(moved(kept, like.device))
        return _Stack([weakref.ref(owner) for owner in owners], squares)

    def _break_up(self, owners: Sequence[Tensor]) -> None:
        """Stacks that hold one of these, or one that is no more, are taken apart."""
        wanted = {id(owner) for owner in owners}
        for key, stack in list(self._stacks.items()):
            alive = [ref() for ref in stack.owners]
            if wanted.isdisjoint(key) and None not in alive:
                continue
            del self._stacks[key]
            for place, owner in enumerate(alive):
                if owner is not None:
                    self._apart[id(owner)] = weakref.ref(owner), stack.squares[place].clone()

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps.

        Args:
            parameters: Of the models, by name.

        Returns:
            The number of steps, and for each matrix that is known its average, shape `[side, side]`.
        """
        if not self._steps:
            return {}
        kept = {key: square for key, (ref, square) in self._apart.items() if ref() is not None}
        for stack in self._stacks.values():
            kept |= {id(ref()): square.clone() for ref, square in zip(stack.owners, stack.squares, strict=True)}
        clock = torch.tensor([self._steps], dtype=torch.float64, device=HOST)
        return {_CLOCK: clock} | {f"{_PREFIX}{n}": kept[id(p)] for n, p in parameters.items() if id(p) in kept}

    def restore(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; from nothing where it gave nothing.

        Raises:
            ValueError: It was made for other parameters.
        """
        self._stacks, self._apart = {}, {}
        self._steps = int(tensors[_CLOCK].item()) if _CLOCK in tensors else 0
        for name, parameter in parameters.items():
            square = tensors.get(f"{_PREFIX}{name}")
            if square is None:
                continue
            side = min(parameter.shape[0], parameter.shape[1:].numel())
            if square.shape != (side, side):
                raise ValueError(f"of `{name}` it keeps squares of side {square.shape[-1]}, where this one has {side}")
            self._apart[id(parameter)] = weakref.ref(parameter), square.to(torch.float32).clone()
