"""The commands `compare` and `card`."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.ledger.reader import read_regular

if TYPE_CHECKING:
    from hf_adaclip.compare.arms import Study

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
            "Trainer and with AdaptiveClipTrainer, both at the stock Trainer's best learning rate and at the library's default, same data "
            "order and initial weights seed by seed, and report steps, seconds and energy to a target loss that was fixed beforehand. "
            "Interrupted, the same command goes on where it stopped."
        ),
        epilog=(
            "Leaves comparison.json, curves.png, report.html, README.md (a model card) and runs/ in the output folder. "
            "Needs the extra: pip install 'hf_adaclip[compare]'."
        ),
    )
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--tasks", default=None, help="comma-separated tasks (default: digits-vit,pydoc-llama)")
    parser.add_argument(
        "--arms",
        default=None,
        help="comma-separated arms: stock, none, any controller or preset (guard), stable_adamw; tuned (the stock arm at its best setting) "
        "and NAME-tuned; without a script stock-default and adaptive-default too, at the library's default learning rate (default: "
        "stock,adaptive with a script, else stock,stock-default,adaptive,adaptive-default)",
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
        "--tune", action="store_true", help="only tune the stock arm, set the target, and write demo_target.json"
    )
    parser.add_argument("--json", action="store_true", help="print comparison.json instead of tables")
    script = parser.add_argument_group(
        "any training script", "hf-adaclip compare --arms stock,tuned,adaptive --seeds 5 -- train.py FLAGS"
    )
    script.add_argument(
        "script",
        nargs="*",
        metavar="-- SCRIPT FLAGS",
        help="a script, or -m and a module, with the flags of the Transformers examples and --clip (scripts/run_glue.py, or yours with "
        "ClipArguments) in place of the two tasks. tuned and NAME-tuned: at the best learning rate, max_grad_norm and warm-up",
    )
    script.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="an arm of your own, such as 'wide=--clip adaptive:max_near=0.5'",
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
    script.add_argument("--target-metric", default=None, help="metric of the target (default: eval_loss)")
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
    from hf_adaclip.compare.arms import STOCK_DEFAULT
    from hf_adaclip.compare.demo_study import TARGET_FILE, demo_studies, fix, fixed_before
    from hf_adaclip.compare.study import check, compare_script

    _refuse_flags_of_the_other(arguments)
    study = _study(arguments)
    study.output.mkdir(parents=True, exist_ok=True)
    if arguments.script:
        return _present(compare_script(study), arguments)
    tasks = [t for t in (arguments.tasks or "digits-vit,pydoc-llama").split(",") if t]
    if arguments.full:
        study = replace(study, arms=tuple(dict.fromkeys([*study.arms, STOCK_DEFAULT])))
    fixed = None if arguments.tune or arguments.full else fixed_before()
    studies = demo_studies(study, tasks, arguments.steps, fixed)
    for each in studies:
        check(each)
    if fixed is None:
        fixed = fix(studies)
        studies = demo_studies(study, tasks, arguments.steps, fixed)
    if arguments.tune:
        path = study.output / TARGET_FILE
        print(path.read_text(encoding="utf-8") if arguments.json else f"Wrote {path}.")
        return 0
    return _present(compare_script(*studies), arguments)


def _refuse_flags_of_the_other(arguments: argparse.Namespace) -> None:
    """Flags that only the two tasks have, with a script; or those that only a script has, without one."""
    alone = ("tasks", "steps", "full", "tune")
    scripted = ("target", "target_metric", "greater_is_better", "quality", "rates")
    given = [
        f"`--{name.replace('_', '-')}`"
        for name in (alone if arguments.script else scripted)
        if getattr(arguments, name) not in (None, False, ())
    ]
    if given and arguments.script:
        raise ConfigError(f"{', '.join(given)} must be left out with a script: it has flags of its own.")
    if given:
        raise ConfigError(
            f"{', '.join(given)} must be given with a script, as in `hf-adaclip compare ... -- train.py FLAGS`."
        )


def _study(arguments: argparse.Namespace) -> "Study":
    """The study that the flags describe; that of a script is complete."""
    from hf_adaclip.compare.arms import Arm, Study
    from hf_adaclip.compare.demo_study import DEMO_ARMS
    from hf_adaclip.compare.runs import python_launcher

    extra = {}
    for text in arguments.arm:
        name, equals, flags = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"`--arm` must be NAME=FLAGS, but is {text!r} instead.")
        extra[name] = Arm(flags, tuple(shlex.split(flags)))
    usual = ",".join(("stock", "adaptive") if arguments.script else DEMO_ARMS)
    arms = [a for a in (usual if arguments.arms is None else arguments.arms).split(",") if a]
    return Study(
        output=arguments.output,
        script=tuple(arguments.script),
        arms=tuple(dict.fromkeys([*arms, *extra])),
        extra=extra,
        seeds=arguments.seeds,
        jobs=arguments.jobs or _default_jobs(),
        launcher=tuple(shlex.split(arguments.launcher)) if arguments.launcher else python_launcher(),
        metric=arguments.target_metric or "eval_loss",
        greater=arguments.greater_is_better,
        target=arguments.target,
        quality=arguments.quality,
        rates=tuple(arguments.rates),
        command=shlex.join(["hf-adaclip", *sys.argv[1:]]),
        quiet=arguments.json,
    )


def _present(comparison: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Pictures, report, card and table of a comparison; the exit code says whether a run failed."""
    from hf_adaclip.compare.card import write_card
    from hf_adaclip.compare.plots import draw_png
    from hf_adaclip.compare.present import print_tables
    from hf_adaclip.compare.report import write_report
    from hf_adaclip.compare.summary import COMPARISON_FILE

    output: Path = arguments.output
    draw_png(comparison, output)
    write_report(comparison, output)
    write_card(comparison, output)
    if arguments.json:
        print((output / COMPARISON_FILE).read_text(encoding="utf-8"))
    else:
        print_tables(comparison)
        print(
            f"\nLook at {output / 'report.html'}; the card is {output / 'README.md'}, the numbers {output / COMPARISON_FILE}."
        )
    failed = any(seed["error"] for task in comparison["tasks"] for entry in task["arms"] for seed in entry["seeds"])
    return 1 if failed else 0


def _card(arguments: argparse.Namespace) -> int:
    from hf_adaclip.compare.card import card_metadata, write_card

    metadata: dict[str, Any] = {}

    def show(comparison: dict[str, Any]) -> Path:
        metadata.update(card_metadata(comparison).to_dict())
        return write_card(comparison, arguments.comparison, arguments.output)

    path = show_comparison(arguments.comparison, show)
    print(json.dumps(metadata, indent=1) if arguments.json else path)
    return 0


def show_comparison(folder: Path, show: Callable[[dict[str, Any]], Path]) -> Path:
    """Load a comparison, and hand it to `show`.

    Raises:
        ConfigError: The folder holds none, or what it holds is damaged.
    """
    path = folder / "comparison.json"
    if not path.exists():
        raise ConfigError(
            f"`comparison` must be a folder of `hf-adaclip compare`, but {folder} holds no comparison.json. A run has its section in the "
            "card that `create_model_card` or `push_to_hub` of its Trainer writes; `hf-adaclip report --format md` makes one page of it."
        )
    try:
        text = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"`comparison` must hold a readable comparison.json, but {path} is not: {error}.") from error
    try:
        comparison = json.loads(text.decode("utf-8"))
        if comparison["schema"] != 1:
            raise ConfigError(f"`comparison` must have schema 1, but {path} has {comparison['schema']!r} instead.")
        return show(comparison)
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"`comparison` must be a folder of `hf-adaclip compare`, but {path} is damaged ({what})."
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
