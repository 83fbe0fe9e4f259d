"""The commands `verify`, `replay`, `advise`, `diff` and `gauntlet`."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from hf_adaclip.errors import ConfigError, LedgerError
from hf_adaclip.ledger.schema import LEDGER_FILE, plain
from hf_adaclip.ledger.tail import HASH

Commands = Any  # argparse keeps the type of its sub-parsers' collection private
_LOGS = (
    "clip_ledger.jsonl, a stock trainer_state.json or a folder that holds one, a CSV with step and norm columns (W&B's export too), or a "
    "folder of TensorBoard events"
)

_PROOF = (
    "What this proves: the chain of seals shows any change of single bytes or lines, and every decision follows from the norms that are "
    "recorded before it. Losses, times and texts are under the seals, but follow from nothing. The chain has no key: whoever can write "
    "the file can write another history and seal it anew, or cut it off at a seal. That shows only where a seal is kept elsewhere. Those "
    "that lie beside the ledger (in clip_ledger.jsonl.seal, in clip_state.safetensors of checkpoints, in README.md) are looked for and "
    "named. Give one that nobody else could change by --seal."
)


def add_commands(commands: Commands) -> None:
    """Add them to the console command."""
    _add_verify(commands)
    _add_replay(commands)
    _add_advise(commands)
    _add_diff(commands)
    _add_gauntlet(commands)


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a ledger: its chain, its continuity, and that each decision follows from the recorded norms",
        description="Check ledgers from first byte to last. Exit code 0: verified, steps that a full disk has left out named as a gap; "
        "1: something was violated; 2: not readable as a ledger; 3: nothing is wrong, but nothing or not all could be checked (a run that "
        "was killed in a block, an end that is missing).",
        epilog=_PROOF,
    )
    parser.add_argument(
        "ledgers",
        nargs="+",
        type=Path,
        metavar="LEDGER",
        help="clip_ledger.jsonl of a run, or the folder that holds it",
    )
    parser.add_argument(
        "--seal",
        default=None,
        metavar="HASH",
        help="a seal of this ledger that was kept elsewhere, such as in the model's card: it must be in the file",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_verify)


def _add_replay(commands: Commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="what another controller or setting would have decided on the same norms",
        description="Run controllers over the norms of a run. Counterfactual on thresholds only: had the run been clipped otherwise, the "
        "norms after it would have been others.",
    )
    parser.add_argument("log", type=Path, metavar="LEDGER", help=_LOGS)
    parser.add_argument(
        "--controller",
        action="append",
        default=None,
        metavar="NAME[:FIELD=VALUE,...]",
        help="controller to replay, with settings where they differ from the defaults; may be given several times (default: all)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="field of AdaptiveClipConfig, such as decay=0.9; may be given several times",
    )
    parser.add_argument(
        "--max-grad-norm", type=float, default=None, help="static threshold (default: the run's, or 1.0)"
    )
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="PNG", help="draw thresholds and cut steps into this file"
    )
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    parser.set_defaults(run=_replay)


def _add_advise(commands: Commands) -> None:
    parser = commands.add_parser(
        "advise",
        help="would adaptive clipping have done anything in a run that you already have?",
        description="Look at the gradient norms of any run and say what was there, what a static threshold did, what each controller "
        "would have done, and which config to begin with.",
    )
    parser.add_argument("log", type=Path, metavar="FILE", help=_LOGS)
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        default=None,
        help="static threshold of that run (default: what its ledger says, or 1.0)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_advise)


def _add_diff(commands: Commands) -> None:
    parser = commands.add_parser(
        "diff",
        help="where two runs part, and why",
        description="Compare two ledgers step by step. Exit code 0: equal; 1: they part; 2: not readable.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="clip_ledger.jsonl of one run")
    parser.add_argument("b", type=Path, metavar="B", help="clip_ledger.jsonl of the other")
    parser.add_argument("--json", action="store_true", help="print the difference as JSON")
    parser.set_defaults(run=_diff)


def _add_gauntlet(commands: Commands) -> None:
    parser = commands.add_parser(
        "gauntlet",
        help="what every controller does when nothing is wrong, at a spike, at a lasting rise, and in a decay",
        description="Run controllers over made-up norms whose story is known, or over those of a log, and show how each does: "
        "altered when calm (always on), what is applied of two spikes (self-masking), steps until a lasting 3x rise is accepted "
        "(lock-in). About half a minute for all.",
    )
    parser.add_argument(
        "--controllers",
        nargs="+",
        default=None,
        metavar="NAME[:FIELD=VALUE,...]",
        help="controllers, with settings where they differ from the defaults, such as percentile:percentile=90 (default: all)",
    )
    parser.add_argument(
        "--noise",
        choices=["normal", "student"],
        default="normal",
        help="normal of 15 %%, or Student-t with heavy tails (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="streams of each story (default: %(default)s)")
    parser.add_argument("--stream", type=Path, default=None, metavar="LOG", help=f"norms of your own: {_LOGS}")
    parser.add_argument(
        "--max-grad-norm", type=float, default=None, help="static threshold (default: the run's, or 1.0)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=None,
        metavar="PNG",
        help="draw what each does with one stream in which all of it happens",
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.set_defaults(run=_gauntlet)


def _verify(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit import verify_ledger

    code, reports = 0, []
    seal = arguments.seal
    if seal is not None and not HASH.fullmatch(seal):
        raise ConfigError(f"`--seal` must be the 64 hexadecimal digits of a seal, but is {seal[:80]!r} instead.")
    if seal is not None and len(arguments.ledgers) > 1:
        raise ConfigError(f"`--seal` must be given with one ledger, but there are {len(arguments.ledgers)} instead.")
    codes = {"verified": 0, "incomplete": 3, "violated": 1}
    for path in arguments.ledgers:
        try:
            report = verify_ledger(path / LEDGER_FILE if path.is_dir() else path, seal=seal)
        except LedgerError as error:
            print(f"hf-adaclip: {error}", file=sys.stderr)
            reports.append({"path": str(path), "ok": None, "error": str(error)})
            code = _worse(code, 2)
            continue
        reports.append(report.to_dict())
        code = _worse(code, codes[report.status])
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


def _worse(a: int, b: int) -> int:
    """Of several ledgers' exit codes the one that counts: unreadable, violated, incomplete, verified."""
    return max(a, b, key=(0, 3, 1, 2).index)


def _replay(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit.ingest import load_series
    from hf_adaclip.audit.replay import REPLAYABLE, find_spikes, outcome, recorded_name, replay
    from hf_adaclip.config import AdaptiveClipConfig
    from hf_adaclip.flat import fields_of_text, own_settings
    from hf_adaclip.report.tables import COUNTERFACTUAL, draw_replay, outcome_table

    changes = dict(_setting(text) for text in arguments.set)
    texts = arguments.controller or list(REPLAYABLE)
    named = {text: fields_of_text(text, "--controller") or {"controller": text} for text in texts}
    # Of several controllers, a setting counts for those that it belongs to.
    own = {text: own_settings(fields["controller"], changes) for text, fields in named.items()}
    taken = {key for values in own.values() for key in values}
    configs = {
        text: AdaptiveClipConfig.from_dict({**fields, **(own[text] if taken == set(changes) else changes)})
        for text, fields in named.items()
    }
    series = load_series(arguments.log)
    static = _positive(arguments.max_grad_norm, (series.header or {}).get("static_threshold"))
    spikes = find_spikes(series.norms)
    rows: dict[str, Any] = {}
    if series.coefficients is not None:
        rows[recorded_name(series)] = outcome(series, series.coefficients, series.reasons, spikes)
    replays = [replay(series, config, static_threshold=static) for config in configs.values()]
    for text, done in zip(configs, replays, strict=True):
        rows[text] = outcome(series, done.coefficients, done.reasons, spikes)
    if arguments.plot is not None:
        draw_replay(series, replays, arguments.plot, titles=list(configs))
    if arguments.json:
        settings = {
            "path": series.path,
            "source": series.source,
            "every": series.every,
            "static_threshold": static,
            "set": changes,
        }
        print(json.dumps(plain({**settings, "note": COUNTERFACTUAL, "outcomes": rows}), indent=1))
        return 0
    print(
        f"{series.path} ({series.source}): {len(series)} norms, {len(spikes)} spike(s), static threshold {static:g}\n"
    )
    print(outcome_table(rows))
    print(f"\n{COUNTERFACTUAL}")
    if arguments.plot is not None:
        print(f"Picture: {arguments.plot}")
    return 0


def _advise(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit.advise import advise
    from hf_adaclip.audit.ingest import load_series
    from hf_adaclip.report.tables import advice_text

    series = load_series(arguments.log)
    given = arguments.max_grad_norm
    advice = advise(series, max_grad_norm=None if given is None else _positive(given, None))
    print(json.dumps(plain(advice), indent=1) if arguments.json else advice_text(advice))
    return 0


def _gauntlet(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit.ingest import load_series
    from hf_adaclip.audit.replay import REPLAYABLE, find_spikes, outcome, replay
    from hf_adaclip.gauntlet import verdict as gauntlet
    from hf_adaclip.report.tables import draw_replay, outcome_table

    if arguments.seeds < 1:
        raise ConfigError(f"`--seeds` must be at least 1, but is {arguments.seeds} instead.")
    configs = {text: gauntlet.parse_controller(text) for text in arguments.controllers or REPLAYABLE}
    own = None if arguments.stream is None else load_series(arguments.stream)
    recorded = None if own is None else (own.header or {}).get("static_threshold")
    static = _positive(arguments.max_grad_norm, recorded)
    found: dict[str, Any] = {}
    width = max(24, *(len(text) for text in configs))
    if own is not None:
        spikes = find_spikes(own.norms)
        for text, config in configs.items():
            done = replay(own, config, static_threshold=static)
            found[text] = outcome(own, done.coefficients, done.reasons, spikes)
        if not arguments.json:
            print(outcome_table(found))
    elif not arguments.json:
        print(gauntlet.header_line(width))
    if own is None:
        for text, config in configs.items():
            verdict = gauntlet.judge_config(config, arguments.noise, arguments.seeds)
            found[text] = verdict.to_dict()
            if not arguments.json:
                print(gauntlet.verdict_line(text, verdict, width), flush=True)
    if arguments.plot is not None:
        series = gauntlet.story(arguments.noise) if own is None else own
        replays = [replay(series, config, static_threshold=static) for config in configs.values()]
        draw_replay(series, replays, arguments.plot, titles=list(configs))
    if arguments.json:
        setting = {"noise": arguments.noise, "seeds": arguments.seeds, "static_threshold": static}
        print(json.dumps(plain({**setting, "stream": own and own.path, "verdicts": found}), indent=1))
    else:
        if own is None:
            print("\n" + gauntlet.trial_table({text: verdict["streams"] for text, verdict in found.items()}))
        if arguments.plot is not None:
            print(f"Picture: {arguments.plot}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from hf_adaclip.audit.diff import diff_ledgers

    found = diff_ledgers(arguments.a, arguments.b)
    if arguments.json:
        print(json.dumps(plain(found), indent=1))
    else:
        print(found["why"])
        for name, (a, b) in (found["first"] or {"fields": {}})["fields"].items():
            print(f"  {name}: {a} | {b}")
        for name, (a, b) in found["settings"].items():
            print(f"  setting {name}: {a} | {b}")
    return 0 if found["first"] is None else 1


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"`--set` must be FIELD=VALUE, but is {text!r} instead.")
    from hf_adaclip.flat import json_or_text

    return name.strip(), json_or_text(value)


def _positive(given: float | None, recorded: Any) -> float:
    recorded = math.inf if recorded == "inf" else recorded
    value = given if given is not None else (recorded if isinstance(recorded, int | float) else 1.0)
    if not value > 0:
        raise ConfigError(f"`--max-grad-norm` must be above 0, but is {value} instead.")
    return float(value)
