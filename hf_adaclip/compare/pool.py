"""Running many runs, a few at a time, with one progress bar."""

import multiprocessing
import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from hf_adaclip.compare.arms import RunSpec
from hf_adaclip.compare.tasks import TASKS
from hf_adaclip.compare.worker import execute, finished_result, prepare_process
from hf_adaclip.telemetry.progress import Progress

_REPORT_EVERY = 5


def run_all(specs: Sequence[RunSpec], output: Path, *, jobs: int, quiet: bool = False) -> list[dict[str, Any]]:
    """Run what has not been run yet; results come in the order of `specs`.

    Runs are independent processes, so that one that dies takes no other with it. Interrupted and called again with the same
    specs, finished runs are read, not made.

    Args:
        specs: What to run.
        output: Folder of the comparison.
        jobs: Runs at a time; each gets an equal share of the cores.
        quiet: No progress bar.
    """
    results: dict[str, dict[str, Any]] = {}
    waiting: list[RunSpec] = []
    for spec in specs:
        done = finished_result(spec, output)
        if done is None:
            waiting.append(spec)
        else:
            results[spec.digest] = done
    if waiting:
        if len(waiting) < len(specs) and not quiet:
            Progress.write(
                f"{len(specs) - len(waiting)} of {len(specs)} runs are there already; going on with the rest."
            )
        results.update(_run(waiting, output, jobs=jobs, quiet=quiet))
    return [results[spec.digest] for spec in specs]


def _run(specs: Sequence[RunSpec], output: Path, *, jobs: int, quiet: bool) -> dict[str, dict[str, Any]]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Before the workers import torch, which reads it once.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    total = sum(spec.max_steps * TASKS[spec.task].step_cost for spec in specs)
    try:
        with (
            context.Manager() as manager,
            ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_process, initargs=(threads,)) as pool,
            Progress(total=total, disable=quiet, bar_format=_BAR, smoothing=0.05, desc="starting") as bar,
        ):
            news: Any = manager.Queue()
            futures: dict[Future[dict[str, Any]], RunSpec] = {
                pool.submit(_in_worker, spec, output, news): spec for spec in specs
            }
            progress: dict[str, float] = {spec.label: 0 for spec in specs}
            pending = set(futures)
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    _drain(news, progress)
                    for future in finished:
                        spec = futures[future]
                        results[spec.digest] = future.result()
                        progress[spec.label] = spec.max_steps
                        if "error" in results[spec.digest]:
                            Progress.write(f"FAILED {spec.label}: {results[spec.digest]['error']}")
                    _show(bar, specs, progress)
            except BaseException:
                for future in pending:
                    future.cancel()
                for process in (pool._processes or {}).values():
                    process.terminate()
                raise
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return results


_BAR = "{desc} |{bar:24}| {percentage:3.0f}%  {elapsed} elapsed, about {remaining} left"


def _in_worker(spec: RunSpec, output: Path, news: Any) -> dict[str, Any]:
    last = time.monotonic()

    def tell(step: int) -> None:
        nonlocal last
        if step % _REPORT_EVERY == 0 and time.monotonic() - last > 0.2:
            last = time.monotonic()
            news.put((spec.label, step))

    news.put((spec.label, 0.01))
    return execute(spec, output, tell)


def _drain(news: Any, progress: dict[str, float]) -> None:
    while True:
        try:
            label, step = news.get_nowait()
        except queue.Empty:
            return
        progress[label] = max(progress[label], step)


def _show(bar: Any, specs: Sequence[RunSpec], progress: dict[str, float]) -> None:
    running = [s.label for s in specs if 0 < progress[s.label] < s.max_steps]
    done = sum(progress[s.label] >= s.max_steps for s in specs)
    idle = "finishing" if done == len(specs) else "starting"
    bar.set_description_str(
        f"run {min(done + 1, len(specs))}/{len(specs)}: {' + '.join(running) or idle}", refresh=False
    )
    # The first seconds are spent on imports; a rate taken from them would promise weeks.
    known = sum(progress.values()) > 0.03 * sum(s.max_steps for s in specs)
    bar.bar_format = _BAR if known else _BAR.replace("about {remaining} left", "estimating")
    bar.n = min(sum(progress[s.label] * TASKS[s.task].step_cost for s in specs), bar.total)
    bar.refresh()
