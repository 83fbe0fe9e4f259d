"""Runs of a training script, each in a process of its own: what is started, what is read from what it leaves.

`result.json` is the last thing that a run gets: one without it was cut off.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.compare import fork_server
from hf_adaclip.config import AdaptiveClipConfig, incident_settings
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.controllers.presets import SHAPE_OFF
from hf_adaclip.errors import ConfigError, LedgerError
from hf_adaclip.ledger.schema import LEDGER_FILE
from hf_adaclip.telemetry.point import CONVERGENCE_FILE, read_points
from hf_adaclip.telemetry.progress import Progress

MODULE: Final = "-m"
RESULT_FILE: Final = "result.json"
LOG_FILE: Final = "log.txt"
CAME_LATER: Final = {**SHAPE_OFF, "spectral_every": 1, "spectral_memory": 0.0, "snapshot_steps": 100, "max_rewinds": 3}
"""Settings younger than recorded runs, with the default that leaves a run what it was before there were any: only another one counts."""
PACE_ONLY: Final = frozenset({4, 5})
"""Revisions of `adaptive` that changed the pace and nothing else: where that is off, a run is that of the revision before."""


@dataclass(frozen=True)
class ScriptRun:
    """One run of a script.

    Attributes:
        task, arm, seed: Which run.
        launcher: What stands before the script: an interpreter, or `accelerate launch ...`.
        script: The script, or `-m` and a module, and the user's flags.
        flags: The arm's flags; they come last, and win.
    """

    task: str
    arm: str
    seed: int
    launcher: tuple[str, ...]
    script: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.task} {self.arm} seed {self.seed}"

    @property
    def folder(self) -> str:
        """Where the run's files go, relative to the comparison's folder."""
        return f"runs/{self.task}/{self.arm}/seed-{self.seed}"

    @property
    def digest(self) -> str:
        """Hash of all that decides the run, the script's text and the defaults of this package that it goes by included."""
        arguments = [*self.script, *self.flags]
        text = json.dumps([asdict(self), defaults_behind(arguments)], sort_keys=True)
        files = [file_of(self.script), *([Path(clip)] if (clip := _clip_of(arguments)) else [])]
        return hashlib.sha256(text.encode() + b"".join(f.read_bytes() for f in files if f and f.is_file())).hexdigest()

    def arguments(self, output: Path) -> list[str]:
        """The script and all its flags."""
        return [*self.script, *self.flags, "--seed", str(self.seed), "--output_dir", str(output / self.folder)]


def file_of(script: Sequence[str]) -> Path | None:
    """The file that holds a script, or the module after `-m`; None where there is no such module."""
    if script[0] != MODULE:
        return Path(script[0])
    try:
        found = importlib.util.find_spec(script[1])
    except (ImportError, IndexError, ValueError):
        return None
    return None if found is None or found.origin is None else Path(found.origin)


def defaults_behind(arguments: Sequence[str]) -> dict[str, Any]:
    """Defaults of this package that a run goes by, with the revisions of what takes part: none for the stock Trainer, those of a config,
    or of several by controller. What the flags say themselves is left out, and so are settings of a part that is off.

    Args:
        arguments: All flags of the run; of several `--clip` the last one counts.
    """
    name = _clip_of(arguments)
    if name in ("stock", "none"):
        return {}
    chosen = (name or "").partition(":")[0]
    if chosen in CONTROLLERS and not any("parameter_rules" in argument.replace("-", "_") for argument in arguments):
        return _behind(chosen, name or "")
    # A file of settings, or rules, may name any controller.
    return {**{other: _defaults_of(other) for other in CONTROLLERS}, **_revisions_of_parts(True, True, reaching=True)}


def revision_that_counts(controller: str, revision: int, *, paced: bool) -> int:
    """The latest revision of a rule, up to the given one, that changed anything for a run with or without the pace."""
    while controller == "adaptive" and not paced and revision in PACE_ONLY:
        revision -= 1
    return revision


def may_pace(config: AdaptiveClipConfig) -> bool:
    """Whether a run of these settings may have a pace: it is on where it is not set and can be."""
    return bool(getattr(config.settings, "max_pace", 1) != 1)


def _behind(controller: str, clip: str) -> dict[str, Any]:
    found = _defaults_of(controller)
    try:
        config = AdaptiveClipConfig.resolve(clip)
    except ConfigError:  # the run will say so
        return found
    given = {part.partition("=")[0].strip() for part in clip.partition(":")[2].split(",")}
    ours = controller == "adaptive"  # to which alone 'auto' gives anything
    paced, width = may_pace(config), config.spectral_width
    ranged = ours if width == "auto" else config.spectral is not None and not math.isinf(config.spectral)
    agreed = ours if config.agreement == "auto" else config.agreement is True
    off = [*([] if paced else ["pace_"]), *([] if ranged else ["spectral_"])]
    kept = {name: v for name, v in found.items() if name not in given and not name.startswith(tuple(off))}
    kept["revision"] = revision_that_counts(controller, found["revision"], paced=paced)
    return {**kept, **_revisions_of_parts(ranged, agreed, reaching=ours and paced and ranged)}


def _revisions_of_parts(ranged: bool, agreed: bool, *, reaching: bool) -> dict[str, int]:
    from hf_adaclip.gradients import agreement, distance, spectral  # they import torch

    parts = {
        "spectral": (ranged, spectral.REVISION),
        "agreement": (agreed, agreement.REVISION),
        "reach": (reaching, distance.REVISION),
    }
    return {f"{name}_revision": revision for name, (on, revision) in parts.items() if on}


def _defaults_of(controller: str) -> dict[str, Any]:
    values = AdaptiveClipConfig(controller=controller).to_dict() | ({} if controller == "adaptive" else SHAPE_OFF)
    decides = {name: value for name, value in values.items() if name not in incident_settings()}
    kept = {name: value for name, value in decides.items() if name not in CAME_LATER or value != CAME_LATER[name]}
    return {**kept, "revision": CONTROLLERS[controller].revision}


def _clip_of(arguments: Sequence[str]) -> str | None:
    """What `--clip` says, in any of the forms that argparse takes; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--clip")
    known: str | None = parser.parse_known_args(arguments)[0].clip
    return known


def run_scripts(
    runs: Sequence[ScriptRun],
    output: Path,
    *,
    jobs: int,
    quiet: bool = False,
    warm: bool = False,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Run what has not been run yet; results come in the order of `runs`.

    A run that fails is a result too: it has `error` in place of points, and is made again when the command is repeated. Interrupted
    runs go on from their last checkpoint, if the script does that.

    Args:
        runs: What to run.
        output: Folder of the comparison.
        jobs: Runs at a time.
        quiet: No progress bar.
        warm: Fork runs without a launcher of their own off a process that has imported the libraries; see `fork_server`.
        threads: Of each run; None: an equal share of the cores.
    """
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        done = finished_result(run, output)
        if done is not None:
            results[run.digest] = done
    waiting = [run for run in runs if run.digest not in results]
    if waiting and len(waiting) < len(runs) and not quiet:
        Progress.write(f"{len(runs) - len(waiting)} of {len(runs)} runs are there already; going on with the rest.")
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    with (
        ThreadPoolExecutor(jobs) as pool,
        Progress(total=len(waiting), disable=quiet or not waiting, unit="run") as bar,
    ):
        processes: list[Any] = []
        ended = threading.Event()
        futures = {
            pool.submit(_execute, run, output, threads, processes.append, warm, jobs, ended): run for run in waiting
        }
        try:
            for future in as_completed(futures):
                run, result = futures[future], future.result()
                results[run.digest] = result
                bar.set_description(run.label, refresh=False)
                bar.update()
                if "error" in result:
                    Progress.write(f"FAILED {run.label}: {result['error']} (see {output / run.folder / LOG_FILE})")
        except BaseException:
            ended.set()
            for future in futures:
                future.cancel()
            for process in processes:
                process.terminate()
            raise
    return [results[run.digest] for run in runs]


def _execute(
    run: ScriptRun,
    output: Path,
    threads: int,
    started: Callable[[Any], None],
    warm: bool,
    jobs: int,
    ended: threading.Event,
) -> dict[str, Any]:
    folder = output / run.folder
    mark = folder / "run.json"
    text = json.dumps({**asdict(run), "digest": run.digest}, indent=1) + "\n"
    if folder.is_dir() and (not mark.is_file() or mark.read_text(encoding="utf-8") != text):
        shutil.rmtree(folder)  # of other settings: nothing of it may be gone on with
    if folder.is_dir() and not any(folder.glob("checkpoint-*")):
        shutil.rmtree(folder)  # cut off before its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(text, encoding="utf-8")
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    if warm and fork_server.AVAILABLE and run.launcher == python_launcher():
        forked = fork_server.start(run.arguments(output), folder / LOG_FILE, environment)
        started(forked)
        forked.join()
        code = forked.exitcode
    else:
        with open(folder / LOG_FILE, "ab") as log:
            command = [*run.launcher, *run.arguments(output)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            started(process)
            code = process.wait()
    result: dict[str, Any] = {"spec": asdict(run), "digest": run.digest}
    try:
        if code != 0:
            raise RuntimeError(f"exit code {code}: {_last_line(folder / LOG_FILE)}")
        result.update(read_run(folder))
    except (RuntimeError, OSError, ValueError, LedgerError) as error:
        result["error"] = str(error)
    result["wall_seconds"], result["jobs"] = round(time.perf_counter() - begin, 3), jobs
    if not ended.is_set():  # what was cut off has not failed
        write_result(folder, result)
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json` in one move: it is there whole or not at all."""
    unfinished = folder / f"{RESULT_FILE}.part"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / RESULT_FILE)


def finished_result(run: ScriptRun, output: Path) -> dict[str, Any] | None:
    """The result of an earlier, successful run of exactly this kind, or None."""
    try:
        result = json.loads((output / run.folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or "error" in result or result.get("digest") != run.digest:
        return None
    return result


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run has left: its evaluations, and what its ledger says.

    Evaluations come from `convergence.jsonl`, or without it from `trainer_state.json` of the stock Trainer (steps only, no times).

    Raises:
        ValueError: There is no evaluation in it.
    """
    from hf_adaclip.audit import verify_ledger
    from hf_adaclip.audit.ingest import load_series
    from hf_adaclip.ledger.schema import plain

    path = folder / CONVERGENCE_FILE
    points = [asdict(p) for p in read_points(path)] if path.is_file() else _from_trainer_state(folder)
    if not points:
        raise ValueError(
            "no evaluation was found: the script must evaluate during training (--eval_strategy steps --eval_steps N) and write "
            "convergence.jsonl (make_trainer, ConvergenceCallback) or trainer_state.json into --output_dir"
        )
    found: dict[str, Any] = {
        "points": plain(points),
        "clipped": None,
        "skipped": None,
        "ledger": None,
        "device": None,
    }
    ledger = folder / LEDGER_FILE
    if ledger.is_file():
        report, series = verify_ledger(ledger), load_series(ledger)
        _, coefficients = series.decisions()
        left_out = ~np.isfinite(series.norms) | (coefficients == 0)
        found.update(
            clipped=int(((coefficients < 1) & ~left_out).sum()),
            skipped=int(left_out.sum()),
            ledger={"file": LEDGER_FILE, "verified": report.ok, "summary": report.summary().split(": ", 1)[1]},
            device=(series.header or {}).get("device"),
        )
    return found


def _from_trainer_state(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in the words of `convergence.jsonl`; what they cost in seconds or energy is not in the file."""
    states = [folder / "trainer_state.json", *sorted(folder.glob("checkpoint-*/trainer_state.json"))]
    state = next((s for s in states if s.is_file()), None)
    history = [] if state is None else json.loads(state.read_text(encoding="utf-8"))["log_history"]
    unknown = dict.fromkeys(("samples", "tokens", "train_seconds", "energy_wh", "energy_source", "energy_measured"))
    return [
        {
            "step": int(entry["step"]),
            **unknown,
            "metrics": {k: float(v) for k, v in entry.items() if k.startswith("eval_") and isinstance(v, int | float)},
        }
        for entry in history
        if "eval_loss" in entry
    ]


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def python_launcher() -> tuple[str, ...]:
    """The interpreter of this process."""
    return (sys.executable,)
