"""The commands `compare` and `card`."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.ledger.reader import read_regular

_MOST_BYTES = 512 * 1024 * 1024
Commands = Any  # argparse keeps the type of its sub-parsers' collection private


def add_commands(commands: Commands) -> None:
    """Add them to the console command."""
    _add_compare(commands)
    _add_card(commands)


def _add_compare(commands: Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="train with the stock Trainer and with adaptive clipping, and report the time to a target",
        description=(
            "Train two small real tasks (a ViT on scikit-learn's digits, a Llama on Python's manual; nothing is downloaded) with the stock "
            "Trainer at its best learning rate and with AdaptiveClipTrainer, same data order and initial weights seed by seed, and report "
            "steps, seconds and energy to a target loss that was fixed beforehand. Interrupted, the same command goes on where it stopped."
        ),
        epilog=(
            "Leaves comparison.json, curves.png, report.html, README.md (a model card) and runs/ in the output folder. "
            "Needs the extra: pip install 'hf_adaclip[compare]'."
        ),
    )
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", default="digits-vit,pydoc-llama", help="comma-separated tasks (default: %(default)s)"
    )
    parser.add_argument(
        "--arms",
        default="stock,adaptive,adaptive-pace",
        help="comma-separated arms: stock, any controller, adaptive-pace, stock-default (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_positive, default=3, help="seeds per arm; a claim needs at least 5 (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=None, help="runs at a time (default: one per core, at most 2; 1 on a GPU)"
    )
    parser.add_argument(
        "--steps", type=_positive, default=None, help="steps of each run, for a quick look (default: the task's own)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also tune the stock arm anew and add the arm with the library's default learning rate",
    )
    parser.add_argument(
        "--tune", action="store_true", help="only tune the stock arm, set the target, and write tuned.json"
    )
    parser.add_argument("--json", action="store_true", help="print comparison.json instead of tables")
    script = parser.add_argument_group(
        "any training script", "hf-adaclip compare --arms stock,tuned,adaptive --seeds 5 -- train.py FLAGS"
    )
    script.add_argument(
        "script",
        nargs="*",
        metavar="-- SCRIPT FLAGS",
        help="a script with the flags of the Transformers examples and --clip (scripts/run_glue.py, or yours with ClipArguments) in place "
        "of the two tasks. Arms: stock, none, any controller, adaptive-pace, stable_adamw; tuned (the stock arm at its best learning rate, "
        "max_grad_norm and warm-up) and NAME-tuned",
    )
    script.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="an arm of your own, such as 'wide=--clip adaptive --max_near 0.5'",
    )
    script.add_argument(
        "--launcher", default=None, help="what runs the script, such as 'accelerate launch' (default: this Python)"
    )
    script.add_argument(
        "--target",
        type=float,
        default=None,
        help="value to reach (default: what the stock arm reaches in 80 %% of its steps, other seeds)",
    )
    script.add_argument("--target-metric", default="eval_loss", help="metric of the target (default: %(default)s)")
    script.add_argument("--greater-is-better", action="store_true", help="more of that metric is better")
    script.add_argument(
        "--quality", default=None, metavar="METRIC", help="metric shown as final quality, such as eval_accuracy"
    )
    script.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=(),
        help="learning rates of the tuning (default: the script's times 0.5, 1, 2, 4, 8)",
    )
    parser.set_defaults(run=_compare)


def _add_card(commands: Commands) -> None:
    parser = commands.add_parser(
        "card",
        help="write the model card of a comparison again",
        description="Write README.md, a model card with metadata for the Hub, from a comparison's numbers.",
    )
    parser.add_argument("comparison", type=Path, metavar="COMPARISON", help="folder that `hf-adaclip compare` left")
    parser.add_argument("--output", type=Path, default=None, help="file to write (default: README.md in the folder)")
    parser.add_argument("--json", action="store_true", help="print the card's metadata as JSON instead of its path")
    parser.set_defaults(run=_card)


def _compare(arguments: argparse.Namespace) -> int:
    _require_extra()
    from hf_adaclip.compare import compare as comparing
    from hf_adaclip.compare.tuning import load_tuned

    output: Path = arguments.output
    tasks = [t for t in arguments.tasks.split(",") if t]
    arms = [a for a in arguments.arms.split(",") if a]
    jobs = arguments.jobs or _default_jobs()
    command = shlex.join(["hf-adaclip", *sys.argv[1:]])
    output.mkdir(parents=True, exist_ok=True)
    if arguments.script:
        from hf_adaclip.compare.study import compare_script

        comparison = compare_script(_study(arguments, arms, jobs, command))
        return _present(comparison, arguments, {})
    if arguments.tune:
        comparing.check_names(tasks, arms)
        comparing.tune_tasks(output, tasks, jobs=jobs, command=command, quiet=arguments.json)
        print(
            (output / "tuned.json").read_text(encoding="utf-8")
            if arguments.json
            else f"Wrote {output / 'tuned.json'}."
        )
        return 0
    if arguments.full and "stock-default" not in arms:
        arms.append("stock-default")
    comparison = comparing.compare(
        output,
        tasks=tasks,
        arms=arms,
        seeds=arguments.seeds,
        jobs=jobs,
        command=command,
        tune=arguments.full,
        quiet=arguments.json,
        steps=arguments.steps,
    )
    return _present(comparison, arguments, load_tuned(output / "tuned.json") if arguments.full else load_tuned())


def _study(arguments: argparse.Namespace, arms: list[str], jobs: int, command: str) -> Any:
    from hf_adaclip.compare.runs import python_launcher
    from hf_adaclip.compare.study import ScriptStudy

    extra = {}
    for text in arguments.arm:
        name, equals, flags = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"`--arm` must be NAME=FLAGS, but is {text!r} instead.")
        extra[name] = tuple(shlex.split(flags))
    return ScriptStudy(
        output=arguments.output,
        script=tuple(arguments.script),
        arms=tuple(dict.fromkeys([*arms, *extra])),
        extra=extra,
        seeds=arguments.seeds,
        jobs=jobs,
        launcher=tuple(shlex.split(arguments.launcher)) if arguments.launcher else python_launcher(),
        metric=arguments.target_metric,
        greater=arguments.greater_is_better,
        target=arguments.target,
        quality=arguments.quality,
        rates=tuple(arguments.rates),
        command=command,
        quiet=arguments.json,
    )


def _present(comparison: dict[str, Any], arguments: argparse.Namespace, tuned: dict[str, Any]) -> int:
    """Pictures, report, card and table of a comparison; the exit code says whether a run failed."""
    from hf_adaclip.compare import compare as comparing
    from hf_adaclip.compare.card import write_card
    from hf_adaclip.compare.plots import draw_png
    from hf_adaclip.compare.present import print_tables
    from hf_adaclip.compare.report import write_report

    output: Path = arguments.output
    draw_png(comparison, output)
    write_report(comparison, output, tuned)
    write_card(comparison, output, tuned)
    if arguments.json:
        print((output / comparing.COMPARISON_FILE).read_text(encoding="utf-8"))
    else:
        print_tables(comparison)
        print(
            f"\nLook at {output / 'report.html'}; the card is {output / 'README.md'}, the numbers {output / 'comparison.json'}."
        )
    failed = any(seed["error"] for task in comparison["tasks"] for entry in task["arms"] for seed in entry["seeds"])
    return 1 if failed else 0


def _card(arguments: argparse.Namespace) -> int:
    from hf_adaclip.compare.card import card_metadata, write_card

    metadata: dict[str, Any] = {}

    def show(comparison: dict[str, Any], tuned: Any) -> Path:
        metadata.update(card_metadata(comparison).to_dict())
        return write_card(comparison, arguments.comparison, tuned, arguments.output)

    path = show_comparison(arguments.comparison, show)
    print(json.dumps(metadata, indent=1) if arguments.json else path)
    return 0


def show_comparison(folder: Path, show: Callable[[dict[str, Any], Any], Path]) -> Path:
    """Load a comparison, and the tuning that it was made with, and hand both to `show`.

    Raises:
        ConfigError: The folder holds none, or what it holds is damaged.
    """
    from hf_adaclip.compare.tuning import load_tuned

    path = folder / "comparison.json"
    try:
        comparison = json.loads(read_regular(path, _MOST_BYTES).decode("utf-8"))
        if comparison["schema"] != 1:
            raise ConfigError(f"`comparison` must have schema 1, but {path} has {comparison['schema']!r} instead.")
        return show(comparison, load_tuned(folder / "tuned.json" if (folder / "tuned.json").is_file() else None))
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"`comparison` must be a folder of `hf-adaclip compare`, but {path} is damaged ({text})."
        ) from error


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _require_extra() -> None:
    missing = [
        m for m in ("datasets", "matplotlib", "plotly", "sklearn", "rich") if importlib.util.find_spec(m) is None
    ]
    if missing:
        raise UnsupportedSetupError(
            f"`hf-adaclip compare` must have {', '.join(missing)}, but they are not installed. Run: pip install 'hf_adaclip[compare]'"
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value} instead")
    return value
