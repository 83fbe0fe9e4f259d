"""The goals of the study: what was asked for, what was measured, and whether that is it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hf_adaclip.compare.statistics import median
from scripts.study.arms import AT, SHORT
from scripts.study.results import LOSS, SECONDS, STEP, TaskResults, same_points
from scripts.study.tables import comparable, number

DEFAULT = "adaptive"
COMBINED = "spectral-agreement"
NOT_RUN = "not run"
RATIO, AS_IT_COMES, EACH, FINE_TUNING, WITHIN, OCTAVES, COST = 0.72, 0.5, 0.85, 0.95, 1.02, 2.0, 1.15
"""Of the steps of the tuned Trainer; of those of the Trainer as it comes; of the tuned one's on every task from scratch, and on
fine-tuning; of the tuned one's final loss; octaves; seconds per step."""


class Verdict(NamedTuple):
    """What was measured, and whether that is it.

    Attributes:
        measured: In words, all losses named.
        holds: Yes, no, or None where nothing was run.
    """

    measured: str
    holds: bool | None

    @property
    def word(self) -> str:
        """For the table."""
        return "not run" if self.holds is None else "yes" if self.holds else "no"


def verdicts(results: Sequence[TaskResults]) -> dict[str, Verdict]:
    """Every goal by its name in the card's template; tasks of a GPU do not count."""
    proper = [r for r in results if r.task.group != "gpu"]
    scratch, tuning = [r for r in proper if r.task.scratch], [r for r in proper if not r.task.scratch]
    short = f"{tuned_default(proper)}{SHORT}"
    found: dict[str, Callable[[], Verdict]] = {
        "no_harm": lambda: _no_harm(proper),
        "guard": lambda: _guard(proper),
        "sooner": lambda: _sooner(proper),
        "scratch": lambda: _against_tuned(scratch, RATIO, EACH),
        "fine_tuning": lambda: _against_tuned(tuning, FINE_TUNING, None),
        "horizon": lambda: _horizon(scratch, (short, f"{COMBINED}-tuned{SHORT}")),
        "moonshot": lambda: _against_tuned(proper, RATIO, None),
        "untuned": lambda: _untuned(proper),
        "wider": lambda: _wider(proper),
        "cost": lambda: _cost(proper),
    }
    return {name: judge() for name, judge in found.items()}


def tuned_default(results: Sequence[TaskResults]) -> str:
    """The arm that stands against the tuned Trainer: the default after a search of its own; unless that was made wherever it was run at
    the settings that were best for the stock Trainer, the latter, which is no easier.
    """
    own, at = f"{DEFAULT}-tuned", f"{DEFAULT}{AT}"
    return own if any(own in r.arms for r in results) and all(own in r.arms for r in results if at in r.arms) else at


def _no_harm(results: Sequence[TaskResults]) -> Verdict:
    found, holds, judged_all = [], True, True
    for arm, baseline in ((DEFAULT, "stock"), (f"{DEFAULT}{AT}", "tuned")):
        judged = [r for r in results if arm in r.arms and baseline in r.arms]
        worse = [r.task.name for r in judged if r.difference(arm, baseline).low > 0]
        names = f" ({', '.join(worse)})" if worse else ""
        found.append(f"`{arm}` against `{baseline}`: worse on {len(worse)} of {len(judged)}{names}")
        judged_all = judged_all and bool(judged)
        holds = holds and not worse
    return Verdict("; ".join(found), holds) if judged_all else Verdict(NOT_RUN, None)


def _guard(results: Sequence[TaskResults]) -> Verdict:
    """Runs of the range alone in which every step was scaled as the static threshold would have, against the stock run of that seed."""
    calm, equal, other = 0, 0, []
    for r in results:
        for seed in r.seeds("guard"):
            run, stock = r.runs["guard", seed], r.runs.get(("stock", seed))
            if stock is None or run["departures"] != 0:
                continue
            calm += 1
            equal += same_points(run, stock)
            other += [] if same_points(run, stock) else [f"{r.task.name} {seed}"]
    if not calm:
        some = any("guard" in r.arms for r in results)
        return Verdict("in every run something happened" if some else NOT_RUN, None)
    names = f"; not {', '.join(other)}" if other else ""
    return Verdict(
        f"{equal} of {calm} runs in which nothing happened have the stock run's evaluations{names}", not other
    )


def _sooner(results: Sequence[TaskResults]) -> Verdict:
    found, holds = [], True
    for name, column in (("steps", STEP), ("seconds", SECONDS)):
        ratios = ratios_of(results, DEFAULT, "stock", column)
        if not ratios:
            return Verdict(NOT_RUN, None)
        middle = median(list(ratios.values()))
        late = [f"{task} {number(ratio)}" for task, ratio in ratios.items() if ratio > 1]
        found.append(f"{name} {number(middle)} over {len(ratios)} tasks{_judges(results, ratios)}, {_later(late)}")
        holds = holds and middle <= AS_IT_COMES and not late
    return Verdict("; ".join(found), holds)


def _against_tuned(results: Sequence[TaskResults], bound: float, each: float | None) -> Verdict:
    """The default on the tuned Trainer's target, tuned with as many runs or with none; the combined arm beside it does not count."""
    ours = tuned_default(results)
    ratios = ratios_of(results, ours, "tuned", STEP)
    if not ratios:
        return Verdict(NOT_RUN, None)
    middle = median(list(ratios.values()))
    text = f"`{ours}` {number(middle)} over {len(ratios)} tasks{_judges(results, ratios)}"
    above = [f"{task} {number(ratio)}" for task, ratio in ratios.items() if each is not None and ratio >= each]
    if each is not None:
        text += f", {each:g} or more on {', '.join(above) or 'none'}"
    for arm in (f"{COMBINED}-tuned", f"{DEFAULT}{AT}", "muon-tuned", "cautious-tuned"):
        if arm != ours and (beside := ratios_of(results, arm, "tuned", STEP)):
            text += f"; `{arm}` {number(median(list(beside.values())))} over {len(beside)}"
    return Verdict(text, middle <= bound and not above)


def _horizon(results: Sequence[TaskResults], arms: Sequence[str]) -> Verdict:
    """In 0.72 of the steps against the tuned Trainer's final loss; judged by the first of the arms."""
    found: list[str] = []
    holds: bool | None = None
    for arm in arms:
        judged = [r for r in results if arm in r.arms and "tuned" in r.arms]
        if not judged:
            continue
        worse = [
            f"{r.task.name} {r.difference(arm, 'tuned').mean:+.3f}"
            for r in judged
            if r.difference(arm, "tuned").low > 0
        ]
        found.append(f"`{arm}`: worse on {len(worse)} of {len(judged)}" + (f" ({', '.join(worse)})" if worse else ""))
        holds = not worse if arm == arms[0] else holds
    return Verdict("; ".join(found) or NOT_RUN, holds)


def _untuned(results: Sequence[TaskResults]) -> Verdict:
    judged = [r for r in results if DEFAULT in r.arms and "tuned" in r.arms]
    if not judged:
        return Verdict(NOT_RUN, None)
    shares = {r.task.name: median(r.finals(DEFAULT, LOSS)) / median(r.finals("tuned", LOSS)) for r in judged}
    # Two runs that both fail give no number, and no run is within 2 % of nothing.
    above = [f"{task} {share - 1:+.1%}" for task, share in shares.items() if math.isnan(share) or share > WITHIN]
    return Verdict(
        f"farther than 2 % on {len(above)} of {len(judged)}" + (f": {', '.join(above)}" if above else ""), not above
    )


def _wider(results: Sequence[TaskResults]) -> Verdict:
    found, beside, gains = [], [], []
    for r in results:
        stock, ours = r.range_of("stock"), r.range_of(DEFAULT)
        if stock is None or ours is None:
            continue
        level = r.range_of(DEFAULT, min(stock.finals.values()))
        if level is not None:
            beside.append(f"{r.task.name} {level.octaves - stock.octaves:+.0f}")
        gain = ours.octaves - stock.octaves
        # Of a stretch that reaches an end of the grid nobody knows how long it is: where that of stock does, the task cannot tell.
        ends = [name for name, one in (("ours", ours), ("stock", stock)) if one.is_open]
        found.append(f"{r.task.name} {gain:+.0f}" + (f" ({' and '.join(ends)} may go on)" if ends else ""))
        gains += [] if stock.is_open else [gain]
    if not found:
        return Verdict(NOT_RUN, None)
    text = f"each by its own best loss: {', '.join(found)}; both by that of `stock`: {', '.join(beside)}"
    return Verdict(text, bool(gains) and min(gains) >= OCTAVES)


def _cost(results: Sequence[TaskResults]) -> Verdict:
    shares = {}
    for r in results:
        # The default does more than these two, so it is no easier.
        arms = (COMBINED, f"{COMBINED}-tuned", f"{DEFAULT}{AT}", DEFAULT)
        share = next((ratio for arm in arms if (ratio := r.step_ratio(arm)) is not None), None)
        if share is not None:
            shares[r.task.name] = share
    if not shares:
        return Verdict(NOT_RUN, None)
    above = [f"{task} {share - 1:+.0%}" for task, share in shares.items() if share > COST]
    middle = median(list(shares.values())) - 1
    text = f"median {middle:+.0%} of a step over {len(shares)} tasks, more than 15 % on {', '.join(above) or 'none'}"
    return Verdict(text, not above)


def ratios_of(results: Sequence[TaskResults], arm: str, baseline: str, column: int) -> dict[str, float]:
    """Median paired ratio of costs to the baseline's target, by task."""
    found = {}
    for r in results:
        target = r.target(baseline)
        if target is not None and comparable(r, arm, baseline, column):
            found[r.task.name] = r.ratio(arm, baseline, target, column).median
    return found


def _judges(results: Sequence[TaskResults], ratios: dict[str, float]) -> str:
    """The same over the tasks that no rule was chosen on."""
    judged = [ratios[r.task.name] for r in results if r.task.group == "confirmation" and r.task.name in ratios]
    return f" ({number(median(judged))} over the {len(judged)} confirmation tasks)" if judged else ""


def _later(late: Sequence[str]) -> str:
    return f"later on {', '.join(late) or 'none'}"
