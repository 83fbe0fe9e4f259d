"""Tables of this folder's page from results.jsonl: python table.py results.jsonl"""

import itertools
import json
import sys
from pathlib import Path
from statistics import median

RATES = {  # as it comes, tuned, edge
    "sst2": (2e-5, 2e-4, 8e-4),
    "fashion": (5e-4, 2e-3, 8e-3),
    "wikitext": (5e-4, 4e-3, 1.6e-2),
    "cola6": (5e-5,),
    "wikitext_long": (5e-4, 4e-3),
    "rte": (2e-5,),
}
NAMES = ("as it comes", "tuned", "edge")


def steps_to(curve, target):
    """First step at which the curve, drawn with straight lines, is at or below the target."""
    for (s0, v0, _), (s1, v1, _) in itertools.pairwise(curve):
        if v1 <= target + 2e-5:
            return s0 if v0 <= target else s0 + (s1 - s0) * min(1.0, (v0 - target) / (v0 - v1))
    return float("inf")


def ratio(run, reference):
    """NaN where the reference ended above its start: there is no such target."""
    if reference["final"] >= reference["curve"][0][1]:
        return float("nan")
    return steps_to(run["curve"], reference["final"]) / reference["steps"]


def show(values, digits):
    return ", ".join(f"{v:.{digits}f}".replace("nan", "no target") for v in values)


def middle(values):
    values = [v for v in values if v == v]
    return f"{median(values):.2f}" if values else "-"


def main():
    runs = {
        (r["task"], r["arm"], r["lr"], r["seed"]): r
        for r in map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    }
    arm = sys.argv[2] if len(sys.argv) > 2 else "reach"
    print(
        "| task | rate | stock final, per seed | pace final, per seed | steps to stock's final loss at that rate, ratio (median) | "
        "steps to the tuned stock's, no warm-up (median) | steps to the tuned stock's with warm-up (median) |"
    )
    print("|---|---|---|---|---|---|---|")
    for task, rates in RATES.items():
        for name, lr in zip(NAMES, rates, strict=False):
            seeds = sorted(s for t, a, r, s in runs if (t, a, r) == (task, arm, lr) and (task, "stock", lr, s) in runs)
            if not seeds:
                continue
            cells = {"own": [], "tuned": [], "warm": []}
            for s in seeds:
                mine = runs[task, arm, lr, s]
                cells["own"].append(ratio(mine, runs[task, "stock", lr, s]))
                for key in ("tuned", "warm"):
                    kind = "stock" if key == "tuned" else "warm"
                    # The tuned rate is one rate for all seeds: the one with the lowest mean over the seeds that ran everywhere.
                    found = {}
                    for (t, a, r, q), x in runs.items():
                        if t == task and a == kind:
                            found.setdefault(r, {})[q] = x["final"]
                    full = {
                        r: sum(v.values()) / len(v)
                        for r, v in found.items()
                        if len(v) == max(map(len, found.values()))
                    }
                    if (full and len(found) > 1) or (full and key == "warm"):
                        best = min(full, key=full.get)
                        reference = runs.get((task, kind, best, s))
                        if reference:
                            cells[key].append(ratio(mine, reference))
            stock = [runs[task, "stock", lr, s]["final"] for s in seeds]
            pace = [runs[task, arm, lr, s]["final"] for s in seeds]
            parts = [
                f"{show(cells[k], 2)} ({middle(cells[k])})" if cells[k] else "-" for k in ("own", "tuned", "warm")
            ]
            print(f"| {task} | {name} {lr:g} | {show(stock, 3)} | {show(pace, 3)} | {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
