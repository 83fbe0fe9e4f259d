"""`hf-adaclip compare`: arms x seeds on tasks, to a table, `comparison.json`, pictures, a report and a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.arms import ARMS, DEFAULT_LEARNING_RATE, STOCK, Arm, RunSpec, clip_config
from hf_adaclip.compare.pool import run_all
from hf_adaclip.compare.summary import Judged, summarise
from hf_adaclip.compare.tasks import TASKS, Task
from hf_adaclip.compare.tuning import Tuned, load_tuned, settle, tuned_to_json, tuning_specs
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near_controller
from hf_adaclip.ledger.schema import plain
from hf_adaclip.run.versions import environment

COMPARISON_FILE: Final = "comparison.json"


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
    judged = [_judged(TASKS[task], tuned[task]) for task in tasks]
    comparison = summarise(judged, [ARMS[a] for a in arms], seeds, results, command, jobs)
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


def _judged(task: Task, tuned: Tuned) -> Judged:
    return Judged(
        name=task.name,
        title=task.title,
        quality=task.quality,
        quality_greater=task.quality_greater,
        quality_of=task.quality_of,
        target=tuned.target,
        baseline=tuned.baseline,
        same_data=tuned.fingerprint == task.fingerprint(),
    )


def check_names(tasks: Sequence[str], arms: Sequence[str]) -> None:
    problems = [
        f"`tasks` must be among {', '.join(TASKS)}, but {t!r} is not.{near_controller(t, TASKS)}"
        for t in tasks
        if t not in TASKS
    ]
    problems += [
        f"`arms` must be among {', '.join(ARMS)}, but {a!r} is not.{near_controller(a, ARMS)}"
        for a in arms
        if a not in ARMS
    ]
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
