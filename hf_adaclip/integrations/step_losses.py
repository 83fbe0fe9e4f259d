"""The losses of a Trainer's steps, without a host read: that of a step as evidence, and what is logged for one that is not finite."""

import torch
from torch import Tensor


class StepLosses:
    """Sums of one run, on the device of its losses.

    Attributes:
        remembers: Whether some step is left out, so that the losses of the others have to be known.
    """

    remembers = False

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._sum: Tensor | None = None
        self._since = -1
        self._standing = False
        self._made: list[Tensor] = []
        self._logged = -1

    def add(self, loss: Tensor) -> None:
        """A micro-batch's: those of one step add up to the step's, as in the Trainer's own running sum."""
        self._step = loss.detach() if self._step is None else self._step + loss.detach()

    def take(self, since: int = -1) -> Tensor | None:
        """The loss of the step that is complete; None when it is not known. `since` as for `filtered`."""
        loss, self._step = self._step, None
        if self.remembers and loss is not None:
            if since != self._logged:
                self._made, self._logged = [], since
            self._made.append(loss)
        return loss

    def stand_in(self, since: int, device: torch.device) -> Tensor:
        """What the Trainer adds for a micro-batch of a step that is left out, so that the mean it logs is that of the others.

        Args:
            since: As for `filtered`; where no step was made since, the last one before counts.
            device: Of its losses.
        """
        if self._standing or not self._made:
            return torch.zeros((), dtype=torch.float32, device=device)
        self._standing = True
        of_these = self._made if since == self._logged else self._made[-1:]
        return torch.stack([loss.float() for loss in of_these]).mean()

    def stood_in(self) -> None:
        """The step that is left out is complete."""
        self._standing = False

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
