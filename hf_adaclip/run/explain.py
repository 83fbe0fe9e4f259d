"""What a clipper does, and why it does it that way, in words: `AdaptiveClipper.explain`."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import leaves_out
from hf_adaclip.controllers.adaptive import PACE_START, AdaptiveController
from hf_adaclip.controllers.numerics.bound import RELEASE
from hf_adaclip.controllers.numerics.deviation import INNER_EDGE
from hf_adaclip.controllers.pace import LITTLE
from hf_adaclip.gradients.agreement import CHANCE

_WHAT: Final = {
    "global": "the global norm",
    "module": "the norm of each module's own parameters",
    "tensor": "the norm of each tensor",
    "unit": "the units of each tensor",
    "element": "each element",
}
_LIMITS: Final = (
    "min_threshold",
    "max_threshold",
    "max_widening_step",
    "max_widening_100",
    "max_skipped",
    "freeze_after",
)


def describe(
    config: AdaptiveClipConfig,
    static_threshold: float,
    skipping: Sequence[str],
    setup: str | None,
    unfolded: str | None,
    held: bool | None,
    off: Mapping[str, str],
    *,
    fresh: str | None = None,
    little: bool = False,
    pace: float | None = None,
) -> str:
    """A few lines for people.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up, and of a ceiling that is held.
        skipping: Per known optimizer, how a step is left out and why so.
        unfolded: Why gradients are scaled in a pass of their own; None when the step does it.
        setup: How the distributed setup is supported; None without an accelerator.
        held: Whether the static threshold is the ceiling; None while that is not known.
        off: Why parts of the default are off.
        fresh: Why the pace goes by the first epoch alone; None where it does not.
        little: Whether the training loss has ended the pace.
        pace: Of the last step; None before the first one.
    """
    shadow = f", shadow: the static threshold {static_threshold:g} is what is applied" if config.shadow else ""
    kind = config.settings
    known = "steps are done" if kind.fine else "norms are known"
    warmup = getattr(kind, "warmup_observations", None)
    until = "" if warmup is None else f"; static threshold {static_threshold:g} until {warmup} {known}"
    lines = [
        f"controller  {config.controller} on {_WHAT[config.works_on]}{until}{shadow}",
        f"            {kind.idea} ({kind.source})",
    ]
    if isinstance(kind, AdaptiveController):
        lines.append(f"ceiling     {_ceiling(kind, static_threshold, held, config.max_threshold)}")
    limits = [f"{name}={getattr(config, name):g}" for name in _LIMITS if getattr(config, name) is not None]
    if limits:
        lines.append(f"limits      {', '.join(limits)}")
    if config.divergence_spreads or config.on_trouble != "continue":
        after = f", `divergence_spreads={config.divergence_spreads:g}`" if config.divergence_spreads else ""
        lines.append(f"trouble     `on_trouble={config.on_trouble}`{after}")
    if leaves_out(config):
        done = "would be left out as a whole (shadow: it is not)" if config.shadow else "is left out as a whole"
        lines.append(
            f"spikes      a step that the controller itself would cut {done}; what the static threshold or a limit cuts is scaled"
        )
    rules = config.parameter_rules if isinstance(config.parameter_rules, dict) else {}
    for pattern, rule in rules.items():
        lines.append(f"rule        {pattern}: {rule}")
    if setup is not None:
        lines.append(f"setup       {setup}")
    unknown = "no optimizer is known: on an accelerator one flag is read per step (pass `optimizer=`)"
    lines += [f"skipping    {why}" for why in skipping or [unknown]]
    lines.append(
        "scaling     inside the fused step" if unfolded is None else f"scaling     in a pass of its own: {unfolded}"
    )
    lines.append(f"pace        {_pace(config, off.get('pace'), fresh, little, pace)}")
    lines += [line for line in _shaping(config, off) if line.split()[0] not in off]
    lines += [f"{part:<11} off{_why(part, off)}" for part in ("spectral", "agreement") if part in off]
    lines.append(f"ledger      {config.ledger_path or 'none'}")
    return "\n".join(lines)


def _ceiling(rule: AdaptiveController, static_threshold: float, held: bool | None, limit: float | None) -> str:
    """What the static threshold still does after the warm-up."""
    far = (2 + INNER_EDGE) / (2 - INNER_EDGE)
    beyond = f"; an edge beyond {far:.3g} x the level is never above it either" if rule.max_edge > INNER_EDGE else ""
    share, static = rule.ceiling_share, f"{static_threshold:g}"
    if share >= 1:
        return f"none for the range as a whole (`ceiling_share` is 1), static threshold {static}{beyond}"
    grows = f"; beyond {static} the range follows norms only while the loss makes progress"
    if limit is not None and limit <= static_threshold:
        grows = ""
    release = f"until it cuts less than {share * RELEASE:.0%} of recent steps" if share else "for good"
    if held is None:
        return (
            f"the static threshold {static}, if it cuts more than {share:.0%} of the warm-up, {release}{grows}{beyond}"
        )
    if held:
        return f"the static threshold {static}, which cut more than {share:.0%} of the warm-up, {release}"
    return f"none for the range as a whole: the static threshold {static} cuts few steps{grows}{beyond}"


def _shaping(config: AdaptiveClipConfig, off: Mapping[str, str]) -> list[str]:
    """What is done beside the length of a step; nothing where all of it is off."""
    lines, shadow = [], " (recorded only: shadow)" if config.shadow else ""
    if config.spectral is not None:
        width, every = config.spectral, config.spectral_every
        often = "" if every == 1 else f", in one step of {every}"
        what = {0.0: "made equal", math.inf: "left as they are"}.get(
            width, f"clipped softly at {width:g} x their root mean square"
        )
        steps = 1 / (1 - config.spectral_memory) if width < math.inf and "memory" not in off else 1.0
        whose = f", averaged over about {steps:.3g} steps," if steps > 1 else ""
        lines.append(
            f"spectral    singular values of each hidden matrix{whose} {what}, its norm kept{often}{shadow}{_why('memory', off)}"
        )
    if config.agreement is True:
        more = f"what is left is made longer unless less than {CHANCE:.0%} has agreed of late"
        lines.append(
            f"agreement   of each step, what goes against the sign of the gradient is taken back; {more}{shadow}"
        )
    return lines


def _why(part: str, off: Mapping[str, str]) -> str:
    return f": {off[part]}" if part in off else ""


def _pace(config: AdaptiveClipConfig, why: str | None, fresh: str | None, little: bool, pace: float | None) -> str:
    if not isinstance(config.settings, AdaptiveController) or config.max_pace == 1:
        return "off" if why is None else f"off: {why}"
    if why is not None:
        return f"1 from here on, the data counts as learned by heart: {why}"
    now = "" if pace is None else f"; x{pace:.3g} in the last step"
    if little:
        return f"goes to 1 and stays: the training loss is {LITTLE:.0%} of that of the first steps, or was, so little is left to learn{now}"
    start = config.settings.pace_start or PACE_START
    applied = ", recorded only: shadow" if config.shadow else ""
    alone = f", by the first epoch alone: {fresh}" if fresh is not None else ""
    return f"a start of {start} steps, then up to x{config.max_pace:g} where that is useful{alone}{applied}{now}"
