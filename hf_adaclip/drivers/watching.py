"""What a clipper has for keeping what its steps are made with, until it is known whether they went wrong."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hf_adaclip.drivers.going_back import GoingBack
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import shown
from hf_adaclip.incidents.folder import Incident
from hf_adaclip.incidents.watched import Watched

Batch = TypeVar("Batch")


class Watching(GoingBack):
    """The part of `AdaptiveClipper` that is shown batches, and tells of incidents."""

    def watch(self, batch: Batch, indices: Sequence[int] | None = None, *, processing_class: Any = None) -> Batch:
        """Hold a reference to what the coming step is made with, so that it can be kept if the step is an incident.

        Call it for every micro-batch, before `clip_`. In a Trainer that happens by itself.

        Args:
            batch: Anything; it is given back as it is.
            indices: Positions of its samples in the dataset, where the loop knows them.
            processing_class: A tokenizer or processor that decodes token ids; the first that is given counts.

        Example:
            >>> clipper = AdaptiveClipper()
            >>> clipper.watch({"x": 1})
            {'x': 1}
        """
        self._capture.begin(self.output_dir)
        if self._capture.processing_class is None:
            self._capture.processing_class = processing_class
        self._capture.add(batch, indices)
        self._driver.sees(batch)
        return batch

    def unwatch(self) -> None:
        """The batches since the last step belong to none: a loop has given it up."""
        self._capture.drop()

    def watched(self, dataloader: Any, *, processing_class: Any = None) -> "Watched":
        """The same dataloader, of which every batch is shown to [`watch`]: `for batch in clipper.watched(dataloader)`.

        Args:
            dataloader: Anything that gives batches; it is asked for everything else as before.
            processing_class: As for [`watch`].
        """
        return Watched(dataloader, lambda batch: self.watch(batch, processing_class=processing_class))

    @property
    def incidents(self) -> list[Incident]:
        """What this run has kept so far, oldest first."""
        return list(self._capture.found)

    def on_incident(self, listener: Callable[[Incident], None]) -> None:
        """Call `listener` with every [`Incident`], after it was written, on every rank for itself.

        Raises:
            ConfigError: It cannot be called.
        """
        check_listener(listener, "Incident", "on_incident")
        self._capture.listeners.append(listener)


def check_listener(listener: Any, of: str, method: str) -> None:
    """Whether it can be called.

    Raises:
        ConfigError: It cannot.
    """
    if not callable(listener):
        raise ConfigError(
            f"`listener` must be a function of one {of}, but is {shown(listener)} instead. Pass such as `clipper.{method}(print)`."
        )
