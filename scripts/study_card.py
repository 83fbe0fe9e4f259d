"""Make the card of the study, its pictures and the README's table from the raw results in model_cards/study.

    python -m scripts.study_card

Tests hold the card and the README equal to what this makes of the raw results.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from hf_adaclip.convergence.statistics import PairedRatio, median
from scripts.readme_section import write_section
from scripts.study_results import LOSS, QUALITY, SECONDS, STEP, STUDY, Interval, Range, TaskResults, load_study

OURS = ("adaptive", "adaptive-pace")
PEERS = ("zscore", "percentile", "stable_adamw")
AS_IT_COMES = ("adaptive", "pace-only", "adaptive-pace", *PEERS, "tuned")
AGAINST_TUNED = ("stock", "adaptive@tuned", "adaptive-pace@tuned", "adaptive-pace", "adaptive-pace-tuned")
RANGES = ("stock", "adaptive", "adaptive-pace")
TEMPLATE = Path(__file__).with_suffix(".template.md")
GOAL_RATIO = 0.72
GOAL_ALARMS = 0.001
GOAL_OCTAVES = 2.0


def card(results: Sequence[TaskResults]) -> str:
    """The whole card as Markdown."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        goals=goals(results),
        steps=_table(results, AS_IT_COMES, lambda r, arm: _against(r, arm, "stock", STEP)),
        seconds=_table(results, AS_IT_COMES, lambda r, arm: _against(r, arm, "stock", SECONDS)),
        finals=_table(results, AS_IT_COMES, lambda r, arm: _difference(r, arm, "stock"), baseline="stock"),
        alarms=_table(results, ("adaptive", "adaptive-pace", "zscore", "percentile"), _alarms),
        tuned_steps=_table(results, AGAINST_TUNED, lambda r, arm: _against(r, arm, "tuned", STEP)),
        tuned_finals=_table(results, AGAINST_TUNED, lambda r, arm: _difference(r, arm, "tuned"), baseline="tuned"),
        chosen=_chosen(results),
        ranges=_table(results, RANGES, lambda r, arm: _range(r.range_of(arm))),
        seeds=_every_seed(results),
    )


def section(results: Sequence[TaskResults]) -> str:
    """The README's table."""
    lines = [
        "| task | `adaptive`: steps, final loss | with `max_pace=64`: steps, final loss | ... over those of the *tuned* Trainer |",
        "| --- | --- | --- | --- |",
    ]
    for r in results:
        cells = [f"{r.task.name} ({r.task.group})"]
        for arm in OURS:
            cells.append(f"{_against(r, arm, 'stock', STEP)}, {_difference(r, arm, 'stock')}")
        cells.append(f"{_against(r, 'adaptive-pace', 'tuned', STEP)}, {_difference(r, 'adaptive-pace', 'tuned')}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals(results: Sequence[TaskResults]) -> str:
    """What was asked for, what was measured, and whether that is it."""
    lines = ["| goal | measured | holds |", "| --- | --- | --- |"]
    for goal, measured, holds in (
        _no_harm(results),
        _false_alarms(results),
        *(_sooner(results, arm) for arm in OURS),
        _wider(results),
        _moonshot(results),
    ):
        lines.append(f"| {goal} | {measured} | {'yes' if holds else 'no'} |")
    return "\n".join(lines)


def _no_harm(results: Sequence[TaskResults]) -> tuple[str, str, bool]:
    pairs = [(arm, "stock") for arm in OURS] + [(f"{arm}@tuned", "tuned") for arm in OURS]
    found, worse = [], {arm: [] for arm, _ in pairs}  # type: ignore[var-annotated]
    for arm, baseline in pairs:
        judged = [r for r in results if arm in r.arms and baseline in r.arms]
        worse[arm] = [r.task.name for r in judged if r.difference(arm, baseline).low > 0]
        text = f"`{arm}` against {baseline}: worse on {len(worse[arm])} of {len(judged)}"
        found.append(text + (f" ({', '.join(worse[arm])})" if worse[arm] else ""))
    return (
        "1. No harm: with the defaults (`adaptive`), on no task a final loss worse than the stock Trainer's at the same learning rate",
        "; ".join(found),
        not worse["adaptive"] and not worse["adaptive@tuned"],
    )


def _false_alarms(results: Sequence[TaskResults]) -> tuple[str, str, bool]:
    shares = {r.task.name: r.alarms("adaptive") for r in results if "adaptive" in r.arms}
    known = {name: share for name, share in shares.items() if share is not None}
    low, high = min(known.values(), default=math.nan), max(known.values(), default=math.nan)
    return (
        "1b. At most 0.1 % of steps altered in a healthy run",
        f"{low:.1%} to {high:.1%} of the steps after the warm-up (these runs are noisy and short; nobody has labelled them healthy)",
        high <= GOAL_ALARMS,
    )


def _sooner(results: Sequence[TaskResults], arm: str) -> tuple[str, str, bool]:
    which = "the defaults" if arm == "adaptive" else "`max_pace=64`"
    title = f"2. At most 0.72 of the steps and seconds of the stock Trainer as it comes, {which}"
    found, holds = [], True
    for name, column in (("steps", STEP), ("seconds", SECONDS)):
        ratios = _ratios(results, arm, "stock", column)
        if not ratios:
            return title, "not run", False
        middle = median([ratio.median for _, ratio in ratios])
        late = [f"{r.task.name} {_number(ratio.median)}" for r, ratio in ratios if ratio.median > 1]
        judged = [ratio.median for r, ratio in ratios if r.task.group == "confirmation"]
        found.append(
            f"{name} {_number(middle)} (confirmation tasks {_number(median(judged)) if judged else 'n/a'})"
            + (f", later on {', '.join(late)}" if late else ", on no task later")
        )
        holds = holds and middle <= GOAL_RATIO and not late
    return title, "; ".join(found), holds


def _wider(results: Sequence[TaskResults]) -> tuple[str, str, bool]:
    gains = {}
    for r in results:
        stock, ours = r.range_of("stock"), r.range_of("adaptive-pace")
        if stock is not None and ours is not None:
            gains[r.task.name] = ours.octaves - stock.octaves
    text = ", ".join(f"{name} {gain:+.0f}" for name, gain in gains.items())
    return (
        "3. A stable range at least 2 octaves wider (`max_pace=64`)",
        text or "not run",
        bool(gains) and min(gains.values()) >= GOAL_OCTAVES,
    )


def _moonshot(results: Sequence[TaskResults]) -> tuple[str, str, bool]:
    found, best = [], math.inf
    for arm in AGAINST_TUNED[2:]:
        ratios = [ratio.median for _, ratio in _ratios(results, arm, "tuned", STEP)]
        if ratios:
            best = min(best, median(ratios))
            found.append(f"`{arm}` {_number(median(ratios))}")
    return (
        "4. At most 0.72 of the steps of the *tuned* stock Trainer, median over tasks",
        ", ".join(found) or "not run",
        best <= GOAL_RATIO,
    )


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
    shown = f"{quality:.1%}" if r.task.quality == "eval_accuracy" else f"perplexity {quality:.1f}"
    return f"{median(r.finals(arm, LOSS)):.3f}, {shown}"


def _against(r: TaskResults, arm: str, baseline: str, column: int) -> str:
    target = r.target(baseline)
    if target is None or arm not in r.arms or baseline not in r.arms:
        return "-"
    ratio = r.ratio(arm, baseline, target, column)
    costs = r.costs(arm, target)
    reached = sum(math.isfinite(c) for c in costs)
    text = f"{_number(ratio.median)} [{_number(ratio.low)}, {_number(ratio.high)}]"
    return text if reached == len(costs) else f"{text} ({reached}/{len(costs)})"


def _difference(r: TaskResults, arm: str, baseline: str) -> str:
    if arm not in r.arms or baseline not in r.arms:
        return "-"
    found: Interval = r.difference(arm, baseline)
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.low > 0 else text


def _alarms(r: TaskResults, arm: str) -> str:
    share = r.alarms(arm)
    return "-" if share is None else f"{share:.1%}"


def _range(found: Range | None) -> str:
    if found is None:
        return "-"
    sign = ">= " if found.open_below or found.open_above else ""
    rates = list(found.finals)
    return f"{sign}{found.octaves:.0f} ({min(found.finals.values()):.3f}; {_number(found.finals[rates[-1]], 3)} at {rates[-1]:g})"


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


def main(argv: list[str] | None = None) -> None:
    """Write card and pictures; for the study proper the README's table too."""
    from scripts.study_plots import draw_curves, draw_ranges

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=STUDY, help="raw results (default: model_cards/study)")
    folder = parser.parse_args(argv).folder
    results = load_study(folder)
    if not results:
        parser.error(
            f"`folder` must hold raw results that `run_study --record` wrote, but {folder} has none of a stock arm."
        )
    (folder / "README.md").write_text(card(results), encoding="utf-8")
    draw_curves(results, folder / "curves.png")
    draw_ranges(results, folder / "ranges.png")
    if folder.resolve() == STUDY.resolve():
        write_section("study", section(results))


if __name__ == "__main__":
    main()
