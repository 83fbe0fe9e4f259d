"""Norms of a run, from our ledger or from logs that others wrote: `trainer_state.json`, TensorBoard events, CSV."""

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from hf_adaclip.audit.reader import open_ledger, read_lines
from hf_adaclip.audit.schema import parse_number
from hf_adaclip.errors import LedgerError

Source = Literal["ledger", "trainer_state.json", "TensorBoard", "CSV"]
MAX_FOREIGN_BYTES: Final = 512 * 1024 * 1024
_MAX_STEP: Final = 2**53
_NORM_TAGS: Final = ("train/grad_norm", "grad_norm", "train/grad-norm", "gradient_norm", "train/gradient_norm")
_NORM_COLUMNS: Final = ("norm", "grad_norm", "gradient_norm", "train/grad_norm")
_STEP_COLUMNS: Final = ("step", "global_step", "steps")


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

    def __len__(self) -> int:
        return len(self.steps)

    def decisions(self) -> tuple[np.ndarray, np.ndarray]:
        """Thresholds and coefficients as they were recorded.

        Raises:
            LedgerError: The log holds norms only.
        """
        if self.thresholds is None or self.coefficients is None:
            raise LedgerError(f"{self.path} must hold decisions, but {self.source} holds norms only.")
        return self.thresholds, self.coefficients


def load_series(path: str | Path) -> Series:
    """Read the norms of a run from whatever file this is.

    Raises:
        LedgerError: The file is missing, is none of the known kinds, or holds no gradient norm.
    """
    path = Path(path)
    if (path / "clip_ledger.jsonl").is_file():
        return _from_ledger(path / "clip_ledger.jsonl")
    if path.is_dir():
        return _from_tensorboard(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if start.startswith(b'{"kind":"'):
        return _from_ledger(path)
    if size > MAX_FOREIGN_BYTES:
        raise LedgerError(f"{path} must be at most {MAX_FOREIGN_BYTES >> 20} MiB, but has {size >> 20} MiB instead.")
    if "tfevents" in path.name:
        return _from_tensorboard(path)
    if start.lstrip().startswith(b"{"):
        return _from_trainer_state(path)
    return _from_csv(path)


def ledger_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Header, step and footer lines of a ledger in order. Lines that are not JSON are passed over: `verify` reports them."""
    with open_ledger(path) as file:
        for line in read_lines(file):
            if line.content is not None and line.content.get("kind") in ("header", "step", "footer"):
                yield line.content


def _from_ledger(path: Path) -> Series:
    header: dict[str, Any] | None = None
    rows: dict[str, list[float]] = {
        key: [] for key in ("step", "norm", "loss", "threshold", "coefficient", "pace", "reach")
    }
    reasons: list[str] = []
    for line in ledger_records(path):
        if line["kind"] == "header":
            header = line
            first = line.get("first_step")
            # A resumed run does some steps again; what counts is what it went on from.
            keep = int(np.searchsorted(rows["step"], first)) if isinstance(first, int) else len(reasons)
            for values in rows.values():
                del values[keep:]
            del reasons[keep:]
        elif line["kind"] == "step":
            try:
                values_now = {key: parse_number(line.get(key) if key == "reach" else line[key]) for key in rows}
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                raise LedgerError(f"{path}: a step record cannot be understood: {error}.") from error
            if not 0 <= values_now["step"] < _MAX_STEP:
                raise LedgerError(
                    f"{path}: {values_now['step']:g} is no step that a run has reached. Run verify on it."
                )
            if rows["step"] and not values_now["step"] > rows["step"][-1]:
                raise LedgerError(
                    f"{path}: step {line['step']} stands after step {rows['step'][-1]:.0f}. Run verify on it."
                )
            for key, value in values_now.items():
                rows[key].append(value)
            reasons.append(sys.intern(str(line.get("reason"))))
    if not reasons:
        raise LedgerError(f"{path} holds no step.")
    return Series(
        path=str(path),
        source="ledger",
        steps=_array(rows["step"]).astype(np.int64),
        norms=_array(rows["norm"]),
        losses=_array(rows["loss"]),
        thresholds=_array(rows["threshold"]),
        coefficients=_array(rows["coefficient"]),
        paces=_array(rows["pace"]),
        reaches=_array(rows["reach"]),
        reasons=reasons,
        header=header,
        every=1,
    )


def _from_trainer_state(path: Path) -> Series:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        history = content["log_history"]
        rows = [
            (int(entry["step"]), _number(entry["grad_norm"]), _number(entry.get("loss")))
            for entry in history
            if isinstance(entry, dict) and "grad_norm" in entry and "step" in entry
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise LedgerError(
            f"{path} must be a ledger, a trainer_state.json, a CSV or a TensorBoard folder, but is none: {_short(error)}."
        ) from error
    return _foreign(path, "trainer_state.json", rows)


def _from_csv(path: Path) -> Series:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = {name.strip().lower(): name for name in reader.fieldnames or [] if name}
            norm = next((names[c] for c in _NORM_COLUMNS if c in names), None)
            step = next((names[c] for c in _STEP_COLUMNS if c in names), None)
            if norm is None or step is None:
                raise LedgerError(
                    f"{path} must be a CSV with a column `step` and a column `norm` (or `grad_norm`), but its columns are "
                    f"{_short(', '.join(names) or 'none')}."
                )
            loss = names.get("loss")
            rows = [
                (int(float(row[step])), _number(row[norm]), _number(row[loss] if loss else None))
                for row in reader
                if row[norm] not in (None, "")
            ]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(f"{path} cannot be read as CSV: {_short(error)}.") from error
    return _foreign(path, "CSV", rows)


def _from_tensorboard(path: Path) -> Series:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise LedgerError(f"Reading {path} needs TensorBoard. Run: pip install tensorboard.") from error
    if path.is_dir() and not any(path.glob("**/*tfevents*")):
        raise LedgerError(f"{path} is a folder without TensorBoard events.")
    folders = sorted({p.parent for p in path.glob("**/*tfevents*")}) if path.is_dir() else [path]
    for folder in folders:
        try:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            tags = events.Tags()["scalars"]
            tag = next((t for t in _NORM_TAGS if t in tags), None)
            if tag is None:
                continue
            loss_tag = next((t for t in ("train/loss", "loss") if t in tags), None)
            losses = {e.step: e.value for e in events.Scalars(loss_tag)} if loss_tag else {}
            rows = [(e.step, e.value, losses.get(e.step, math.nan)) for e in events.Scalars(tag)]
        except Exception as error:  # the reader raises whatever a damaged file makes it raise
            raise LedgerError(f"{folder} cannot be read as TensorBoard events: {_short(error)}.") from error
        return _foreign(path, "TensorBoard", rows)
    raise LedgerError(f"{path} holds TensorBoard events, but none is called {' or '.join(_NORM_TAGS[:2])}.")


def _foreign(path: Path, source: Source, rows: list[tuple[int, float, float]]) -> Series:
    # Logs count steps from 1, after the step; a run that was resumed may log one twice, and the later entry counts.
    ordered = sorted({step: (norm, loss) for step, norm, loss in rows}.items())
    if not ordered:
        raise LedgerError(
            f"{path} holds no gradient norm. The Trainer logs it as `grad_norm` unless `max_grad_norm` is off."
        )
    if not all(abs(step) < _MAX_STEP for step, _ in ordered):
        raise LedgerError(f"{path} holds a step beyond {_MAX_STEP}, which no run has reached.")
    steps = np.array([step for step, _ in ordered], dtype=np.int64)
    every = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    return Series(
        path=str(path),
        source=source,
        steps=steps,
        norms=_array([norm for _, (norm, _) in ordered]),
        losses=_array([loss for _, (_, loss) in ordered]),
        thresholds=None,
        coefficients=None,
        paces=None,
        reaches=None,
        reasons=None,
        header=None,
        every=max(every, 1),
    )


def _number(value: Any) -> float:
    if value is None or value == "":
        return math.nan
    return float(value)


def _array(values: list[float]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32)


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:200] + "..."
