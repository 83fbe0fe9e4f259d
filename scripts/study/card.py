"""Make the card of the study, its pictures and the README's table from raw results.

    python -m scripts.study.card              those of model_cards/study
    python -m scripts.study.card FOLDER       those of another folder, for one while the study is run

Tests hold the card and the README equal to what this makes of the raw results.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template

from hf_adaclip.compare.statistics import median
from scripts.docs.readme_section import README, ROOT, write_section
from scripts.study import first_card
from scripts.study.arms import ABLATIONS, AT, SHORT
from scripts.study.goals import NOT_RUN, ratios_of, tuned_default, verdicts
from scripts.study.results import SECONDS, STEP, STUDY, STUDY_ANEW, TaskResults, load_first, load_study
from scripts.study.tables import (
    against,
    alarms,
    chosen,
    difference,
    every_seed,
    measured,
    number,
    overfit,
    ranges,
    rows_of,
    step_cost,
    table,
)

PEERS = ("zscore", "percentile", "muon", "cautious")
AS_IT_COMES = ("tuned", "adaptive", "adaptive-tuned", *ABLATIONS, *PEERS)
AT_TUNED = tuple(f"{arm}{AT}" for arm in ("adaptive", *ABLATIONS))
TUNED = ("adaptive-tuned", "spectral-agreement-tuned", "muon-tuned", "cautious-tuned")
AGAINST_TUNED = ("stock", "adaptive", *TUNED, *AT_TUNED)
HORIZON = tuple(f"{arm}{SHORT}" for arm in ("tuned", f"adaptive{AT}", *TUNED))
TEMPLATE = Path(__file__).with_suffix(".template.md")
EPOCHS = 2.0
"""From so many on a task is one of several epochs."""
PACE = ROOT / "model_cards" / "pace" / "README.md"


def card(results: Sequence[TaskResults]) -> str:
    """The whole card as Markdown."""
    many = [r for r in results if r.task.epochs >= EPOCHS]
    goals = {}
    for name, verdict in verdicts(results).items():
        goals[f"{name}_measured"], goals[f"{name}_holds"] = verdict.measured, verdict.word
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        goals,
        note="\n".join(f"**{note}**\n" for note in foreign_note(results)),
        tasks=len([r for r in results if r.task.group != "gpu"]),
        steps=table(results, AS_IT_COMES, lambda r, arm: against(r, arm, "stock", STEP)),
        seconds=table(results, AS_IT_COMES, lambda r, arm: against(r, arm, "stock", SECONDS)),
        finals=table(results, AS_IT_COMES, lambda r, arm: difference(r, arm, "stock"), baseline="stock"),
        alarms=table(results, ("adaptive", "guard", "zscore", "percentile"), alarms),
        tuned_steps=table(results, AGAINST_TUNED, lambda r, arm: against(r, arm, "tuned", STEP)),
        tuned_seconds=table(results, AGAINST_TUNED, lambda r, arm: against(r, arm, "tuned", SECONDS)),
        tuned_finals=table(results, AGAINST_TUNED, lambda r, arm: difference(r, arm, "tuned"), baseline="tuned"),
        horizon=table(results, HORIZON, lambda r, arm: difference(r, arm, "tuned"), baseline="tuned"),
        epochs=table(many, ("stock", "tuned", "adaptive", "adaptive-tuned", *AT_TUNED), overfit),
        measured=measured(results),
        costs=table(results, ("tuned", "adaptive", *ABLATIONS, *PEERS), step_cost),
        chosen=chosen(results, ("tuned", *TUNED)),
        ranges=ranges(results, "adaptive"),
        seeds=every_seed(results),
    )
    # No reason where a goal is met.
    return re.sub(r"^(\| [0-9][^|]*\|[^|]*\| yes \|)[^|]*\|$", r"\1 - |", text, flags=re.MULTILINE)


def section(results: Sequence[TaskResults]) -> str:
    """The README's table: the stock Trainer as it comes is 1, the tuned one stands beside ours, and ours beside the tuned one."""
    seeds = sorted({len(r.seeds(arm)) for r in results for arm in ("stock", "tuned", "adaptive") if arm in r.arms})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    ours = tuned_default(results)
    how = "tuned" if ours == "adaptive-tuned" else "at its settings"
    columns = (
        ("tuned / as it comes", "tuned", "stock", STEP),
        ("default / as it comes", "adaptive", "stock", STEP),
        (f"default {how} / tuned", ours, "tuned", STEP),
        ("in seconds", ours, "tuned", SECONDS),
    )
    rows = []
    for r in results:
        cells = [against(r, arm, baseline, column) for _, arm, baseline, column in columns]
        # Of what is beside the point the median alone: the card has the intervals.
        cells = [cell if place == 2 else cell.split(" [")[0] for place, cell in enumerate(cells)]
        losses = (difference(r, ours, "tuned"), difference(r, f"{ours}{SHORT}", "tuned"))
        cells += [re.sub(r" \[[^]]*\]", "", loss) for loss in losses]
        rows.append([r.task.name, *(NOT_RUN if cell == "-" else cell for cell in cells)])
    facts = []
    kinds = (("from scratch", True), ("on fine-tuning", False))
    sooner = [
        f"{number(median(list(found.values())))} {kind}"
        for kind, scratch in kinds
        if (found := ratios_of([r for r in results if r.task.scratch == scratch], ours, "tuned", STEP))
    ]
    if sooner:
        facts.append(f"- {' and '.join(sooner)} of the tuned Trainer's steps are the medians.")
    peers = [
        f"{name} {number(median(list(found.values())))} over {len(found)} tasks"
        for peer, name in (("muon-tuned", "Muon"), ("cautious-tuned", "C-AdamW"))
        if (found := ratios_of(results, peer, "tuned", STEP))
    ]
    if peers:
        facts.append(f"- Others, searched alike: {', '.join(peers)}.")
    reached = [math.isfinite(c) for r in results if (t := r.target("tuned")) for c in _costs(r, "adaptive", t)]
    if reached:
        facts.append(
            f"- {sum(reached)} of {len(reached)} runs of the untuned default reach the *tuned* Trainer's target."
        )
    facts += [f"- {note}" for note in foreign_note(results)]
    heads = ["task", *(title for title, *_ in columns), "final loss", "loss in 0.72 of the steps"]
    shown = " ".join(cell for row in rows for cell in row)
    legend = [
        text
        for mark, text in ((" inf ", "inf: never."), (" 0.00 ", "0.00: B missed it."), ("**", "Bold: worse."))
        if mark in shown
    ]
    return "\n".join(
        [
            f"A / B: steps of A until B's target, over those of B; medians of {count} seeds [95 % intervals]. Losses: less the tuned "
            f"Trainer's. {' '.join(legend)}".rstrip(),
            "",
            rows_of(heads, rows),
            "",
            *facts,
        ]
    )


def _costs(r: TaskResults, arm: str, target: float) -> list[float]:
    return r.costs(arm, target) if arm in r.arms else []


def foreign_note(results: Sequence[TaskResults]) -> list[str]:
    """How many runs would be other ones today."""
    reasons: Counter[str] = sum((Counter(r.foreign) for r in results), Counter())
    if not reasons:
        return []
    whole = sum(len(r.runs) for r in results)
    text = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    return [f"{sum(reasons.values()):,} of {whole:,} runs would be other ones today: {text}."]


def unexplained(text: str) -> list[str]:
    """Goals of a card that are missed and have no reason beside them."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [row[0] for row in rows if len(row) == 4 and row[2] == "no" and row[3] in ("", "-")]


def main(argv: list[str] | None = None) -> None:
    """Write card and pictures; for the study proper the README's table too."""
    from scripts.study.plots import draw_curves, draw_ranges

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=STUDY, help="raw results (default: model_cards/study)")
    folder = parser.parse_args(argv).folder
    results, first = load_study(folder), load_first(folder)
    if any(r.task.group != "gpu" for r in results) or (results and not first):
        page, summary = card(results), section(results)
        draw_curves(results, folder / "curves.png")
        draw_ranges(results, folder / "ranges.png")
    elif first:
        page, summary = first_card.card([*first, *results]), first_card.section(first)
        draw_curves(first, folder / "curves.png", first_card.CURVES)
        draw_ranges(first, folder / "ranges.png", first_card.RANGES)
    else:
        parser.error(
            f"`folder` must hold raw results that `study.run --record` wrote, but {folder} has none of a stock arm."
        )
    (folder / "README.md").write_text(page, encoding="utf-8")
    # The first one has measured the pace, and not yet the default.
    page_of = {STUDY.resolve(): PACE if first and not results else README, STUDY_ANEW.resolve(): README}
    if folder.resolve() in page_of:
        write_section("study", summary, page_of[folder.resolve()])
    for goal in unexplained(page):
        print(f"No reason is given for a goal that is missed: {goal}. It is written in {TEMPLATE.name}.")


if __name__ == "__main__":
    main()
