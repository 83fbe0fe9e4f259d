"""The card of the first study (revision 1 of the rule of `adaptive`) and the README's table, from the raw results of it.

`python -m scripts.study.card` makes it, as long as model_cards/study holds no results of the new study; to be removed, with `RETIRED` and
`FIRST` in tasks.py and `load_first` in results.py, when these take their place.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import TypeAlias

from hf_adaclip.compare.statistics import PairedRatio, median
from hf_adaclip.controllers.adaptive import AdaptiveController
from scripts.study.arms import AT
from scripts.study.results import LOSS, QUALITY, SECONDS, STEP, Range, TaskResults

WHICH = {
    "adaptive": "the defaults",
    "adaptive-pace": "`max_pace=64`",
}
PAIRS = [*((arm, "stock") for arm in WHICH), *((f"{arm}{AT}", "tuned") for arm in WHICH)]
"""What is compared with what at the same settings."""
PEERS = ("zscore", "percentile", "stable_adamw")
AS_IT_COMES = ("adaptive", "adaptive-pace", "pace-only", "open", *PEERS, "tuned")
AGAINST_TUNED = (
    "stock",
    "adaptive@tuned",
    "adaptive-pace@tuned",
    "open@tuned",
    "adaptive-pace",
    "adaptive-pace-tuned",
)
CURVES = ("stock", "tuned", "adaptive", "adaptive-pace")
RANGES = ("stock", "adaptive-pace")
TEMPLATE = Path(__file__).with_suffix(".template.md")
NOT_RUN = "not run"
Verdict: TypeAlias = tuple[str, str, bool]
"""A goal, what was measured, and whether that is it."""
GOAL_RATIO = 0.72
GOAL_ALARMS = 0.001
SEEDS = 5
"""How many a claim needs; where there are fewer, the card says how many."""
GOAL_OCTAVES = 2.0


def card(results: Sequence[TaskResults]) -> str:
    """The whole card as Markdown."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        note="\n".join(f"**{note}**\n" for note in revision_note(results)),
        goals=goals(results),
        steps=_table(results, AS_IT_COMES, lambda r, arm: _against(r, arm, "stock", STEP)),
        seconds=_table(results, AS_IT_COMES, lambda r, arm: _against(r, arm, "stock", SECONDS)),
        finals=_table(results, AS_IT_COMES, lambda r, arm: _difference(r, arm, "stock"), baseline="stock"),
        alarms=_table(results, ("adaptive", "adaptive-pace", "open", "zscore", "percentile"), _alarms),
        tuned_steps=_table(results, AGAINST_TUNED, lambda r, arm: _against(r, arm, "tuned", STEP)),
        tuned_finals=_table(results, AGAINST_TUNED, lambda r, arm: _difference(r, arm, "tuned"), baseline="tuned"),
        chosen=_chosen(results),
        ranges=_ranges(results),
        seeds=_every_seed(results),
    )


def section(results: Sequence[TaskResults]) -> str:
    """The README's table: both baselines beside ours, and what holds against the second."""
    seeds = sorted({len(r.seeds(arm)) for r in results for arm in ("stock", *WHICH) if arm in r.arms})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    arms = {"tuned": "the tuned Trainer", "adaptive-pace": "`max_pace=64`", "adaptive": "`adaptive`"}
    lines = [
        f"{len(results)} tasks, {count} seeds. Steps until the target of the stock Trainer as it comes, over its own, median [95 % "
        "interval]; final eval loss less its own. 0.00 and inf: one of the two never arrives.",
        "",
        "| task | stock Trainer, tuned by a search | `max_pace=64`, no search |",
        "| --- | --- | --- |",
    ]
    for r in results:
        cells = [r.task.name]
        for arm in ("tuned", "adaptive-pace"):
            steps = _against(r, arm, "stock", STEP)
            cells.append(NOT_RUN if steps == "-" else f"{steps}; {_mean_difference(r, arm)}")
        lines.append("| " + " | ".join(cells) + " |")
    if "**" in "".join(lines):
        lines[0] += " Bold: a final loss that is worse."
    medians = []
    for arm, name in arms.items():
        if ratios := [ratio.median for _, ratio in _ratios(results, arm, "stock", STEP)]:
            medians.append(f"{_number(median(ratios))} for {name} ({_number(min(ratios))} to {_number(max(ratios))})")
    facts = [f"Median steps over the tasks (range): {', '.join(medians)}."] if medians else []
    both = [
        (r.ratio("tuned", "stock", target).median, r.ratio("adaptive-pace", "stock", target).median)
        for r in results
        if {"tuned", "adaptive-pace"} <= set(r.arms) and (target := r.target("stock")) is not None
    ]
    if both:
        sooner, later = sum(tuned < ours for tuned, ours in both), sum(tuned > ours for tuned, ours in both)
        facts.append(
            f"The tuned Trainer is sooner than `max_pace=64` on {sooner} of {len(both)} tasks, and later on {later}."
        )
    return "\n".join(
        [*lines, "", *(f"- {fact}" for fact in [*facts, *_against_tuned(results), *revision_note(results)])]
    )


def _mean_difference(r: TaskResults, arm: str) -> str:
    found = r.difference(arm, "stock")
    return f"**{found.mean:+.3f}**" if found.low > 0 and len(r.seeds(arm)) > 1 else f"{found.mean:+.3f}"


def _against_tuned(results: Sequence[TaskResults]) -> list[str]:
    """Whether ours gets where the tuned stock Trainer does: without its search, and with its settings."""
    facts, reached, runs = [], 0, 0
    for r in results:
        target = r.target("tuned")
        if target is not None and "adaptive-pace" in r.arms:
            costs = r.costs("adaptive-pace", target)
            reached, runs = reached + sum(math.isfinite(c) for c in costs), runs + len(costs)
    if runs:
        facts.append(
            f"{reached} of {runs} runs of `max_pace=64` without a search reach the target of the *tuned* Trainer."
        )
    shares, worse = [], []
    for arm, name in ((f"adaptive{AT}", "`adaptive`"), (f"adaptive-pace{AT}", "`max_pace=64`")):
        if ratios := _ratios(results, arm, "tuned", STEP):
            shares.append(f"{_number(median([ratio.median for _, ratio in ratios]))} for {name}")
            worse += [r.task.name for r, _ in ratios if r.difference(arm, "tuned").low > 0]
    if shares:
        facts.append(
            f"Steps at the settings of the tuned Trainer, over its own: {', '.join(shares)}; final loss worse on "
            f"{', '.join(worse) or 'no task'}."
        )
    return facts


def revision_note(results: Sequence[TaskResults]) -> list[str]:
    """That the runs went by an older rule than the one here, if they did."""
    lines = [line for r in results for (arm, _), line in r.runs.items() if arm == "adaptive"]
    then, now = min((line.get("revision") or 1 for line in lines), default=0), AdaptiveController.revision
    if not 0 < then < now:
        return []
    return [
        f"Revision {then} of the rule of `adaptive` made these runs. The rule is revision {now} now, so the study has to be run anew."
    ]


def goals(results: Sequence[TaskResults]) -> str:
    """What was asked for, what was measured, and whether that is it; of the study proper."""
    proper = [r for r in results if r.task.group != "gpu"]
    lines = ["| goal | measured | holds |", "| --- | --- | --- |"]
    for goal, measured, holds in (
        _no_harm(proper),
        _false_alarms(proper),
        *(_sooner(proper, arm) for arm in WHICH),
        _wider(proper),
        _moonshot(proper),
    ):
        lines.append(f"| {goal} | {measured} | {'yes' if holds else 'no'} |")
    return "\n".join(lines)


def _no_harm(results: Sequence[TaskResults]) -> Verdict:
    found, holds = [], True
    for arm, baseline in PAIRS:
        judged = [r for r in results if arm in r.arms and baseline in r.arms]
        worse = [r.task.name for r in judged if r.difference(arm, baseline).low > 0]
        text = f"`{arm}` against {baseline}: worse on {len(worse)} of {len(judged)}"
        found.append(text + (f" ({', '.join(worse)})" if worse else ""))
        if "pace" not in arm:
            holds = holds and bool(judged) and not worse
    return (
        "1. No harm: with the defaults (`adaptive`), on no task a final loss worse than the stock Trainer's at the same learning rate",
        "; ".join(found),
        holds,
    )


def _false_alarms(results: Sequence[TaskResults]) -> Verdict:
    counts = {r.task.name: r.alarms("adaptive") for r in results if "adaptive" in r.arms}
    known = {name: count for name, count in counts.items() if count is not None}
    title = "1b. At most 0.1 % of steps cut shorter than the stock Trainer would, in a healthy run (the defaults)"
    if not known:
        return title, NOT_RUN, False
    cut, steps = (sum(column) for column in zip(*known.values(), strict=True))
    above = [f"{name} {c:,} of {n:,} ({c / n:.2%})" for name, (c, n) in known.items() if c / n > GOAL_ALARMS]
    text = (
        f"{cut:,} of {steps:,} steps after the warm-up over all tasks ({cut / steps:.2%}), above 0.1 % on "
        f"{', '.join(above) or 'none'} (nobody has labelled these runs healthy)"
    )
    return title, text, not above


def _sooner(results: Sequence[TaskResults], arm: str) -> Verdict:
    title = f"2. At most 0.72 of the steps and seconds of the stock Trainer as it comes, {WHICH[arm]}"
    found, holds = [], True
    for name, column in (("steps", STEP), ("seconds", SECONDS)):
        ratios = _ratios(results, arm, "stock", column)
        if not ratios:
            return title, NOT_RUN, False
        middle = median([ratio.median for _, ratio in ratios])
        late = [f"{r.task.name} {_number(ratio.median)}" for r, ratio in ratios if ratio.median > 1]
        judged = [ratio.median for r, ratio in ratios if r.task.group == "confirmation"]
        found.append(
            f"{name} {_number(middle)} over {len(ratios)} tasks"
            + (f" ({_number(median(judged))} over the {len(judged)} confirmation tasks)" if judged else "")
            + (f", later on {', '.join(late)}" if late else ", later on none")
        )
        holds = holds and middle <= GOAL_RATIO and not late
    return title, "; ".join(found), holds


def _wider(results: Sequence[TaskResults]) -> Verdict:
    found, beside, holds = [], [], True
    for r in results:
        stock, ours, at_stocks_best = _both_ranges(r)
        if stock is None or ours is None or at_stocks_best is None:
            continue
        gain = ours.octaves - stock.octaves
        beside.append(f"{r.task.name} {at_stocks_best.octaves - stock.octaves:+.0f}")
        # Of a stretch that reaches an end of the grid nobody knows how long it is.
        open_ended = [name for name, found_range in (("ours", ours), ("stock", stock)) if found_range.is_open]
        found.append(f"{r.task.name} {gain:+.0f}" + (f" ({' and '.join(open_ended)} may go on)" if open_ended else ""))
        holds = holds and gain >= GOAL_OCTAVES and not stock.is_open
    title = "3. A stable range at least 2 octaves wider (`max_pace=64`)"
    if not found:
        return title, NOT_RUN, False
    return title, f"{', '.join(found)}; within 5 % of the *stock* arm's best: {', '.join(beside)}", holds


def _both_ranges(r: TaskResults) -> tuple[Range | None, Range | None, Range | None]:
    """Of the stock arm, of ours around its own best, and of ours around the best of the stock arm."""
    stock, ours = (r.range_of(arm) for arm in RANGES)
    return stock, ours, None if stock is None else r.range_of(RANGES[-1], min(stock.finals.values()))


def _moonshot(results: Sequence[TaskResults]) -> Verdict:
    found, best = [], math.inf
    for arm in AGAINST_TUNED[1:]:
        ratios = [ratio.median for _, ratio in _ratios(results, arm, "tuned", STEP)]
        if ratios:
            best = min(best, median(ratios))
            found.append(f"`{arm}` {_number(median(ratios))} over {len(ratios)} tasks")
    title = "4. At most 0.72 of the steps of the *tuned* stock Trainer, median over tasks"
    return title, ", ".join(found) or NOT_RUN, best <= GOAL_RATIO


def _ratios(
    results: Sequence[TaskResults], arm: str, baseline: str, column: int
) -> list[tuple[TaskResults, PairedRatio]]:
    found = []
    for r in results:
        target = r.target(baseline)
        if target is not None and arm in r.arms and baseline in r.arms:
            found.append((r, r.ratio(arm, baseline, target, column)))
    return found


def _table(
    results: Sequence[TaskResults],
    arms: Sequence[str],
    cell: Callable[[TaskResults, str], str],
    baseline: str | None = None,
) -> str:
    """A row per task, a column per arm, and with a baseline one with its own final loss and quality."""
    heads = ["task", *([f"{baseline} ends at"] if baseline else []), *(f"`{arm}`" for arm in arms)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for r in results:
        cells = [r.task.name]
        if baseline is not None:
            cells.append(_end(r, baseline))
        cells += [cell(r, arm) if arm in r.arms else "-" for arm in arms]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _end(r: TaskResults, arm: str) -> str:
    if arm not in r.arms:
        return "-"
    quality = median(r.finals(arm, QUALITY))
    if math.isinf(quality):
        return "failed"
    shown = f"{quality:.1%}" if r.task.quality == "eval_accuracy" else f"perplexity {quality:.1f}"
    return f"{median(r.finals(arm, LOSS)):.3f}, {shown}"


def _against(r: TaskResults, arm: str, baseline: str, column: int) -> str:
    target = r.target(baseline)
    if target is None or arm not in r.arms or baseline not in r.arms:
        return "-"
    ratio = r.ratio(arm, baseline, target, column)
    costs = r.costs(arm, target)
    reached = sum(math.isfinite(c) for c in costs)
    text = (
        f"{_number(ratio.median)} [{_number(ratio.low)}, {_number(ratio.high)}]"
        if len(costs) > 1
        else _number(ratio.median)
    )
    # A pair of which neither arrived counts as even; who reads "1.00" has to know.
    notes = [f"{reached}/{len(costs)}"] if reached < len(costs) or len(costs) < SEEDS else []
    notes += [f"{ratio.neither} neither"] if ratio.neither else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _difference(r: TaskResults, arm: str, baseline: str) -> str:
    if arm not in r.arms or baseline not in r.arms:
        return "-"
    found = r.difference(arm, baseline)
    if len(r.seeds(arm)) < 2:
        return f"{found.mean:+.3f}"
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.low > 0 else text


def _alarms(r: TaskResults, arm: str) -> str:
    found = r.alarms(arm)
    return "-" if found is None else f"{found[0] / found[1]:.1%}"


def _ranges(results: Sequence[TaskResults]) -> str:
    """A row per task: each arm's range around its own best, and that of the last arm by what the stock arm reaches at best."""
    heads = ["task", *(f"`{arm}`" for arm in RANGES), f"`{RANGES[-1]}`, within 5 % of the best of `{RANGES[0]}`"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for r in results:
        stock, ours, at_stocks_best = _both_ranges(r)
        cells = [_range(stock), _range(ours), "-" if at_stocks_best is None else _octaves(at_stocks_best)]
        lines.append("| " + " | ".join([r.task.name, *cells]) + " |")
    return "\n".join(lines)


def _octaves(found: Range) -> str:
    return f"{'>= ' if found.is_open else ''}{found.octaves:.0f}"


def _range(found: Range | None) -> str:
    if found is None:
        return "-"
    rates = list(found.finals)
    return (
        f"{_octaves(found)} ({min(found.finals.values()):.3f}; {_number(found.finals[rates[-1]], 3)} at {rates[-1]:g})"
    )


def _chosen(results: Sequence[TaskResults]) -> str:
    arms = ("tuned", "adaptive-pace-tuned")
    lines = ["| task | rate as it comes | " + " | ".join(f"`{a}`" for a in arms) + " |", "| --- |" + " --- |" * 3]
    for r in results:
        cells = [r.task.name, f"{r.task.rate:g} ({r.task.source})"]
        for arm in arms:
            line = r.runs.get((arm, 0))
            words = line["flags"].split() if line else []
            values = dict(zip(words[::2], words[1::2], strict=False))
            cells.append(
                ", ".join(values.get(flag, "?") for flag in ("--learning_rate", "--max_grad_norm", "--warmup_steps"))
                if line
                else "-"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _every_seed(results: Sequence[TaskResults]) -> str:
    parts = []
    for r in results:
        both = [(baseline, r.target(baseline)) for baseline in ("stock", "tuned")]
        known = [(baseline, target) for baseline, target in both if target is not None]
        lines = [
            "| arm | " + " | ".join(f"steps to {t:.3f} ({b})" for b, t in known) + " | final loss |",
            "| --- |" + " --- |" * (len(known) + 1),
        ]
        for arm in r.arms:
            costs = [", ".join("never" if math.isinf(c) else f"{c:.0f}" for c in r.costs(arm, t)) for _, t in known]
            lines.append(
                f"| `{arm}` | " + " | ".join([*costs, ", ".join(_number(v, 3) for v in r.finals(arm))]) + " |"
            )
        heading = f"{r.task.name} ({r.task.group}): {r.task.title}"
        parts.append(f"<details><summary>{heading}</summary>\n\n" + "\n".join(lines) + "\n\n</details>")
    return "\n\n".join(parts)


def _number(value: float, digits: int = 2) -> str:
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"
