"""Norms of a run as a series, from our ledger or from logs that others wrote (see `foreign` and `events_files`)."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.audit import foreign
from hf_adaclip.audit.series import MAX_STEP, Series, array
from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.reader import open_ledger, open_regular, read_lines, what_it_is
from hf_adaclip.ledger.schema import LEDGER_FILE, parse_number

__all__ = ["Series", "ledger_records", "load_series"]

_NOT_ALWAYS: Final = ("reach", "altered_energy", "agreeing_share", "moved")
"""Fields of the parts that are not on in every run."""


def load_series(path: str | Path) -> Series:
    """Read the norms of a run from whatever file or folder this is.

    Raises:
        LedgerError: It is missing, is none of the known kinds, holds no gradient norm, or something in it cannot be read as one: then the
            row, the step or the file is named.
    """
    path = Path(path)
    if path.is_dir():
        if (path / LEDGER_FILE).is_file():
            return _from_ledger(path / LEDGER_FILE)
        return foreign.from_folder(path)
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if start.startswith(b'{"kind":"'):
        return _from_ledger(path)
    if (known := what_it_is(start)) is not None:
        raise LedgerError(
            f"{path} must be a ledger, a trainer_state.json, a CSV or TensorBoard events, but is {known}."
        )
    return foreign.from_file(path)


def ledger_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Header, step and footer lines of a ledger in order. Lines that are not JSON are passed over: `verify` reports them."""
    with open_ledger(path) as file:
        for line in read_lines(file):
            if line.content is not None and line.content.get("kind") in ("header", "step", "footer"):
                yield line.content


def _from_ledger(path: Path) -> Series:
    header: dict[str, Any] | None = None
    rows: dict[str, list[float]] = {
        key: [] for key in ("step", "norm", "loss", "threshold", "coefficient", "pace", *_NOT_ALWAYS)
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
                values_now = {key: parse_number(line.get(key) if key in _NOT_ALWAYS else line[key]) for key in rows}
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                raise LedgerError(f"{path}: a step record cannot be understood: {error}.") from error
            if not 0 <= values_now["step"] < MAX_STEP:
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
        steps=array(rows["step"]).astype(np.int64),
        norms=array(rows["norm"]),
        losses=array(rows["loss"]),
        thresholds=array(rows["threshold"]),
        coefficients=array(rows["coefficient"]),
        paces=array(rows["pace"]),
        reaches=array(rows["reach"]),
        reasons=reasons,
        header=header,
        every=1,
        altered_energies=array(rows["altered_energy"]),
        agreeing_shares=array(rows["agreeing_share"]),
        moved=array(rows["moved"]),
    )
