"""The losses of a Trainer's steps, without a host read: that of a step as evidence, and what is logged for one that is not finite."""

import torch
from torch import Tensor


class StepLosses:
    """Sums of one run, on the device of its losses."""

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._sum: Tensor | None = None
        self._since = -1
        self._last: Tensor | None = None
        self._left_out = 0

    def add(self, loss: Tensor) -> None:
        """A micro-batch's: those of one step add up to the step's, as in the Trainer's own running sum."""
        self._step = loss.detach() if self._step is None else self._step + loss.detach()

    def take(self) -> Tensor | None:
        """The loss of the step that is complete; None when it is not known."""
        loss, self._step = self._step, None
        self._last = loss
        return loss

    def leave_out(self) -> None:
        """A step without a loss is complete."""
        self._left_out += 1

    def spread(self, total: Tensor, steps: int) -> None:
        """Make a sum of losses, in place, one of as many steps as are counted: as if those that were left out had been like the others.

        Args:
            total: The Trainer's sum since it last logged, which has 0 for a step that was left out.
            steps: Counted since then.
        """
        made, self._left_out = steps - self._left_out, 0
        if made == steps:
            return
        if made > 0:
            total.mul_(steps / made)
        elif self._last is not None:
            total.add_(self._last, alpha=steps)

    def filtered(self, loss: Tensor, since: int, step: int) -> Tensor:
        """The loss; where it is not finite, what the Trainer's own filter adds to its sum instead: the mean since it last logged.

        Args:
            loss: Of one micro-batch, shape `[]`.
            since: The step that was logged last.
            step: The present one.
        """
        if self._sum is None or since != self._since:
            self._sum, self._since = torch.zeros((), dtype=torch.float32, device=loss.device), since
        loss = torch.where(torch.isfinite(loss), loss, self._sum / (1 + step - since))
        self._sum = self._sum + loss.detach()
        return loss
