"""Which samples of the dataset a Trainer's micro-batches are made of: what its batch sampler has drawn, in the order it was drawn."""

from collections import deque
from typing import Any, Final

_MOST: Final = 1 << 14
"""Batches that may be drawn ahead of those that are trained on."""


class SampleIndices:
    """Follows one dataloader at a time. Where nothing is known, `next` gives None: iterable datasets, batches that one process hands out
    to the others, workers out of order."""

    def __init__(self) -> None:
        self._drawn: deque[list[int]] = deque()
        self._known = False
        self._skipped: int | None = 0
        self._left = 0
        self._keeps_state = False

    def follow(self, dataloader: Any) -> None:
        """From its next epoch on, note what the dataloader's batch sampler draws; what it gives stays the same.

        A sampler cannot be put in the place of another one once a dataloader is made, so its class is one that was made on the spot.
        """
        sampler = getattr(dataloader, "batch_sampler", None)
        in_order = getattr(dataloader, "in_order", True)
        if (
            sampler is None
            or not in_order
            or any(kind.__name__ == "DataLoaderDispatcher" for kind in type(dataloader).__mro__)
        ):
            return
        self._keeps_state = any(kind.__name__ == "StatefulDataLoader" for kind in type(dataloader).__mro__)
        kind, begin, note = type(sampler), self._begin, self._note

        def draw(own: Any) -> Any:
            begin()
            for indices in kind.__iter__(own):
                note(indices)
                yield indices

        try:
            sampler.__class__ = type(kind.__name__, (kind,), {"__iter__": draw, "__module__": kind.__module__})
        except TypeError:  # a class whose objects cannot change theirs
            return

    def begin_midway(self, batches: int | None) -> None:
        """The coming epoch is gone on with.

        Args:
            batches: Micro-batches of this rank that are drawn first and that nobody will see; None where that is not known.
        """
        # A dataloader that keeps its place begins there, and draws none of them.
        self._skipped = None if batches and self._keeps_state else batches

    def next(self) -> list[int] | None:
        """Of the micro-batch that is trained on now; to be called for each of them."""
        return self._drawn.popleft() if self._known and self._drawn else None

    def _begin(self) -> None:
        self._drawn.clear()
        self._known, self._left, self._skipped = self._skipped is not None, self._skipped or 0, 0

    def _note(self, indices: Any) -> None:
        if self._left:
            self._left -= 1
        elif self._known and isinstance(indices, list | tuple):
            self._drawn.append(list(indices))
            self._known = len(self._drawn) <= _MOST
        else:
            self._known = False
