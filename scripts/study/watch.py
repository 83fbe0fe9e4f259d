"""What the study says while it runs: a line at the start and one a minute."""

import threading
import time
from collections.abc import Callable, Sequence

from hf_adaclip.telemetry.progress import EVERY
from scripts.study.plan import Measured, Stage, minutes


class Watch:
    """Says once a minute where the study is, on a terminal as in a file, as long as it is entered.

    Args:
        planned: All stages.
        seconds: What a step takes.
        there: How many runs of a stage are there.
        jobs: Runs at a time.
        every: Seconds from a line to the next.
    """

    def __init__(
        self,
        planned: Sequence[Stage],
        seconds: Measured,
        there: Callable[[Stage], int],
        jobs: int,
        every: float = EVERY,
    ) -> None:
        self.seconds, self.there = seconds, there
        self._planned, self._jobs, self._every = planned, jobs, every
        self._number = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> "Watch":
        if self._planned:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._planned:
            self._thread.join()

    def begin(self, number: int) -> None:
        """A stage begins, counted from 0."""
        self._number = number

    def line(self) -> str:
        """Which stage it is at, how far that is, and how long the rest takes."""
        number = self._number
        stage, left = self._planned[number], 0.0
        for later in self._planned[number:]:
            left += minutes(later, self.seconds, self._jobs, self.there(later))
        return (
            f"{time.strftime('%H:%M')} stage {number + 1} of {len(self._planned)} (wave {stage.wave}): {stage.label}, "
            f"{self.there(stage)} of {stage.runs} runs. About {left / 60:.1f} h left."
        )

    def _speak(self) -> None:
        while True:
            print(self.line(), flush=True)
            if self._over.wait(self._every):
                return
