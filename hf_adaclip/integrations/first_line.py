"""The line that a Trainer shows as its clipping begins: how far it departs from the given settings, and how to switch that off."""

from typing import Any

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.gradients.provenance import trained_before


def in_one_line(clipper: AdaptiveClipper, given: AdaptiveClipConfig, model: Any) -> str:
    """The line.

    Args:
        clipper: As it begins, or goes on from a checkpoint.
        given: The config before anything was decided.
        model: Is trained.
    """
    config, off = clipper.config, clipper.off
    # Where they are on by themselves they do not act in a model that was trained before, unless its weights move fast. A run that is gone
    # on with has decided that already.
    waits = clipper.step == 0 and trained_before([model])
    ranged = config.spectral is not None and not (waits and given.spectral_width == "auto")
    agreed = config.agreement is True and not (waits and given.agreement == "auto")
    parts = [
        *([f"pace up to x{config.max_pace:g}"] if config.max_pace > 1 and "pace" not in off else []),
        *(["spectral range"] if ranged and "spectral" not in off else []),
        *(["agreement"] if agreed and "agreement" not in off else []),
    ]
    beside = f" with {', '.join(parts)}" if parts else ""
    if parts:
        less = ' `clip="guard"` only clips.' if config.controller == "adaptive" else ""
    else:
        less = f" It only clips: {clipper.only_clips}." if clipper.only_clips is not None else ""
    line = (
        f"Adaptive clipping by `{config.controller}`{beside}{' in shadow' if config.shadow else ''}, static threshold "
        f"{config.static_threshold:g}; ledger {config.ledger_path or 'none'}.{less} `trainer.clipper.explain()` says more. "
        f"{clipper.held_back}"
    )
    return line.rstrip()
