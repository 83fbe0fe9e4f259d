"""Telling people: events to the log and to listeners, and the end of a run that is in trouble."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from hf_adaclip.errors import TrainingTroubleError
from hf_adaclip.run.events import ALARMING, ClipEvent

logger = logging.getLogger(__name__)


PAUSE: Final = 60.0
"""Seconds between two warnings of the same recurring kind."""

_RECURRING: Final = frozenset({"spike", "skipped"})


class Alerts:
    """Where events go. Listeners get every one; the log gets alarming ones as warnings: spikes and skipped steps at most once a minute
    each, with the number in between, the others when they first come up for a reason.

    Args:
        clock: Seconds that only rise.
        speaks: Whether this process logs events as warnings. All ranks have the same ones, and one of them is enough to read.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, speaks: bool = True) -> None:
        self._alarm = logging.WARNING if speaks else logging.DEBUG
        self.listeners: list[Callable[[ClipEvent], None]] = []
        self.stop: Callable[[TrainingTroubleError], None] | None = None
        self._clock = clock
        self._warned: set[str] = set()
        self._told: dict[str, float] = {}  # when a recurring kind was last warned of
        self._untold: Counter[str] = Counter()
        self._failed: list[Callable[[ClipEvent], None]] = []

    def tell(self, events: Sequence[ClipEvent]) -> None:
        """Pass events on. A listener that raises is logged, with its traceback the first time, and called again for the next event."""
        for event in events:
            if event.kind in _RECURRING:
                self._tell_recurring(event)
            elif event.kind in ALARMING and (text := f"{event.kind} {event.code}") not in self._warned:
                self._warned.add(text)
                logger.log(
                    self._alarm, "Adaptive clipping, %s Later ones of this kind are logged at level DEBUG.", event
                )
            else:
                level = logging.INFO if event.kind == "held" else logging.DEBUG
                logger.log(level, "Adaptive clipping, %s", event)
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception:
                    self._excuse(listener)

    def _tell_recurring(self, event: ClipEvent) -> None:
        now, last = self._clock(), self._told.get(event.kind)
        if last is not None and now - last < PAUSE:
            self._untold[event.kind] += 1
            logger.debug("Adaptive clipping, %s", event)
            return
        self._told[event.kind] = now
        since = self._untold.pop(event.kind, 0)
        what = "spikes" if event.kind == "spike" else "series of skipped steps"
        logger.log(
            self._alarm,
            "Adaptive clipping, %s%s",
            event,
            f" {since} other {what} came since the last warning." if since else "",
        )

    def _excuse(self, listener: Callable[[ClipEvent], None]) -> None:
        # Who only listens does not end a training.
        if listener not in self._failed:
            self._failed.append(listener)
            logger.exception(
                "The listener %r of adaptive clipping has raised; training goes on, and it is called again.", listener
            )

    def say(self, message: str) -> None:
        """Log what people should see though nothing is wrong: a change of what training does."""
        logger.log(self._alarm, "Adaptive clipping, %s", message)

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
