"""Reading a ledger line by line, in bounded memory, from input that may be damaged or hostile."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from hf_adaclip.audit.schema import MAX_LINE_BYTES
from hf_adaclip.errors import LedgerError


class Line(NamedTuple):
    """One line of the file.

    Attributes:
        number: Counted from 1.
        raw: Its bytes, newline included if there is one.
        content: The JSON object, or None when the line is not one.
        problem: Why `content` is None, in words.
        cut: The line is the beginning of a valid line that a killed process did not finish.
    """

    number: int
    raw: bytes
    content: dict[str, Any] | None
    problem: str = ""
    cut: bool = False


def open_ledger(path: str | Path) -> BinaryIO:
    """Open a file that claims to be a ledger.

    Raises:
        LedgerError: It is missing, a folder, empty, or does not begin with a header line.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - handed to the caller
        start = file.read(16)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not start.startswith(b'{"kind":"'):
        file.close()
        what = "is empty" if not start else "does not begin with a header line"
        raise LedgerError(f"{path} is not a ledger of hf_adaclip: it {what}.")
    file.seek(0)
    return file


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Parse strictly: no NaN literals, no duplicate keys, objects only."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            yield Line(number, b"", None, f"the line is longer than {MAX_LINE_BYTES} bytes")
            return
        yield _parse(number, raw)


def _parse(number: int, raw: bytes) -> Line:
    finished = raw.endswith(b"\n")
    text = raw[:-1] if finished else raw
    try:
        content = _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError:
        return Line(number, raw, None, "the line is not UTF-8")
    except json.JSONDecodeError as error:
        return Line(
            number, raw, None, f"the line is not JSON ({error.msg})", cut=not finished and _is_cut(text, error)
        )
    except (ValueError, RecursionError) as error:
        return Line(number, raw, None, f"the line is not strict JSON ({error})")
    if not isinstance(content, dict):
        return Line(number, raw, None, "the line is not a JSON object")
    if not finished:
        whole = text.endswith(b"}")
        return Line(number, raw, None, "the line has no end", cut=whole)
    return Line(number, raw, content)


def _is_cut(text: bytes, error: json.JSONDecodeError) -> bool:
    if not text.startswith(b"{") or error.msg == "Extra data":
        return False
    rest = error.doc[error.pos :].rstrip()
    if error.msg.startswith("Unterminated string") or (error.msg.startswith("Invalid \\u") and len(rest) <= 6):
        return True
    return len(rest) <= 1 or _CUT_WITHIN.fullmatch(rest) is not None


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice")
    return content


_CUT_WITHIN = re.compile("nul?|tru?|fal?s?|[eE][+-]")
"""Beginnings, of more than one character, of what stands in a line besides strings: null, true, false, and the exponent of a number."""
_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)
