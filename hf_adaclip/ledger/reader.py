"""Reading a ledger line by line, in bounded memory, from input that may be damaged or hostile."""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.schema import MAX_LINE_BYTES


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


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, and only a file: a FIFO would wait for a writer for ever, a device never ends.

    Raises:
        OSError: It is missing, not readable, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _READ_FLAGS)
    except ValueError as error:  # a NUL in the name
        raise OSError(str(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"it is {kind_of_file(mode)}, not a file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int) -> bytes:
    """The first `limit` bytes of a file. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read(limit)


def kind_of_file(mode: int) -> str:
    """What a thing in the file system is, in words."""
    for is_kind, name in _KINDS:
        if is_kind(mode):
            return name
    return "something else"


def what_it_is(start: bytes) -> str | None:
    """What a file of another program is, by its first bytes, and what to do with it; None when they say nothing."""
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    return None


def open_ledger(path: str | Path) -> BinaryIO:
    """Open a file that claims to be a ledger.

    Raises:
        LedgerError: It is missing, not a file, empty, or does not begin with a header line.
    """
    try:
        file = open_regular(path)
        start = file.read(16)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not start.startswith(b'{"kind":"'):
        file.close()
        known = what_it_is(start)
        what = "is empty" if not start else "does not begin with a header line"
        raise LedgerError(f"{path} is not a ledger of hf_adaclip: it {what if known is None else f'is {known}'}.")
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
        yield parse_line(number, raw)


def parse_line(number: int, raw: bytes) -> Line:
    """One line, read strictly."""
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


_READ_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_MAGIC = (
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (b"PK\x03\x04", "a zip archive (or an Excel sheet, or what torch.save writes); export it as CSV"),
    (b"PAR1", "a Parquet file; export it as CSV"),
    (b"ARROW1", "an Arrow file; export it as CSV"),
    (b"SQLite format 3\x00", "an SQLite database; export it as CSV"),
    (b"\x89HDF", "an HDF5 file; export it as CSV"),
    (b"\x93NUMPY", "a NumPy array; export it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel sheet; export it as CSV"),
    (b"\x80\x02", "a pickle; export it as CSV"),
    (b"\x80\x03", "a pickle; export it as CSV"),
    (b"\x80\x04", "a pickle; export it as CSV"),
    (b"\x80\x05", "a pickle; export it as CSV"),
)
_CUT_WITHIN = re.compile("nul?|tru?|fal?s?|[eE][+-]")
"""Beginnings, of more than one character, of what stands in a line besides strings: null, true, false, and the exponent of a number."""
_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)
