"""What is known of a run before its first step, and what follows from it: how the pace starts, and what is held back.

Over several epochs a model that was trained before learns its data by heart at a higher rate, and nothing in the first epoch tells that:
model_cards/RESEARCH.md, entries 33 and 34. What tells is the plan. Where it has `SEVERAL` epochs or more, the pace is off by itself, and
the static threshold is the upper limit of the range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients.provenance import frozen_beside, trained_before
from hf_adaclip.run.checkpoint import SavedPlan

SEVERAL: Final = 3
"""Epochs from which on it holds."""
PACE_START_SHARE: Final = 0.1
STATIC_THRESHOLD: Final = 1.0
"""That of a loop which sets none, as in the Trainer."""
_WHY: Final = f"this run plans {SEVERAL} or more epochs with a model that was trained before"
_UNKNOWN: Final = (
    f"this run plans {SEVERAL} or more epochs, and no model tells whether it was trained before (pass `model=`)"
)
_AS_BEFORE: Final = "it is as in the checkpoint that this run goes on from"
_HELD: Final = {"max_pace": "no pace", "max_threshold": "no threshold above {:g}"}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a loop knows of its run beforehand; a Trainer says it by itself.

    Args:
        steps: Optimizer steps that are planned. A tenth of them, less the warm-up, is the start of the pace. None: it is 50 steps.
        warmup_steps: Steps in which the schedule of the learning rate rises.
        epochs: How often the data is gone through. None: not known, and taken for once.
        before: Of the checkpoint that the run goes on from, for integrations that know it this early.

    Raises:
        ConfigError: A number is not above 0; of the warm-up, is below it.

    Example:
        >>> RunPlan(steps=1200, warmup_steps=60, epochs=3).pace_start
        60
    """

    steps: int | None = None
    warmup_steps: float = 0
    epochs: float | None = None
    before: SavedPlan = field(default=SavedPlan(), repr=False)

    def __post_init__(self) -> None:
        for name, least in (("steps", "1 or more"), ("warmup_steps", "0 or more"), ("epochs", "above 0")):
            value = getattr(self, name)
            if value is None and name != "warmup_steps":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (value >= 0 if name == "warmup_steps" else value > 0):
                raise ConfigError(f"`{name}` of RunPlan must be {least}, but is {value!r} instead.")

    @property
    def pace_start(self) -> int | None:
        """Steps of the pace's start: a schedule that warms up has a start of its own, and two of them are too slow.

        A run that is gone on with for longer does not start again.
        """
        if self.before.start is not None or self.steps is None:
            return self.before.start
        return max(1, round(PACE_START_SHARE * self.steps - self.warmup_steps))


def steps_per_epoch(dataloader: Any, accumulation: int) -> int | None:
    """Steps in which the data is seen once, as the Trainer counts: the last one may have fewer batches. None where no length is known."""
    try:
        batches = len(dataloader)
    except (TypeError, AttributeError):
        return None
    return max(1, math.ceil(batches / accumulation))


class HeldBack(NamedTuple):
    """What the plan of a run comes to.

    Attributes:
        config: The config of the run.
        fields: Which of its fields the plan holds back.
        why: In words; empty where it holds none.
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
        return f"There is {what}: {self.why} (set {names} to override)."


def follow_plan(config: AdaptiveClipConfig, plan: RunPlan, models: Sequence[Any]) -> HeldBack:
    """Fill in what the plan says, and hold back what the user has not set.

    Args:
        config: As it was given.
        plan: Of the run.
        models: Those that are trained; they are looked at only where the plan has several epochs.
    """
    if plan.pace_start is not None:
        config = config.with_pace_start(plan.pace_start)
    before = plan.before
    several = before.max_pace is None and plan.epochs is not None and plan.epochs >= SEVERAL
    why = _AS_BEFORE
    if several:
        several, why = _several(models)
    changes = {}
    if (several or before.max_pace == 1) and getattr(config.settings, "max_pace", 0) is None:
        changes["max_pace"] = 1.0
    static = STATIC_THRESHOLD if config.static_threshold is None else config.static_threshold
    limit = static if several else before.max_threshold
    if config.controller == "adaptive" and config.max_threshold is None and limit is not None and math.isfinite(limit):
        changes["max_threshold"] = max(limit, config.min_threshold or 0.0)
    if not changes:
        return HeldBack(config)
    return HeldBack(config.replace(**changes), tuple(changes), why)


def _several(models: Sequence[Any]) -> tuple[bool, str]:
    """Whether several epochs are held against the pace, and why."""
    if not models:
        return True, _UNKNOWN
    return trained_before(models) or frozen_beside(models), _WHY
