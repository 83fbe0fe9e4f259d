"""The console command `hf-adaclip`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adaclip.errors import HfAdaclipError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 fine, 1 a check failed, 2 bad input or usage."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except HfAdaclipError as error:
        print(f"hf-adaclip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhf-adaclip: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adaclip",
        description="Adaptive gradient clipping for Hugging Face training: compare, and check what was done.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_verify(commands)
    return parser


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="fine-tune with the stock Trainer and with adaptive clipping, and report the time to a target",
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
        help="comma-separated arms out of stock, adaptive, adaptive-pace, zscore, percentile, stock-default (default: %(default)s)",
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
    parser.set_defaults(run=_compare)


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify",
        help="check a ledger: its chain, its continuity, and that each decision follows from the recorded norms",
        description="Check ledgers from first byte to last. Exit code 0: verified; 1: something was violated; 2: not readable as a ledger.",
    )
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER", help="clip_ledger.jsonl of a run")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_verify)


def _compare(arguments: argparse.Namespace) -> int:
    _require_extra()
    from hf_adaclip.convergence import compare as comparing
    from hf_adaclip.convergence.card import write_card
    from hf_adaclip.convergence.plots import draw_png
    from hf_adaclip.convergence.present import print_tables
    from hf_adaclip.convergence.report import write_report
    from hf_adaclip.convergence.tuning import load_tuned

    output: Path = arguments.output
    tasks = [t for t in arguments.tasks.split(",") if t]
    arms = [a for a in arguments.arms.split(",") if a]
    jobs = arguments.jobs or _default_jobs()
    command = shlex.join(["hf-adaclip", *sys.argv[1:]])
    output.mkdir(parents=True, exist_ok=True)
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
    tuned = load_tuned(output / "tuned.json") if arguments.full else load_tuned()
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


def _verify(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit import verify_ledger
    from hf_adaclip.errors import LedgerError

    code, reports = 0, []
    for path in arguments.ledgers:
        try:
            report = verify_ledger(path)
        except LedgerError as error:
            print(f"hf-adaclip: {error}", file=sys.stderr)
            reports.append({"path": str(path), "ok": None, "error": str(error)})
            code = 2
            continue
        reports.append(report.to_dict())
        code = max(code, 0 if report.ok else 1)
        if not arguments.json:
            print(report.summary())
            for finding in report.findings:
                print(f"  {finding}")
            hidden = report.num_violations - sum(f.violation for f in report.findings)
            if hidden > 0:
                print(f"  ... and {hidden} more violations")
    if arguments.json:
        print(json.dumps(reports, indent=1))
    return code


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _require_extra() -> None:
    import importlib.util

    missing = [
        m for m in ("datasets", "matplotlib", "plotly", "sklearn", "rich") if importlib.util.find_spec(m) is None
    ]
    if missing:
        from hf_adaclip.errors import UnsupportedSetupError

        raise UnsupportedSetupError(
            f"`hf-adaclip compare` must have {', '.join(missing)}, but they are not installed. Run: pip install 'hf_adaclip[compare]'"
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value} instead")
    return value


if __name__ == "__main__":
    sys.exit(main())
