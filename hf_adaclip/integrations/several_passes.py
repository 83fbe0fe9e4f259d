"""Several passes over the data of a model that was trained before.

At a higher rate it learns the data by heart, and nothing in the first pass tells that: model_cards/RESEARCH.md, entries 33 and 34. What
tells is the plan of the Trainer. Where it has `SEVERAL` passes or more, the pace is off by itself, and the static threshold is the upper
limit of the range.
"""

import math
from typing import Any, Final, NamedTuple

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.run.checkpoint import SavedPlan

SEVERAL: Final = 3
"""Passes over the data from which on it holds."""
_WHY: Final = f"this run plans {SEVERAL} or more passes over its data with a model that was trained before"
_AS_BEFORE: Final = "it is as in the checkpoint that this run goes on from"
_HELD: Final = {"max_pace": "no pace", "max_threshold": "no threshold above {:g}"}


def steps_per_pass(dataloader: Any, accumulation: int) -> int | None:
    """Steps in which the data is seen once, as the Trainer counts: the last one may have fewer batches. None where no length is known."""
    try:
        batches = len(dataloader)
    except (TypeError, AttributeError):
        return None
    return max(1, math.ceil(batches / accumulation))


class HeldBack(NamedTuple):
    """What the plan of a run holds back.

    Attributes:
        config: The config of the run.
        fields: Which of its fields the plan has set.
        why: In words; empty where it has set none.
    """

    config: AdaptiveClipConfig
    fields: tuple[str, ...] = ()
    why: str = ""

    @property
    def sentence(self) -> str:
        """For the first line of a run; empty where nothing is held back."""
        if not self.fields:
            return ""
        what = " and ".join(_HELD[name].format(getattr(self.config, name)) for name in self.fields)
        names = " and ".join(f"`{name}`" for name in self.fields)
        return f" There is {what}: {self.why} (set {names} to override)."


def held_back(config: AdaptiveClipConfig, before: SavedPlan, *, several: bool) -> HeldBack:
    """Holds back what the user has not set.

    Args:
        config: With what the Trainer knows.
        before: With which plan the checkpoint was written that the run goes on from.
        several: Whether the run plans several passes with a model that was trained before.
    """
    several = several and before.max_pace is None  # a run is gone on with as it was begun
    changes = {}
    if (several or before.max_pace == 1) and getattr(config.settings, "max_pace", 0) is None:
        changes["max_pace"] = 1.0
    limit = config.static_threshold if several else before.max_threshold
    if config.controller == "adaptive" and config.max_threshold is None and limit is not None and math.isfinite(limit):
        changes["max_threshold"] = max(limit, config.min_threshold or 0.0)
    if not changes:
        return HeldBack(config)
    return HeldBack(config.replace(**changes), tuple(changes), _WHY if several else _AS_BEFORE)
