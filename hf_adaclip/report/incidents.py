"""Incidents of a run for people: as lines of text, and as a section of its page."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from hf_adaclip.errors import LedgerError
from hf_adaclip.incidents.contents import BATCH_FILE, load_batch
from hf_adaclip.incidents.folder import FOLDER, Incident, find_incidents
from hf_adaclip.incidents.texts import GENERATIONS_FILE, TEXT_FILE
from hf_adaclip.ledger.reader import read_regular
from hf_adaclip.ledger.schema import parse_number
from hf_adaclip.report import page
from hf_adaclip.report.thumbnails import thumbnails

_MOST_SHOWN: Final = 50
_TEXTS: Final = 8
_LABELS: Final = ["step", "what", "norm", "usual", "loss", "batch", "why"]
_TEXT_BYTES: Final = 1 << 20
_LENGTH: Final = 300


def incidents_of(run: Path) -> list[Incident]:
    """Those of a run, from its folder, its ledger, or its folder of incidents.

    Raises:
        LedgerError: There is no such folder or file.
    """
    if not run.exists():
        raise LedgerError(f"{run} must be the folder of a run, or its ledger, but does not exist.")
    return find_incidents(run.parent if run.name == FOLDER else run)


def overview(found: list[Incident]) -> list[str]:
    """A line for each incident, below a line of heads."""
    rows = [_LABELS, *(_row(incident) for incident in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return ["  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[6]]) for row in rows]


def _row(incident: Incident) -> list[str]:
    facts = incident.facts
    kept = "kept" if _batch(facts).get("file") else "hashes" if _batch(facts).get("hashes") else "none"
    numbers = [_shortly(facts.get(key)) for key in ("norm", "usual_norm", "loss")]
    return [str(incident.step), incident.kind.replace("_", " "), *numbers, kept, incident.reason]


def in_full(incident: Incident) -> list[str]:
    """All that is known of one incident, as lines."""
    facts = incident.facts
    lines = [f"Step {incident.step}: {incident.kind.replace('_', ' ')}. {incident.reason}", f"  {incident.folder}"]
    lines += [f"  {name:<15}{value}" for name, value in _facts(facts)]
    for title, rows in (("modules", _entries(facts, "modules")), ("tensors", _entries(facts, "tensors"))):
        if rows:
            lines.append(f"  largest {title}, by their share of the squared norm:")
            lines += [f"    {share:>8}  {name}{norm}" for share, name, norm in map(_share_row, rows[:10])]
    lines += [f"  {line}" for line in _inputs(incident)]
    if texts := _texts(incident.folder):
        lines.append(f"  text ({TEXT_FILE} has all):")
        lines += [f"    {where}: {text}" for where, text in texts]
    if written := _generations(incident.folder):
        lines.append(f"  completions, the largest advantage first ({GENERATIONS_FILE} has all):")
        lines += [f"    {' '.join(row)}" for row in written]
    return lines


def markdown_rows(run: Path) -> tuple[list[str], list[list[str]]]:
    """Labels and rows of a table of the incidents of a run."""
    return _LABELS, [_row(incident) for incident in find_incidents(run)[:_MOST_SHOWN]]


def section(run: Path) -> list[page.Part]:
    """Of a run's page; nothing where there was no incident."""
    found = find_incidents(run)
    if not found:
        return []
    parts = [page.heading(f"Incidents ({len(found)})")]
    parts.append(
        page.table(_LABELS, [_row(i) for i in found[:_MOST_SHOWN]], words=["why"], short=["step", "what", "batch"])
    )
    for incident in found[:_MOST_SHOWN]:
        parts += _one(incident)
    if len(found) > _MOST_SHOWN:
        parts.append(page.text(f"{len(found) - _MOST_SHOWN} more are in the folder; see `hf-adaclip incident`."))
    return parts


def _one(incident: Incident) -> Iterator[page.Part]:
    facts = incident.facts
    yield page.subheading(f"Step {incident.step}: {incident.kind.replace('_', ' ')}")
    yield page.facts([[name, value] for name, value in _facts(facts)])
    rows = [list(_share_row(entry)[:2]) for entry in _entries(facts, "modules")[:10]]
    if rows:
        yield page.folded("Modules by their share of the squared norm", ["share", "module"], rows)
    if texts := _texts(incident.folder):
        yield page.folded("Text of the batch", ["sample", "text"], [list(row) for row in texts])
    if written := _generations(incident.folder):
        yield page.folded(
            "Completions and rewards", ["advantage", "rewards", "completion"], [list(row) for row in written]
        )
    if drawn := thumbnails(_batch_of(incident)):
        images = "".join(f'<img alt="{escape(name)}" title="{escape(name)}" src="{source}">' for name, source in drawn)
        yield page.images(images)


def _facts(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "norm", f"{_shortly(facts.get('norm'))}, let through {_shortly(facts.get('norm_left'))}"
    yield "usual norm", _shortly(facts.get("usual_norm"))
    yield "threshold", f"{_shortly(facts.get('threshold'))} (static {_shortly(facts.get('static_threshold'))})"
    yield "decision", f"{facts.get('decision')}: {facts.get('decision_in_words')}"
    yield "loss", _shortly(facts.get("loss"))
    if rates := facts.get("learning_rates"):
        yield "learning rate", f"{', '.join(f'{rate:.4g}' for rate in rates)}, pace {_shortly(facts.get('pace'))}"
    if facts.get("loss_scale") is not None:
        yield "loss scale", _shortly(facts["loss_scale"])
    batch = _batch(facts)
    why = f" {batch['why']}" if batch.get("why") else ""
    yield "batch", (f"{batch.get('file')}, {batch.get('bytes')} bytes" if batch.get("file") else "not kept.") + why
    for number, places in enumerate(batch.get("indices") or []):
        if places is not None:
            yield f"samples {number}", ", ".join(map(str, places[:64])) + (" ..." if len(places) > 64 else "")


def _inputs(incident: Incident) -> Iterator[str]:
    """What the batch is made of."""
    for number, micro_batch in enumerate(_batch_of(incident)):
        entries = micro_batch.items() if isinstance(micro_batch, dict) else [("", micro_batch)]
        for name, value in entries:
            yield f"micro-batch {number} {name}: {_outline(value)}"


def _outline(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return (
        text
        if len(text) <= 120
        else f"{type(value).__name__} of {len(value)}"
        if hasattr(value, "__len__")
        else text[:120]
    )


def _batch_of(incident: Incident) -> list[Any]:
    if not _batch(incident.facts).get("file"):
        return []
    try:
        return load_batch(incident.folder / BATCH_FILE)
    except LedgerError:
        return []


def _generations(folder: Path) -> list[tuple[str, str, str]]:
    """Advantage, rewards and completion of a few, the largest advantage first."""
    try:
        lines = read_regular(folder / GENERATIONS_FILE, _TEXT_BYTES).decode("utf-8", errors="replace").splitlines()
        rows = [json.loads(line) for line in lines]
        rows.sort(key=lambda row: -abs(parse_number(row["advantage"])))
        return [
            (
                _shortly(row["advantage"]),
                ", ".join(f"{_printable(str(name))} {_shortly(value)}" for name, value in row["rewards"].items()),
                _printable(str(row["completion"]))[:_LENGTH],
            )
            for row in rows[:_TEXTS]
        ]
    except (OSError, LedgerError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _texts(folder: Path) -> list[tuple[str, str]]:
    found = []
    try:
        lines = read_regular(folder / TEXT_FILE, _TEXT_BYTES).decode("utf-8", errors="replace").splitlines()
        for line in lines[:_TEXTS]:
            entry = json.loads(line)
            text = _printable(str(entry["text"]))
            where = f"micro-batch {entry['micro_batch']}, sample {entry['sample']}, {entry['field']}"
            found.append((where, text[:_LENGTH] + (" ..." if len(text) > _LENGTH else "")))
    except (OSError, ValueError, LookupError, TypeError):
        return found
    return found


def _entries(facts: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = facts.get(key)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _share_row(entry: dict[str, Any]) -> tuple[str, str, str]:
    share = entry.get("share")
    norm = f"  (norm {_shortly(entry['norm'])})" if "norm" in entry else ""
    return f"{share:.2%}" if isinstance(share, int | float) else "-", _printable(str(entry.get("name"))), norm


def _batch(facts: dict[str, Any]) -> dict[str, Any]:
    batch = facts.get("batch")
    return batch if isinstance(batch, dict) else {}


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shortly(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown" if value is None else str(value)
