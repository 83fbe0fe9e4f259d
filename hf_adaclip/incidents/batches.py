"""References to what the last steps were made with. No tensor is copied, moved or looked at; containers are made anew, because losses and
collators take entries out of theirs."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

KEPT: Final = 2
"""Steps before the present one whose inputs are held."""
MOST_MICRO_BATCHES: Final = 1024
_DEEPEST: Final = 16


class Step(NamedTuple):
    """What is held of a step.

    Attributes:
        number: Of the optimizer step.
        inputs: One entry per micro-batch, in order.
        indices: Positions in the dataset per micro-batch; None where they are not known.
        norms: Of every gradient, shape `[number of gradients]`; None where nobody knows them.
        present: Places of the parameters that these belong to.
        names: Gives the names of all places, None where they are not known: a list of thousands is not made in every step.
        rates: Learning rate of every group of the optimizers.
        static_threshold: Of the step.
    """

    number: int
    inputs: list[Any]
    indices: list[Any]
    norms: Tensor | None
    present: Sequence[int]
    names: Callable[[], Sequence[str] | None]
    rates: list[Any]
    static_threshold: float


class BatchRing:
    """The inputs of the present step, and of at most `KEPT` steps before it."""

    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._indices: list[Any] = []
        self._steps: deque[Step] = deque()

    def add(self, inputs: Any, indices: Sequence[int] | None = None) -> None:
        """A micro-batch of the present step."""
        if not self._inputs:
            while len(self._steps) > KEPT:
                self._steps.popleft()
        if len(self._inputs) == MOST_MICRO_BATCHES:  # nobody clips: an evaluation, or a loop that was given up
            del self._inputs[0], self._indices[0]
        self._inputs.append(_outlines(inputs))
        self._indices.append(indices)

    def close(self, number: int, **facts: Any) -> None:
        """The present step is complete."""
        self._steps.append(Step(number, self._inputs, self._indices, **facts))
        self._inputs, self._indices = [], []

    def take(self, number: int) -> Step | None:
        """What is held of a step, if anything; it and all before it are let go."""
        found = None
        while self._steps and self._steps[0].number <= number:
            step = self._steps.popleft()
            found = step if step.number == number else None
        return found

    def drop(self) -> None:
        """The present step is given up."""
        self._inputs, self._indices = [], []

    def clear(self) -> None:
        self.drop()
        self._steps.clear()

    def __len__(self) -> int:
        """Steps that are held beside the present one."""
        return len(self._steps)


def _outlines(value: Any, depth: int = 0) -> Any:
    """The same containers anew around the same leaves."""
    if depth > _DEEPEST:
        return value
    if isinstance(value, Mapping):
        return {key: _outlines(entry, depth + 1) for key, entry in value.items()}
    if type(value) is list and any(isinstance(entry, Mapping | list) for entry in value):
        return [_outlines(entry, depth + 1) for entry in value]
    return list(value) if type(value) is list else value
