"""What a clipper does, and why it does it that way, in words: `AdaptiveClipper.explain`."""

from collections.abc import Sequence
from typing import Final

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, leaves_out
from hf_adaclip.controllers.adaptive import PACE_START

_WHAT: Final = {
    "global": "the global norm",
    "module": "the norm of each module's own parameters",
    "tensor": "the norm of each tensor",
    "unit": "the units of each tensor",
    "element": "each element",
}
_NO_WARMUP: Final = ("static", "weight_ratio")


def describe(
    config: AdaptiveClipConfig,
    static_threshold: float,
    skipping: Sequence[str],
    setup: str | None,
    unfolded: str | None,
    held: bool | None,
) -> str:
    """A few lines for people.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up, and of a ceiling that is held.
        skipping: Per known optimizer, how a step is left out and why so.
        unfolded: Why gradients are scaled in a pass of their own; None when the step does it.
        setup: How the distributed setup is supported; None without an accelerator.
        held: Whether the static threshold is the ceiling; None while that is not known.
    """
    shadow = ", shadow: the static threshold is what is applied" if config.shadow else ""
    kind = CONTROLLERS[config.controller]
    until = f"; static threshold {static_threshold:g} until {config.warmup_observations} norms are known"
    lines = [
        f"controller  {config.controller} on {_WHAT[config.works_on]}{'' if config.controller in _NO_WARMUP else until}{shadow}",
        f"            {kind.idea} ({kind.source})",
    ]
    if config.controller == "adaptive" and config.ceiling_share < 1:
        if held is None:
            ceiling = f"the static threshold, if it cuts more than {config.ceiling_share:.0%} of the warm-up"
        else:
            ceiling = (
                "the static threshold, which cuts most steps" if held else "none: the static threshold cuts few steps"
            )
        lines.append(f"ceiling     {ceiling}")
    if leaves_out(config):
        lines.append("spikes      a step that the controller would cut is left out as a whole")
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
    lines.append(
        "pace        off"
        if config.max_pace == 1
        else f"pace        a start of {config.pace_start or PACE_START} steps, then up to x{config.max_pace:g} where that is useful"
    )
    lines.append(f"ledger      {'none' if config.ledger in (None, 'none', 'auto') else config.ledger}")
    return "\n".join(lines)
