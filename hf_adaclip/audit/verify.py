"""Checking a ledger: the chain of seals, the continuity of steps, and that every decision follows from the recorded norms."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit.reader import Line, open_ledger, read_lines
from hf_adaclip.audit.schema import GENESIS, SCHEMA_VERSION, seal_line
from hf_adaclip.audit.segment import Segment

_HASH = re.compile(r"[0-9a-f]{64}")
MAX_FINDINGS = 50
"""Findings kept in full; further ones are only counted."""


@dataclass(frozen=True)
class Finding:
    """One thing found in a ledger.

    Attributes:
        violation: The ledger is not what the run wrote, or does not follow from itself. False: worth knowing, nothing wrong.
        line: Line of the file, counted from 1.
        step: Optimizer step concerned, if one is.
        message: What was found, in words.
    """

    violation: bool
    line: int
    step: int | None
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}" if self.step is None else f"line {self.line}, step {self.step}"
        return f"{'VIOLATION' if self.violation else 'note'} ({where}): {self.message}"


@dataclass
class VerifyReport:
    """What `verify_ledger` found. `ok` is True when there is no violation."""

    path: str
    segments: int = 0
    steps: int = 0
    recomputed: int = 0
    measured: int = 0
    closed: bool = False
    num_violations: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.num_violations == 0

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok}

    def summary(self) -> str:
        """The verdict in one line."""
        verdict = "verified" if self.ok else f"NOT verified, {self.num_violations} violation(s)"
        return (
            f"{self.path}: {verdict}. {self.steps} steps in {self.segments} segment(s), {self.recomputed} decisions recomputed "
            f"and equal, {self.measured} applied norms measured and as intended, {'ended cleanly' if self.closed else 'no footer'}."
        )


def verify_ledger(path: str | Path) -> VerifyReport:
    """Check a ledger from its first byte to its last, in bounded memory.

    Checked are: strict JSON; the SHA-256 chain; that steps follow one another, over resumptions too; that each recorded
    threshold, coefficient, pace and reason is what the controller decides from the recorded norms; that measured norms are what
    was intended; that the footer agrees. An unfinished last block (a killed process) is noted, not held against the ledger.

    Raises:
        LedgerError: The file cannot be read or is no ledger at all.
    """
    return _Verifier(path).run()


class _Verifier:
    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._report = VerifyReport(str(path))
        self._head = GENESIS
        self._block: list[Line] = []
        self._segment: Segment | None = None
        # By the hash of a seal: the step and the digest of the state at that point, for headers that name it as parent.
        self._points: dict[str, tuple[int, bytes]] = {}
        self._last_seal = GENESIS

    def run(self) -> VerifyReport:
        # Overflow and invalid operations are part of the maths here: a replay meets every norm that the run met.
        with open_ledger(self._path) as file, np.errstate(all="ignore"):
            for line in read_lines(file):
                kind = None if line.content is None else line.content.get("kind")
                if kind == "seal":
                    self._seal(line)
                    continue
                if line.content is None and not line.cut:
                    self._found(line, line.problem)
                elif line.content is not None and kind not in ("header", "step", "footer"):
                    # At once, and not when its block is sealed: a seal whose kind was changed never seals anything.
                    self._found(line, f"the kind of the line is {kind!r}, which this version does not know.")
                self._block.append(line)
        self._end()
        return self._report

    # -- the chain -----------------------------------------------------------------------------------------------

    def _seal(self, line: Line) -> None:
        assert line.content is not None
        block, self._block = self._block, []
        expected, digest = seal_line(self._head, len(block), b"".join(b.raw for b in block))
        if line.raw != expected:
            claimed = line.content.get("sha256")
            span = f"lines {block[0].number} to {block[-1].number}" if block else "an empty block"
            self._found(
                line, f"the seal does not fit {span}: something in them, in the seal or before them was changed."
            )
            # Go on from what the seal claims, so that one change gives one finding and not one per later block.
            digest = claimed if isinstance(claimed, str) and _HASH.fullmatch(claimed) else digest
        self._head = digest
        for body in block:
            if body.content is not None:
                self._body(body, body.content)
        if self._segment is not None:
            self._points[digest] = self._segment.point()
        self._last_seal = digest

    def _end(self) -> None:
        if self._block:
            first = self._block[0]
            count = len(self._block)
            self._note(
                first, f"torn tail: {count} line(s) after the last seal, from a run that was killed; not checked."
            )
        self._report.closed = self._segment is not None and self._segment.closed

    # -- the content ---------------------------------------------------------------------------------------------

    def _body(self, line: Line, content: dict[str, Any]) -> None:
        kind = content.get("kind")
        if kind == "header":
            self._header(line, content)
        elif kind in ("step", "footer"):
            if self._segment is None:
                self._found(line, f"a {kind} line stands before any header.")
                return
            check = self._segment.step if kind == "step" else self._segment.footer
            for problem in check(content):
                self._found(line, problem, content.get("step"))
            if kind == "step":
                self._report.steps += 1
            self._report.recomputed += self._segment.take_recomputed()
            self._report.measured += self._segment.take_measured()

    def _header(self, line: Line, content: dict[str, Any]) -> None:
        if content.get("schema") != SCHEMA_VERSION:
            self._found(line, f"the schema is {content.get('schema')!r}; this version reads {SCHEMA_VERSION}.")
            self._segment = None
            return
        first, before = self._report.segments == 0, self._segment
        try:
            self._segment = Segment(content)
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, MemoryError) as error:
            self._found(line, f"the header cannot be understood: {error}")
            self._segment = None
            return
        if before is not None and not before.closed and self._segment.restarted is None:
            self._note(line, "the run before this header did not end cleanly.")
        self._report.segments += 1
        dropped, parent = self._segment.dropped, self._segment.parent
        if dropped is not None:
            self._note(line, f"a torn tail of {dropped['bytes']} bytes was cut off when the run was resumed.")
        if parent is None:
            if not first:
                self._note(line, "a new run begins here; it does not continue the one before.")
            return
        known = self._points.get(parent["sha256"])
        follows = known is not None and known == self._segment.point()
        if self._segment.restarted is not None and before is not None and parent["sha256"] == self._last_seal:
            try:
                follows = self._segment.carries_over(before)
            except (ValueError, LookupError):
                follows = False
        elif known is None:
            self._note(line, "the run continues one whose ledger is not in this file; the join cannot be checked.")
            return
        elif self._segment.restarted is not None:
            self._note(line, "the run goes on with other parameters from an older point; the join cannot be checked.")
            return
        if not follows:
            self._found(
                line, "the state that the run resumed with is not the state that its parent had at that point."
            )

    def _found(self, line: Line, message: str, step: Any = None) -> None:
        self._report.num_violations += 1
        self._add(Finding(True, line.number, _step_or_none(step), message))

    def _note(self, line: Line, message: str) -> None:
        self._add(Finding(False, line.number, None, message))

    def _add(self, finding: Finding) -> None:
        if len(self._report.findings) < MAX_FINDINGS:
            self._report.findings.append(finding)


def _step_or_none(step: Any) -> int | None:
    return step if isinstance(step, int) else None
