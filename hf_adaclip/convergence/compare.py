"""`hf-adaclip compare`: arms x seeds on tasks, to a table, `comparison.json`, pictures, a report and a model card."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from hf_adaclip.audit.schema import plain
from hf_adaclip.convergence.arms import ARMS, DEFAULT_LEARNING_RATE, STOCK, Arm, RunSpec, clip_config
from hf_adaclip.convergence.pool import run_all
from hf_adaclip.convergence.statistics import PairedRatio, median, paired_ratio
from hf_adaclip.convergence.tasks import TASKS, Task
from hf_adaclip.convergence.tracker import Target, first_reaching, point_from
from hf_adaclip.convergence.tuning import Tuned, load_tuned, settle, tuned_to_json, tuning_specs
from hf_adaclip.errors import ConfigError
from hf_adaclip.versions import environment

COMPARISON_FILE: Final = "comparison.json"
COSTS: Final = ("step", "train_seconds", "energy_wh")


def compare(
    output: Path,
    *,
    tasks: Sequence[str],
    arms: Sequence[str],
    seeds: int,
    jobs: int,
    command: str,
    tune: bool = False,
    quiet: bool = False,
    steps: int | None = None,
) -> dict[str, Any]:
    """Run the comparison, or what is missing of it, and write `comparison.json`.

    Args:
        output: Folder for everything.
        tasks: Names from `TASKS`.
        arms: Names from `ARMS`; the stock arm is always among them.
        seeds: Seeds per arm, 0 to `seeds - 1`.
        jobs: Runs at a time.
        command: The command line, for the record.
        tune: Tune the stock arm and set the target anew instead of taking the recorded values.
        quiet: No progress bar.
        steps: Optimizer steps of each run in place of the task's own (for a quick look; the recorded target no longer means much).

    Raises:
        ConfigError: A name is unknown, or the folder holds a comparison with other settings.
    """
    check_names(tasks, arms)
    arms = [STOCK, *[a for a in arms if a != STOCK]]
    tuned = tune_tasks(output, tasks, jobs=jobs, command=command, quiet=quiet) if tune else load_tuned()
    specs = [
        run_spec(TASKS[task], ARMS[arm], seed, tuned[task].learning_rate, steps)
        for seed in range(seeds)
        for task in tasks
        for arm in arms
    ]
    _refuse_other_settings(output, specs)
    results = run_all(specs, output, jobs=jobs, quiet=quiet)
    comparison = summarise(tasks, arms, seeds, tuned, results, command, jobs)
    (output / COMPARISON_FILE).write_text(json.dumps(plain(comparison), indent=1) + "\n", encoding="utf-8")
    return comparison


def tune_tasks(output: Path, tasks: Sequence[str], *, jobs: int, command: str, quiet: bool) -> dict[str, Tuned]:
    """Tune the stock arm on every task and write `tuned.json`."""
    specs = [spec for task in tasks for spec in tuning_specs(TASKS[task])]
    results = run_all(specs, output, jobs=jobs, quiet=quiet)
    tuned = {task: settle(TASKS[task], [r for r in results if r["spec"]["task"] == task]) for task in tasks}
    date = datetime.now(timezone.utc).date().isoformat()
    values = tuned_to_json(tuned, command=command, date=date, versions=environment())
    (output / "tuned.json").write_text(json.dumps(plain(values), indent=1) + "\n", encoding="utf-8")
    return tuned


def run_spec(task: Task, arm: Arm, seed: int, tuned_rate: float, steps: int | None = None) -> RunSpec:
    """The run of one arm with one seed; data order and initial weights depend on task and seed alone."""
    return RunSpec(
        task=task.name,
        arm=arm.name,
        seed=seed,
        learning_rate=tuned_rate if arm.rate == "tuned" else DEFAULT_LEARNING_RATE,
        clip=clip_config(arm),
        max_steps=steps or task.max_steps,
        batch_size=task.batch_size,
        eval_steps=min(task.eval_steps, steps or task.eval_steps),
        data=task.fingerprint(),
    )


def summarise(
    tasks: Sequence[str],
    arms: Sequence[str],
    seeds: int,
    tuned: dict[str, Tuned],
    results: Sequence[dict[str, Any]],
    command: str,
    jobs: int,
) -> dict[str, Any]:
    """The content of `comparison.json`: settings, every seed's numbers, medians and intervals, losses as well as wins."""
    by_run = {(r["spec"]["task"], r["spec"]["arm"], r["spec"]["seed"]): r for r in results}
    entries = []
    for name in tasks:
        task, target = TASKS[name], tuned[name].target
        rows = {arm: [_seed_row(task, by_run[name, arm, seed], target) for seed in range(seeds)] for arm in arms}
        entries.append(
            {
                "task": name,
                "title": task.title,
                "quality": task.quality,
                "quality_greater_is_better": task.quality_greater,
                "target": asdict(target),
                "same_data_as_tuning": tuned[name].fingerprint == task.fingerprint(),
                "arms": [_arm_entry(arm, rows[arm], rows[STOCK]) for arm in arms],
            }
        )
    finished = [r for r in results if "error" not in r]
    return {
        "schema": 1,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": environment(),
        "device": finished[0]["device"] if finished else None,
        "seeds": seeds,
        "jobs": jobs,
        "energy": _energy_kind(finished, jobs),
        "tasks": entries,
    }


def _seed_row(task: Task, result: dict[str, Any], target: Target) -> dict[str, Any]:
    """What one run contributes; costs are infinite when the target was never reached, None when they are not known."""
    row: dict[str, Any] = {"seed": result["spec"]["seed"], "error": result.get("error")}
    points = result.get("points", [])
    hit = first_reaching([point_from(p) for p in points], target)
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


def _arm_entry(arm: str, rows: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "arm": arm,
        "title": ARMS[arm].title,
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


def check_names(tasks: Sequence[str], arms: Sequence[str]) -> None:
    problems = [f"`tasks` must be among {', '.join(TASKS)}, but {t!r} is not." for t in tasks if t not in TASKS]
    problems += [f"`arms` must be among {', '.join(ARMS)}, but {a!r} is not." for a in arms if a not in ARMS]
    if problems:
        raise ConfigError(problems)


def _refuse_other_settings(output: Path, specs: Sequence[RunSpec]) -> None:
    """A folder's runs are never written over by runs that mean something else."""
    for spec in specs:
        path = output / spec.folder / "result.json"
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if "error" not in found and found.get("digest") != spec.digest:
            was, now = found.get("spec", {}), asdict(spec)
            changed = [k for k in now if now[k] != was.get(k)]
            raise ConfigError(
                f"`output` must be a new folder or one of the same comparison, but {path} was made with another "
                f"{', '.join(f'`{c}`' for c in changed)}. Choose another folder, or remove this one."
            )
