"""TensorBoard events: all files of a run, in order, also when it was resumed into files and folders of their own."""

import math
from pathlib import Path
from typing import Final, NamedTuple

from hf_adaclip.audit.numbers import NotANumberError, read_norm
from hf_adaclip.audit.series import MAX_STEP, Series, of_rows
from hf_adaclip.errors import LedgerError

_NORM_TAGS: Final = ("train/grad_norm", "grad_norm", "train/grad-norm", "gradient_norm", "train/gradient_norm")
_LOSS_TAGS: Final = ("train/loss", "loss")


class _Part(NamedTuple):
    """The norms in one file.

    Attributes:
        file: Where they stand.
        begun: When the first was written, seconds since 1970.
        rows: Step, norm and loss, in the order they were written.
    """

    file: Path
    begun: float
    rows: list[tuple[int, float, float]]

    @property
    def first(self) -> int:
        return self.rows[0][0]

    @property
    def last(self) -> int:
        return self.rows[-1][0]


def found_in(folder: Path) -> list[Path]:
    """Event files in a folder and below."""
    return sorted(p for p in folder.glob("**/*tfevents*") if p.is_file())


def from_events(path: Path) -> Series:
    """Read an event file, or all of a folder. A part that begins later than the one before goes on with it, and its steps count.

    Raises:
        LedgerError: TensorBoard is not installed, a file is damaged, there is no norm, or there are several runs.
    """
    files = found_in(path) if path.is_dir() else [path]
    parts = sorted((part for file in files if (part := _read(file)) is not None), key=lambda part: part.begun)
    if not parts:
        raise LedgerError(f"{path} holds TensorBoard events, but none is called {' or '.join(_NORM_TAGS[:2])}.")
    rows: list[tuple[int, float, float]] = []
    doubled = 0
    for part in parts:
        # A run that was resumed begins in the middle; one that begins where another began is another run.
        if rows and part.first <= parts[0].first:
            several = "; ".join(f"{_name(p.file, path)} (steps {p.first} to {p.last})" for p in parts[:5])
            raise LedgerError(f"{path} must hold one run, but holds several: {several}. Name one of them.")
        kept = [row for row in rows if row[0] < part.first]
        doubled += len(rows) - len(kept)
        rows = kept + part.rows
    said = []
    if len(parts) > 1:
        said.append(f"Read from {len(parts)} event files, the later ones going on with the earlier.")
    if doubled:
        said.append(f"{doubled} step(s) were done again after a resumption; the later ones count.")
    return of_rows(path, "TensorBoard", rows, said)


def _read(file: Path) -> _Part | None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise LedgerError(f"Reading {file} needs TensorBoard. Run: pip install tensorboard.") from error
    try:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        tag = next((t for t in _NORM_TAGS if t in tags), None)
        if tag is None:
            return None
        loss_tag = next((t for t in _LOSS_TAGS if t in tags), None)
        losses = {e.step: e.value for e in events.Scalars(loss_tag)} if loss_tag else {}
        found = events.Scalars(tag)
    except Exception as error:  # the reader raises whatever a damaged file makes it raise
        raise LedgerError(
            f"{file} cannot be read as TensorBoard events: {' '.join(str(error).split())[:200]}."
        ) from error
    if not found:
        return None
    rows = []
    for event in found:
        if not 0 <= event.step <= MAX_STEP:
            raise LedgerError(f"{file} holds step {event.step}, which no run has reached.")
        try:
            norm = read_norm(event.value)
        except NotANumberError as error:
            raise LedgerError(f"{file} cannot be read: `{tag}` at step {event.step}: {error}.") from error
        rows.append((event.step, math.nan if norm is None else norm, losses.get(event.step, math.nan)))
    return _Part(file, found[0].wall_time, rows)


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if folder in file.parents else file.name
