"""What pace, spectral range and sign agreement did in a run, in numbers and in words."""

import math
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.controllers import Reason
from hf_adaclip.run.shape_gate import how_fast

_MOST: Final = 0.5
"""Share of the steps after the warm-up from which on the static threshold counts as one that always acts."""


def shape_numbers(series: Series) -> dict[str, Any]:
    """Numbers of a run's parts beside the threshold, JSON-ready; None of a part that never acted.

    Returns:
        `altered_energy` and `agreeing_share` (means over the steps that have one), `spectral_steps` and `agreement_steps` (how many),
        `by_heart_step` (from which on the data counts as learned by heart), `let_in` (steps from which on a part acted because loaded
        weights moved fast, and by which share of their size), `held` and `judged` (steps that the static threshold cut,
        and all after the warm-up).
    """
    altered, altered_steps = _mean(series.altered_energies)
    agreeing, agreeing_steps = _mean(series.agreeing_shares)
    back = np.flatnonzero(series.reaches == -math.inf) if series.reaches is not None else np.array([])
    anew = np.flatnonzero(np.isfinite(series.moved)) if series.moved is not None else np.array([])
    reasons = series.reasons or []
    return {
        "altered_energy": altered,
        "spectral_steps": altered_steps,
        "agreeing_share": agreeing,
        "agreement_steps": agreeing_steps,
        "by_heart_step": int(series.steps[back[0]]) if len(back) else None,
        "let_in": [[int(series.steps[i]), float(series.moved[i])] for i in anew] if series.moved is not None else [],
        "held": reasons.count(Reason.HELD.name),
        "judged": len(reasons) - reasons.count(Reason.WARMUP.name),
    }


def clause(numbers: dict[str, Any]) -> str:
    """What shaped the steps, as a sentence to put after others; empty where nothing did.

    Args:
        numbers: Of `shape_numbers`, with `shadow`.
    """
    shadow = numbers["shadow"]
    parts = []
    if numbers["altered_energy"] is not None:
        moved = "would have moved" if shadow else "moved"
        parts.append(f"the spectral range {moved} gradients by {percent(numbers['altered_energy'])} of their energy")
    if numbers["agreeing_share"] is not None:
        parts.append(f"{percent(numbers['agreeing_share'])} of the steps' components agreed")
    if not parts:
        return ""
    text = ", ".join(parts)
    return f" {text[0].upper()}{text[1:]}."


def facts(numbers: dict[str, Any]) -> dict[str, str]:
    """The same for a table of facts, only of parts that acted."""
    shadow = " (shadow: not applied)" if numbers["shadow"] else ""
    rows = (
        ("spectral range", "altered_energy", "spectral_steps", "altered energy {}"),
        ("sign agreement", "agreeing_share", "agreement_steps", "{} of the components agreed"),
    )
    return {
        name: f"{words.format(percent(numbers[value]))} on average, in {numbers[count]} of {numbers['steps']} steps{shadow}"
        for name, value, count, words in rows
        if numbers[value] is not None
    }


def threshold_remark(numbers: dict[str, Any]) -> str:
    """What the controller does where the static threshold always acts; empty where it does not."""
    if not numbers["held"] or numbers["held"] < _MOST * numbers["judged"]:
        return ""
    share = f"{numbers['held']} of {numbers['judged']} steps after the warm-up"
    would = "would have " if numbers["shadow"] else ""
    text = (
        f"The threshold {would}stayed at `max_grad_norm` in {share}. "
        "Where that cuts most steps, it is a part of the optimizer, and no guard."
    )
    others = [
        *(["the pace"] if numbers["largest_pace"] > 1 else []),
        *(["the spectral range"] if numbers["altered_energy"] is not None else []),
        *(["the sign agreement"] if numbers["agreeing_share"] is not None else []),
    ]
    if not others:
        return text
    names = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
    return f"{text} {names[0].upper()}{names[1:]} went on."


def pace_remark(numbers: dict[str, Any]) -> str:
    """Why the pace is 1 for good; empty where it is not."""
    if numbers["by_heart_step"] is None:
        return ""
    is_one = "would be 1" if numbers["shadow"] else "is 1" if numbers["largest_pace"] > 1 else "stays 1"
    return (
        f"From step {numbers['by_heart_step']} on the pace {is_one} for good. The data is learned by heart (the evaluation loss rose "
        "while the training loss fell, or the training loss fell as an epoch began), or the first of several epochs had no sign that a "
        "higher rate is useful."
    )


def waiting_remark(numbers: dict[str, Any]) -> str:
    """Why range and agreement did not act from the first step on; empty where that has another reason or none."""
    if not numbers["let_in"]:
        return ""
    moments = [f"at step {step} they had moved by {how_fast(share)}" for step, share in numbers["let_in"]]
    return f"Spectral range and agreement were let in as loaded weights moved fast: {', '.join(moments)}."


def remarks(numbers: dict[str, Any]) -> list[str]:
    """What there is to remark on threshold, pace, and the parts that waited."""
    return [text for text in (threshold_remark(numbers), pace_remark(numbers), waiting_remark(numbers)) if text]


def percent(share: float) -> str:
    """A share in whole percents, as people say it."""
    return f"{share * 100:.0f} %" if share == 0 or share >= 0.01 else f"{share * 100:.1g} %"


def _mean(values: np.ndarray | None) -> tuple[float | None, int]:
    known = np.array([]) if values is None else values[np.isfinite(values)]
    return (float(known.mean(dtype=np.float64)), len(known)) if len(known) else (None, 0)
