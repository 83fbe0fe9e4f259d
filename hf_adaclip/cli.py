"""The console command `hf-adaclip`."""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from hf_adaclip.compare.commands import add_commands as add_convergence_commands
from hf_adaclip.compare.commands import show_comparison
from hf_adaclip.errors import ConfigError, HfAdaclipError
from hf_adaclip.hints import near, near_flag
from hf_adaclip.integrations.incident_command import add_incident
from hf_adaclip.integrations.launch import VARIABLE, run_command
from hf_adaclip.reliance import require
from hf_adaclip.report.commands import add_commands as add_audit_commands

FORMATS: Final = ("html", "md", "png", "json", "csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 fine, 1 a check failed, 2 bad input or usage, 3 not all could be checked (`verify`)."""
    arguments = build_parser().parse_args(argv)
    os.environ.pop(VARIABLE, None)  # the stock arm of a comparison is to stay stock; `run` sets it anew
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a job scheduler's way to say stop: workers must not be left behind
    try:
        return int(arguments.run(arguments))
    except HfAdaclipError as error:
        print(f"hf-adaclip: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        return 0
    except OSError as error:  # an output that cannot be written, a file that vanished
        which = "a file" if error.filename is None else str(error.filename)
        print(
            f"hf-adaclip: {which} cannot be written or read ({error.strerror or error}). Make room, or name another place, such as by "
            "`--output` or `--plot`.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nhf-adaclip: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Says which flag or name was probably meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flags = list(_flags(self))
            given = message.removeprefix("unrecognized arguments: ").split()
            message += "".join(near_flag(text, flags) for text in given if text.startswith("-"))
        elif choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += near(choice[1], [name.strip(" '") for name in choice[2].split(",")], "'")
        super().error(message)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All flags, those of the commands included."""
    commands = require(argparse, "_SubParsersAction")
    for action in require(parser, "_actions"):
        yield from action.option_strings
        for command in action.choices.values() if isinstance(action, commands) else ():
            yield from _flags(command)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-adaclip",
        description="Adaptive gradient clipping for Hugging Face training: compare it, and check what it did.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_convergence_commands(commands)
    add_audit_commands(commands)
    add_incident(commands)
    report = commands.add_parser(
        "report",
        help="a page that shows a run or a comparison",
        description="Make a self-contained page (or picture, Markdown, JSON) of a run's ledger or of a comparison's folder.",
    )
    report.add_argument("source", type=Path, metavar="RUN_OR_COMPARISON", help="folder or clip_ledger.jsonl")
    report.add_argument(
        "--format",
        choices=FORMATS,
        default=None,
        help="what to make (default: as --output ends, or html)",
    )
    report.add_argument(
        "--output", type=Path, default=None, help="file to write (default: report.FORMAT beside the source)"
    )
    report.add_argument(
        "--interactive",
        action="store_true",
        help="figures of the page by plotly, to zoom into; it is 4.8 MB larger for that (default: light drawings)",
    )
    report.set_defaults(run=_report)
    _add_run(commands)
    return parser


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run a training command in which every Trainer clips adaptively",
        usage="hf-adaclip run [-h] [--clip CLIP] -- COMMAND ...",
        description="Run any command that trains by transformers.Trainer (python train.py, torchrun, accelerate launch, trl sft, "
        "llamafactory-cli train) with adaptive clipping, without editing it: every Trainer in it and in its child processes is attached as "
        "its `train` begins. With HF_ADACLIP=CLIP in the environment the same happens without this command.",
        epilog="Exit status: the command's own; 1 if that is 0 and no Trainer was attached; 2 for bad usage.",
    )
    parser.add_argument(
        "--clip",
        default="adaptive",
        help="a controller or preset (rl), NAME:FIELD=VALUE,..., or the path of a config's JSON (default: %(default)s)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="program and arguments")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise ConfigError("`COMMAND` must follow, as in `hf-adaclip run -- python train.py`, but there is none.")
    return run_command(command, arguments.clip)


def _report(arguments: argparse.Namespace) -> int:
    source: Path = arguments.source
    ending = "" if arguments.output is None else arguments.output.suffix.lstrip(".")
    form = arguments.format or (ending if ending in FORMATS else "html")
    folder = source if source.is_dir() else source.parent
    target = arguments.output or folder / f"report.{form}"
    there = target.exists()
    try:
        _write_report(source, form, target, arguments.interactive)
    except OSError:
        if not there:  # half a page is none
            with contextlib.suppress(OSError):
                target.unlink()
        raise
    print(target)
    return 0


def _write_report(source: Path, form: str, target: Path, zoom: bool) -> None:
    if (source / "comparison.json").is_file():
        _report_comparison(source, form, target, zoom)
    else:
        from hf_adaclip.report import run_report

        writers: dict[str, Callable[[Any, Path], Path]] = {
            "html": partial(run_report.write_html, zoom=zoom),
            "csv": run_report.write_csv,
            "md": run_report.write_markdown,
            "png": run_report.write_png,
            "json": run_report.write_json,
        }
        writers[form](run_report.load_run(source), target)


def _report_comparison(folder: Path, form: str, target: Path, zoom: bool) -> Path:
    from hf_adaclip.compare.card import write_card
    from hf_adaclip.compare.plots import draw_png
    from hf_adaclip.compare.report import write_report

    if form == "csv":
        raise ConfigError("`--format` must be html, md, png or json for a comparison, but is 'csv' instead.")

    def show(comparison: dict[str, Any]) -> Path:
        if form == "html":
            return write_report(comparison, folder, target, zoom=zoom)
        if form == "png":
            return draw_png(comparison, folder, target)
        if form == "md":
            return write_card(comparison, folder, target)
        target.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
        return target

    return show_comparison(folder, show)


if __name__ == "__main__":
    sys.exit(main())
