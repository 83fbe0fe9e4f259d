"""Writing `clip_ledger.jsonl`."""

import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import IO, Any

from hf_adaclip.audit.schema import GENESIS, SCHEMA_VERSION, encode, seal_line
from hf_adaclip.audit.tail import find_tail
from hf_adaclip.errors import LedgerError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


def _lock(file: IO[bytes], path: Path) -> None:
    """Two writers would overwrite each other's blocks, so the second one is refused. The lock goes with the process."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise LedgerError(
            f"`ledger` must be written by one run at a time, but {path} is being written by another. Give each run a path of its own."
        ) from error
    except OSError:  # a file system without locks
        logger.debug("%s: locking is not possible here", path)


class Ledger:
    """An append-only, sealed log of one run on the main process.

    An existing file is continued: its last seal becomes the predecessor of the new header. A torn tail (what a killed process
    wrote after its last seal) is cut off, and the header says how many bytes went and what their hash was.

    A failing disk does not stop training, unless the ledger is required: the first failure is logged, later steps are tried again, and
    the gap shows as missing steps.

    Args:
        path: The file. Its folder is made.
        header: Content of the header line, see `AdaptiveClipper`; `kind`, `schema` and `dropped_tail` are added here.
        required: Raise when a block cannot be written.

    Raises:
        LedgerError: The file exists and is not a ledger, or cannot be opened; later, when it is required and cannot be written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, required: bool = False) -> None:
        self.path = Path(path)
        self._required = required
        self._warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tail = find_tail(self.path) if self.path.exists() and self.path.stat().st_size else None
            # Unbuffered: after a failed write no remains of it may wait in a buffer and come out later.
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)  # noqa: SIM115
            _lock(self._file, self.path)
        except OSError as error:
            raise LedgerError(f"`ledger` must be a writable file, but {self.path} is not: {error}.") from error
        self._head = GENESIS if tail is None else tail.sha256
        self._sealed_bytes = 0 if tail is None else tail.offset
        dropped = None
        if tail is not None and tail.torn:
            dropped = {"bytes": len(tail.torn), "sha256": hashlib.sha256(tail.torn).hexdigest()}
            logger.warning(
                "%s: a torn tail of %d bytes after the last seal was cut off (the run before this one was killed).",
                self.path,
                len(tail.torn),
            )
        self._write([{"kind": "header", "schema": SCHEMA_VERSION, **header, "dropped_tail": dropped}])

    @property
    def head(self) -> str:
        """Hash of the last seal: what a checkpoint remembers and a resumed run names as its parent."""
        return self._head

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Append step records as one sealed block."""
        if records:
            self._write([{"kind": "step", **record} for record in records])

    def close(self, footer: dict[str, Any] | None = None) -> None:
        """Write the footer, unless the run did not end cleanly (`footer` None), and close the file."""
        if self._file.closed:
            return
        if footer is not None:
            self._write([{"kind": "footer", **footer}])
        self._file.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        body = b"".join(encode(line) for line in lines)
        seal, digest = seal_line(self._head, len(lines), body)
        try:
            # Always from the end of the last seal: after a failed write its remains are overwritten, never chained.
            self._file.seek(self._sealed_bytes)
            self._file.truncate()
            waiting = memoryview(body + seal)
            while waiting:
                waiting = waiting[self._file.write(waiting) or 0 :]
        except OSError as error:
            if self._required:
                raise LedgerError(
                    f"`ledger` must be writable all the time under `ledger_required`, but {self.path} is not: {error}. Make room and "
                    "resume from the last checkpoint."
                ) from error
            if not self._warned:
                logger.warning(
                    "%s: the ledger could not be written (%s). Training goes on; the missing steps will show as a gap.",
                    self.path,
                    error,
                )
                self._warned = True
            return
        self._head = digest
        self._sealed_bytes += len(body) + len(seal)

    def sync(self) -> None:
        """Force what was written to the disk, for a checkpoint that refers to it."""
        try:
            os.fsync(self._file.fileno())
        except (OSError, ValueError):  # a closed file or a file system without fsync
            logger.debug("%s: fsync is not possible here", self.path)
