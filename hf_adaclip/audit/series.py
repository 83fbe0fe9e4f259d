"""Gradient norms over the steps of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from hf_adaclip.errors import LedgerError

Source = Literal["ledger", "trainer_state.json", "TensorBoard", "CSV"]
MAX_STEP: Final = 2**53


@dataclass(frozen=True)
class Series:
    """Gradient norms over the steps of a run.

    Attributes:
        path: Where they come from.
        source: What kind of file it was.
        steps: Optimizer steps, int64, rising.
        norms: Norm before clipping, float32; NaN and inf where the run had them.
        losses: Training loss, float32, NaN where it is not known.
        thresholds, coefficients, paces: What was decided, float32; None when the log does not say.
        reaches: What the pace went by, float32, NaN where there was none; None when the log does not say.
        reasons: Names of reasons; None when the log does not say.
        header: Header of the last segment of a ledger, else None.
        every: Steps between two known norms; 1 when all are known. With more, spikes in between are unseen.
        left_out: What the log holds besides and was not taken, in sentences.
        altered_energies: What the spectral range moved, 0 to 1, float32, NaN in steps in which it did not act; None when the log does not
            say.
        agreeing_shares: Share of the components that the sign agreement let move, likewise.
        moved: Share of their size that loaded weights had moved, in steps from which on a part acts for that; NaN in all others.
    """

    path: str
    source: Source
    steps: np.ndarray
    norms: np.ndarray
    losses: np.ndarray
    thresholds: np.ndarray | None
    coefficients: np.ndarray | None
    paces: np.ndarray | None
    reaches: np.ndarray | None
    reasons: list[str] | None
    header: dict[str, Any] | None
    every: int
    left_out: tuple[str, ...] = ()
    altered_energies: np.ndarray | None = None
    agreeing_shares: np.ndarray | None = None
    moved: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Steps before and after which several norms in a row are missing, by the usual distance between two."""
        wide = np.flatnonzero(np.diff(self.steps) > 1.5 * self.every)
        return [(int(self.steps[i]), int(self.steps[i + 1])) for i in wide]

    def decisions(self) -> tuple[np.ndarray, np.ndarray]:
        """Thresholds and coefficients as they were recorded.

        Raises:
            LedgerError: The log holds norms only.
        """
        if self.thresholds is None or self.coefficients is None:
            raise LedgerError(f"{self.path} must hold decisions, but {self.source} holds norms only.")
        return self.thresholds, self.coefficients


def of_rows(
    path: Path, source: Source, rows: Sequence[tuple[int, float, float]], left_out: Sequence[str] = ()
) -> Series:
    """A series from a log that holds norms only.

    Args:
        path: Where they come from.
        source: What kind of file it was.
        rows: Step, norm and loss (NaN when it is not known), in the order of the log. Where a step stands twice the later row counts: a
            run that was resumed does steps again.
        left_out: What was not taken, in sentences.

    Raises:
        LedgerError: There is no row.
    """
    if not rows:
        raise LedgerError(
            f"{path} holds no gradient norm. The Trainer logs it as `grad_norm` unless `max_grad_norm` is off."
        )
    said = list(left_out)
    ordered = sorted({step: (norm, loss) for step, norm, loss in rows}.items())
    if doubled := len(rows) - len(ordered):
        said.append(f"{doubled} step(s) stand there again; the later entry counts.")
    elif any(a[0] > b[0] for a, b in pairwise(rows)):
        said.append("The steps were not in order; they were sorted.")
    steps = np.array([step for step, _ in ordered], dtype=np.int64)
    every = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    return Series(
        path=str(path),
        source=source,
        steps=steps,
        norms=array([norm for _, (norm, _) in ordered]),
        losses=array([loss for _, (_, loss) in ordered]),
        thresholds=None,
        coefficients=None,
        paces=None,
        reaches=None,
        reasons=None,
        header=None,
        every=max(every, 1),
        left_out=tuple(said),
    )


def array(values: list[float]) -> np.ndarray:
    """float32, what is too large as infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32)
