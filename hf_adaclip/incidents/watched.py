"""A dataloader that shows every batch to somebody on its way."""

from collections.abc import Callable, Iterator
from typing import Any


class Watched:
    """Gives the batches of a dataloader, and everything else that it has.

    Args:
        dataloader: Anything that gives batches.
        show: Called with each of them, before the loop gets it.
    """

    def __init__(self, dataloader: Any, show: Callable[[Any], object]) -> None:
        self._dataloader, self._show = dataloader, show

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            self._show(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataloader", "_show"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._dataloader, name)
