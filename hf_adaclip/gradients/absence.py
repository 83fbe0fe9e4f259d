"""Steps in which no parameter has a gradient: every label masked, a batch that was given up, or a call in the wrong place."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from hf_adaclip.gradients.norms import Gradients, tensor_norms

PATIENCE: Final = 10
"""Such steps, from the start on, after which clipping must stand in the wrong place."""
_WARNING: Final = (
    "a step has no gradient: its norm is 0, nothing is clipped, nothing is learnt from it. If that is not meant, call `clip_` after "
    "`backward` and before `optimizer.step()` and `zero_grad()`."
)


class AbsenceCheck:
    """Tells a step that happens to have no gradient from a loop that clips where there never is one.

    Args:
        warn: Says something once.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._missing: int | None = 0  # None once a gradient was seen

    def look(self, gradients: Gradients) -> None:
        """Look at a step.

        Raises:
            ConfigError: There has been no gradient from the first step on, too often.
        """
        if gradients.tensors:
            self._missing = None
            return
        self._warn(_WARNING)
        if self._missing is not None:
            self._missing += 1
            if self._missing >= PATIENCE:
                gradients.required()


def norms_of(gradients: Gradients) -> Tensor:
    """L2 norm of every gradient, shape `[number of gradients]`, which may be 0.

    Raises:
        ConfigError: There is no trainable parameter.
    """
    if gradients.tensors:
        return tensor_norms(gradients.tensors)
    if not gradients.parameters:
        gradients.required()
    return torch.zeros(0, dtype=torch.float32, device=gradients.parameters[0].device)
