"""What is kept of an incident, rank by rank: the batch, where its samples come from, and their text."""

import json
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from hf_adaclip.errors import ConfigError, LedgerError
from hf_adaclip.incidents.contents import BATCH_FILE, load_batch
from hf_adaclip.incidents.folder import INCIDENT_FILE, Incident, of_rank
from hf_adaclip.incidents.texts import TEXT_FILE, texts_of
from hf_adaclip.ledger.reader import read_regular

_BYTES: Final = 1 << 24
Texts = dict[tuple[int, int], str]


class Part(NamedTuple):
    """What one rank was fed in the step.

    Attributes:
        rank: Which one.
        micro_batches: In order; None where they were not kept.
        indices: Positions in the dataset per micro-batch; None where they are not known.
        hashes: SHA-256 per micro-batch.
        texts: By micro-batch and sample.
    """

    rank: int
    micro_batches: list[Any] | None
    indices: list[list[int] | None]
    hashes: list[str]
    texts: Texts


def parts_of(incident: Incident, rank: int | None = None) -> list[Part]:
    """Of one rank, or of all that left something.

    Raises:
        ConfigError: There was no such rank.
        LedgerError: A file is damaged.
    """
    world = int(incident.facts.get("world_size") or 1)
    if rank is not None and not 0 <= rank < world:
        raise ConfigError(f"`--rank` must be one of 0 to {world - 1}, but is {rank} instead.")
    found = [part for r in range(world) if rank in (None, r) and (part := _part(incident, r)) is not None]
    if rank is not None and not found:
        raise LedgerError(
            f"{incident.folder} must hold {of_rank(INCIDENT_FILE, rank)} of rank {rank}, but does not: every node keeps its own."
        )
    return found


def _part(incident: Incident, rank: int) -> Part | None:
    try:
        text = read_regular(incident.folder / of_rank(INCIDENT_FILE, rank), _BYTES)
    except (OSError, LedgerError):
        return None
    try:
        batch = json.loads(text)["batch"]
        hashes = [str(one["sha256"]) for one in batch.get("hashes") or []]
        indices = list(batch.get("indices") or [])
        count = int(batch.get("micro_batches") or 0)
    except (ValueError, LookupError, TypeError) as error:
        raise LedgerError(f"{incident.folder} must tell of its batch, but is damaged: {error}.") from error
    kept = load_batch(incident.folder / of_rank(BATCH_FILE, rank)) if batch.get("file") else None
    indices += [None] * (count - len(indices))
    return Part(rank, kept, indices, hashes, _written(incident, rank))


def _written(incident: Incident, rank: int) -> Texts:
    try:
        lines = read_regular(incident.folder / of_rank(TEXT_FILE, rank), _BYTES).decode("utf-8", "replace")
        return _joined(json.loads(line) for line in lines.splitlines())
    except (OSError, LedgerError, ValueError, LookupError, TypeError):  # what only explains is done without
        return {}


def decoded(micro_batches: list[Any], processing_class: Any) -> Texts:
    """The text of every sample, by a tokenizer or processor."""
    return _joined(texts_of(micro_batches, processing_class))


def _joined(entries: Iterator[dict[str, Any]]) -> Texts:
    """The fields of a sample in one line; labels only where there is nothing else, because they repeat it."""
    fields: dict[tuple[int, int], dict[str, str]] = {}
    for entry in entries:
        fields.setdefault((int(entry["micro_batch"]), int(entry["sample"])), {})[str(entry["field"])] = str(
            entry["text"]
        )
    texts = {}
    for place, named in fields.items():
        shown = {name: text for name, text in named.items() if name != "labels"} or named
        texts[place] = " | ".join(shown.values())
    return texts
