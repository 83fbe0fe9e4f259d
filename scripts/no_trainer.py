"""Any of the three tasks without a Trainer: an Accelerate loop, with the clipping that `--clip` chooses, to be read and copied.

    accelerate launch scripts/no_trainer.py --task glue --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --output_dir out --do_train --do_eval --clip adaptive
    accelerate launch scripts/no_trainer.py --task clm --model_name_or_path openai-community/gpt2 --train_file notes.txt \
        --output_dir out --do_train --do_eval --clip adaptive
    accelerate launch scripts/no_trainer.py --task image_classification --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --output_dir out --do_train --do_eval --clip adaptive

Data, model and their flags are those of `run_glue.py`, `run_clm.py` and `run_image_classification.py`; the schedule's flags have the names
of `TrainingArguments`. As there, the arguments after `--task` may stand in one .json or .yaml file, and files and a config will do without
a hub. A run starts anew unless `--resume_from_checkpoint` says otherwise.
"""

import argparse
import inspect
import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# Python puts the folder of a script first in its path, so that it finds its neighbours from anywhere.
import run_clm
import run_glue
import run_image_classification
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData
from no_trainer_arguments import LAST, LoopArguments, make_accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, get_scheduler

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import ConfigError, TrainingTroubleError
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.incidents.replay import replay_if_asked
from hf_adaclip.integrations.rewinding import set_aside
from hf_adaclip.integrations.script_args import ClipArguments, Ingredients, parse_arguments, run_script
from hf_adaclip.ledger.schema import LEDGER_FILE
from hf_adaclip.ledger.tail import find_tail
from hf_adaclip.report.run_report import clipping_section, load_run
from hf_adaclip.run.run_plan import RunPlan
from hf_adaclip.telemetry.energy import open_meter
from hf_adaclip.telemetry.point import CONVERGENCE_FILE, Point, Stopwatch, append_point, read_points, write_points
from hf_adaclip.telemetry.progress import Progress

logger = logging.getLogger(__name__)

TASKS: Final = {"glue": run_glue, "clm": run_clm, "image_classification": run_image_classification}
CHECKPOINT: Final = re.compile(r"checkpoint-\d+")


def run_loop(
    accelerator: Accelerator,
    arguments: LoopArguments,
    clip: ClipArguments,
    parts: Ingredients,
) -> dict[str, float]:
    """Train, evaluate, write checkpoints, `convergence.jsonl`, `all_results.json`, the model and its card.

    Args:
        accelerator: From `make_accelerator`.
        arguments: Schedule and batches.
        clip: Which arm, and its settings: "stock" is `accelerator.clip_grad_norm_`.
        parts: What is trained.

    Returns:
        All results, as in `all_results.json`.
    """
    output = Path(arguments.output_dir or ".")
    if arguments.ignored:
        flags = ", ".join(f"--{name}" for name in arguments.ignored)
        logger.warning("This loop does not follow %s; the script with a Trainer does.", flags)
    output.mkdir(parents=True, exist_ok=True)
    loop = Loop(accelerator, arguments, clip.resolve() or clip.clip, parts, output)
    results: dict[str, float] = {}
    if arguments.do_train:
        results.update(loop.train())
    if arguments.do_eval:
        results.update(loop.last_evaluation or loop.evaluate())
    if accelerator.is_main_process:
        (output / "all_results.json").write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
        accelerator.unwrap_model(loop.model).save_pretrained(output)
        if parts.processor is not None:
            parts.processor.save_pretrained(output)
        loop.only_record("README.md", lambda: _write_card(output, results))
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return results


class Loop:
    """One run: what is trained, and where it stands."""

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: LoopArguments,
        clip: AdaptiveClipConfig | str,
        parts: Ingredients,
        output: Path,
    ) -> None:
        self._accelerator, self._arguments, self._clip = accelerator, arguments, clip
        self._parts, self._output = parts, output
        rows = [_without_unused(rows, parts.model) for rows in (parts.train_rows, parts.eval_rows)]
        size, eval_size = arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size
        workers = arguments.dataloader_num_workers
        train = DataLoader(rows[0], shuffle=True, collate_fn=parts.collate, batch_size=size, num_workers=workers)
        evaluation = DataLoader(rows[1], collate_fn=parts.collate, batch_size=eval_size, num_workers=workers)
        optimizer = torch.optim.AdamW(
            [p for p in parts.model.parameters() if p.requires_grad],
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
            fused=True,
        )
        self.model, self._optimizer, self._batches, self._eval_batches = accelerator.prepare(
            parts.model, optimizer, train, evaluation
        )
        self._per_epoch = math.ceil(len(self._batches) / arguments.gradient_accumulation_steps)
        total = math.ceil(arguments.num_train_epochs * self._per_epoch)
        self._steps = arguments.max_steps if arguments.max_steps > 0 else total
        # The scheduler is stepped once per process and step, so it counts in steps of all processes.
        many = accelerator.num_processes
        self._scheduler = accelerator.prepare(
            get_scheduler(
                arguments.lr_scheduler_type,
                optimizer,
                num_warmup_steps=many * arguments.get_warmup_steps(self._steps),
                num_training_steps=many * self._steps,
                scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
            )
        )
        self._clipper = self._make_clipper()
        self._watch = Stopwatch(open_meter() if accelerator.is_main_process else None)
        self._warned: set[str] = set()
        self._window = torch.zeros((), dtype=torch.float32, device=accelerator.device)  # losses since a log line
        self._logged = 0
        self._saved: list[Path] = []  # checkpoints of this run, the oldest first
        self.last_evaluation: dict[str, float] = {}
        if arguments.report_to:
            config = {k: v for k, v in arguments.to_sanitized_dict().items() if isinstance(v, int | float | str)}
            accelerator.init_trackers(arguments.run_name or "hf_adaclip", config=config)

    def _make_clipper(self) -> AdaptiveClipper | None:
        if isinstance(self._clip, str):
            return None
        config = self._clip
        if config.ledger == "auto":
            config = config.replace(ledger=str(self._output / LEDGER_FILE))
        if config.static_threshold is None:
            config = config.replace(static_threshold=self._arguments.max_grad_norm)
        clipper = AdaptiveClipper(
            config,
            accelerator=self._accelerator,
            optimizer=self._optimizer,
            model=self.model,
            ledger=config.ledger,
            plan=RunPlan(
                steps=self._steps,
                warmup_steps=self._arguments.get_warmup_steps(self._steps),
                epochs=self._steps / self._per_epoch,
                epoch_steps=self._per_epoch,
                checkpoint=self._checkpoint(),
            ),
        )
        if clipper.held_back and self._accelerator.is_main_process:
            logger.warning(clipper.held_back)
        return clipper

    def train(self) -> dict[str, float]:
        # Does nothing but for `hf-adaclip incident OUTPUT_DIR STEP --replay scripts/no_trainer.py FLAGS`.
        replay_if_asked(
            self.model, lambda model, batch: model(**batch).loss, self._accelerator.load_state, self._parts.processor
        )
        step = self._resume()
        offset = 0 if self._clipper is None else step - self._clipper.step
        try:
            if self._clipper is not None:
                self._clipper.leaving(offset)
                self._clipper.snapshot()
            results = self._train(step)
        except BaseException:
            if self._clipper is not None:
                self._clipper.close(clean=False)
            raise
        if self._clipper is not None:
            self._clipper.close(counted_steps=self._steps - offset)
        return results

    def _train(self, step: int) -> dict[str, float]:
        total = torch.zeros((), dtype=torch.float32, device=self._accelerator.device)
        begun, done, self._logged = step, step >= self._steps, step
        hidden = self._arguments.disable_tqdm or not self._accelerator.is_main_process
        bar = Progress(total=self._steps, initial=step, disable=hidden)
        while not done:
            epoch, within = divmod(step, self._per_epoch)
            self._batches.set_epoch(epoch)
            skipped = within * self._arguments.gradient_accumulation_steps
            batches = self._accelerator.skip_first_batches(self._batches, skipped) if skipped else self._batches
            self.model.train()
            self._watch.run()
            loss_of_step = norm = left_out = None
            for batch in batches:
                if left_out is None:  # the first of a step
                    left_out = self._clipper is not None and self._clipper.leaves_out()
                if self._clipper is not None and not left_out:
                    self._clipper.watch(batch, processing_class=self._parts.processor)
                with self._accelerator.accumulate(self.model):
                    if not left_out:
                        loss = self.model(**batch).loss
                        self._accelerator.backward(loss)
                        part = loss.detach() / self._arguments.gradient_accumulation_steps
                        loss_of_step = part if loss_of_step is None else loss_of_step + part
                        if self._accelerator.sync_gradients:
                            norm = self._clip_gradients(loss_of_step, measure=self._is_due("logging", step + 1))
                            total, self._window, loss_of_step = total + loss_of_step, self._window + loss_of_step, None
                        self._optimizer.step()
                    rate = self._optimizer.param_groups[0]["lr"]
                    self._scheduler.step()
                    self._optimizer.zero_grad()
                if not self._accelerator.sync_gradients:
                    continue
                step += 1
                bar.update()
                done = step >= self._steps
                self._logged, left_out = self._logged + bool(left_out), None
                self._look_back(step, last=done)
                self._log(step, norm, rate)
                self._after_step(step, last=done)
                if done:
                    break
        bar.close()
        self._watch.pause()
        return {"train_loss": float(total) / max(step - begun, 1), "train_runtime": round(self._watch.seconds, 3)}

    def _look_back(self, step: int, *, last: bool) -> None:
        """Under `--clip_on_trouble rewind`: back to before trouble, if there was any. The next batch is what comes next."""
        if self._clipper is None:
            return
        try:
            self._clipper.snapshot(last=last)
        except TrainingTroubleError:
            self._save(step)
            raise
        finally:
            if self._clipper.rewound and self._accelerator.is_main_process:
                ahead = step - self._clipper.step
                set_aside(self._output, self._clipper.rewound.first + ahead, self._clipper.rewound.last + ahead)
                self._saved = [folder for folder in self._saved if folder.is_dir()]

    def _clip_gradients(self, loss: Tensor, *, measure: bool) -> Tensor | None:
        if self._clipper is not None:
            return self._clipper.clip_(self.model.parameters(), loss=loss, measure=measure or None)
        if self._clip == "stock":
            norm: Tensor = self._accelerator.clip_grad_norm_(self.model.parameters(), self._arguments.max_grad_norm)
            return norm
        return None

    def _is_due(self, what: str, step: int) -> bool:
        """Whether `logging`, `eval` or `save` comes after this step, by its strategy and its number of steps, as a Trainer has them."""
        strategy = getattr(self._arguments, f"{what}_strategy")
        every = getattr(self._arguments, f"{what}_steps")
        if what == "logging" and step == 1 and self._arguments.logging_first_step:
            return True
        if strategy == "epoch":
            return bool(step % self._per_epoch == 0 or step == self._steps)
        every = math.ceil(every * self._steps) if every and every < 1 else every
        steps = strategy == "steps" or what == "eval"  # `--eval_steps` alone says enough
        due: bool = bool(steps and every) and step % int(every) == 0
        return due

    def _log(self, step: int, norm: Tensor | None, rate: float) -> None:
        """The line that a Trainer logs, on the screen and to the trackers of `--report_to`."""
        if not self._is_due("logging", step):
            return
        loss = float(self._accelerator.gather(self._window.reshape(1)).mean()) / max(step - self._logged, 1)
        self._window, self._logged = torch.zeros_like(self._window), step
        logs: dict[str, Any] = {"loss": loss}
        if norm is not None:
            logs["grad_norm"] = float(norm)
        logs |= {"learning_rate": float(rate), "epoch": step / self._per_epoch}
        if self._clipper is not None:
            logs |= self._clipper.metrics()
            if self._clipper.config.max_pace > 1 and not self._clipper.config.shadow:
                logs["clip/learning_rate"] = logs["learning_rate"] * logs["clip/pace"]
        self._say(step, logs)

    def _say(self, step: int, logs: dict[str, Any]) -> None:
        if self._arguments.report_to:
            self._accelerator.log(logs, step=step)
        if self._accelerator.is_main_process:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in logs.items()}
            Progress.write(f"step {step}/{self._steps}: {shown}")

    def _after_step(self, step: int, *, last: bool) -> None:
        if self._arguments.do_eval and (last or self._is_due("eval", step)):
            self._watch.pause()
            self.last_evaluation = self.evaluate()
            self._say(step, dict(self.last_evaluation))
            self.only_record(CONVERGENCE_FILE, lambda: self._record(step))
            self._watch.run()
        if self._is_due("save", step):
            self._watch.pause()
            self._save(step)
            self._watch.run()

    def only_record(self, what: str, write: Callable[[], None]) -> None:
        """Write something that only records: where that fails it is said, once, and training goes on."""
        try:
            write()
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                logger.warning(
                    "%s could not be written (%s: %s). Training goes on.", what, type(error).__name__, error
                )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        losses, scores, labels = [], [], []
        for batch in self._eval_batches:
            outputs = self.model(**batch)
            rows = len(batch["labels"])
            losses.append(self._accelerator.gather_for_metrics(outputs.loss.detach().repeat(rows)))
            if self._parts.compute_metrics is not None:
                both = self._accelerator.gather_for_metrics((outputs.logits, batch["labels"]))
                scores.append(moved(both[0].float(), HOST))
                labels.append(moved(both[1], HOST))
        self.model.train()
        metrics = {"eval_loss": float(torch.cat(losses).float().mean())}
        if self._parts.compute_metrics is not None:
            prediction = EvalPrediction(predictions=torch.cat(scores).numpy(), label_ids=torch.cat(labels).numpy())
            metrics.update({f"eval_{k}": float(v) for k, v in self._parts.compute_metrics(prediction).items()})
        return {**metrics, **self._parts.add(metrics)}

    def _record(self, step: int) -> None:
        if self._accelerator.is_main_process:
            meter = self._watch.meter
            batch = self._arguments.per_device_train_batch_size * self._accelerator.num_processes
            point = Point(
                step=step,
                samples=step * batch * self._arguments.gradient_accumulation_steps,
                tokens=None,
                train_seconds=self._watch.seconds,
                energy_wh=self._watch.energy_wh,
                energy_source=None if meter is None else meter.source,
                energy_measured=None if meter is None else meter.measured,
                metrics=self.last_evaluation,
                cpu_seconds=self._watch.cpu_seconds,
            )
            append_point(self._output / CONVERGENCE_FILE, point)

    def _save(self, step: int) -> None:
        folder = self._output / f"checkpoint-{step}"
        self._accelerator.save_state(str(folder))
        if self._accelerator.is_main_process:
            spent = json.dumps({"train_seconds": self._watch.seconds, "cpu_seconds": self._watch.cpu_seconds})
            self.only_record("seconds.json", lambda: _write_text(folder / "seconds.json", spent))
            self._saved.append(folder)
            limit = self._arguments.save_total_limit
            while limit and len(self._saved) > limit:
                shutil.rmtree(self._saved.pop(0))

    def _checkpoint(self) -> Path | None:
        """The folder that `--resume_from_checkpoint` names."""
        named = self._arguments.resume_from_checkpoint
        if named != LAST:
            return Path(named) if named else None
        found = _checkpoints(self._output)
        return found[-1] if found else None

    def _resume(self) -> int:
        """Load the checkpoint that `--resume_from_checkpoint` names; the step that it was written at, 0 without one."""
        found, folder = _checkpoints(self._output), self._checkpoint()
        last = found[-1] if found else None
        points = self._output / CONVERGENCE_FILE
        if folder is None:
            if self._accelerator.is_main_process:
                if last is not None:
                    logger.warning("%s stays unused. `--resume_from_checkpoint %s` goes on from it.", last, LAST)
                self.only_record(CONVERGENCE_FILE, lambda: write_points(points, []))
            return 0
        if not CHECKPOINT.fullmatch(folder.name) or not folder.is_dir():
            raise ConfigError(
                f"`--resume_from_checkpoint` must be a folder checkpoint-N or {LAST!r}, but is {str(folder)!r} instead."
            )
        step = _step_of(folder)
        self._saved = [path for path in found if _step_of(path) <= step]
        self._accelerator.load_state(str(folder))
        self.only_record("seconds.json", lambda: self._go_on_counting(folder, points, step))
        return step

    def _go_on_counting(self, folder: Path, points: Path, step: int) -> None:
        spent = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        self._watch.go_on(seconds=spent["train_seconds"], energy_wh=0.0, cpu_seconds=spent.get("cpu_seconds"))
        if self._accelerator.is_main_process:
            write_points(points, [p for p in (read_points(points) if points.is_file() else []) if p.step <= step])


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _without_unused(rows: Any, model: Any) -> Any:
    """Rows without the columns that the model does not take, as a Trainer leaves them; not those that a transform is made from."""
    if rows.format["type"] == "custom":
        return rows
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels"}
    return rows.remove_columns([c for c in rows.column_names if c not in taken])


def _checkpoints(output: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    found = [p for p in output.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _write_card(output: Path, results: dict[str, float]) -> None:
    lines = [f"| {name} | {value:.6g} |" for name, value in sorted(results.items())]
    text = "\n".join(["# Results", "", "| | |", "| --- | --- |", *lines])
    ledger = output / LEDGER_FILE
    if ledger.is_file():
        text += f"\n\n{clipping_section(load_run(ledger), find_tail(ledger).sha256)}"
    data = ModelCardData(library_name="transformers", tags=["hf_adaclip"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(output / "README.md")


def prepare(task: str, model_args: Any, data_args: Any, first: Any, seed: int) -> Ingredients:
    """What is trained, by the task's own script. `first` is a context in which the main process goes ahead of the others."""
    parts: Ingredients
    if task == "glue":
        parts = run_glue.prepare(model_args, data_args, first)
    elif task == "clm":
        parts = run_clm.prepare(model_args, data_args, first, seed)
    else:
        parts = run_image_classification.prepare(model_args, data_args)
    return parts


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say; returns all results."""
    # Without abbreviations, so that `--task_name` stays the task's own.
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--task")
    chosen, rest = before.parse_known_args(argv)
    if chosen.task is None and {"-h", "--help"} & set(rest):
        print(
            f"usage: no_trainer.py --task {{{','.join(TASKS)}}} FLAGS\n\n`--task TASK --help` lists the flags of a task."
        )
        raise SystemExit(0)
    if chosen.task not in TASKS:
        given = "not given" if chosen.task is None else repr(chosen.task)
        raise ConfigError(f"`--task` must be one of {', '.join(TASKS)}, but is {given}.")
    script = TASKS[chosen.task]
    model_args, data_args, loop_args, clip_args = parse_arguments(
        rest, script.ModelArguments, script.DataArguments, schedule=LoopArguments
    )
    accelerator = make_accelerator(loop_args)
    parts = prepare(chosen.task, model_args, data_args, accelerator.main_process_first(), loop_args.seed)
    return run_loop(accelerator, loop_args, clip_args, parts)


if __name__ == "__main__":
    run_script(main)
