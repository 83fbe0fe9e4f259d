"""The command `incident`: what is kept of steps that went wrong, and their batches once more through the script's model."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_adaclip.errors import ConfigError
from hf_adaclip.incidents.folder import Incident

_SCRIPT = "SCRIPT"


def add_incident(commands: Any) -> None:
    """Add it to the console command."""
    parser = commands.add_parser(
        "incident",
        usage="hf-adaclip incident [-h] [--json] RUN [STEP [--bisect] [--rank N] [--checkpoint FOLDER] --replay SCRIPT [FLAGS ...]]",
        help="steps of a run that went wrong: what is kept of them, and which module, batch and sample they came from",
        description="List the incidents of a run, or show all that is known of those at one step. Each lies in RUN/incidents/step-NNNNN: "
        "incident.json, batch.safetensors (`hf_adaclip.incidents.contents.load_batch` reads it), text.jsonl. With --replay the batch goes "
        "once more through the model of the training script, forward and backward, from the last checkpoint before the step; nothing is "
        "trained or written.",
        epilog="Example: hf-adaclip incident out 1234 --bisect --replay scripts/run_clm.py --output_dir out --do_train ...",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run, or its ledger")
    parser.add_argument(
        "step",
        type=int,
        nargs="?",
        default=None,
        metavar="STEP",
        help="optimizer step, counted from 0 as in the ledger",
    )
    parser.add_argument("--json", action="store_true", help="print what incident.json holds, or the replay, as JSON")
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="with --replay: loss and norm of every sample alone, the largest norm first",
    )
    parser.add_argument(
        "--rank", type=int, default=None, help="with --replay: the batch of one rank (default: those of all, together)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="with --replay: weights to begin from (default: the last RUN/checkpoint-N before the step, else the initial ones)",
    )
    parser.add_argument(
        "--replay",
        nargs=argparse.REMAINDER,
        default=None,
        metavar=_SCRIPT,
        help="last: the training script, or -m and a module, with the flags of the run",
    )
    parser.set_defaults(run=_incident)


def _incident(arguments: argparse.Namespace) -> int:
    from hf_adaclip.report.incidents import in_full, incidents_of, overview

    if arguments.replay is None and (arguments.bisect or arguments.rank is not None or arguments.checkpoint):
        raise ConfigError(
            "`--bisect`, `--rank` and `--checkpoint` must come with `--replay SCRIPT`, but there is none."
        )
    found = incidents_of(arguments.run_folder)
    chosen = found if arguments.step is None else [i for i in found if i.step == arguments.step]
    if arguments.step is not None and not chosen:
        known = ", ".join(map(str, dict.fromkeys(i.step for i in found))) or "none"
        raise ConfigError(f"`STEP` must be one with an incident ({known}), but is {arguments.step} instead.")
    if arguments.replay is not None:
        return _replay(arguments, chosen)
    if arguments.json:
        print(json.dumps([{**i.facts, "folder": str(i.folder)} for i in chosen], indent=1))
    elif not found:
        print(f"{arguments.run_folder} has no incidents.")
    else:
        lines = overview(found) if arguments.step is None else [line for i in chosen for line in in_full(i)]
        print("\n".join(lines))
    return 0


def _replay(arguments: argparse.Namespace, chosen: list[Incident]) -> int:
    from hf_adaclip.incidents.replay import Request
    from hf_adaclip.integrations.incident_replay import last_checkpoint, replay_by_script
    from hf_adaclip.report.replayed import in_words

    if arguments.step is None:
        raise ConfigError("`STEP` must be given with `--replay`, but is not.")
    if not arguments.replay:
        raise ConfigError(f"`{_SCRIPT}` must follow `--replay`, with the flags of the run, but nothing does.")
    incident = chosen[-1]  # the last of them, where a run has come to this step again
    checkpoint = arguments.checkpoint
    if checkpoint is not None and not checkpoint.is_dir():
        raise ConfigError(f"`--checkpoint` must be a folder with weights, but {checkpoint} is none.")
    if checkpoint is None:
        checkpoint = last_checkpoint(incident)
    answer = replay_by_script(Request(incident, checkpoint, arguments.rank, arguments.bisect), arguments.replay)
    print(json.dumps(answer, indent=1) if arguments.json else "\n".join(in_words(answer)))
    return 0
