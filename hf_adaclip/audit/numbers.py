"""Numbers as logs of other programs write them: read strictly, because a guess would be a wrong norm."""

import math
import re
from typing import Any, Final

ABSENT: Final = frozenset(("", "n/a", "na", "#n/a", "null", "none", "-", "--", "<na>"))
"""How logs write, in lower case, that there is no value. NaN is not among them: it is what a norm can be."""
_PLAIN: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_WRAPPED: Final = re.compile(
    r"(?:\w+\.)*(?:tensor|array|float[0-9]+)\(\[?([^,()\[\]]+)\]?(?:,\s*\w+=[^=()]*(?:\([^()]*\))?)*\)", re.IGNORECASE
)


class NotANumberError(ValueError):
    """A value that is no number; the message says why, and what to do."""


def read_number(value: Any) -> float | None:
    """A number, or None where there is none. Also what printing a tensor leaves: `tensor(0.12, device='cuda:0')`.

    Raises:
        NotANumberError: It is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise NotANumberError(f"{_short(value)} is no number")
    if not isinstance(value, str):
        return _float(value)
    text = value.strip()
    if text.lower() in ABSENT:
        return None
    wrapped = _WRAPPED.fullmatch(text)
    inner = text if wrapped is None else wrapped.group(1).strip()
    if text.isascii() and _PLAIN.fullmatch(inner):
        return _float(inner)
    if text.endswith("%"):
        raise NotANumberError(f"{_short(text)} is a percentage; write the number itself")
    if re.fullmatch(r"[+-]?[0-9.,' _]+", text):
        raise NotANumberError(f"{_short(text)} has separators; write it as 1234.5, with a point and nothing else")
    raise NotANumberError(f"{_short(text)} is no number")


def read_step(value: Any) -> int | None:
    """A number of steps, or None where there is none.

    Raises:
        NotANumberError: It is something else.
    """
    number = read_number(value)
    if number is None:
        return None
    if not math.isfinite(number) or number != math.floor(number) or number < 0 or number > 2**53:
        raise NotANumberError(f"{_short(value)} is no number of steps")
    return int(number)


def read_norm(value: Any) -> float | None:
    """A gradient norm, or None where there is none. DeepSpeed writes -1 for one that is not finite.

    Raises:
        NotANumberError: It is something else.
    """
    number = read_number(value)
    if number is None or not number < 0:
        return number
    if number == -1:
        return math.nan
    raise NotANumberError(f"{_short(value)} is negative, and a norm never is")


def _float(value: str | int | float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise NotANumberError("a whole number is too large") from error


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:60] + "..."
