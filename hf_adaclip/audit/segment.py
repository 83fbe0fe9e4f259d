"""One segment of a ledger (from a header to the next): does each record follow from the ones before it?"""

import hashlib
import math
from collections import Counter
from typing import Any

import numpy as np

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation, Reason, build_controller
from hf_adaclip.controllers.base import coefficient_of
from hf_adaclip.controllers.elementwise import FineController
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, Value, host_number
from hf_adaclip.controllers.wrappers.states import Keeping, carry_over
from hf_adaclip.ledger.header import check_counts, check_header, is_text, rewound_of
from hf_adaclip.ledger.records import Summary, revisions, state_bytes, state_from_json, summarise
from hf_adaclip.ledger.schema import APPLIED_TOLERANCE, SHAPE_FIELDS, STEP_FIELDS, parse_number
from hf_adaclip.run.shape_gate import FAST

SUM_TOLERANCE = 1e-5
"""Relative difference in the summary of a per-tensor step: the order in which a device sums squares is its own."""


class Segment:
    """Replays a segment as its records come in.

    Args:
        header: The header line.

    Raises:
        ValueError, TypeError, KeyError: The header is not one.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        check_header(header)
        self._config = AdaptiveClipConfig.from_dict(header["config"])
        self._num_tensors: int = header["num_tensors"]
        # Ledgers of before there were `parameter_rules` have no parts.
        parts = [(str(p) if p is not None else None, int(n)) for p, n in header.get("parts", [])]
        self._controller = build_controller(self._config, parts)
        groups = tuple(str(name) for name in header.get("groups", ()))
        self._keeping = Keeping(self._controller, groups, tuple(parts))
        restarted = header.get("restarted")
        self.restarted = None if restarted is None else [str(name) for name in restarted]
        self._shape = (self._num_tensors,) if self._num_tensors else ()
        self._ops = ARRAY if self._shape else SCALAR
        self._header_static = header["static_threshold"]
        self._static = host_number(self._header_static)
        self._next_step: int = header["first_step"]
        self._counts: Counter[str] = Counter(header["counts"])
        self.parent = _mapping(header["parent"], sha256=str, step=int)
        self.dropped = _mapping(header["dropped_tail"], bytes=int, sha256=str)
        self.missing_seal = _mapping(header.get("missing_seal"), lines=int, sha256=str)
        self.rewound = rewound_of(header)
        origin = self._next_step if self.rewound is None else self.rewound.first
        if self.parent is not None and self.parent["step"] != origin:
            raise ValueError(f"its parent ends at step {self.parent['step']}, but it goes on from {origin}")
        self.other_revision = other_revision(header, self._config)
        """How the rule that decided differs from the one of this version, in words; then nothing is recomputed."""
        self._state: tuple[Any, ...] = ()
        if self.other_revision is None:
            self._state = state_from_json(self._controller, header["initial_state"], self._ops, self._shape)
        self._broken = self.other_revision is not None
        self._recomputed = self._measured = 0
        self._last_time = 0.0
        self._begun = False
        self.lost = 0
        self.closed = False

    @property
    def next_step(self) -> int:
        return self._next_step

    def point(self) -> tuple[int, bytes | None]:
        """The next step and a digest of the state (None where it is not known): equal points are the same moment of the same run.

        Of a segment that went back, before its first record: the step that it went back to.
        """
        step = self._next_step if self.rewound is None or self._begun else self.rewound.first
        return step, None if self._broken else hashlib.sha256(state_bytes(self._state)).digest()

    def begin(self) -> None:
        """Its parent is known: records follow."""
        self._begun = True
        if self.rewound is not None and not self._broken:
            self._state = self._controller.narrowed(self._state, self._ops)

    def carries_over(self, before: "Segment") -> bool:
        """Whether the state that this segment begins with is the one that `before` has come to, for the parameters of now.

        True as well where one of the two is not known.
        """
        if self._next_step != before._next_step:
            return False
        if self._broken or before._broken:
            return True
        try:
            state = carry_over(before._state, before._keeping, self._keeping, self.restarted or (), self._ops)
        except (ValueError, LookupError):
            return False
        return state_bytes(state) == state_bytes(self._state)

    def take_recomputed(self) -> int:
        taken, self._recomputed = self._recomputed, 0
        return taken

    def take_measured(self) -> int:
        taken, self._measured = self._measured, 0
        return taken

    def step(self, record: dict[str, Any]) -> list[str]:
        """Check one step record; returns problems in words."""
        problems = []
        if self.closed:
            problems.append("a step stands after the footer.")
        missing = [key for key in STEP_FIELDS if key not in record]
        if missing:
            return [*problems, f"the record has no {', '.join(missing)}."]
        step = record["step"]
        if step != self._next_step or isinstance(step, bool):
            problems.append(
                f"step {self._next_step} should come here. Steps are missing, doubled or out of order; "
                "decisions after it are not recomputed."
            )
            self._broken = True
        self._next_step = step + 1 if isinstance(step, int) else self._next_step + 1
        reason = str(record["reason"])
        self._counts[reason] += 1
        try:
            recorded = {k: parse_number(record[k]) for k in ("norm", "threshold", "coefficient", "pace", "loss")}
            recorded["reach"] = parse_number(record.get("reach"))
            # A schedule of `max_grad_norm` has one beside each step; otherwise the header's holds.
            self._static = host_number(parse_number(record.get("static_threshold", self._header_static)))
            applied = parse_number(record["applied_norm"])
            norms = [parse_number(n) for n in record["norms"]] if self._num_tensors else None
            problems += self._compare_time(parse_number(record["time"]))
            parse_number(record["loss_scale"])
            moved = parse_number(record["moved"]) if "moved" in record else None
            shape: dict[str, float] = {str(k): parse_number(record[k]) for k in SHAPE_FIELDS if k in record}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            self._broken = True
            return [*problems, f"the record cannot be understood: {error}."]
        if norms is not None and len(norms) != self._num_tensors:
            self._broken = True
            return [*problems, f"the record has {len(norms)} norms for {self._num_tensors} tensors."]
        problems += _impossible(recorded, reason, applied)
        if moved is not None and not min(FAST.values()) < moved < math.inf:
            problems.append(
                f"loaded weights are recorded as trained anew, but had moved by {moved:g}, which does not say so."
            )
        if reason == Reason.LEFT_OUT.name:
            return [*problems, *self._leave_out(recorded, applied)]
        if not self._broken:
            try:
                problems += self._compare(self._replay(recorded, norms), recorded, reason)
            except (ValueError, LookupError, OverflowError, TypeError) as error:
                self._broken = True  # only a state that no run ever had, such as a NaN for a place in a history
                return [*problems, f"the decision cannot be recomputed: {error}."]
        problems += self._compare_applied(recorded, applied)
        return problems + self._compare_shape(shape, recorded, step)

    def _leave_out(self, recorded: dict[str, float], applied: float) -> list[str]:
        """A step without a gradient, which nobody decided on."""
        if recorded["norm"] != 0 or recorded["coefficient"] != 0 or recorded["pace"] != 1 or applied == applied:
            return ["the step was left out with its data, but is recorded with a gradient."]
        if not self._broken:
            self._state = self._controller.narrowed(self._state, self._ops)
            self._recomputed += 1
        return []

    def gap(self, record: dict[str, Any]) -> list[str]:
        """Check a line on steps that could not be written, and go on after them; returns problems in words."""
        try:
            first, steps, errors = record["first"], record["steps"], record["errors"]
            counts = check_counts(record["counts"])
            if first != self._next_step or not _is_whole(steps) or steps < 1:
                raise ValueError(f"step {self._next_step} should come here")
            if sum(counts.values()) != steps:
                raise ValueError(f"its counts are not those of {steps} steps")
            if not isinstance(errors, list) or not errors or not all(is_text(e) for e in errors):
                raise ValueError("it does not say why")
            self._next_step += steps
            self._counts.update(counts)
            self.lost += steps
            if record["state"] is None:
                self._broken = True
            elif not self._broken:
                self._state = state_from_json(self._controller, record["state"], self._ops, self._shape)
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            self._broken = True
            return [f"the gap cannot be understood: {error}."]
        return []

    def footer(self, record: dict[str, Any]) -> list[str]:
        """Check the footer; returns problems in words."""
        problems = ["a second footer stands after the footer."] if self.closed else []
        self.closed = True
        if record.get("steps") != self._next_step:
            problems.append(f"the footer counts {record.get('steps')!r} steps, the records {self._next_step}.")
        counted = record.get("counted_steps", record.get("steps"))
        if counted != record.get("steps"):
            problems.append(
                f"the training loop counted {counted!r} optimizer steps, but clipping decided on {record.get('steps')!r}: it was not "
                "called once in each."
            )
        if record.get("counts") != {k: v for k, v in self._counts.items() if v}:
            problems.append("the footer's counts by reason are not those of the records.")
        if record.get("lost", 0) != self.lost:
            problems.append(f"the footer says that {record.get('lost', 0)!r} steps were lost, the gaps {self.lost}.")
        if self._broken:
            return problems
        try:
            final = state_from_json(self._controller, record["final_state"], self._ops, self._shape)
            if state_bytes(final) != state_bytes(self._state):
                problems.append("the footer's final state is not the one that the records lead to.")
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            problems.append(f"the footer's final state cannot be understood: {error}.")
        return problems

    def _compare_time(self, seconds: float) -> list[str]:
        before, self._last_time = self._last_time, seconds
        if seconds >= before and math.isfinite(seconds):
            return []
        self._last_time = before
        return [f"`time` is {seconds:g} s, but the step before it was at {before:g} s."]

    def _replay(self, recorded: dict[str, float], norms: list[float] | None) -> Summary:
        norm = host_number(recorded["norm"])
        observed: Value = norm if norms is None else np.array(norms, dtype=np.float32)
        finite = norm < host_number(math.inf)
        left = None
        if isinstance(self._controller, FineController) and self._next_step > self._controller.first_step:
            left = host_number(recorded["threshold"])  # what it did to single units is not in a ledger
        seen = Observation(
            observed, host_number(recorded["loss"]), self._static, finite, left, host_number(recorded["reach"])
        )
        decision, self._state = self._controller.update(self._state, seen)
        return Summary(*decision) if norms is None else summarise(norm, observed, *decision)

    def _compare(self, summary: Summary, recorded: dict[str, float], reason: str) -> list[str]:
        problems = []
        tolerance = SUM_TOLERANCE if self._num_tensors else 0.0
        for key in ("threshold", "coefficient", "pace"):
            want, have = float(getattr(summary, key)), float(np.float32(recorded[key]))
            if not _close(want, have, tolerance):
                problems.append(f"`{key}` is recorded as {have:g}, but the norms before it give {want:g}.")
        want_reason = Reason(int(summary.reason)).name
        if want_reason == Reason.NONFINITE.name and reason == Reason.SCALER_SKIPPED.name:
            want_reason = reason  # the same norm; who skips it is known only to the run
        if want_reason != reason:
            problems.append(f"`reason` is recorded as {reason}, but the norms before it give {want_reason}.")
        self._recomputed += not problems
        return problems

    @property
    def beyond_recomputing(self) -> str | None:
        """What records of this segment hold that follows from gradients, which no ledger has; None where there is nothing of the kind."""
        fields = [*(SHAPE_FIELDS[1:3] if self._config.spectral is not None else ())]
        fields += SHAPE_FIELDS[3:] if self._config.agreement is True else ()
        if not fields:
            return None
        names = ", ".join(f"`{name}`" for name in fields)
        return f"{names}: not recomputed, but held to what is possible. They follow from gradients."

    def _compare_shape(self, shape: dict[str, float], recorded: dict[str, float], step: Any) -> list[str]:
        """What the spectral range and the agreement have done, as far as the settings and the norm say what it can be."""
        problems = []
        width, every = self._config.spectral, self._config.spectral_every
        spectral = [key for key in SHAPE_FIELDS[:3] if key in shape]
        if spectral and (width is None or not isinstance(step, int) or step % every):
            problems.append(
                f"`{spectral[0]}` is recorded, but by the settings the spectral range does not act in this step."
            )
        elif spectral:
            if len(spectral) < 3:
                problems.append(f"`{spectral[0]}` is recorded without {', '.join(SHAPE_FIELDS[:3])} as a whole.")
            elif np.float32(shape["spectral_width"]) != np.float32(width):
                problems.append(
                    f"`spectral_width` is recorded as {shape['spectral_width']:g}, but the settings say {width:g}."
                )
            else:
                left = self._intended(recorded)
                if not 0 <= shape["matrix_norm"] <= left * (1 + APPLIED_TOLERANCE):
                    problems.append(
                        f"`matrix_norm` is recorded as {shape['matrix_norm']:g}, but the norm of all gradients was {left:g}."
                    )
        if "agreeing_share" in shape and self._config.agreement is not True:
            problems.append("`agreeing_share` is recorded, but by the settings the agreement is off.")
        problems += [
            f"`{key}` is recorded as {shape[key]:g}, not a share between 0 and 1."
            for key in ("altered_energy", "agreeing_share")
            if key in shape and not 0 <= shape[key] <= 1
        ]
        return problems

    def _intended(self, recorded: dict[str, float]) -> float:
        """The norm that clipping leaves."""
        coefficient = recorded["coefficient"]
        if self._config.shadow:
            coefficient = float(coefficient_of(host_number(recorded["norm"]), self._static, SCALAR))
        return recorded["norm"] * coefficient

    def _compare_applied(self, recorded: dict[str, float], applied: float) -> list[str]:
        if applied != applied or not math.isfinite(recorded["norm"]):
            return []
        intended = self._intended(recorded)
        if not _close(intended, applied, APPLIED_TOLERANCE):
            return [
                f"the optimizer was given a gradient of norm {applied:g}, {intended:g} was intended: "
                "something changed it between clipping and the step."
            ]
        self._measured += 1
        return []


def other_revision(header: dict[str, Any], config: AdaptiveClipConfig) -> str | None:
    """How the revision of the rule that a header names differs from the one here, in words; None when it does not."""
    then = {"revision": header.get("revision", 1), **header.get("revisions", {})}
    now = revisions(config)
    now = {"revision": now["revision"], **now.get("revisions", {})}
    differing = {k: (then.get(k, 1), now.get(k, 1)) for k in sorted({*then, *now}) if then.get(k, 1) != now.get(k, 1)}
    if not differing:
        return None
    return ", ".join(
        f"{config.controller if name == 'revision' else name} in revision {a}, not {b}"
        for name, (a, b) in differing.items()
    )


def _impossible(recorded: dict[str, float], reason: str, applied: float) -> list[str]:
    """What no controller decides and no gradient has, whatever came before."""
    problems = []
    if reason not in Reason.__members__:
        problems.append(f"`reason` is {_short(reason)}, which this version does not know.")
    for key, value in (("norm", recorded["norm"]), ("applied_norm", applied)):
        if value < 0:
            problems.append(f"`{key}` is {value:g}, and a norm is never negative.")
    if not 0 <= recorded["coefficient"] <= 1:
        problems.append(f"`coefficient` is {recorded['coefficient']:g}, not between 0 and 1.")
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(value: Any, **kinds: type) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{_short(value)} does not have {', '.join(kinds)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _close(a: float, b: float, tolerance: float) -> bool:
    if a == b or (a != a and b != b):
        return True
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
