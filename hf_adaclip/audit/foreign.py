"""Logs of other programs: the Trainer's `trainer_state.json`, CSV of anything, folders of checkpoints. Read right, or refused by row."""

import codecs
import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any, Final

from hf_adaclip.audit.numbers import NotANumberError, read_norm, read_number, read_step
from hf_adaclip.audit.series import Series, of_rows
from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.reader import open_regular
from hf_adaclip.run.checkpoint import CHECKPOINT

MAX_FOREIGN_BYTES: Final = 512 * 1024 * 1024
STATE: Final = "trainer_state.json"
_NORM_COLUMNS: Final = (
    "norm",
    "grad_norm",
    "gradient_norm",
    "train/grad_norm",
    "train/gradient_norm",
    "train/grad-norm",
)
# The optimizer's steps before any other: W&B counts its own log calls in `_step`.
_STEP_COLUMNS: Final = ("train/global_step", "global_step", "trainer/global_step", "step", "steps", "_step")
_LOSS_COLUMNS: Final = ("train/loss", "loss", "train_loss")
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def from_folder(path: Path) -> Series:
    """A checkpoint's folder, an output folder with checkpoints, or a folder of TensorBoard events.

    Raises:
        LedgerError: It holds none of them, or more than one run.
    """
    if (path / STATE).is_file():
        return from_file(path / STATE)
    states = sorted(
        (int(match.group(1)), state)
        for state in path.glob(f"*/{STATE}")
        if (match := CHECKPOINT.fullmatch(state.parent.name)) and state.is_file()
    )
    if states:
        return _newest(path, [state for _, state in states])
    from hf_adaclip.audit import event_files

    if event_files.found_in(path):
        return event_files.from_events(path)
    raise LedgerError(
        f"{path} is a folder without TensorBoard events, and without clip_ledger.jsonl, {STATE} or checkpoint-*/{STATE}. "
        "Name the file that holds the norms."
    )


def from_file(path: Path) -> Series:
    """Read a file by what is in it.

    Raises:
        LedgerError: It cannot be read, or a value in it cannot.
    """
    if "tfevents" in path.name:
        from hf_adaclip.audit import event_files

        return event_files.from_events(path)
    text = _text(path)
    return _from_state(path, text) if text.lstrip()[:1] in ("{", "[") else _from_csv(path, text)


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_FOREIGN_BYTES + 1)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) > MAX_FOREIGN_BYTES:
        raise LedgerError(f"{path} must be at most {MAX_FOREIGN_BYTES >> 20} MiB, but has more instead.")
    if not raw.strip():
        raise LedgerError(
            f"{path} must be a CSV with a column `step` and a column `norm` (or `grad_norm`), but is empty instead."
        )
    encoding = next((name for bom, name in _BOMS if raw.startswith(bom)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise LedgerError(
            f"{path} cannot be read as CSV or JSON: it is not {encoding.upper()} (byte {error.start})."
        ) from error


def _newest(path: Path, states: list[Path]) -> Series:
    """The longest of several checkpoints, each of which holds the history before it. They must be of one run."""
    all_read = [from_file(state) for state in states]
    newest = all_read[-1]
    known = dict(zip(newest.steps.tolist(), newest.norms.tolist(), strict=True))
    for state, series in zip(states[:-1], all_read[:-1], strict=True):
        for step, norm in zip(series.steps.tolist(), series.norms.tolist(), strict=True):
            other = known.get(step)
            if other is not None and other != norm and not (other != other and norm != norm):
                raise LedgerError(
                    f"{path} must hold the checkpoints of one run, but {state.parent.name} and {states[-1].parent.name} differ at step "
                    f"{step}. Name one of them."
                )
    if len(states) == 1:
        return newest
    said = (
        f"Read from {states[-1].parent.name}, the last of {len(states)} checkpoints, which holds the history of all."
    )
    return _with(newest, said)


def _with(series: Series, sentence: str) -> Series:
    return dataclasses.replace(series, left_out=(*series.left_out, sentence))


def _from_state(path: Path, text: str) -> Series:
    try:
        content = json.loads(text)
        history = content if isinstance(content, list) else content["log_history"]
        if not isinstance(history, list):
            raise TypeError("`log_history` is no list")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{path} must be a ledger, a trainer_state.json, a CSV or a TensorBoard folder, but is none: {_short(error)}."
        ) from error
    rows: list[tuple[int, float, float]] = []
    without = 0
    for number, entry in enumerate(history, start=1):
        if not isinstance(entry, dict) or "grad_norm" not in entry:
            continue
        where = f"entry {number} of `log_history`"
        step = _read(path, where, "step", read_step, entry.get("step"))
        norm = _read(path, where if step is None else f"step {step}", "grad_norm", read_norm, entry["grad_norm"])
        loss = _read(path, where if step is None else f"step {step}", "loss", read_number, entry.get("loss"))
        if step is None or norm is None:
            without += 1
            continue
        rows.append((step, norm, math.nan if loss is None else loss))
    return of_rows(path, "trainer_state.json", rows, _said(without, "entry(s) hold no norm, or no step"))


def _from_csv(path: Path, text: str) -> Series:
    first = text.lstrip("\ufeff\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[tuple[int, float, float]] = []
    without = again = 0
    header: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = cells
                step_at, norm_at, loss_at = _columns(path, header)
                continue
            if cells == header:
                again += 1
                continue
            where = f"row {reader.line_num}"
            if any(cells[len(header) :]):
                raise LedgerError(
                    f"{path} must have {len(header)} cells in every row, but {where} has {len(cells)} instead. "
                    "Put quotes around a cell that holds the separator."
                )
            cells += [""] * (len(header) - len(cells))
            step = _read(path, where, header[step_at], read_step, cells[step_at])
            norm = _read(path, where, header[norm_at], read_norm, cells[norm_at])
            if step is None or norm is None:
                without += 1
                continue
            loss = None if loss_at is None else _read(path, where, header[loss_at], read_number, cells[loss_at])
            rows.append((step, norm, math.nan if loss is None else loss))
    except csv.Error as error:
        raise LedgerError(f"{path} cannot be read as CSV: row {reader.line_num}: {_short(error)}.") from error
    if not header:
        raise LedgerError(
            f"{path} must be a CSV with a column `step` and a column `norm` (or `grad_norm`), but is empty instead."
        )
    said = _said(without, "row(s) hold no norm, or no step") + _said(again, "row(s) repeat the header")
    return of_rows(path, "CSV", rows, said)


def _columns(path: Path, header: list[str]) -> tuple[int, int, int | None]:
    """Where step, norm and loss stand."""
    names = [name.lower() for name in header]
    norm = next((names.index(c) for c in _NORM_COLUMNS if c in names), None)
    if norm is None:
        # W&B's export of a chart: "<run> - train/grad_norm", with minimum and maximum beside.
        charts = [i for i, name in enumerate(names) if name.endswith(tuple(f" - {c}" for c in _NORM_COLUMNS))]
        if len(charts) > 1:
            raise LedgerError(
                f"{path} must hold one run, but has columns of {len(charts)}: {_short(', '.join(header[i] for i in charts))}. "
                "Export one of them."
            )
        norm = charts[0] if charts else None
    step = next((names.index(c) for c in _STEP_COLUMNS if c in names), None)
    if norm is None or step is None:
        raise LedgerError(
            f"{path} must be a CSV with a column `step` and a column `norm` (or `grad_norm`), but its columns are "
            f"{_short(', '.join(filter(None, header)) or 'none')}."
        )
    for at in (norm, step):
        if names.count(names[at]) > 1:
            raise LedgerError(
                f"{path} must have one column `{_short(header[at])}`, but has {names.count(names[at])} instead."
            )
    return step, norm, next((names.index(c) for c in _LOSS_COLUMNS if c in names), None)


def _read(path: Path, where: str, name: str, read: Any, value: Any) -> Any:
    """A value, or an error that says where it stands."""
    try:
        return read(value)
    except NotANumberError as error:
        kind = "CSV" if where.startswith("row") else STATE
        raise LedgerError(f"{path} cannot be read as {kind}: `{_short(name)}` in {where}: {error}.") from error


def _said(count: int, what: str) -> list[str]:
    return [f"{count} {what}."] if count else []


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:200] + "..."
