"""Completions and rewards that a step of TRL's policy trainers was made of: what its batch holds of them are token ids and advantages."""

import json
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from hf_adaclip.incidents.batches import KEPT
from hf_adaclip.incidents.folder import Incident, of_rank
from hf_adaclip.incidents.texts import GENERATIONS_FILE
from hf_adaclip.run.ranks import rank

_MOST: Final = 256
_LONGEST: Final = 20_000


class Generations:
    """Holds references to the texts and rewards of the last steps, and writes those of an incident.

    Args:
        trainer: Of any kind; only those that keep what they have generated are looked at.
        private: Whether nothing of a batch may be written.
        excuse: Called with what went wrong, in place of ending the training.
    """

    def __init__(self, trainer: Any, *, private: bool, excuse: Callable[[str], None]) -> None:
        self._trainer, self._excuse = trainer, excuse
        self._held: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT + 1)
        self._on = not private and isinstance(getattr(trainer, "_logs", None), Mapping)

    def note(self, step: int) -> None:
        """A micro-batch of this step is shown."""
        if not self._on or (self._held and self._held[-1][0] == step):
            return
        logs = self._trainer._logs
        held: dict[str, Any] = {name: tuple(logs.get(name) or ()) for name in ("prompt", "completion", "advantages")}
        held["rewards"] = {name: tuple(values) for name, values in (logs.get("rewards") or {}).items()}
        self._held.append((step, held))

    def write(self, incident: Incident) -> None:
        """`generations.jsonl` beside the batch: what was generated for the step, in all processes, and what it was worth."""
        held = next((held for step, held in self._held if step == incident.step), None)
        if held is None or not held["completion"]:
            return
        try:
            lines = [json.dumps(row, ensure_ascii=False) for row in islice(_rows(held), _MOST)]
            path = incident.folder / of_rank(GENERATIONS_FILE, rank())
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
        except Exception as error:  # what only records ends nothing
            self._excuse(f"{GENERATIONS_FILE} could not be written ({type(error).__name__}: {error}).")


def _rows(held: dict[str, Any]) -> Any:
    for place, completion in enumerate(held["completion"]):
        yield {
            "prompt": _text(_at(held["prompt"], place)),
            "completion": _text(completion),
            "rewards": {name: _number(_at(values, place)) for name, values in held["rewards"].items()},
            "advantage": _number(_at(held["advantages"], place)),
        }


def _at(values: tuple[Any, ...], place: int) -> Any:
    return values[place] if place < len(values) else None


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:_LONGEST]


def _number(value: Any) -> Any:
    """Strict JSON has no NaN."""
    if value is None:
        return None
    number = float(value)
    return number if abs(number) < float("inf") else str(number)
