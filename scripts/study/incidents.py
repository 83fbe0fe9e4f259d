"""Incidents that a healthy run has by mistake: the rules over the norms and losses of runs in which nothing was planted.

    python -m scripts.study.incidents                                      the table, over model_cards/incidents/norms.jsonl
    python -m scripts.study.incidents --record --output runs/incidents     train the study's tasks, at the rate as it comes, and record
    python -m scripts.study.incidents --record --data DATA --tasks rte     local parquet files, some of the tasks

The goal is at most 1 incident in 1,000 steps. Runs of GRPO are recorded with `--record --tasks grpo` (needs TRL): a tiny Llama that learns
to write one letter, and once nothing at all.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason
from hf_adaclip.incidents.rules import IncidentRules
from hf_adaclip.ledger.schema import LEDGER_FILE, parse_number
from scripts.study.run import prepare_base
from scripts.study.tasks import BASE, TASKS, Place

NORMS: Final = Path(__file__).parents[2] / "model_cards/incidents/norms.jsonl"
GOAL: Final = 1.0
"""Incidents in 1,000 steps of healthy runs."""


class Outcome(NamedTuple):
    """One run under the rules.

    Attributes:
        name: Of the task.
        steps: Of the run.
        found: Step and kind of each incident.
    """

    name: str
    steps: int
    found: list[tuple[int, str]]


def judged(line: dict[str, Any], config: AdaptiveClipConfig | None = None) -> Outcome:
    """The incidents of a recorded run, under the stock Trainer's threshold of 1.

    Args:
        line: `task`, `norms` and `losses`.
        config: With other thresholds than the defaults.
    """
    rules = IncidentRules(config or AdaptiveClipConfig())
    found: list[tuple[int, str]] = []
    for step, (norm, loss) in enumerate(zip(line["norms"], line["losses"], strict=True)):
        row = {"norm": norm, "loss": math.nan if loss is None else loss, "threshold": 1.0, "coefficient": 1.0}
        if (finding := rules.feed(step, row, Reason.WITHIN, 1.0)) is not None:
            found.append((step, finding.kind))
    return Outcome(line["task"], len(line["norms"]), found)


def recorded(path: Path = NORMS) -> list[dict[str, Any]]:
    """All runs that were recorded."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rate(outcomes: list[Outcome]) -> float:
    """Incidents in 1,000 steps."""
    return 1000 * sum(len(o.found) for o in outcomes) / sum(o.steps for o in outcomes)


def table(outcomes: list[Outcome]) -> str:
    """A line per task, and one for all."""
    lines = [f"{'task':<20}{'runs':>6}{'steps':>8}{'incidents':>11}{'per 1,000':>11}  which"]
    for name in [*dict.fromkeys(o.name for o in outcomes), ""]:
        mine = [o for o in outcomes if name in ("", o.name)]
        which = ", ".join(f"{kind} at {step}" for o in mine for step, kind in o.found) if name else ""
        counts = f"{len(mine):>6}{sum(o.steps for o in mine):>8}{sum(len(o.found) for o in mine):>11}"
        lines.append(f"{name or 'all':<20}{counts}{rate(mine):>11.2f}  {which}".rstrip())
    return "\n".join(lines)


def norms_of(task: str, seed: int, folder: Path) -> dict[str, Any]:
    """A line for a run that has a ledger: norms and losses, to four digits."""
    lines = (json.loads(line) for line in (folder / LEDGER_FILE).read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "task": task,
        "seed": seed,
        "norms": [_short(parse_number(step["norm"])) for step in steps],
        "losses": [_short(parse_number(step["loss"])) for step in steps],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def runs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train what is asked for, by the stock rule with a ledger."""
    data = None if arguments.data is None else arguments.data.resolve()
    place = Place(data, (arguments.output / BASE).resolve())
    for name in arguments.tasks.split(","):
        folder = (arguments.output / name).resolve()
        if name == "grpo":
            from scripts.study.grpo import ROUNDS, train

            for title, settings in ROUNDS.items():
                train(folder / title, **settings)
                yield norms_of(f"grpo {title}", arguments.seed, folder / title)
            continue
        if TASKS[name].needs_base:
            prepare_base(place)
        command = [part for part in TASKS[name].command(place) if part != "--do_eval"]
        command[command.index("--eval_strategy") + 1] = "no"
        flags = ["--clip", "static:incidents=False", "--seed", str(arguments.seed), "--output_dir", str(folder)]
        subprocess.run([sys.executable, *command, *flags], check=True)
        yield norms_of(name, arguments.seed, folder)


def main(argv: list[str] | None = None) -> int:
    """Print the table, after recording where that is asked for; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", action="store_true", help="train first, and add what is measured to the recorded runs"
    )
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help="tasks to record, of the study's, or grpo (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=None, help="local parquet files (default: from the hub)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/incidents"), help="where runs go (default: %(default)s)"
    )
    parser.add_argument("--norms", type=Path, default=NORMS, help="the recorded runs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.record:
        arguments.norms.parent.mkdir(parents=True, exist_ok=True)
        for line in runs(arguments):
            known = {
                (k["task"], k["seed"]): k for k in (recorded(arguments.norms) if arguments.norms.is_file() else [])
            }
            known[line["task"], line["seed"]] = line
            text = "".join(json.dumps(known[key], separators=(",", ":")) + "\n" for key in sorted(known))
            arguments.norms.write_text(text, encoding="utf-8")
    outcomes = [judged(line) for line in recorded(arguments.norms)]
    print(table(outcomes))
    return int(rate(outcomes) > GOAL)


if __name__ == "__main__":
    sys.exit(main())
