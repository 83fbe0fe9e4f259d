"""Several passes over the data of a model that was trained before.

At a higher rate it learns the data by heart, and nothing in the first pass tells that: model_cards/RESEARCH.md, entries 33 and 34. What
tells is the plan of the Trainer. Where it has `SEVERAL` passes or more, the pace is off by itself, and the static threshold is the upper
limit of the range.
"""

import math
from typing import Any, Final

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.run.checkpoint import SavedPlan

SEVERAL: Final = 3
"""Passes over the data from which on it holds."""
_WHY: Final = f"this run plans {SEVERAL} or more passes over its data with a model that was trained before"
_AS_BEFORE: Final = "it is as in the checkpoint that this run goes on from"


def length_of(dataloader: Any) -> int | None:
    """Its batches; None for a stream, and where there is none."""
    try:
        return len(dataloader)
    except TypeError:
        return None


def planned_passes(steps: int, batches: int | None, accumulation: int) -> float:
    """How often the data is seen, as the Trainer counts: the last step of a pass may have fewer batches. 0 for a stream."""
    return steps / max(1, math.ceil(batches / accumulation)) if batches else 0.0


def held_back(
    config: AdaptiveClipConfig, before: SavedPlan, *, several: bool
) -> tuple[AdaptiveClipConfig, str | None, str | None]:
    """The config of the run, and why its pace and its threshold are held back; None where they are not, or were set.

    Args:
        config: With what the Trainer knows.
        before: With which plan the checkpoint was written that the run goes on from.
        several: Whether the run plans several passes with a model that was trained before.
    """
    several = several and before.max_pace is None  # a run is gone on with as it was begun
    no_pace = no_range = None
    if (several or before.max_pace == 1) and getattr(config.settings, "max_pace", 0) is None:
        config, no_pace = config.replace(max_pace=1.0), _WHY if several else _AS_BEFORE
    limit = config.static_threshold if several else before.max_threshold
    if config.controller == "adaptive" and config.max_threshold is None and limit is not None and math.isfinite(limit):
        config = config.replace(max_threshold=max(limit, config.min_threshold or 0.0))
        no_range = _WHY if several else _AS_BEFORE
    return config, no_pace, no_range


def in_a_sentence(config: AdaptiveClipConfig, no_pace: str | None, no_range: str | None) -> str:
    """For the first line of a run; empty where nothing is held back."""
    why = no_pace or no_range
    if why is None:
        return ""
    held = {
        "max_pace": ("no pace", no_pace),
        "max_threshold": (f"no threshold above {config.max_threshold:g}" if config.max_threshold else "", no_range),
    }
    what = " and ".join(said for said, reason in held.values() if reason)
    names = " and ".join(f"`{name}`" for name, (_, reason) in held.items() if reason)
    return f" There is {what}: {why} (set {names} to override)."
