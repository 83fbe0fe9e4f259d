"""What is known of a run before its first step, and what follows from it: how the pace starts, and what is held back.

Over several epochs a model that was trained before learns its data by heart at a higher rate. What it has seen before says nothing of the
rate that is useful, so where the plan has `SEVERAL` epochs or more the pace goes by the first alone (`hf_adaclip.run.fresh_data`), and the
static threshold is the upper limit of the range: model_cards/RESEARCH.md, entries 33 to 36.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, NamedTuple

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients.provenance import frozen_beside, trained_before
from hf_adaclip.run.checkpoint import STATE_FILE, SavedPlan, plan_of

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
_HELD: Final = {
    "max_pace": "there is no pace",
    "fresh": "the pace goes by the first epoch alone",
    "max_threshold": "there is no threshold above {:g}",
}


@dataclass(frozen=True)
class RunPlan:
    """What a loop knows of its run beforehand; a Trainer says it by itself.

    Args:
        steps: Optimizer steps that are planned. A tenth of them, less the warm-up, is the start of the pace. None: it is 50 steps.
        warmup_steps: Steps in which the schedule of the learning rate rises.
        epochs: How often the data is gone through. None: not known, and taken for once.
        epoch_steps: Optimizer steps of an epoch; by default `steps / epochs`.
        checkpoint: Folder of the checkpoint that the run goes on from: it keeps the plan that it was begun with.

    Raises:
        ConfigError: A number is not what it can be; the message names it.

    Example:
        >>> RunPlan(steps=1200, warmup_steps=60, epochs=3).pace_start
        60
    """

    steps: int | None = None
    warmup_steps: float = 0
    epochs: float | None = None
    epoch_steps: int | None = None
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epoch_steps"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, Integral) and value >= 1):
                raise ConfigError(
                    f"`{name}` of RunPlan must be a whole number of 1 or more, but is {value!r} instead."
                )
        if not _is_number(self.warmup_steps) or not 0 <= self.warmup_steps < math.inf:
            raise ConfigError(f"`warmup_steps` of RunPlan must be 0 or more, but is {self.warmup_steps!r} instead.")
        if self.epochs is not None and not (_is_number(self.epochs) and self.epochs > 0):
            raise ConfigError(f"`epochs` of RunPlan must be above 0, but is {self.epochs!r} instead.")

    @cached_property
    def before(self) -> SavedPlan:
        """The plan that the checkpoint was written with."""
        return SavedPlan() if self.checkpoint is None else plan_of(Path(self.checkpoint) / STATE_FILE)

    @property
    def pace_start(self) -> int | None:
        """Steps of the pace's start: a schedule that warms up has a start of its own, and two of them are too slow.

        A run that is gone on with for longer does not start again.
        """
        if self.before.start is not None or self.steps is None:
            return self.before.start
        return max(1, round(PACE_START_SHARE * self.steps - self.warmup_steps))

    @property
    def first_epoch(self) -> int | None:
        """Steps of the first epoch, where they are known."""
        if self.epoch_steps is not None:
            return self.epoch_steps
        if self.steps is None or self.epochs is None or math.isinf(self.epochs):
            return None
        return max(1, math.floor(self.steps / self.epochs))


def checked_plan(plan: object) -> RunPlan:
    """The plan that was given; an empty one for None.

    Raises:
        ConfigError: It is none.
    """
    if plan is None:
        return RunPlan()
    if not isinstance(plan, RunPlan):
        raise ConfigError(
            f"`plan` must be a RunPlan, but is {plan!r} instead. Pass `plan=RunPlan(steps=1200, epochs=3)`, or leave it out."
        )
    return plan


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


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
        fields: What it holds back: fields of the config that it has set, and "fresh", where the pace goes by the first epoch alone.
        why: In words; empty where it holds nothing.
        override: Whether it may be overridden.
    """

    config: AdaptiveClipConfig
    fields: tuple[str, ...] = ()
    why: str = ""
    override: bool = True

    @property
    def sentence(self) -> str:
        """For the first line of a run; empty where nothing is held back."""
        if not self.fields:
            return ""
        what = " and ".join(_HELD[name].format(getattr(self.config, name, 0)) for name in self.fields)
        names = " and ".join(f"`{'max_pace' if name == 'fresh' else name}`" for name in self.fields)
        way_out = f" (set {names} to override)" if self.override else ""
        return f"{what[0].upper()}{what[1:]}: {self.why}{way_out}."


def follow_plan(config: AdaptiveClipConfig, plan: RunPlan, models: Sequence[Any]) -> HeldBack:
    """Fill in what the plan says, and hold back what the user has not set.

    Args:
        config: As it was given.
        plan: Of the run.
        models: Those that are trained; they are looked at only where the plan has several epochs.
    """
    before = plan.before
    goes_on = before.max_pace is not None  # as it was begun
    several, why = goes_on, _AS_BEFORE
    if not goes_on:
        several = plan.epochs is not None and plan.epochs >= SEVERAL
        several, why = _several(models) if several else (False, "")
    fields, changes = [], {}
    if getattr(config.settings, "max_pace", 0) is None:
        if (before.max_pace == 1) if goes_on else (several and plan.first_epoch is None):
            changes["max_pace"] = 1.0
        elif before.fresh if goes_on else several:
            fields.append("fresh")
    # What is held to the given rate begins with it too: until the estimate says more, the run is that of stock.
    start = 1 if "fresh" in fields and before.start is None else plan.pace_start
    if start is not None:
        config = config.with_pace_start(start)
    static = STATIC_THRESHOLD if config.static_threshold is None else config.static_threshold
    limit = before.max_threshold if goes_on else static if several else None
    if config.controller == "adaptive" and config.max_threshold is None and limit is not None and math.isfinite(limit):
        changes["max_threshold"] = max(limit, config.min_threshold or 0.0)
    if not (changes or fields):
        return HeldBack(config)
    made = config.replace(**changes) if changes else config
    order = [name for name in _HELD if name in changes or name in fields]
    return HeldBack(made, tuple(order), why, override=not goes_on)


def _several(models: Sequence[Any]) -> tuple[bool, str]:
    """Whether several epochs are held against the pace, and why."""
    if not models:
        return True, _UNKNOWN
    return trained_before(models) or frozen_beside(models), _WHY
