"""One run of one arm, start to end, in whatever process calls it."""

import json
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

from hf_adaclip.compare.arms import RunSpec

RESULT_FILE: Final = "result.json"


def prepare_process(threads: int) -> None:
    """Settings of a worker process: threads, quiet libraries, deterministic kernels where torch has them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import transformers
    from datasets.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bar()
    logging.getLogger("codecarbon").disabled = True
    warnings.simplefilter("ignore")


def execute(spec: RunSpec, output: Path, on_steps: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train, and write `result.json` as the last thing: a run without it was not finished and is made again.

    A run that raises is a result too: it has `error` in place of points, and is shown, not dropped.

    Args:
        spec: What to run.
        output: The comparison's folder.
        on_steps: Called with the number of steps done.
    """
    folder = output / spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    result: dict[str, Any] = {"spec": asdict(spec), "digest": spec.digest}
    started = time.perf_counter()
    try:
        result.update(_train(spec, folder, on_steps))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    result["wall_seconds"] = round(time.perf_counter() - started, 3)
    write_result(folder, result)
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json` in one move: it is there whole or not at all."""
    unfinished = folder / f"{RESULT_FILE}.part"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / RESULT_FILE)


class Spec(Protocol):
    """What a result is found by: where it lies, and what it has to have been made with."""

    @property
    def folder(self) -> str: ...

    @property
    def digest(self) -> str: ...


def finished_result(spec: Spec, output: Path) -> dict[str, Any] | None:
    """The result of an earlier, successful run of exactly this spec, or None."""
    path = output / spec.folder / RESULT_FILE
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or "error" in result or result.get("digest") != spec.digest:
        return None
    return result


def _train(spec: RunSpec, folder: Path, on_steps: Callable[[int], None] | None) -> dict[str, Any]:
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from hf_adaclip.audit import verify_ledger
    from hf_adaclip.compare.tasks import TASKS
    from hf_adaclip.config import AdaptiveClipConfig
    from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
    from hf_adaclip.integrations.transformers import LEDGER_FILE, AdaptiveClipTrainer
    from hf_adaclip.run.versions import environment
    from hf_adaclip.telemetry.point import CONVERGENCE_FILE, read_points

    for name in (LEDGER_FILE, CONVERGENCE_FILE):  # of a run that was cut off here earlier
        (folder / name).unlink(missing_ok=True)
    set_seed(spec.seed)
    parts = TASKS[spec.task].build()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.max_steps,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup_ratio,
        max_grad_norm=spec.max_grad_norm,
        eval_strategy="steps",
        eval_steps=spec.eval_steps,
        logging_steps=spec.eval_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        include_num_input_tokens_seen="all" if parts.compute_metrics is None else "no",
        seed=spec.seed,
        data_seed=spec.seed,
    )
    ingredients: dict[str, Any] = {
        "model": parts.model,
        "args": arguments,
        "train_dataset": parts.train_dataset,
        "eval_dataset": parts.eval_dataset,
        "compute_metrics": parts.compute_metrics,
    }
    callback = ConvergenceCallback(folder, estimate_energy=True, on_steps=on_steps)
    if spec.clip is None:
        trainer = Trainer(**ingredients)
    else:
        trainer = AdaptiveClipTrainer(**ingredients, clip=AdaptiveClipConfig.from_dict(spec.clip))
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    points = [json.loads(line) for line in (folder / CONVERGENCE_FILE).read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {
        "points": points,
        "train_loss": [
            [entry["step"], entry["loss"]]
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > 0
        ],
        "final_metrics": read_points(folder / CONVERGENCE_FILE)[-1].metrics,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "device": str(arguments.device),
        "versions": environment(),
        "clipped": None,
        "skipped": None,
        "ledger": None,
    }
    if isinstance(trainer, AdaptiveClipTrainer) and trainer.clipper is not None:
        report = verify_ledger(folder / LEDGER_FILE)
        statistics = trainer.clipper.statistics
        result.update(
            clipped=statistics.clipped,
            skipped=statistics.skipped,
            ledger={"file": LEDGER_FILE, "verified": report.ok, "summary": report.summary().split(": ", 1)[1]},
        )
    return result
