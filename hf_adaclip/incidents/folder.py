"""`incidents/step-00123/` in the folder of a run: where each incident lies, and how it is read again.

`incident.json` is written last, so a folder without one is not complete. Of several ranks, rank 0 writes it together with
`batch.safetensors`, and every other one `incident-rank1.json` and `batch-rank1.safetensors`, with what it was fed.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.reader import open_regular
from hf_adaclip.ledger.schema import plain

FOLDER: Final = "incidents"
INCIDENT_FILE: Final = "incident.json"
SCHEMA: Final = 1
_NAME: Final = re.compile(r"step-(\d{5,15})(?:-(\d{1,6}))?")


class Incident(NamedTuple):
    """An incident on disk.

    Attributes:
        step: Optimizer step.
        kind: What it is.
        reason: In words.
        folder: Where it lies.
        facts: All of `incident.json`.
    """

    step: int
    kind: str
    reason: str
    folder: Path
    facts: dict[str, Any]


def of_rank(name: str, rank: int) -> str:
    """What a rank calls its own file of that name."""
    stem, dot, ending = name.rpartition(".")
    return name if rank == 0 else f"{stem}-rank{rank}{dot}{ending}"


def make_folder(root: Path, step: int, rank: int) -> Path:
    """The folder of an incident at this step; a second one, of a run that went back or was started again, has its own.

    Raises:
        OSError: It cannot be made.
    """
    for again in range(1, 10_000):
        folder = root / (f"step-{step:05d}" + (f"-{again}" if again > 1 else ""))
        if not (folder / of_rank(INCIDENT_FILE, rank)).exists():
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise OSError(f"{root} has incidents of step {step} without end")


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """As strict JSON, all of it or nothing.

    Raises:
        OSError: There is no room.
    """
    draft = path.with_suffix(".partial")
    try:
        draft.write_text(json.dumps(plain(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def find_incidents(run: str | Path) -> list[Incident]:
    """The incidents of a run, in order of their steps. What cannot be read as one is left out.

    Args:
        run: Its folder, or its ledger.
    """
    run = Path(run)
    return sorted(
        _complete((run if run.is_dir() else run.parent) / FOLDER), key=lambda found: (found.step, found.folder.name)
    )


def _complete(root: Path) -> Iterator[Incident]:
    for folder in root.iterdir() if root.is_dir() else ():
        if _NAME.fullmatch(folder.name):
            try:
                yield load_incident(folder)
            except LedgerError:
                continue


def load_incident(folder: Path) -> Incident:
    """Read one.

    Raises:
        LedgerError: It is not complete, or damaged.
    """
    try:
        with open_regular(folder / INCIDENT_FILE) as file:
            facts = json.loads(file.read().decode("utf-8"))
        return Incident(int(facts["step"]), str(facts["kind"]), str(facts["reason"]), folder, dict(facts))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise LedgerError(f"{folder} must hold an {INCIDENT_FILE}, but it cannot be read: {error}.") from error
