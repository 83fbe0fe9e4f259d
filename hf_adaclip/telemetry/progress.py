"""One progress bar for all: a bar on a terminal, elsewhere (a file, a pipe, a job's log) a line at the start, one a minute, and one at the
end."""

import sys
import time
from collections.abc import Callable
from typing import Any, Final

from tqdm import tqdm

from hf_adaclip.reliance import require

EVERY: Final = 60.0
"""Seconds between two lines in a log."""


class Progress(tqdm):  # type: ignore[type-arg]
    """As tqdm, but never a carriage return where nobody can see it overwrite anything.

    Args:
        args, kwargs: What tqdm takes; `file` is stderr by default.
        clock: Seconds that only rise.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Progress":
        require(tqdm, "_decr_instances")
        made: Progress = super().__new__(cls)
        return made

    def __init__(self, *args: Any, clock: Callable[[], float] = time.monotonic, **kwargs: Any) -> None:
        stream = kwargs.setdefault("file", sys.stderr)
        self._in_lines = not is_terminal(stream)
        self._clock, self._last, self._shown = clock, -EVERY, ""
        if self._in_lines:
            kwargs.update(ncols=0, ascii=True, leave=True)
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, or write a line if one is due: the first, one a minute, and the last, for which `close` disables the bar."""
        if not self._in_lines:
            super().display(msg, pos)
        elif self.disable or self._clock() - self._last >= EVERY:
            line = str(self).strip() if msg is None else msg.strip()
            if line and line != self._shown:
                print(line, file=self.fp, flush=True)
            self._last, self._shown = self._clock(), line

    def clear(self, nolock: bool = False) -> None:
        if not self._in_lines:
            super().clear(nolock)

    def close(self) -> None:
        if not self._in_lines:
            super().close()
        elif not getattr(self, "disable", True):
            self.disable = True
            self.display()
            self._decr_instances(self)  # type: ignore[attr-defined]


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at it, so that a line may be written over."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # not a file, or closed
        return False
