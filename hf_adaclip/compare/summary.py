"""From the runs of a comparison to `comparison.json`: every seed's numbers, medians, intervals, losses as well as wins."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Final

from hf_adaclip.compare.arms import STOCK
from hf_adaclip.compare.statistics import PairedRatio, median, paired_ratio
from hf_adaclip.run.versions import environment
from hf_adaclip.telemetry.point import Target, first_reaching, point_from

COMPARISON_FILE: Final = "comparison.json"
COSTS: Final = ("step", "train_seconds", "energy_wh")


@dataclass(frozen=True)
class Judged:
    """What the runs of one task are judged by.

    Attributes:
        name, title: Of the task.
        arms: Their titles, by name.
        quality: Metric shown as final quality, its direction, and a function from an evaluation's metrics.
        target: Fixed before the runs.
        baseline: How the stock arm was set, in a sentence.
        same_data: Whether the data is that on which the target was set.
    """

    name: str
    title: str
    arms: Mapping[str, str]
    quality: str
    quality_greater: bool
    quality_of: Callable[[dict[str, float]], float | None]
    target: Target
    baseline: str
    same_data: bool = True


def summarise(
    tasks: Sequence[Judged], seeds: int, results: Sequence[dict[str, Any]], command: str, jobs: int
) -> dict[str, Any]:
    """The content of `comparison.json`: settings, every seed's numbers, medians and intervals, losses as well as wins."""
    by_run = {(r["spec"]["task"], r["spec"]["arm"], r["spec"]["seed"]): r for r in results}
    entries = []
    for task in tasks:
        rows = {arm: [_seed_row(task, by_run[task.name, arm, s]) for s in range(seeds)] for arm in task.arms}
        entries.append(
            {
                "task": task.name,
                "title": task.title,
                "quality": task.quality,
                "quality_greater_is_better": task.quality_greater,
                "target": asdict(task.target),
                "baseline": task.baseline,
                "same_data_as_tuning": task.same_data,
                "arms": [_arm_entry(arm, title, rows[arm], rows[STOCK]) for arm, title in task.arms.items()],
            }
        )
    finished = [r for r in results if "error" not in r]
    return {
        "schema": 1,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": environment(),
        "device": next((r["device"] for r in finished if r["device"]), None),
        "seeds": seeds,
        "jobs": jobs,
        "energy": _energy_kind(finished, jobs),
        "tasks": entries,
    }


def _seed_row(task: Judged, result: dict[str, Any]) -> dict[str, Any]:
    """What one run contributes; costs are infinite when the target was never reached, None when they are not known."""
    row: dict[str, Any] = {"seed": result["spec"]["seed"], "error": result.get("error")}
    points = result.get("points", [])
    hit = first_reaching([point_from(p) for p in points], task.target)
    for cost in COSTS:
        known = bool(points) and points[-1].get(cost) is not None
        row[cost] = getattr(hit, cost) if hit is not None else (math.inf if known or cost != "energy_wh" else None)
    final = {k: float(v) for k, v in points[-1]["metrics"].items()} if points else {}
    row.update(
        reached=hit is not None,
        final_eval_loss=_or_inf(final.get("eval_loss", math.inf)),
        quality=task.quality_of(final) if final else None,
        total_steps=points[-1]["step"] if points else 0,
        clipped=result.get("clipped"),
        skipped=result.get("skipped"),
        ledger=result.get("ledger"),
    )
    return row


def _arm_entry(arm: str, title: str, rows: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "arm": arm,
        "title": title,
        "reached": sum(r["reached"] for r in rows),
        "seeds": rows,
    }
    for cost in COSTS:
        values = [r[cost] for r in rows]
        entry[f"median_{cost}"] = None if None in values else median(values)
        # A run that raised says nothing about speed; a run that never reached the target does.
        pairs = [(a[cost], b[cost]) for a, b in zip(rows, stock, strict=True) if not a["error"] and not b["error"]]
        known = bool(pairs) and all(None not in pair for pair in pairs)
        ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs]) if known and arm != STOCK else None
        entry[f"ratio_{cost}"] = None if ratio is None else asdict(ratio)
    entry["median_final_eval_loss"] = median([r["final_eval_loss"] for r in rows])
    qualities = [r["quality"] for r in rows if r["quality"] is not None]
    entry["median_quality"] = median(qualities) if qualities else None
    differences = [a["final_eval_loss"] - b["final_eval_loss"] for a, b in zip(rows, stock, strict=True)]
    entry["final_eval_loss_minus_stock"] = None if arm == STOCK else differences
    return entry


def ratio_from(entry: dict[str, Any], cost: str) -> PairedRatio | None:
    """The paired ratio of an arm in `comparison.json`; numbers may have been through JSON."""
    values = entry[f"ratio_{cost}"]
    if values is None:
        return None
    return PairedRatio(
        ratios=tuple(map(float, values["ratios"])),
        median=float(values["median"]),
        low=float(values["low"]),
        high=float(values["high"]),
        neither=values["neither"],
    )


def _or_inf(value: float) -> float:
    """A loss that is no number is the worst there is; sorted as NaN it could pass for the best."""
    return math.inf if math.isnan(value) else value


def _energy_kind(results: Sequence[dict[str, Any]], jobs: int) -> dict[str, Any] | None:
    for result in results:
        for point in result.get("points", []):
            if point["energy_wh"] is not None:
                # A sensor counts the whole chip: with runs side by side, each is charged for the others too.
                shared = jobs > 1 and point["energy_measured"]
                return {
                    "source": point["energy_source"],
                    "measured": point["energy_measured"] and not shared,
                    "shared": shared,
                }
    return None
