"""The training loss of a step as evidence: averaged over ranks where they decide by it, and left out where they could not."""

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.gradients import observe_loss
from hf_adaclip.run.ranks import world_size
from hf_adaclip.run.run import Run


class LossObserver:
    """Makes a number of the run's kind of what a loop gives as its loss.

    Args:
        config: The settings.
        run: Knows its kind of numbers, and the ranks that decide alike.
        ranks_known: Whether the loop tells which ranks train together.

    Attributes:
        expected: Whether losses are given at all; False where no rank ever knows one.
    """

    def __init__(self, config: AdaptiveClipConfig, run: Run, *, ranks_known: bool) -> None:
        self._config, self._run, self._ranks_known = config, run, ranks_known
        self.expected = True

    def observe(self, loss: Tensor | float | None, device: torch.device) -> Value:
        """The loss, shape `[]`; NaN when it is not known.

        Args:
            loss: What `clip_` was given.
            device: Where the norms are.
        """
        required = self._config.divergence_spreads > 0
        if loss is None and required:
            self._run.alerts.warn_once(
                "`divergence_spreads` > 0 needs the training loss: call `clip_(..., loss=loss)`."
            )
        ranks = self._run.ranks
        average = self._config.looks_at_loss and self.expected
        if average and not (self._ranks_known or ranks or required) and world_size() > 1:
            # Ranks that see different losses would decide differently, and who they are is not known here: some may have no clipper.
            average, loss = False, None
        return observe_loss(loss, device, self._run.ops, average=average, group=None if ranks is None else ranks.group)
