"""A comparison as a table for people: in the terminal, in the model card, in the report. One source of cells for all three."""

import math
from typing import Any, Final

from hf_adaclip.compare.summary import ratio_from
from hf_adaclip.compare.verdict import verdict
from hf_adaclip.report import markdown as md

COLUMNS: Final = (
    "arm",
    "reached",
    "steps",
    "seconds",
    "energy",
    "steps vs stock",
    "seconds vs stock",
    "final loss",
    "quality",
    "clipped",
    "skipped",
)


MAX_TITLE: Final = 90


def seeds_of(comparison: dict[str, Any]) -> str:
    """How many seeds each arm has, in words."""
    return "1 seed" if comparison["seeds"] == 1 else f"{comparison['seeds']} seeds"


def title_of(task: dict[str, Any]) -> str:
    """The task's title, short enough for a picture: comparisons of before it was one held a whole command line there."""
    title = " ".join(str(task["title"]).split())
    if len(title) <= MAX_TITLE:
        return title
    return str(task["task"])[:MAX_TITLE] if "--" in title else title[: MAX_TITLE - 3].rstrip() + "..."


def columns(task: dict[str, Any]) -> list[str]:
    """Labels of one task's table. The metric has a column of its own unless it is the loss, which has one already."""
    return [task["quality"] if c == "quality" else c for c in COLUMNS if c != "quality" or task["quality"] != "loss"]


def table_rows(task: dict[str, Any]) -> list[list[str]]:
    """The cells of one task's table, one row per arm, in the order of `columns`."""
    left = [i for i, c in enumerate(COLUMNS) if c != "quality" or task["quality"] != "loss"]
    return [[row[i] for i in left] for row in (_row(task, entry) for entry in task["arms"])]


def _row(task: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    seeds = entry["seeds"]
    failed = sum(bool(s["error"]) for s in seeds)
    reached = f"{entry['reached']}/{len(seeds)}" + (f" ({failed} failed)" if failed else "")
    return [
        entry["arm"],
        reached,
        _cost(entry["median_step"], "{:.0f}"),
        _cost(entry["median_train_seconds"], "{:.1f} s"),
        _cost(entry["median_energy_wh"], "{:.3f} Wh"),
        _ratio(entry, "step"),
        _ratio(entry, "train_seconds"),
        _number(entry["median_final_eval_loss"], "{:.3f}"),
        _quality(task, entry),
        _share(seeds, "clipped"),
        _share(seeds, "skipped"),
    ]


def _cost(value: Any, form: str) -> str:
    if value is None:
        return "n/a"
    value = float(value)
    return "never" if math.isinf(value) else form.format(value)


def _ratio(entry: dict[str, Any], cost: str) -> str:
    ratio = ratio_from(entry, cost)
    if ratio is None:
        return "1" if entry["ratio_step"] is None and entry["arm"] == "stock" else "n/a"
    text = _number(ratio.median, "{:.2f}")
    if len(ratio.ratios) > 1:  # one seed has no interval
        text += f" [{_number(ratio.low, '{:.2f}')}, {_number(ratio.high, '{:.2f}')}]"
    # Where neither arm reached the target, the pair counts as even; who reads "1.00" has to know.
    return text if not ratio.neither else f"{text} ({ratio.neither} of {len(ratio.ratios)} neither)"


def _number(value: Any, form: str) -> str:
    value = float(value)
    return "inf" if math.isinf(value) else form.format(value)


def _quality(task: dict[str, Any], entry: dict[str, Any]) -> str:
    value = entry["median_quality"]
    if value is None:
        return "n/a"
    return f"{value:.1%}" if task["quality"] == "accuracy" else f"{value:.2f}"


def _share(seeds: list[dict[str, Any]], key: str) -> str:
    """Steps as a share of all steps of the arm's runs; the stock Trainer does not say."""
    known = [(s[key], s["total_steps"]) for s in seeds if s[key] is not None]
    if not known:
        return "-"
    count, total = sum(k for k, _ in known), sum(t for _, t in known)
    return f"{count / max(total, 1):.1%}" if key == "clipped" else str(count)


def heading(task: dict[str, Any]) -> str:
    """What the table is about, in one line of plain text."""
    target = task["target"]
    sign = ">=" if target["greater_is_better"] else "<="
    return f"{title_of(task)} · target {target['metric']} {sign} {target['value']:.3f}"


def notes(comparison: dict[str, Any]) -> list[str]:
    """What a reader has to know to read the tables, in sentences."""
    energy = comparison["energy"]
    lines = (
        []
        if comparison.get("script")
        else [
            "Target: fixed beforehand on other seeds, as the eval loss that every tuning run of the stock Trainer at its best learning "
            "rate reached within 80 % of its steps.",
        ]
    )
    lines += [
        f"Medians over {seeds_of(comparison)}; a run that never reaches the target counts as infinite. 'vs stock': median of the "
        "ratios seed by seed, with a 95 % bootstrap interval; below 1 is sooner.",
        "First sentence: 'ends' is the final eval loss less that of the stock arm it is held against, median over seeds.",
        "Seconds are training time without evaluation; the method's own overhead, its ledger included, is in them.",
    ]
    lines.append(
        "Clipped: share of all steps, those included in which the static threshold rules as in the stock Trainer: the controller's "
        "warm-up, and where it cut most of that, all others."
    )
    if comparison.get("jobs", 1) > 1:
        lines.append(
            f"{comparison['jobs']} runs shared the machine at a time, so seconds vary by tens of percent from one comparison to the next "
            "(steps do not vary); for timing use `--jobs 1` on an idle machine."
        )
    if comparison["seeds"] < 5:
        show = "shows" if comparison["seeds"] == 1 else "show"
        lines.append(f"{seeds_of(comparison)} {show} the direction; a claim needs at least 5 (`--seeds 5`).")
    if energy is None:
        lines.append("Energy: no sensor could be read and codecarbon is not installed, so nothing is said.")
    elif energy.get("shared"):
        lines.append(
            f"Energy: read from {energy['source']} while runs went on side by side, so each is charged for its neighbours too."
        )
    else:
        how = "measured" if energy["measured"] else "estimated, not measured"
        lines.append(f"Energy: {how} ({energy['source']}).")
    if not all(task["same_data_as_tuning"] for task in comparison["tasks"]):
        lines.append(
            "The data differs from the data that the target was set on (another version of Python or scikit-learn)."
        )
    return lines


def print_tables(comparison: dict[str, Any]) -> None:
    """Print every task's verdict and table to the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if console.width < 120 and not console.is_terminal:
        console = Console(width=150)  # written to a file or a log: never cut a column
    for task in comparison["tasks"]:
        # Names are shown as they are: rich would read [brackets] as its own markup.
        table = Table(title=escape(heading(task)), title_justify="left")
        for position, label in enumerate(columns(task)):
            table.add_column(escape(label), justify="left" if position == 0 else "right", no_wrap=position == 0)
        for row in table_rows(task):
            table.add_row(*map(escape, row))
        if sentence := verdict(comparison, task):
            console.print(sentence, style="bold", highlight=False, markup=False)
        console.print(table)
        console.print()
    for line in notes(comparison):
        console.print(f"- {line}", style="dim", highlight=False, markup=False)


def markdown_table(task: dict[str, Any]) -> str:
    """The same table in Markdown."""
    return md.table([md.text(c) for c in columns(task)], [[md.text(row[0]), *row[1:]] for row in table_rows(task)])
