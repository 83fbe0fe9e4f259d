"""Cells and tables of the study's card."""

import math
from collections.abc import Callable, Sequence

from hf_adaclip.compare.statistics import median
from scripts.study.results import LOSS, QUALITY, SECONDS, Range, TaskResults, load

SEEDS = 5
"""How many a claim needs; where there are fewer, the card says how many."""


def table(
    results: Sequence[TaskResults],
    arms: Sequence[str],
    cell: Callable[[TaskResults, str], str],
    baseline: str | None = None,
) -> str:
    """A row per task, a column per arm, and with a baseline one with its own final loss and quality."""
    heads = ["task", *([f"{baseline} ends at"] if baseline else []), *(f"`{arm}`" for arm in arms)]
    rows = []
    for r in results:
        first = [_end(r, baseline)] if baseline is not None else []
        rows.append([r.task.name, *first, *(cell(r, arm) if arm in r.arms else "-" for arm in arms)])
    return rows_of(heads, rows)


def rows_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def against(r: TaskResults, arm: str, baseline: str, column: int) -> str:
    """Cost to the baseline's target over that of the baseline."""
    target = r.target(baseline)
    if target is None or not comparable(r, arm, baseline, column):
        return "-"
    ratio = r.ratio(arm, baseline, target, column)
    costs = r.costs(arm, target)
    reached = sum(math.isfinite(c) for c in costs)
    text = number(ratio.median)
    if len(costs) > 1:
        text += f" [{number(ratio.low)}, {number(ratio.high)}]"
    # A pair of which neither arrived counts as even; who reads "1.00" has to know.
    notes = [f"{reached}/{len(costs)}"] if reached < len(costs) or len(costs) < SEEDS else []
    notes += [f"{ratio.neither} neither"] if ratio.neither else []
    return f"{text} ({', '.join(notes)})" if notes else text


def difference(r: TaskResults, arm: str, baseline: str) -> str:
    """Final loss less that of the baseline; in bold where it is worse."""
    if arm not in r.arms or baseline not in r.arms:
        return "-"
    found = r.difference(arm, baseline)
    if len(r.seeds(arm)) < 2:
        return f"{found.mean:+.3f}"
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.low > 0 else text


def alarms(r: TaskResults, arm: str) -> str:
    """Share of the steps that were cut shorter than the static threshold would."""
    found = r.alarms(arm)
    return "-" if found is None else f"{found[0] / found[1]:.1%}"


def overfit(r: TaskResults, arm: str) -> str:
    """Lowest eval loss of a run, and the one at its end: medians over seeds."""
    lowest = [value for seed in r.seeds(arm) if (value := r.lowest(arm, seed)) is not None]
    return f"{number(median(lowest), 3)} to {number(median(r.finals(arm, LOSS)), 3)}" if lowest else "failed"


def step_cost(r: TaskResults, arm: str) -> str:
    """Seconds per step over those of the stock arm."""
    found = r.step_ratio(arm)
    return "-" if found is None else number(found)


def measured(results: Sequence[TaskResults]) -> str:
    """How the seconds were measured, in sentences."""
    loads = {load for r in results for load in r.loads()}
    clocks = {
        "cpu": "processor time of the run's process, all its threads, which waits of a busy machine do not count in",
        "wall": "the time that passed",
    }
    found = [text for clock, text in clocks.items() if any(c == clock for c, _ in loads)]
    text = f"Seconds are {'; on a GPU or where no other is known '.join(found)}." if found else "Seconds: not known."
    jobs = sorted({n for _, n in loads if n is not None})
    if jobs:
        text += f" Runs were made {' or '.join(map(str, jobs))} at a time."
    return f"{text} Evaluations are left out. Only runs that were measured alike are compared by their seconds."


def comparable(r: TaskResults, arm: str, baseline: str, column: int) -> bool:
    """Whether there are runs of both on one seed, and for seconds such that were measured alike."""
    return any(column != SECONDS or load(a) == load(b) for a, b in r.pairs(arm, baseline))


def ranges(results: Sequence[TaskResults], ours: str) -> str:
    """A row per task: each arm's range around its own best, and that of ours by what the stock arm reaches at best."""
    rows = []
    for r in results:
        stock, found = r.range_of("stock"), r.range_of(ours)
        beside = None if stock is None else r.range_of(ours, min(stock.finals.values()))
        rows.append([r.task.name, _range(stock), _range(found), "-" if beside is None else octaves(beside)])
    return rows_of(["task", "`stock`", f"`{ours}`", f"`{ours}`, within 5 % of the best of `stock`"], rows)


def chosen(results: Sequence[TaskResults], arms: Sequence[str]) -> str:
    """What the tuning of each arm chose, and with how many runs."""
    flags = ("--learning_rate", "--max_grad_norm", "--warmup_steps", "--adam_beta2")
    rows = []
    for r in results:
        cells = [r.task.name, f"{r.task.rate:g} ({r.task.source})"]
        for arm in arms:
            line = r.runs.get((arm, 0))
            words = line["flags"].split() if line else []
            values = dict(zip(words[::2], words[1::2], strict=False))
            text = ", ".join(values.get(flag, "?") for flag in flags)
            # Beyond the end of the grid a better one may lie: that baseline, or that arm, may be weak.
            end = values.get("--learning_rate") in {f"{rate:g}" for rate in (r.task.rates[0], r.task.rates[-1])}
            note = f"{r.tuning_runs(arm)} runs{', rate at an end of the grid' if end else ''}"
            cells.append(f"{text} ({note})" if line else "-")
        rows.append(cells)
    return rows_of(["task", "rate as it comes", *(f"`{arm}`" for arm in arms)], rows)


def every_seed(results: Sequence[TaskResults]) -> str:
    """Every seed's steps and final loss, folded task by task."""
    parts = []
    for r in results:
        both = [(baseline, r.target(baseline)) for baseline in ("stock", "tuned")]
        known = [(baseline, target) for baseline, target in both if target is not None]
        rows = []
        for arm in r.arms:
            costs = [", ".join("never" if math.isinf(c) else f"{c:.0f}" for c in r.costs(arm, t)) for _, t in known]
            rows.append([f"`{arm}`", *costs, ", ".join(number(v, 3) for v in r.finals(arm))])
        heads = ["arm", *(f"steps to {t:.3f} ({b})" for b, t in known), "final loss"]
        heading = f"{r.task.name} ({r.task.group}): {r.task.title}"
        parts.append(f"<details><summary>{heading}</summary>\n\n{rows_of(heads, rows)}\n\n</details>")
    return "\n\n".join(parts)


def octaves(found: Range) -> str:
    """Length of a range; `>=` where it reaches an end of the grid."""
    return f"{'>= ' if found.is_open else ''}{found.octaves:.0f}"


def number(value: float, digits: int = 2) -> str:
    """A number, infinite in words."""
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"


def _end(r: TaskResults, arm: str) -> str:
    if arm not in r.arms:
        return "-"
    quality = median(r.finals(arm, QUALITY))
    if math.isinf(quality):
        return "failed"
    shown = f"{quality:.1%}" if r.task.quality == "eval_accuracy" else f"perplexity {quality:.1f}"
    return f"{median(r.finals(arm, LOSS)):.3f}, {shown}"


def _range(found: Range | None) -> str:
    if found is None:
        return "-"
    rates = list(found.finals)
    last = number(found.finals[rates[-1]], 3)
    return f"{octaves(found)} ({min(found.finals.values()):.3f}; {last} at {rates[-1]:g})"
