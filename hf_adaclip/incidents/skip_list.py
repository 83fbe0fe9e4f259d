"""`skip_batches.json` in the folder of a run: data that is left out, by the number of its step or by its place in the dataset.

    {"steps": [12, 13], "samples": [5, 99]}

Steps are counted from 0, as in `incidents/` and in the ledger. A run that goes back adds the steps that it has undone, so that a run that
is resumed leaves out the same; a person may write it too.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hf_adaclip.errors import ConfigError
from hf_adaclip.ledger.reader import read_regular

SKIP_FILE: Final = "skip_batches.json"
_KEYS: Final = ("steps", "samples")
_MOST_BYTES: Final = 64 * 1024 * 1024
_LARGEST: Final = 2**53


@dataclass(frozen=True)
class SkipList:
    """What is left out.

    Attributes:
        steps: Numbers of optimizer steps, counted from 0.
        samples: Positions in the training dataset.
    """

    steps: frozenset[int] = frozenset()
    samples: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.steps or self.samples)

    def __str__(self) -> str:
        return f"{_spans(self.steps) or 'no step'}; {len(self.samples)} sample(s)"

    def with_steps(self, first: int, last: int) -> "SkipList":
        return SkipList(self.steps | frozenset(range(first, last + 1)), self.samples)

    def write(self, folder: Path) -> None:
        """Write the file, as a whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SKIP_FILE
        text = json.dumps({"steps": sorted(self.steps), "samples": sorted(self.samples)}) + "\n"
        beside = path.with_suffix(".json.tmp")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def read_skip_list(folder: Path) -> SkipList:
    """What the file in a run's folder says; nothing where there is none.

    Raises:
        ConfigError: It is none, or says what cannot be left out.
    """
    path = folder / SKIP_FILE
    if not path.exists() and not path.is_symlink():
        return SkipList()
    try:
        content = json.loads(read_regular(path, _MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"`{SKIP_FILE}` must be a readable JSON file, but {path} is not: {error}. Mend or delete it."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"`{SKIP_FILE}` must be an object with {' and '.join(_KEYS)}, but {path} holds a {type(content).__name__}. Write "
            '{"steps": [12], "samples": []}.'
        )
    if unknown := sorted(set(content) - set(_KEYS)):
        raise ConfigError(
            f"`{SKIP_FILE}` must have no other keys than {' and '.join(_KEYS)}, but {path} has {unknown[0]!r}."
        )
    return SkipList(*(frozenset(_numbers(path, key, content.get(key, []))) for key in _KEYS))


def _numbers(path: Path, key: str, value: Any) -> list[int]:
    if isinstance(value, list):
        wrong = [n for n in value if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _LARGEST]
        if not wrong:
            return value
        value = wrong[0]
    raise ConfigError(
        f"`{key}` of `{SKIP_FILE}` must be a list of whole numbers from 0 on, but in {path} it has {value!r}."[:400]
    )


def _spans(steps: frozenset[int]) -> str:
    """Steps in words, neighbours together: "steps 3-5, 9"."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:5]]
    more = f" and {len(spans) - 5} more spans" if len(spans) > 5 else ""
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(shown) + more if shown else ""
