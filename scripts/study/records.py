"""The raw results of the study: written as JSON lines small enough to be committed, and read again where the runs' own files are not."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import load_series
from hf_adaclip.audit.replay import replay
from hf_adaclip.compare.arms import ARMS as KNOWN
from hf_adaclip.compare.arms import Study
from hf_adaclip.compare.runs import (
    RESULT_FILE,
    ScriptRun,
    defaults_behind,
    finished_result,
    may_pace,
    revision_that_counts,
    write_result,
)
from hf_adaclip.compare.tuning import TUNED_FILE
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Reason
from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.schema import LEDGER_FILE
from scripts.study.arms import ARMS, base_of
from scripts.study.tasks import BASE, Place, StudyTask

STUDY_NUMBER: Final = 2
"""Which study a line belongs to. Lines of the first one do not say."""
PEERS_REVISION: Final = 1
"""Of scripts/optimizers.py: to be raised with every change of what these optimizers do."""
CPU: Final = "cpu"
WALL: Final = "wall"
"""The clocks: processor time of the run's process, or the time that passed; both in training only, without evaluations."""
NOT_ROUNDING = 1 - 1e-5
FROM_RECORD = "restored from the raw results"


def record(output: Path, folder: Path, tasks: Mapping[str, StudyTask], steps: int | None = None) -> None:
    """Write a line for every finished run, and what the tuning chose.

    Lines of runs that are not in `output` stay. Left out are runs and lines that were made by other settings than a run would have today.

    Args:
        output: The study's folder.
        folder: Where the lines go, a file per task.
        tasks: Tasks by name.
        steps: Steps of each run, if not the task's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        path = folder / f"{name}.jsonl"
        known = {_place_of(line): line for line in current_lines(folder, task, steps)}
        base = base_hash(output) if task.needs_base else None
        found = []
        for result_path in sorted((output / name).glob(f"runs/**/{RESULT_FILE}")):
            result = json.loads(result_path.read_text(encoding="utf-8"))
            before = known.get((result["spec"]["arm"], result["spec"]["seed"]))
            if before is not None and before["error"] is None and before["digest"] == result["digest"]:
                found.append(before)  # a ledger is read once
            elif is_current(result, task, steps):
                found.append(_line(task, result_path.parent, result, steps, base))
        known.update((_place_of(line), line) for line in found)
        if found:
            text = [json.dumps(known[place], sort_keys=True) for place in sorted(known)]
            unfinished = path.with_suffix(".part")
            unfinished.write_text("\n".join(text) + "\n", encoding="utf-8")
            unfinished.replace(path)
        tuned = output / name / TUNED_FILE
        if tuned.is_file():
            shutil.copy(tuned, folder / f"{name}.tuned.json")


def restore(study: Study, task: StudyTask, folder: Path, steps: int | None = None) -> tuple[int, dict[str, int]]:
    """Take recorded runs for finished ones, where the study has none of its own, revision and settings are those of today, and the
    Llama that they began with, if any, has the very weights of the one that is here.

    Returns:
        How many were taken, and how many were refused, by reason.
    """
    count, refused = 0, Counter[str]()
    base = base_hash(study.output.parent) if task.needs_base else None
    for line in recorded_lines(folder, task):
        reason = foreign(task, line, steps)
        if reason is None and line["error"]:
            reason = "failed"
        if reason is None and line["base"] != base:
            reason = "with another Llama to begin with"
        if reason is not None:
            refused[reason] += 1
            continue
        flags = tuple(line["flags"].split())
        run = ScriptRun(study.task, line["arm"], line["seed"], study.launcher, study.script, flags)
        if finished_result(run, study.output):
            continue
        (study.output / run.folder).mkdir(parents=True, exist_ok=True)
        write_result(study.output / run.folder, _result(task, run, line))
        count += 1
    return count, dict(refused)


def recorded_lines(folder: Path, task: StudyTask) -> list[dict[str, Any]]:
    """The recorded lines of a task, whatever made them; none where there is no file."""
    path = folder / f"{task.name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def current_lines(folder: Path, task: StudyTask, steps: int | None = None) -> list[dict[str, Any]]:
    """Those that were made by the revision and the settings that a run would have today."""
    return [line for line in recorded_lines(folder, task) if foreign(task, line, steps) is None]


def foreign(task: StudyTask, line: Mapping[str, Any], steps: int | None = None) -> str | None:
    """Why a run would be another one today: of another study, revision or settings. None: it would be the same."""
    if line.get("study") != STUDY_NUMBER:
        return "of the first study"
    flags = line["flags"].split()
    then, now = revision_of(flags, line.get("revision")), revision_of(flags)
    if then is not None and now is not None and then != now:
        return f"of revision {then} (now {now})"
    known = {**KNOWN, **ARMS}.get(base_of(line["arm"].split("/")[1] if "/" in line["arm"] else line["arm"]))
    if known is None or tuple(flags[: len(known.flags)]) != known.flags:
        return "of other settings"
    return None if line.get("key") == key(task, line, steps) else "of other settings"


UNKNOWN: Final = -1


def revision_of(flags: Sequence[str], recorded: int | None = UNKNOWN) -> int | None:
    """Which version of its rule the arm has: of the controller, or of a peer's optimizer; None for the stock arm.

    Args:
        flags: Of the arm.
        recorded: The version that a run had; that of today where it is not given. Found is the latest up to it that changed the run.
    """
    if recorded is None:
        return None
    if "--optimizer" in flags:
        return PEERS_REVISION if recorded == UNKNOWN else recorded
    clip = flags[flags.index("--clip") + 1] if "--clip" in flags else ""
    name = clip.partition(":")[0]
    if name not in CONTROLLERS:
        return None
    revision = CONTROLLERS[name].revision if recorded == UNKNOWN else recorded
    return revision_that_counts(name, revision, paced=may_pace(AdaptiveClipConfig.resolve(clip)))


def key(task: StudyTask, line: Mapping[str, Any], steps: int | None = None) -> str:
    """Hash of what a run is asked to do, wherever it is made: the task, arm, seed, and the defaults of the package that it goes by.

    The script's text is not in it: who changes what a script trains has to begin a new record.
    """
    command = task.command(Place(None, Path("base")), steps=steps)[1:]
    flags = line["flags"].split()
    decides = [command, line["arm"], line["seed"], line["flags"], defaults_behind(flags), revision_of(flags)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def is_current(result: Mapping[str, Any], task: StudyTask, steps: int | None = None) -> bool:
    """Whether a run was made by the script, the defaults and the number of steps that it would be made with today."""
    spec = result["spec"]
    as_tuples = {name: tuple(spec[name]) for name in ("launcher", "script", "flags")}
    run = ScriptRun(spec["task"], spec["arm"], spec["seed"], **as_tuples)
    wanted = task.command(Place(None, Path("base")), steps=steps)
    return run.digest == result["digest"] and _steps(run.script) == _steps(wanted)


def base_hash(output: Path) -> str | None:
    """Hash of the Llama that the study has trained; None where it has not."""
    weights = output / BASE / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights.is_file() else None


def _steps(script: Sequence[str]) -> str:
    return script[script.index("--max_steps") + 1]


def _place_of(line: Mapping[str, Any]) -> tuple[str, int]:
    return line["arm"], line["seed"]


def _line(
    task: StudyTask, folder: Path, result: dict[str, Any], steps: int | None, base: str | None
) -> dict[str, Any]:
    spec, points = result["spec"], result.get("points", [])
    clock = _clock(task, points)
    ledger = result.get("ledger")
    line = {
        "study": STUDY_NUMBER,
        "task": task.name,
        "arm": spec["arm"],
        "seed": spec["seed"],
        "flags": " ".join(spec["flags"]),
        "error": result.get("error"),
        "clock": clock,
        "jobs": result.get("jobs"),
        "points": [
            [p["step"], _seconds(p, clock), *(_short(p["metrics"].get(m)) for m in _metrics(task))]
            for p in (points[-1:] if spec["arm"].startswith("tuning/") else points)
        ],
        "clipped": result.get("clipped"),
        "alarms": result["alarms"] if "alarms" in result else _alarms(folder / LEDGER_FILE),
        "base": base,
        "revision": result["revision"] if "revision" in result else _revision(folder / LEDGER_FILE, spec["flags"]),
        "digest": result["digest"],
        "departures": result["departures"] if "departures" in result else _departures(folder / LEDGER_FILE),
        "wall_seconds": result.get("wall_seconds"),
        "skipped": result.get("skipped"),
        "verified": None if ledger is None else ledger["verified"],
    }
    return {**line, "key": key(task, line, steps)}


def _result(task: StudyTask, run: ScriptRun, line: dict[str, Any]) -> dict[str, Any]:
    """`result.json` as far as the line tells."""
    unknown = dict.fromkeys(("samples", "tokens", "energy_wh", "energy_source", "energy_measured"))
    seconds_of = "cpu_seconds" if line.get("clock") == CPU else "train_seconds"
    points = [
        {"step": step, "train_seconds": None, **unknown, "metrics": _measured(task, values), seconds_of: seconds}
        for step, seconds, *values in line["points"]
    ]
    verified = line["verified"]
    return {
        "spec": asdict(run),
        "digest": run.digest,
        "points": points,
        "clipped": line["clipped"],
        "alarms": line["alarms"],
        "revision": line.get("revision"),
        "departures": line.get("departures"),
        "wall_seconds": line.get("wall_seconds"),
        "jobs": line.get("jobs"),
        "skipped": line["skipped"],
        "ledger": None if verified is None else {"file": LEDGER_FILE, "verified": verified, "summary": FROM_RECORD},
        "device": None,
    }


def _clock(task: StudyTask, points: Sequence[Mapping[str, Any]]) -> str:
    """By which clock the seconds of a run are recorded: of the processor where the training is done there and the run knows it."""
    known = bool(points) and all(p.get("cpu_seconds") is not None for p in points)
    return CPU if known and task.group != "gpu" else WALL


def _seconds(point: Mapping[str, Any], clock: str) -> float | None:
    seconds = point["cpu_seconds" if clock == CPU else "train_seconds"]
    return None if seconds is None else round(seconds, 2)


def _measured(task: StudyTask, values: Sequence[float | None]) -> dict[str, float]:
    """The metrics that an evaluation had: the perplexity, for one, is measured at the end only."""
    return {name: value for name, value in zip(_metrics(task), values, strict=True) if value is not None}


def _metrics(task: StudyTask) -> tuple[str, str]:
    return "eval_loss", task.quality


def _alarms(ledger: Path) -> list[int] | None:
    """Steps that the controller cut shorter than the static threshold would have once its warm-up was over, and how many came after it."""
    try:
        series = load_series(ledger)
    except (OSError, LedgerError):  # no ledger, or a run that failed before its first block
        return None
    assert series.header is not None
    _, coefficients = series.decisions()
    judged = np.array([reason != Reason.WARMUP.name for reason in series.reasons or ()], dtype=bool)
    static = replay(
        series, AdaptiveClipConfig(controller="static"), static_threshold=series.header["static_threshold"]
    )
    shorter = coefficients < static.coefficients * NOT_ROUNDING
    return [int((shorter & judged).sum()), int(judged.sum())]


def _departures(ledger: Path) -> int | None:
    """Steps that were not scaled as the static threshold would have, shorter or longer; None without a ledger."""
    try:
        series = load_series(ledger)
    except (OSError, LedgerError):
        return None
    assert series.header is not None
    _, coefficients = series.decisions()
    static = replay(
        series, AdaptiveClipConfig(controller="static"), static_threshold=series.header["static_threshold"]
    ).coefficients
    return int((~np.isclose(coefficients, static, rtol=1e-5, atol=0.0, equal_nan=True)).sum())


def _revision(ledger: Path, flags: Sequence[str]) -> int | None:
    """Which version of its rule the run had, by its ledger; a peer's is that of today, and the stock arm has none."""
    if "--optimizer" in flags:
        return PEERS_REVISION
    try:
        header = load_series(ledger).header
    except (OSError, LedgerError):
        return None
    return None if header is None else int(header.get("revision", 1))


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
