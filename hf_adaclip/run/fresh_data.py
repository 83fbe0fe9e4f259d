"""The pace by the first epoch alone, where a model that was trained before sees its data several times.

    reach_t                   in the first epoch
    min(reach_t, most)        from the second on: the largest of the first
    -inf                      from the second on, where the last of the first is below `trust`: the pace is 1 for good

An estimate of the useful rate goes by how the loss falls, and of data that was seen before it falls by being learned by heart. Of 240 steps
over 640 sentences, where no higher rate is any good, the estimate is 1.4 after the first epoch and 20 at the end; of 300 steps over 1,100
instructions, where the rate is 80 times too low, it is 25 after the first: model_cards/RESEARCH.md, entry 36.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.gradients.transfer import HOST, moved


class FreshData:
    """Holds the estimate to what the first epoch has said.

    Args:
        steps: Of the first epoch.
        trust: Below which the estimate says nothing for a higher rate.
    """

    def __init__(self, steps: int, trust: float) -> None:
        self.steps, self._trust = steps, trust
        self._most: Value | float = 0.0
        self._end: Value | float = 0.0

    def held(self, reach: Value, step: int, ops: Ops) -> Value:
        """The estimate that counts.

        Args:
            reach: As the gradients of a step make it; NaN where it is not known, which stays so in the first epoch.
            step: Number of that step, counted from 0, over all that has been seen of the data.
            ops: The kind of numbers.
        """
        most, end = _of_kind(self._most, ops), _of_kind(self._end, ops)
        if step < self.steps:
            known = reach == reach
            self._most, self._end = ops.maximum(most, ops.where(known, reach, most)), ops.where(known, reach, end)
            return reach
        return ops.where(end < ops(self._trust), ops(-math.inf), ops.minimum(reach, most))

    def tensor(self) -> Tensor:
        """What a checkpoint keeps, float64, shape `[3]`."""
        found = (float(moved(x, HOST)) if isinstance(x, Tensor) else float(x) for x in (self._most, self._end))
        numbers = [x if math.isfinite(x) else 0.0 for x in found]
        return torch.tensor([float(self.steps), *numbers], dtype=torch.float64, device=HOST)

    def restore(self, tensor: Tensor) -> None:
        """Go on from what `tensor` gave."""
        steps, most, end = tensor.tolist()
        self.steps, self._most, self._end = int(steps), float(most), float(end)


def _of_kind(number: Value | float, ops: Ops) -> Any:
    return number if isinstance(number, Tensor) and not ops.on_host else ops(float(number))
