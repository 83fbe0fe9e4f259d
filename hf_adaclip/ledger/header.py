"""What a header line may hold. Most of it follows from nothing in the file, so here it is only held to its form."""

import math
from typing import Any, Final, NamedTuple

from hf_adaclip.controllers import CONTROLLERS, Reason

MAX_TENSORS: Final = 1_000_000
MAX_TEXT: Final = 1000
"""Characters of a name or a text in a header; names of parameters are far shorter."""


def check_header(header: dict[str, Any]) -> None:
    """Hold a header's fields to their types and ranges.

    Raises:
        ValueError: One of them has another; the message names it.
    """
    config = header.get("config")
    if not isinstance(config, dict):
        raise ValueError("`config` is not a table of settings")
    if header.get("controller") not in CONTROLLERS:
        raise ValueError(f"`controller` is {_short(header.get('controller'))}, which is none that this version knows")
    if header["controller"] != config.get("controller"):
        raise ValueError(
            f"`controller` is {header['controller']}, but that of the config is {_short(config.get('controller'))}"
        )
    _whole(header, "num_tensors", 0, MAX_TENSORS)
    _whole(header, "first_step", 0, 2**53)
    for key, lowest in (("world_size", 1), ("seed", -(2**64)), ("revision", 1), ("steps_before", 1)):
        if key in header:
            _whole(header, key, lowest, 2**64)
    static = header.get("static_threshold")
    static = 1.0 if static == "inf" else static  # one that never acts
    if isinstance(static, bool) or not isinstance(static, int | float) or not 0 < static < math.inf:
        raise ValueError(f"`static_threshold` is {_short(static)}, not a number above 0")
    check_counts(header.get("counts"))
    for key in ("created", "device"):
        if key in header and not is_text(header[key]):
            raise ValueError(f"`{key}` is not a short text without control characters")
    for key in ("versions", "revisions"):
        if not _is_table(header.get(key, {}), str if key == "versions" else int):
            raise ValueError(f"`{key}` is not a table of short texts")
    groups, number = header.get("groups", []), header["num_tensors"]
    if not isinstance(groups, list) or not all(is_text(name) for name in groups):
        raise ValueError("`groups` is not a list of names without control characters")
    if groups and len(groups) != number:
        raise ValueError(f"`groups` names {len(groups)} things, and `num_tensors` is {number}")


class Rewound(NamedTuple):
    """A run that went back.

    Attributes:
        first: First step that was undone, and to which the weights belong now.
        last: Last step that was undone; the next one follows it by number.
        reason: Why, in a sentence.
    """

    first: int
    last: int
    reason: str

    def __str__(self) -> str:
        span = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        return (
            f"after step {self.last} the weights were put back to those before step {self.first}, and {span} left out with the data: "
            f"{self.reason}"
        )


def rewound_of(header: dict[str, Any]) -> Rewound | None:
    """What was undone before a segment; None where its run had not gone back.

    Raises:
        ValueError: It is not told as it is told, or not up to the segment's first step.
    """
    value = header.get("rewound")
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != set(Rewound._fields) or not is_text(value["reason"]):
        raise ValueError(f"`rewound` is {_short(value)}, not first, last and reason of what was undone")
    _whole(value, "first", 0, 2**53)
    _whole(value, "last", value["first"], 2**53)
    if value["last"] + 1 != header["first_step"]:
        raise ValueError(f"what was undone ends at step {value['last']}, but it begins at {header['first_step']}")
    return Rewound(**value)


def check_counts(value: Any) -> dict[str, int]:
    """Counts by reason.

    Raises:
        ValueError: They are not.
    """
    if not isinstance(value, dict) or not all(
        name in Reason.__members__ and isinstance(n, int) and not isinstance(n, bool) and n >= 0
        for name, n in value.items()
    ):
        raise ValueError("`counts` is not a table of whole numbers by reason")
    return value


def is_text(value: Any) -> bool:
    """Whether this is a text that can be shown in a line: short, and without control characters."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_table(value: Any, kind: type) -> bool:
    if not isinstance(value, dict) or len(value) > 100:
        return False
    return all(is_text(k) and isinstance(v, kind) and (kind is int or is_text(v)) for k, v in value.items())


def _whole(header: dict[str, Any], key: str, lowest: int, highest: int) -> None:
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"`{key}` is {_short(value)}, not a whole number that it can be")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
