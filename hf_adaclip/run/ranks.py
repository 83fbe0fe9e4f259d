"""Do all ranks decide alike? Where they do not, their weights drift apart, or one waits for ever for the others.

Once in 50 steps the ranks compare the last norm, threshold and pace, and the sum of the coefficients since the last comparison: eight
numbers in one small collective. A rank that left out a step which the others took shows in the sum.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.errors import RankDisagreementError

EVERY: Final = 50
TOLERANCE: Final = 1e-3
"""Relative difference that rounding on unlike devices explains."""


def world_size() -> int:
    """How many processes train together, as torch knows it."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if known else 1


def rank() -> int:
    """Which of them this one is; 0 where it is the only one."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def shared_device() -> torch.device:
    """Where a tensor has to be for all ranks to share it."""
    host = "gloo" in str(torch.distributed.get_backend()) or not torch.cuda.is_available()
    return torch.device("cpu") if host else torch.device("cuda", torch.cuda.current_device())


def of_first_rank(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on all ranks; an exception too. Of the only process, its own."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0, device=shared_device())
    if box[1] is not None:
        raise box[1]
    return box[0]


class RankCheck:
    """Compares decisions over ranks.

    Args:
        group: The process group of those that have to decide alike; None for all.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._sum: Any = 0.0
        self._agree: Tensor | None = None
        self._step = 0

    def add(self, step: int, norm: Value, threshold: Value, kept: Value, pace: Value) -> None:
        """Take in one step; every 50th of them is a collective, so all ranks have to call this for every step.

        Args:
            step: The optimizer step, counted from 0.
            norm: Global norm, shape `[]` like all that follow.
            threshold: What was decided.
            kept: The coefficient; -1 where the step is not finite, or has no gradient.
            pace: What was decided.
        """
        self._sum = self._sum + kept
        if step % EVERY:
            return
        seen = (norm, threshold, pace, self._sum)
        if isinstance(norm, Tensor):
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=norm.device) for v in seen])
        else:
            values = torch.from_numpy(np.array(seen, dtype=np.float32))
        values = torch.nan_to_num(values.double(), nan=-1.0)
        extremes = torch.cat([values, -values])
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=self.group)
        largest, smallest = extremes[: len(seen)], -extremes[len(seen) :]
        close = (largest == smallest) | (
            largest - smallest <= TOLERANCE * torch.maximum(largest.abs(), smallest.abs())
        )
        agree = close.all()
        self._agree = agree if self._agree is None else self._agree & agree
        self._step, self._sum = step, 0.0

    def require(self) -> None:
        """Read the result, if there is one.

        Raises:
            RankDisagreementError: The ranks do not decide alike.
        """
        agree, self._agree = self._agree, None
        if agree is not None and not bool(agree):
            raise RankDisagreementError(
                f"All ranks must decide alike, but their norms, thresholds or skipped steps differ at step {self._step} or in the "
                f"{EVERY} steps before it. Look at gradients that are not averaged over ranks, at a `loss` or parameters that "
                "differ between ranks, and at a rank that calls `clip_` more often than the others; then resume from a checkpoint before."
            )
