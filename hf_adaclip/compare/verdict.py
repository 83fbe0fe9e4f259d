"""What came out of a comparison, in one sentence per task, made from the numbers alone: losses as well as wins."""

import math
from dataclasses import dataclass
from typing import Any, Final

from hf_adaclip.compare.arms import ADAPTIVE_DEFAULT, STOCK, STOCK_DEFAULT, TUNED, untuned
from hf_adaclip.compare.statistics import median, paired_ratio

_NOT_OURS: Final = frozenset({STOCK, STOCK_DEFAULT, TUNED, "none", "stable_adamw"})
_MOST_ARMS: Final = 2
"""Arms in a sentence; the table has them all."""
_DIVERGES: Final = "diverges"


@dataclass(frozen=True)
class _Pairs:
    """An arm beside the baseline, over the seeds in which neither raised.

    Attributes:
        arm: Its name.
        steps, base_steps: To the target; infinite where it was not reached.
        losses: Final eval loss, less the baseline's.
        seeds: All seeds, those included in which one raised.
    """

    arm: str
    steps: list[float]
    base_steps: list[float]
    losses: list[float]
    seeds: int

    @property
    def reached(self) -> int:
        return sum(math.isfinite(s) for s in self.steps)

    @property
    def base_reached(self) -> int:
        return sum(math.isfinite(s) for s in self.base_steps)


def verdicts(comparison: dict[str, Any]) -> list[str]:
    """One sentence per task, which is named where there are several; backticks stand around names."""
    found = [(task["task"], verdict(comparison, task)) for task in comparison["tasks"]]
    several = len(found) > 1
    return [f"`{name}`: {sentence}" if several else sentence for name, sentence in found if sentence]


def verdict(comparison: dict[str, Any], task: dict[str, Any]) -> str:
    """Whether our arms reach the target sooner than the stock Trainer, and where they end, in at most 25 words.

    The baseline is the tuned stock arm, where there is one. The default at the library's default learning rate comes first, then the
    arms in their order; two are named.

    Args:
        comparison: Content of `comparison.json`.
        task: One of its tasks.

    Returns:
        Empty where there is nothing to compare.
    """
    arms = {entry["arm"]: entry for entry in task["arms"]}
    base = arms.get(TUNED) or arms.get(STOCK)
    if base is None:
        return ""
    ours = [a for a in arms if untuned(a) not in _NOT_OURS] or [a for a in arms if a not in (base["arm"], STOCK)]
    ours = sorted(ours, key=lambda a: a != ADAPTIVE_DEFAULT)[:_MOST_ARMS]
    if not ours:
        return ""
    # The demo's stock arm has its best learning rate; a script's has the flags as they stand.
    is_tuned = base["arm"] == TUNED or not comparison.get("script")
    name = "the tuned stock Trainer" if is_tuned else "the stock Trainer"
    first, *others = (_pairs(arms[a], base) for a in ours)
    clauses = [_first(first, name), *(_other(first, other) for other in others)]
    return "; ".join(clauses) + _seeds(first, clauses[0]) + "."


def _pairs(entry: dict[str, Any], base: dict[str, Any]) -> _Pairs:
    pairs = [(a, b) for a, b in zip(entry["seeds"], base["seeds"], strict=True) if not a["error"] and not b["error"]]
    return _Pairs(
        entry["arm"],
        [float(a["step"]) for a, _ in pairs],
        [float(b["step"]) for _, b in pairs],
        [float(a["final_eval_loss"]) - float(b["final_eval_loss"]) for a, b in pairs],
        len(entry["seeds"]),
    )


def _first(pairs: _Pairs, base: str) -> str:
    count, arm = len(pairs.steps), f"`{pairs.arm}`"
    if not count:
        return f"{arm} cannot be compared, because runs failed"
    end = _end(pairs.losses)
    ends = f" and {'' if end == _DIVERGES else 'ends '}{end}" if end else ""
    if pairs.reached == pairs.base_reached == count:
        ratio = paired_ratio(pairs.steps, pairs.base_steps)
        interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if count > 1 else ""
        times = "of" if ratio.median <= 1 else "times"
        return f"{arm} reaches the target in {ratio.median:.2f} {times} {base}'s steps{interval}{ends}"
    if not pairs.reached:
        if not pairs.base_reached:
            return f"{arm} never reaches the target, nor does {base},{ends or ' and both diverge'}"
        if pairs.base_reached < count:
            return f"{arm} never reaches the target ({base} in {pairs.base_reached} of {count} seeds){ends}"
        return f"{arm} never reaches the target, which {base} does,{ends}"
    if pairs.reached == count and not pairs.base_reached:
        return f"{arm} reaches the target, which {base} never does,{ends}"
    return f"{arm} reaches the target in {pairs.reached} of {count} seeds ({base} in {pairs.base_reached}){ends}"


def _other(first: _Pairs, pairs: _Pairs) -> str:
    count, arm = len(pairs.steps), f"`{pairs.arm}`"
    if not count:
        return f"{arm} failed"
    end = _end(pairs.losses)
    ends = f", {end}" if end else ""
    if pairs.reached == pairs.base_reached == count:
        ratio = paired_ratio(pairs.steps, pairs.base_steps).median
        said = first.reached == first.base_reached == len(first.steps)  # whose steps: in the first clause already
        whose = "" if said else " of stock's steps"
        return f"{arm} in {ratio:.2f}{whose}{ends}"
    if not pairs.reached:
        return f"{arm} never{ends}"
    if pairs.reached == count and not pairs.base_reached:
        return f"{arm} reaches it{ends}"
    return f"{arm} in {pairs.reached} of {count}{ends}"


def _end(differences: list[float]) -> str:
    """Where the final loss is against the baseline's; empty where both are infinite."""
    known = [d for d in differences if not math.isnan(d)]
    if not known:
        return ""
    middle = median(known)
    if math.isinf(middle):
        return _DIVERGES if middle > 0 else "where the other diverged"
    if abs(middle) < 5e-4:
        return "level"
    return f"{abs(middle):.2g} {'lower' if middle < 0 else 'higher'}"


def _seeds(pairs: _Pairs, said: str) -> str:
    count = len(pairs.steps)
    if not count or said.endswith("seeds") or f" of {count} seeds" in said:
        return ""
    if count < pairs.seeds:
        return f" ({count} of {pairs.seeds} seeds; others failed)"
    return " (1 seed)" if count == 1 else f" ({count} seeds)"
