"""The losses of a Trainer's steps, without a host read: that of a step as evidence, and what is logged for one that is not finite."""

import torch
from torch import Tensor


class StepLosses:
    """Sums of one run, on the device of its losses."""

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._sum: Tensor | None = None
        self._since = -1

    def add(self, loss: Tensor) -> None:
        """A micro-batch's: those of one step add up to the step's, as in the Trainer's own running sum."""
        self._step = loss.detach() if self._step is None else self._step + loss.detach()

    def take(self) -> Tensor | None:
        """The loss of the step that is complete; None when it is not known."""
        loss, self._step = self._step, None
        return loss

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
