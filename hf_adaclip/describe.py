"""What a clipper does, and why it does it that way, in words: `AdaptiveClipper.explain`."""

from collections.abc import Sequence

from hf_adaclip.config import AdaptiveClipConfig


def describe(config: AdaptiveClipConfig, static_threshold: float, skipping: Sequence[str], setup: str | None) -> str:
    """A few lines for people.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up.
        skipping: Per known optimizer, how a step is left out and why so.
        setup: How the distributed setup is supported; None without an accelerator.
    """
    shadow = ", shadow: the static threshold is what is applied" if config.shadow else ""
    lines = [
        f"controller  {config.controller} on the {config.granularity} norm; static threshold {static_threshold:g} "
        f"until {config.warmup_observations} norms are known{shadow}"
    ]
    if setup is not None:
        lines.append(f"setup       {setup}")
    unknown = "no optimizer is known: on an accelerator one flag is read per step (pass `optimizer=`)"
    lines += [f"skipping    {why}" for why in skipping or [unknown]]
    lines.append("pace        off" if config.max_pace == 1 else f"pace        up to x{config.max_pace:g}")
    lines.append(f"ledger      {'none' if config.ledger in (None, 'none', 'auto') else config.ledger}")
    return "\n".join(lines)
