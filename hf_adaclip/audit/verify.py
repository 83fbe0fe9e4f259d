"""Checking a ledger: the chain of seals, the continuity of steps, and that every decision follows from the recorded norms."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit.segment import Segment
from hf_adaclip.ledger.anchors import Anchor, anchors_beside
from hf_adaclip.ledger.reader import Line, open_ledger, read_lines
from hf_adaclip.ledger.schema import BODY_KINDS, GENESIS, SCHEMA_VERSION, seal_line
from hf_adaclip.ledger.tail import HASH

MAX_FINDINGS = 50
"""Violations kept in full, and notes; further ones are only counted."""


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
    """What `verify_ledger` found.

    Attributes:
        path: The file.
        segments: Headers that were understood: runs, and resumptions of them.
        steps: Step records under a seal.
        recomputed: Decisions among them that were recomputed from the recorded norms and are equal.
        measured: Applied norms that were measured and are as intended.
        closed: The last run ended with its footer.
        unsealed: Lines after the last seal.
        lost: Steps that could not be written, as the run says itself.
        last_step: Steps of the run that the file knows of: the largest step and 1.
        counted: Steps that the Trainer counts, by `trainer_state.json` beside the file; None without one.
        before: Steps of the Trainer that were made before the first of the file, as its newest header says.
        seal: Hash of the last seal.
        anchors: What names a seal of this ledger outside of it, and the step that it reaches to.
        contradicted: What names a seal that is not in it.
        num_violations: Findings that are violations.
        findings: The first of them, and notes.
    """

    path: str
    segments: int = 0
    steps: int = 0
    recomputed: int = 0
    measured: int = 0
    closed: bool = False
    unsealed: int = 0
    lost: int = 0
    last_step: int = 0
    counted: int | None = None
    before: int = 0
    seal: str = GENESIS
    anchors: list[tuple[str, int]] = field(default_factory=list)
    contradicted: list[str] = field(default_factory=list)
    num_violations: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`violated`; `incomplete`: nothing is wrong, and nothing or not all is there to be checked; `verified`."""
        if self.num_violations:
            return "violated"
        return "incomplete" if self.incomplete else "verified"

    @property
    def ok(self) -> bool:
        """Whether the status is `verified`."""
        return self.status == "verified"

    @property
    def incomplete(self) -> list[str]:
        """What keeps a ledger in which nothing is wrong from being verified, in words."""
        reasons = []
        if not self.steps:
            reasons.append("no step is under a seal")
        if self.unsealed:
            reasons.append(f"{self.unsealed} line(s) after the last seal are under none")
        if self.recomputed < self.steps:
            reasons.append(f"{self.steps - self.recomputed} decision(s) could not be recomputed")
        if self.counted is not None and self.counted > self.before + self.last_step:
            where = (
                f"{self.last_step}" if not self.before else f"{self.last_step}, {self.before} more were made before it"
            )
            reasons.append(f"trainer_state.json counts {self.counted} steps, the ledger ends at {where}")
        return reasons

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok, "status": self.status, "incomplete": self.incomplete}

    def summary(self) -> str:
        """The verdict in one line."""
        verdict = {
            "verified": "verified"
            if not self.lost
            else f"verified but for {self.lost} step(s) that could not be written",
            "incomplete": f"NOT verified as a whole: {'; '.join(self.incomplete)}",
            "violated": f"NOT verified, {self.num_violations} violation(s)",
        }[self.status]
        steps = f"{self.steps} steps"
        if self.counted is not None:
            since = f", {self.before} of them before this ledger" if self.before else ""
            steps = f"{self.steps} steps (trainer_state.json counts {self.counted}{since})"
        ending = "no footer" if not self.closed else "with a footer" if self.lost or not self.ok else "ended cleanly"
        return (
            f"{self.path}: {verdict}. {steps} in {self.segments} segment(s), {self.recomputed} decisions recomputed "
            f"and equal, {self.measured} applied norms measured and as intended, {ending}. {self._anchored()}"
        )

    def _anchored(self) -> str:
        if self.contradicted:
            return f"Contradicted by {_some(self.contradicted)}."
        if not self.anchors:
            return "No anchor: nothing outside the file confirms it, and whoever can write it can write any history."
        reach = max(step for _, step in self.anchors)
        return f"Anchored up to step {reach} by {_some([name for name, _ in self.anchors])}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def verify_ledger(path: str | Path, *, seal: str | None = None) -> VerifyReport:
    """Check a ledger from its first byte to its last, in bounded memory.

    Checked are: strict JSON; the SHA-256 chain; that steps follow one another, over resumptions too; that each recorded
    threshold, coefficient, pace and reason is what the controller decides from the recorded norms; that measured norms are what
    was intended; that the footer agrees; that the seals which other files beside it name are in it (see `anchors`).

    Steps that the run itself says could not be written are a gap, and no violation. What an older revision of a controller's rule
    decided is not recomputed, so such a ledger is incomplete, not verified.

    Args:
        path: The ledger.
        seal: Hash of a seal of this ledger that was kept elsewhere: it must be in the file.

    Raises:
        LedgerError: The file cannot be read or is no ledger at all.
    """
    return _Verifier(path, seal).run()


class _Verifier:
    def __init__(self, path: str | Path, seal: str | None) -> None:
        self._path = Path(path)
        self._given = seal
        self._report = VerifyReport(str(path))
        self._head = GENESIS
        self._block: list[Line] = []
        self._segment: Segment | None = None
        self._last_seal = GENESIS
        self._sealed = True
        # By the hash of a seal: the step and the digest of the state at that point, for headers that name it as parent, and anchors.
        self._points: dict[str, tuple[int, bytes | None]] = {}
        self._parents: set[str] = set()
        self._last_line = 1

    def run(self) -> VerifyReport:
        # Overflow and invalid operations are part of the maths here: a replay meets every norm that the run met.
        with open_ledger(self._path) as file, np.errstate(all="ignore"):
            for line in read_lines(file):
                self._last_line = line.number
                kind = None if line.content is None else line.content.get("kind")
                if kind == "seal":
                    self._seal(line)
                    continue
                if line.content is None and not line.cut:
                    self._found(line.number, line.problem)
                elif line.content is not None and kind not in BODY_KINDS:
                    # At once, and not when its block is sealed: a seal whose kind was changed never seals anything.
                    self._found(
                        line.number, f"the kind of the line is {_short(kind)}, which this version does not know."
                    )
                self._block.append(line)
            self._end()
        self._anchor()
        return self._report

    # -- the chain -----------------------------------------------------------------------------------------------

    def _seal(self, line: Line) -> None:
        assert line.content is not None
        block, self._block = self._block, []
        expected, digest = seal_line(self._head, len(block), b"".join(b.raw for b in block))
        if line.raw != expected:
            claimed = line.content.get("sha256")
            span = f"lines {block[0].number} to {block[-1].number}" if block else "an empty block"
            begins = line.content.get("previous") == GENESIS and self._head != GENESIS
            why = (
                "another ledger begins here" if begins else "something in them, in the seal or before them was changed"
            )
            self._found(line.number, f"the seal does not fit {span}: {why}.")
            # Go on from what the seal claims, so that one change gives one finding and not one per later block.
            digest = claimed if isinstance(claimed, str) and HASH.fullmatch(claimed) else digest
        self._head = digest
        for body in block:
            if body.content is not None:
                self._body(body, body.content)
        if self._segment is not None:
            self._points[digest] = self._segment.point()
        self._last_seal = digest

    def _end(self) -> None:
        report = self._report
        report.closed = self._segment is not None and self._segment.closed
        report.seal = self._head
        if self._block:
            # Nothing vouches for these lines, but what can be recomputed of them is.
            self._sealed = False
            report.unsealed = len(self._block)
            self._note(
                self._block[0].number,
                f"torn tail: {len(self._block)} line(s) after the last seal. A run was killed while it wrote, or a seal was removed.",
            )
            for body in self._block:
                if body.content is not None:
                    self._body(body, body.content)

    def _anchor(self) -> None:
        """Look for the seals that are named outside of the file."""
        report = self._report
        found = anchors_beside(self._path)
        report.counted = found.counted
        for problem in found.problems:
            self._note(self._last_line, problem)
        given = [] if self._given is None else [Anchor("--seal", self._given, None)]
        for anchor in (*given, *found.anchors):
            point = self._points.get(anchor.sha256)
            if point is None and anchor.sha256 in self._parents:
                continue  # the checkpoint of another ledger, from which this one went on
            if point is None:
                report.contradicted.append(anchor.name)
                self._found(
                    self._last_line,
                    f"{anchor.name} names the seal {anchor.sha256[:12]}..., which is not in this ledger: it was cut off, replaced or "
                    "sealed anew since.",
                )
            elif anchor.step is not None and point[0] > anchor.step:
                self._found(
                    self._last_line,
                    f"{anchor.name} is of step {anchor.step}, but the seal that it names is of step {point[0]}.",
                )
            else:
                report.anchors.append((anchor.name, point[0]))
        if not report.anchors and not report.contradicted:
            self._note(
                self._last_line,
                "no anchor: no file beside the ledger names one of its seals, so a history that was written anew as a whole, or cut off at "
                "a seal, looks the same. `--seal HASH` compares it with a seal that was kept elsewhere.",
            )

    # -- the content ---------------------------------------------------------------------------------------------

    def _body(self, line: Line, content: dict[str, Any]) -> None:
        kind = content.get("kind")
        if kind == "header":
            self._header(line, content)
        elif kind in BODY_KINDS:
            if self._segment is None:
                self._found(line.number, f"a {kind} line stands before any header.")
                return
            check = {"step": self._segment.step, "gap": self._segment.gap, "footer": self._segment.footer}[str(kind)]
            lost = self._segment.lost
            problems = check(content)
            for problem in problems:
                self._found(line.number, problem, content.get("step"))
            if kind == "gap" and not problems:
                self._report.lost += self._segment.lost - lost
                self._note(
                    line.number,
                    f"gap: {content['steps']} step(s) from step {content['first']} could not be written ({'; '.join(content['errors'])}).",
                )
            recomputed, measured = self._segment.take_recomputed(), self._segment.take_measured()
            if self._sealed:
                self._report.steps += kind == "step"
                self._report.recomputed += recomputed
                self._report.measured += measured
                self._report.last_step = max(self._report.last_step, self._segment.next_step)

    def _header(self, line: Line, content: dict[str, Any]) -> None:
        schema = content.get("schema")
        if isinstance(schema, bool) or not isinstance(schema, int) or schema != SCHEMA_VERSION:
            self._found(line.number, f"the schema is {_short(schema)}; this version reads {SCHEMA_VERSION}.")
            self._segment = None
            return
        first, before = self._report.segments == 0, self._segment
        try:
            self._segment = Segment(content)
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, MemoryError) as error:
            self._found(line.number, f"the header cannot be understood: {error}")
            self._segment = None
            return
        self._report.before = content.get("steps_before", 0)
        rewound = self._segment.rewound
        if before is not None and not before.closed and self._segment.restarted is None and rewound is None:
            self._note(line.number, "the run before this header did not end cleanly.")
        self._report.segments += 1
        if (beyond := self._segment.beyond_recomputing) is not None:
            self._note(line.number, beyond)
        dropped, missing = self._segment.dropped, self._segment.missing_seal
        if dropped is not None:
            self._note(line.number, f"a torn tail of {dropped['bytes']} bytes was cut off when the run was resumed.")
        if missing is not None:
            self._note(
                line.number,
                f"when the run went on here, the ledger did not hold the seal of its line {missing['lines']} any more: "
                "the machine lost what it had written, or somebody cut or replaced the file.",
            )
        if self._segment.other_revision is not None:
            self._note(
                line.number,
                f"decisions of this run are not recomputed: they were made by {self._segment.other_revision}. Chain, counts and applied "
                "norms are checked.",
            )
        if rewound is not None:
            self._undo(line, self._segment, before)
        else:
            self._join(line, self._segment, before, first)
        self._segment.begin()

    def _undo(self, line: Line, segment: Segment, before: Segment | None) -> None:
        """Whether a run that went back was at that moment as it says."""
        assert segment.rewound is not None
        first, last, reason = segment.rewound
        self._note(
            line.number,
            f"the run went back here: steps {first} to {last} were undone and their data left out. {reason}",
        )
        step, digest = segment.point()
        sha256 = "" if segment.parent is None else segment.parent["sha256"]
        known = self._points.get(sha256)
        if before is not None and before.next_step != segment.next_step:
            self._found(
                line.number,
                f"the run went back after step {last}, but the records before it end at step {before.next_step - 1}.",
            )
        if known is None:
            self._found(line.number, "the moment that the run went back to is not in this file.")
        elif known[0] < step and before is not None and before.lost:
            self._note(line.number, "the moment that it went back to was not written; the join cannot be checked.")
        elif known[0] != step or (digest is not None and known[1] is not None and known[1] != digest):
            self._found(line.number, "the state that the run went back to is not the state that its parent had then.")

    def _join(self, line: Line, segment: Segment, before: Segment | None, first: bool) -> None:
        """Whether a run goes on from where its parent was."""
        parent = segment.parent
        if parent is None:
            if not first:
                self._note(line.number, "a new run begins here; it does not continue the one before.")
            return
        self._parents.add(parent["sha256"])
        known = self._points.get(parent["sha256"])
        step, digest = segment.point()
        if segment.restarted is not None and before is not None and parent["sha256"] == self._last_seal:
            if not segment.carries_over(before):
                self._found(
                    line.number, "the state does not follow from its parent's, with the parameters that there are now."
                )
        elif known is None:
            self._note(
                line.number, "the run continues one whose ledger is not in this file; the join cannot be checked."
            )
        elif known[0] < step:
            self._report.lost += step - known[0]
            self._note(
                line.number,
                f"gap: the checkpoint that the run resumed from is of step {step}, its parent's last seal of step {known[0]}: "
                "the steps between were not written.",
            )
        elif segment.restarted is not None:
            self._note(
                line.number, "the run goes on with other parameters from an older point; the join cannot be checked."
            )
        elif known[0] != step or (digest is not None and known[1] is not None and known[1] != digest):
            self._found(
                line.number, "the state that the run resumed with is not the state that its parent had at that point."
            )

    def _found(self, line: int, message: str, step: Any = None) -> None:
        self._report.num_violations += 1
        self._add(Finding(True, line, _step_or_none(step), message))

    def _note(self, line: int, message: str) -> None:
        self._add(Finding(False, line, None, message))

    def _add(self, finding: Finding) -> None:
        kept = self._report.findings
        if sum(other.violation == finding.violation for other in kept) < MAX_FINDINGS:
            kept.append(finding)


def _step_or_none(step: Any) -> int | None:
    return step if isinstance(step, int) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
