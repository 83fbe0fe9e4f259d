"""Finding the last seal of a ledger, for a run that continues it."""

import json
from pathlib import Path
from typing import NamedTuple

from hf_adaclip.audit.schema import GENESIS
from hf_adaclip.errors import LedgerError

_START = b'{"kind":"header"'


class Tail(NamedTuple):
    """Where a ledger can be continued.

    Attributes:
        sha256: Hash of the last seal.
        offset: First byte after it.
        torn: What follows it: nothing after a clean end.
    """

    sha256: str
    offset: int
    torn: bytes


def find_tail(path: Path) -> Tail:
    """Look for the last seal. Whether the chain before it holds is a question for `verify_ledger`.

    Raises:
        LedgerError: The file has no seal at all, so it is not a ledger and must not be written over.
        OSError: It cannot be read.
    """
    last: Tail | None = None
    offset = 0
    with open(path, "rb") as file:
        for raw in file:
            offset += len(raw)
            if raw.startswith(b'{"kind":"seal"') and raw.endswith(b"\n"):
                try:
                    last = Tail(str(json.loads(raw)["sha256"]), offset, b"")
                except (ValueError, KeyError):
                    continue
        if last is None:
            file.seek(0)
            start = file.read(len(_START))
            if start == _START[: len(start)]:
                # Killed, or out of space, in its very first write: all there is is a torn tail.
                file.seek(0)
                return Tail(GENESIS, 0, file.read())
            raise LedgerError(
                f"`ledger` must be a ledger or a file that does not exist yet, but {path} has no sealed block. "
                "It is left as it is; choose another path."
            )
        file.seek(last.offset)
        return last._replace(torn=file.read())
