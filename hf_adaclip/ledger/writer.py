"""Writing `clip_ledger.jsonl`."""

import contextlib
import errno
import hashlib
import logging
import os
import stat
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.reader import kind_of_file
from hf_adaclip.ledger.schema import GENESIS, LEDGER_FILE, SCHEMA_VERSION, encode, seal_line
from hf_adaclip.ledger.tail import Tail, find_continuation, read_seal, seal_path

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)
_OPEN_FLAGS = (
    os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_open_here: "weakref.WeakValueDictionary[tuple[int, int], Ledger]" = weakref.WeakValueDictionary()
"""Ledgers that this process is writing, by device and inode."""


class Ledger:
    """An append-only, sealed log of one run on the main process.

    An existing ledger is continued: its last seal becomes the predecessor of the new header. A torn tail (what a killed process wrote
    after its last seal) is cut off, and the header says how many bytes went and what their hash was. A file that is not a ledger with an
    unbroken chain, or that ends in something else than such a tail, is left as it is.

    A failing disk does not stop training, unless the ledger is required: the first failure is logged, later blocks are tried again, and
    the first that succeeds says in a `gap` line how many steps were lost, and why.

    After every block the last seal is written to `<ledger>.seal`, so that an end which is cut off later shows. That may fail, too; then
    the log says so.

    Size: about 185 bytes a step; with granularity "tensor" or "module" 10 to 11 more per norm (300 tensors: 3.1 to 3.5 kB a step).

    Args:
        path: The file. Its folder is made.
        header: Content of the header line, see `AdaptiveClipper`; `kind`, `schema` and `dropped_tail` are added here.
        required: Raise when a block cannot be written.

    Raises:
        LedgerError: The file exists and cannot be continued, is being written by another run, or cannot be opened; later, when it is
            required and cannot be written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, required: bool = False) -> None:
        self.path = Path(path)
        self._place = self.path.absolute()  # a run may change its working folder
        self._required = required
        self._warned = self._warned_of_seal = False
        self._header: dict[str, Any] | None = None  # until it is written
        self._gap: dict[str, Any] | None = None  # steps that could not be, likewise
        self.lost = 0
        """Steps of this run that could not be written."""
        seal = read_seal(self._place)
        self._file, tail = _open(self._place, None if seal is None else seal["sha256"])
        self._head, self._sealed_bytes, self._lines = tail.sha256, tail.offset, tail.lines
        dropped = None
        if tail.torn:
            dropped = {"bytes": len(tail.torn), "sha256": hashlib.sha256(tail.torn).hexdigest()}
            logger.warning(
                "%s: a torn tail of %d bytes after the last seal was cut off (the run before this one was killed).",
                self.path,
                len(tail.torn),
            )
        if not tail.lines:
            with contextlib.suppress(OSError):
                os.unlink(seal_path(self._place))  # of a ledger that is gone
        self._header = {"kind": "header", "schema": SCHEMA_VERSION, **header, "dropped_tail": dropped}
        if tail.lines and seal is not None and not tail.anchored:
            self._header["missing_seal"] = seal
            logger.warning(
                "%s does not hold the seal of its line %d any more: its end was lost or cut off.",
                self.path,
                seal["lines"],
            )
        try:
            self._write([])
        except LedgerError:
            self._file.close()
            raise
        _open_here[_identity(self._file)] = self

    @property
    def head(self) -> str:
        """Hash of the last seal: what a checkpoint remembers and a resumed run names as its parent."""
        return self._head

    def steps(self, records: list[dict[str, Any]], state: Callable[[], dict[str, Any]] | None = None) -> None:
        """Append step records as one sealed block.

        Args:
            records: In their order.
            state: Gives the controller's state after them, as JSON; asked for only where they cannot be written.
        """
        if not records:
            return
        error = self._write([{"kind": "step", **record} for record in records])
        if error is None:
            return
        counts = Counter(str(record.get("reason")) for record in records)
        gap = self._gap or {"kind": "gap", "first": records[0]["step"], "steps": 0, "counts": {}, "errors": []}
        gap["steps"] += len(records)
        gap["counts"] = dict(Counter(gap["counts"]) + counts)
        gap["errors"] = sorted({*gap["errors"], _in_words(error)})
        gap["state"] = None if state is None else state()
        self._gap = gap
        self.lost += len(records)
        if self._required:
            raise LedgerError(
                f"`ledger` must be writable all the time under `ledger_required`, but {self.path} is not: {error}. Make room and "
                "resume from the last checkpoint."
            ) from error

    def close(self, footer: dict[str, Any] | None = None) -> None:
        """Write the footer, unless the run did not end cleanly (`footer` None), and close the file."""
        if self._file.closed:
            return
        lost = {"lost": self.lost} if self.lost else {}
        try:
            if footer is not None:
                self._write([{"kind": "footer", **footer, **lost}])
            elif self._gap is not None:
                self._write([])
        finally:
            with contextlib.suppress(OSError):
                self._file.close()

    def _write(self, lines: list[dict[str, Any]]) -> OSError | None:
        """Append a block: what still waits to be written, then these lines. Returns why it was not possible."""
        waiting = [line for line in (self._header, self._gap) if line is not None]
        block = [*waiting, *lines]
        body = b"".join(encode(line) for line in block)
        seal, digest = seal_line(self._head, len(block), body)
        try:
            # Always from the end of the last seal: after a failed write its remains are overwritten, never chained.
            self._file.seek(self._sealed_bytes)
            self._file.truncate()
            rest = memoryview(body + seal)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._sealed_bytes)
            if self._required and not any(line["kind"] == "step" for line in lines):
                raise LedgerError(
                    f"`ledger` must be writable all the time under `ledger_required`, but {self.path} is not: {error}. Make room and "
                    "resume from the last checkpoint."
                ) from error
            if not self._warned and not self._required:
                logger.warning(
                    "%s: the ledger could not be written (%s). Training goes on; the missing steps will show as a gap.",
                    self.path,
                    error,
                )
                self._warned = True
            return error
        self._header = self._gap = None
        self._head = digest
        self._sealed_bytes += len(body) + len(seal)
        self._lines += len(block) + 1
        self._keep_seal()
        return None

    def _keep_seal(self) -> None:
        """Write the last seal beside the ledger, at once or not at all."""
        line = encode({"kind": "anchor", "ledger": self.path.name, "lines": self._lines, "sha256": self._head})
        path = seal_path(self._place)
        try:
            with open(f"{path}.tmp", "wb", buffering=0) as file:
                file.write(line)
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.tmp")
            if not self._warned_of_seal:
                logger.warning(
                    "%s could not be written (%s): `verify` will not notice when the end of the ledger is cut off.",
                    path,
                    error,
                )
                self._warned_of_seal = True

    def sync(self) -> None:
        """Force what was written to the disk, for a checkpoint that refers to it."""
        try:
            os.fsync(self._file.fileno())
        except (OSError, ValueError):  # a closed file or a file system without fsync
            logger.debug("%s: fsync is not possible here", self.path)


def _open(path: Path, anchor: str | None) -> tuple[BinaryIO, Tail]:
    """Open a ledger for one writer and find where it goes on."""
    if os.path.isdir(path):  # which takes a name that cannot be for none
        raise LedgerError(
            f"`ledger` must be a writable file, but {path} is a folder instead. Write {path / LEDGER_FILE}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, _OPEN_FLAGS, 0o666)
    except (OSError, ValueError) as error:
        raise LedgerError(f"`ledger` must be a writable file, but {path} is not: {error}.") from error
    # Unbuffered: after a failed write no remains of it may wait in a buffer and come out later.
    file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise LedgerError(f"`ledger` must be a writable file, but {path} is {kind_of_file(mode)} instead.")
        _lock(file, path)
        with open(descriptor, "rb", closefd=False) as reader:
            tail = (
                find_continuation(reader, path, anchor) if os.fstat(descriptor).st_size else Tail(GENESIS, 0, b"", 0)
            )
    except OSError as error:
        file.close()
        raise LedgerError(f"`ledger` must be a writable file, but {path} is not: {error}.") from error
    except LedgerError:
        file.close()
        raise
    return file, tail


def _lock(file: BinaryIO, path: Path) -> None:
    """Two writers would overwrite each other's blocks, so the second one is refused. The lock goes with the process."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if _identity(file) in _open_here:
            raise LedgerError(
                f"`ledger` must be written by one run at a time, but {path} is being written by a clipper of this process that was not "
                "closed. Call its `close()`, use it as a context manager, or give each run a path of its own."
            ) from error
        raise LedgerError(
            f"`ledger` must be written by one run at a time, but {path} is being written by another process. "
            "Give each run a path of its own."
        ) from error
    except OSError:  # a file system without locks
        logger.debug("%s: locking is not possible here", path)


def _identity(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def _in_words(error: OSError) -> str:
    """An error's number and text, without the names of files in it."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{name}: {error.strerror or error}"[:200]
