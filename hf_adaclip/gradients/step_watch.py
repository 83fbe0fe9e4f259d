"""Do optimizers step that nobody clips for? Under `install` only the script decides whether, and how often, clipping is called."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_adaclip.gradients.optimizers import unwrap_optimizer

logger = logging.getLogger(__name__)

PATIENCE: Final = 10
"""Steps without a call of clipping before it is said: a critic may step a few times as often as what is clipped."""


class StepWatch:
    """Counts the steps of some optimizers against the calls of clipping, from now until `end`.

    Args:
        optimizers: Gives those that count, wrapped by Accelerate or not.
        warn: Told, once during the run and once at its end.
    """

    def __init__(self, optimizers: Callable[[], Iterable[Any]], warn: Callable[[str], None]) -> None:
        self._optimizers, self._warn = optimizers, warn
        self._steps = self._calls = self._alone = 0
        # For all optimizers of the process, because a script makes and prepares its own while this is watching.
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def clipped(self) -> None:
        """Clipping was called."""
        self._calls += 1
        self._alone = 0

    @property
    def _unclipped(self) -> int:
        return self._alone - bool(self._calls)  # the first step after a call is the one it was for

    def end(self) -> None:
        """Stop watching, and say what came of it."""
        self._handle.remove()
        if self._steps > self._calls:
            # A critic that steps more often than what is clipped is no reason to warn.
            say = self._warn if self._unclipped >= PATIENCE else logger.info
            say(
                f"{self._calls} of {self._steps} optimizer steps were clipped: the script did not call `accelerator.clip_grad_norm_` in "
                "the others."
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(unwrap_optimizer(o) is optimizer for o in self._optimizers()):
            return
        self._steps += 1
        self._alone += 1
        if self._unclipped == PATIENCE:
            self._warn(
                f"{PATIENCE} optimizer steps in a row were not clipped: the script does not call `accelerator.clip_grad_norm_`, which "
                "`install` answers. Let it call that method, or call `clipper.clip_(model.parameters())` before `optimizer.step()`."
            )
