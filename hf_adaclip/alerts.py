"""Telling people: events to the log and to listeners, and the end of a run that is in trouble."""

import logging
from collections.abc import Callable, Sequence

from hf_adaclip.errors import TrainingTroubleError
from hf_adaclip.events import ALARMING, ClipEvent

logger = logging.getLogger(__name__)


class Alerts:
    """Where events go. Listeners get every one; the log gets alarming ones as warnings, of each kind and reason the first."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[ClipEvent], None]] = []
        self.stop: Callable[[TrainingTroubleError], None] | None = None
        self._warned: set[str] = set()

    def tell(self, events: Sequence[ClipEvent]) -> None:
        """Pass events on."""
        for event in events:
            if event.kind in ALARMING and event.reason not in self._warned:
                self._warned.add(event.reason)
                logger.warning("Adaptive clipping, %s Later ones of this kind are in the ledger.", event)
            else:
                level = logging.INFO if event.kind == "held" else logging.DEBUG
                logger.log(level, "Adaptive clipping, %s", event)
            for listener in self.listeners:
                listener(event)

    def warn_once(self, message: str) -> None:
        """Log a warning, the first time only."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("Adaptive clipping: %s", message)

    def stop_on_trouble(self, policy: str, events: Sequence[ClipEvent]) -> None:
        """End the run if the policy says so: through `stop` where somebody has set it, else by an exception.

        Raises:
            TrainingTroubleError: Trouble is among the events, `policy` is 'stop', and nobody ends the run in order.
        """
        trouble = next((e for e in events if e.kind == "trouble"), None)
        if trouble is None or policy != "stop":
            return
        error = TrainingTroubleError(
            f"{trouble.reason} It was found at step {trouble.step}, and `on_trouble` is 'stop'. Look at the steps before it in the "
            "ledger (`hf-adaclip report`), and go on from a checkpoint before it, with a lower learning rate or without the bad batch.",
            step=trouble.step,
        )
        if self.stop is None:
            raise error
        self.stop(error)
