"""Finding the last seal of a ledger: for the card that prints it, and for a run that continues the file."""

import json
import re
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.reader import open_regular, parse_line, read_regular
from hf_adaclip.ledger.schema import (
    BODY_KINDS,
    GENESIS,
    MAX_LINE_BYTES,
    SCHEMA_VERSION,
    SEAL_SUFFIX,
    STEP_FIELDS,
    seal_line,
)

HASH: Final = re.compile(r"[0-9a-f]{64}")
_SEAL = b'{"kind":"seal"'
_START = f'{{"kind":"header","schema":{SCHEMA_VERSION},'.encode()


class Tail(NamedTuple):
    """Where a ledger can be continued.

    Attributes:
        sha256: Hash of the last seal.
        offset: First byte after it.
        torn: What follows it: nothing after a clean end.
        lines: Lines up to and with it.
        anchored: Whether the seal that was asked for is one of its chain.
    """

    sha256: str
    offset: int
    torn: bytes
    lines: int
    anchored: bool = False


def find_tail(path: Path) -> Tail:
    """Look for the last seal. Whether the chain before it holds is a question for `verify_ledger`.

    Raises:
        LedgerError: The file has no seal at all.
        OSError: It cannot be read, or is no file.
    """
    last: Tail | None = None
    offset = lines = 0
    with open_regular(path) as file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            offset += len(raw)
            lines += 1
            if raw.startswith(_SEAL) and raw.endswith(b"\n"):
                try:
                    last = Tail(str(json.loads(raw)["sha256"]), offset, b"", lines)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        if last is None:
            raise LedgerError(f"{path} has no sealed block, so it has no last seal.")
        file.seek(last.offset)
        return last._replace(torn=file.read())


def find_continuation(file: BinaryIO, path: Path, anchor: str | None = None) -> Tail:
    """Where a run may go on writing: after the last seal of an unbroken chain. What follows it will be cut off, so it must be ours.

    Args:
        file: The ledger, at its beginning.
        path: Its name, for messages.
        anchor: Hash of a seal that is known from elsewhere.

    Raises:
        LedgerError: It is no ledger, its chain is broken, or something follows the last seal that no killed run of ours has left.
        OSError: It cannot be read.
    """
    tail = Tail(GENESIS, 0, b"", 0)
    block: list[bytes] = []
    while raw := file.readline(MAX_LINE_BYTES + 1):
        if len(raw) > MAX_LINE_BYTES:
            raise _refusal(path, f"line {tail.lines + len(block) + 1} is longer than {MAX_LINE_BYTES} bytes")
        if not (raw.startswith(_SEAL) and raw.endswith(b"\n")):
            block.append(raw)
            continue
        body = b"".join(block)
        expected, digest = seal_line(tail.sha256, len(block), body)
        number = tail.lines + len(block) + 1
        if raw != expected:
            raise _refusal(path, f"the seal in line {number} does not fit what stands before it")
        tail = Tail(digest, tail.offset + len(body) + len(raw), b"", number, tail.anchored or digest == anchor)
        block = []
    if not tail.lines and not _begins_as_ours(block):
        raise _refusal(path, "it has no sealed block")
    for position, raw in enumerate(block):
        if not _is_ours(raw, last=position == len(block) - 1):
            raise _refusal(path, f"line {tail.lines + position + 1} is none that a killed run has left")
    return tail._replace(torn=b"".join(block))


def _refusal(path: Path, what: str) -> LedgerError:
    return LedgerError(
        f"`ledger` must be a ledger or a file that does not exist yet, but {path} is none that can be continued: {what}. "
        "It is left as it is; choose another path."
    )


def _begins_as_ours(block: list[bytes]) -> bool:
    """Whether a file without any seal is a first block that was not finished."""
    first = block[0].rstrip(b"\0") if block else b""
    if not first.startswith(_START[: len(first)]):
        return False
    content = parse_line(1, first).content
    return content is None or (isinstance(content.get("config"), dict) and "initial_state" in content)


def _is_ours(raw: bytes, *, last: bool) -> bool:
    """Whether a line may stand after the last seal: one of ours, only the last unfinished or filled up with NUL by the file system."""
    text = raw.rstrip(b"\0") if last else raw
    if not text:
        return True
    line = parse_line(0, text)
    if line.content is None:
        return last and line.cut and text.startswith(b'{"kind":"'[: len(text)])
    kind = line.content.get("kind")
    if kind == "step":
        return all(key in line.content for key in STEP_FIELDS)
    return kind in BODY_KINDS


def seal_path(ledger: Path) -> Path:
    """The file beside a ledger that holds its last seal."""
    return ledger.with_name(f"{ledger.name}{SEAL_SUFFIX}")


def read_seal(ledger: Path) -> dict[str, Any] | None:
    """What stands in it: `sha256` and `lines`; None where it is missing or damaged."""
    try:
        content = parse_line(1, read_regular(seal_path(ledger), 4096)).content
    except (OSError, ValueError):
        return None
    if content is None or not isinstance(content.get("lines"), int):
        return None
    digest = content.get("sha256")
    if not isinstance(digest, str) or not HASH.fullmatch(digest):
        return None
    return {"sha256": digest, "lines": content["lines"]}
