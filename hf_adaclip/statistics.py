"""Counts of a run on the host, fed by the rows that the ring brings."""

import math
from collections import Counter
from typing import Any

from hf_adaclip.controllers import Reason
from hf_adaclip.errors import NonFiniteGradientError


class RunStatistics:
    """How many steps were treated how, and the last decision.

    Attributes:
        counts: Steps by reason.
        clipped: Steps whose gradient was scaled down.
        skipped: Steps left out, because the norm was not finite (by us or by a loss scaler) or because the controller skips spikes.
        consecutive_nonfinite: How many of ours have come in a row.
    """

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.clipped = 0
        self.skipped = 0
        self.consecutive_nonfinite = 0
        self._longest = 0  # since it was last asked for: a series may end before anybody looks
        self._window_steps = 0
        self._window_clipped = 0
        self._last: dict[str, float] | None = None
        self._last_reason = Reason.WARMUP

    @property
    def steps(self) -> int:
        return self.counts.total()

    def add(self, row: dict[str, float], reason: Reason) -> None:
        """Count one step; `row` has the columns of the ring."""
        altered = 0 < row["coefficient"] < 1
        self.counts[reason] += 1
        self.clipped += altered
        # By the norm and not by the reason: the step at which a budget runs out is named after that, and is left out all the same.
        nonfinite = not math.isfinite(row["norm"])
        self.skipped += nonfinite or row["coefficient"] == 0
        ours = nonfinite and reason is not Reason.SCALER_SKIPPED
        self.consecutive_nonfinite = self.consecutive_nonfinite + 1 if ours else 0
        self._longest = max(self._longest, self.consecutive_nonfinite)
        self._window_steps += 1
        self._window_clipped += altered
        self._last, self._last_reason = row, reason

    def stop_if_hopeless(self, limit: int, *, last_step: int, checkpoint: str | None) -> None:
        """End the run after `limit` skipped steps in a row; `checkpoint` is the last one that is known.

        Raises:
            NonFiniteGradientError: It has come to that; the message says where to look.
        """
        found, self._longest = self._longest, self.consecutive_nonfinite
        if found < limit:
            return
        raise NonFiniteGradientError(
            f"The gradient norm was NaN or infinite in {found} steps in a row (`max_consecutive_nonfinite` is {limit}), the last of "
            f"them step {last_step}. All were skipped, so the weights are those of the last good step. Look at the loss of these "
            "batches, at the learning rate, and at float16 overflow (bfloat16 has none); then "
            + (f"resume from {checkpoint}." if checkpoint else "start again: no checkpoint was written before."),
            step=last_step,
            consecutive=found,
            checkpoint=checkpoint,
        )

    def metrics(self) -> dict[str, float | int | str]:
        """The `clip/*` values for a log line, and a new window for `clip/fraction`. Empty before the first step."""
        if self._last is None:
            return {}
        fraction = self._window_clipped / max(self._window_steps, 1)
        self._window_steps = self._window_clipped = 0
        return {
            "clip/threshold": self._last["threshold"],
            "clip/coefficient": self._last["coefficient"],
            "clip/fraction": fraction,
            "clip/pace": self._last["pace"],
            "clip/phase": self._last_reason.phase,
            "clip/skipped": self.skipped,
        }

    def counts_by_name(self) -> dict[str, int]:
        return {reason.name: self.counts[reason] for reason in Reason if self.counts[reason]}

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "counts": self.counts_by_name(),
            "clipped": self.clipped,
            "skipped": self.skipped,
            "consecutive_nonfinite": self.consecutive_nonfinite,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunStatistics":
        restored = cls()
        restored.counts.update({Reason[name]: int(count) for name, count in values["counts"].items()})
        restored.clipped = int(values["clipped"])
        restored.skipped = int(values["skipped"])
        restored.consecutive_nonfinite = int(values["consecutive_nonfinite"])
        return restored
