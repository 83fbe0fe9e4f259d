"""Counts of a run on the host, fed by the rows that the ring brings."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from hf_adaclip.controllers import Reason
from hf_adaclip.errors import NonFiniteGradientError
from hf_adaclip.ledger.schema import SHAPE_FIELDS

TEXT_METRICS: Final = ("clip/phase",)
"""Those of the metrics that are words. `clip/phase_id` says the same as a number."""

_NUMBERS_ONLY: Final = frozenset(
    {"MLflowCallback", "DagsHubCallback", "ClearMLCallback", "DVCLiveCallback", "AzureMLCallback", "FlyteCallback"}
)
"""Callbacks of transformers that take numbers alone, and warn of every word in every log line or drop it (looked up in 5.23)."""


def for_reporters(metrics: dict[str, Any], callbacks: Iterable[object]) -> dict[str, Any]:
    """The metrics without words, if one of these callbacks, or of their bases, takes only numbers."""
    names = {base.__name__ for callback in callbacks for base in type(callback).__mro__}
    return {k: v for k, v in metrics.items() if k not in TEXT_METRICS} if names & _NUMBERS_ONLY else metrics


@dataclass
class _Window:
    """The steps since the last log line."""

    steps: int = 0
    clipped: int = 0
    spikes: int = 0
    skipped: int = 0
    norm_max: float = math.nan
    coefficient: float = 1.0
    paces: float = 0.0


class RunStatistics:
    """How many steps were treated how, and what happened since the last log line.

    Attributes:
        counts: Steps by reason.
        clipped: Steps whose gradient was scaled down.
        spikes: Steps with a norm far above what was usual (an event of kind `spike`), or left out for that.
        skipped: Steps left out, because the norm was not finite (by us or by a loss scaler) or because the controller skips spikes.
        consecutive_nonfinite: How many of ours have come in a row.
        mean_pace: Of the steps before the last log line; 1 before any.
    """

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.clipped = 0
        self.spikes = 0
        self.skipped = 0
        self.consecutive_nonfinite = 0
        self.mean_pace = 1.0
        self._longest = 0  # since it was last asked for: a series may end before anybody looks
        self._window = _Window()
        self._last: dict[str, float] | None = None
        self._last_reason = Reason.WARMUP
        self._logged: dict[str, float | int | str] = {}

    @property
    def steps(self) -> int:
        return self.counts.total()

    def add(self, row: dict[str, float], reason: Reason, *, spike: bool = False) -> None:
        """Count one step.

        Args:
            row: The columns of the ring.
            reason: Why it was treated as it was.
            spike: Whether it made an event of kind `spike`.
        """
        self.counts[reason] += 1
        if reason is Reason.LEFT_OUT:
            return  # nothing was decided
        altered = 0 < row["coefficient"] < 1
        self.clipped += altered
        # By the norm and not by the reason: the step at which a budget runs out is named after that, and is left out all the same.
        nonfinite = not math.isfinite(row["norm"])
        skipped = nonfinite or row["coefficient"] == 0
        spike = spike or reason is Reason.SKIPPED
        self.skipped += skipped
        self.spikes += spike
        ours = nonfinite and reason is not Reason.SCALER_SKIPPED
        self.consecutive_nonfinite = self.consecutive_nonfinite + 1 if ours else 0
        self._longest = max(self._longest, self.consecutive_nonfinite)
        window = self._window
        window.steps += 1
        window.clipped += altered
        window.spikes += spike
        window.skipped += skipped
        window.coefficient = min(window.coefficient, row["coefficient"])
        window.paces += row["pace"]
        if not nonfinite and not row["norm"] <= window.norm_max:
            window.norm_max = row["norm"]
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
        """The `clip/*` values for a log line, over the steps since the last one. Empty before the first step.

        Over the window: `norm_max` (largest finite norm, NaN where none was), `coefficient` (the smallest; 0 where the controller left a
        step out), `fraction` (share scaled down), `spikes`, `skipped`. Of its last step: `threshold`, `pace`, `phase`, `phase_id`, and what
        the spectral range and the agreement did where they are on. Of the
        run: `spikes_total`, `skipped_total`. Where no step came since, the last window is told again.
        """
        if self._last is None:
            return {}
        window = self._window
        if window.steps or not self._logged:
            self._window = _Window()
            self.mean_pace = window.paces / max(window.steps, 1)
            self._logged = {
                "clip/norm_max": window.norm_max,
                "clip/threshold": self._last["threshold"],
                "clip/coefficient": window.coefficient,
                "clip/fraction": window.clipped / max(window.steps, 1),
                "clip/spikes": window.spikes,
                "clip/skipped": window.skipped,
                "clip/spikes_total": self.spikes,
                "clip/skipped_total": self.skipped,
                "clip/pace": self._last["pace"],
                "clip/phase": self._last_reason.phase,
                "clip/phase_id": self._last_reason.phase_id,
            }
            for name in SHAPE_FIELDS:
                if not math.isnan(value := self._last.get(name, math.nan)):
                    self._logged[f"clip/{name}"] = value
        return dict(self._logged)

    def counts_by_name(self) -> dict[str, int]:
        return {reason.name: self.counts[reason] for reason in Reason if self.counts[reason]}

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "counts": self.counts_by_name(),
            "clipped": self.clipped,
            "spikes": self.spikes,
            "skipped": self.skipped,
            "consecutive_nonfinite": self.consecutive_nonfinite,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunStatistics":
        restored = cls()
        restored.counts.update({Reason[name]: int(count) for name, count in values["counts"].items()})
        restored.clipped = int(values["clipped"])
        restored.spikes = int(values.get("spikes", 0))  # not in checkpoints of before they were counted
        restored.skipped = int(values["skipped"])
        restored.consecutive_nonfinite = int(values["consecutive_nonfinite"])
        return restored
