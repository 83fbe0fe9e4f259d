"""Write the table of what the default gains in a plain loop into the card of the spectral range.

    python -m scripts.docs.default_table

A test holds it equal to model_cards/spectral/default.jsonl, whose runs default_probe.py beside it made.
"""

import json
from collections.abc import Iterable
from statistics import mean
from typing import Any, Final

from scripts.docs.readme_section import ROOT, write_section

CARD: Final = ROOT / "model_cards" / "spectral" / "README.md"
RUNS: Final = ROOT / "model_cards" / "spectral" / "default.jsonl"
SEEDS: Final = (3, 4, 5)
"""Seeds that chose nothing: the parts were chosen on seed 0, the average over steps on 0, 1 and 2."""
TASKS: Final = {
    "wiki": "Llama from scratch, WikiText-2",
    "fashion": "ViT from scratch, Fashion-MNIST",
    "ft": "that Llama fine-tuned, tiny_shakespeare",
}
COLUMNS: Final[dict[str, tuple[str, bool, float]]] = {
    "AdamW, tuned by a search": ("tuned", False, 1.0),
    "default, rate as it comes": ("asis", True, 1.0),
    "default, tuned rate": ("tuned", True, 1.0),
    "the same in 0.72 of the steps": ("tuned", True, 0.72),
}
"""What a column shows: whose rate, whether it is ours, and the part of the steps."""


def load() -> list[dict[str, Any]]:
    """The runs of the default as it is, and of `clip_grad_norm_`; of one job the latest."""
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    chosen = [r for r in runs if not r["clip"] and "off" not in r]
    latest = {(r["task"], r["seed"], r["kind"], r["clip"] is not None, r.get("hor", 1.0)): r for r in chosen}
    return list(latest.values())


def finals(runs: Iterable[dict[str, Any]], task: str, column: str) -> list[float]:
    """Final eval losses of the seeds."""
    kind, ours, horizon = COLUMNS[column]
    found = {
        r["seed"]: float(r["final"])
        for r in runs
        if (r["task"], r["kind"], r["clip"] is not None, r.get("hor", 1.0)) == (task, kind, ours, horizon)
    }
    return [found[seed] for seed in SEEDS]


def sooner(runs: Iterable[dict[str, Any]], task: str, kind: str) -> list[float]:
    """Part of the steps after which the default has the tuned AdamW's final loss, by seed; infinite where it never has."""
    shares = []
    for seed in SEEDS:
        mine = [r for r in runs if (r["task"], r["seed"], r.get("hor", 1.0)) == (task, seed, 1.0)]
        [tuned] = [r for r in mine if r["kind"] == "tuned" and r["clip"] is None]
        [ours] = [r for r in mine if r["kind"] == kind and r["clip"] is not None]
        reached = [point[0] for point in ours["curve"] if point[1] <= tuned["final"]]
        shares.append(min(reached, default=float("inf")) / ours["S"])
    return shares


def table() -> str:
    """The table as Markdown."""
    runs = load()
    rows = [
        "| final eval loss, mean of 3 seeds | " + " | ".join(COLUMNS) + " | steps to the tuned loss |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for task, title in TASKS.items():
        cells = [f"{mean(finals(runs, task, column)):.3f}" for column in COLUMNS]
        shares = ", ".join(f"{share:.2f}" for share in sooner(runs, task, "tuned"))
        rows.append(f"| {title} | {' | '.join(cells)} | {shares} |")
    return "\n".join(rows)


if __name__ == "__main__":
    write_section("default", table(), CARD)
