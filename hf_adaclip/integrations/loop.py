"""An Accelerate training loop for the `*_no_trainer.py` scripts: the whole of it in one place, to be read and copied."""

import inspect
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, get_scheduler, set_seed

from hf_adaclip.audit.run_report import clipping_section, load_run
from hf_adaclip.audit.tail import find_tail
from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.convergence.energy import open_meter
from hf_adaclip.convergence.progress import Progress
from hf_adaclip.convergence.tracker import CONVERGENCE_FILE, Point, Stopwatch, append_point, read_points, write_points
from hf_adaclip.integrations.script import ClipArguments, Ingredients
from hf_adaclip.integrations.trainer import LEDGER_FILE, pace_start

CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")


@dataclass
class LoopArguments:
    """What a Trainer's `TrainingArguments` are to it, under the same names."""

    output_dir: str = field(metadata={"help": "Folder for everything."})
    do_train: bool = field(default=False, metadata={"help": "Train."})
    do_eval: bool = field(default=False, metadata={"help": "Evaluate at the end, and every `--eval_steps`."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a training batch on each device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows of an evaluation batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches that make one optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay, on all parameters."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps in all; above 0 it overrides the epochs."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.0, metadata={"help": "Warm-up in steps; below 1, as a share of all steps."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Static threshold; with a controller, that of its warm-up."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate every so many steps (default: at the end)."}
    )
    save_steps: int | None = field(default=None, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=None, metadata={"help": "Keep only so many checkpoints, the newest."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from (default: the last one in `--output_dir`)."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16 (default: as `accelerate launch` says)."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    seed: int = field(default=42, metadata={"help": "Seed of everything."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """The accelerator of a loop; its sampler can be gone on with from the middle of an epoch."""
    set_seed(arguments.seed)
    return Accelerator(
        cpu=arguments.use_cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
    )


def run_loop(
    accelerator: Accelerator,
    arguments: LoopArguments,
    clip: ClipArguments,
    config: AdaptiveClipConfig,
    parts: Ingredients,
) -> dict[str, float]:
    """Train, evaluate, write checkpoints, `convergence.jsonl`, `all_results.json`, the model and its card.

    Args:
        accelerator: From `make_accelerator`.
        arguments: Schedule and batches.
        clip: Which arm: "stock" is `accelerator.clip_grad_norm_`.
        config: What the flags of the controllers have filled in.
        parts: What is trained.

    Returns:
        All results, as in `all_results.json`.
    """
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    loop = _Loop(accelerator, arguments, clip.resolve(config) or clip.clip, parts, output)
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
        _write_card(output, results)
    accelerator.wait_for_everyone()
    return results


class _Loop:
    def __init__(
        self,
        accelerator: Accelerator,
        arguments: LoopArguments,
        clip: AdaptiveClipConfig | str,
        parts: Ingredients,
        output: Path,
    ) -> None:
        self._accelerator, self._arguments, self._clip, self._parts, self._output = (
            accelerator,
            arguments,
            clip,
            parts,
            output,
        )
        rows = [_without_unused(rows, parts.model) for rows in (parts.train_rows, parts.eval_rows)]
        size, eval_size = arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size
        train = DataLoader(rows[0], shuffle=True, collate_fn=parts.collate, batch_size=size)
        evaluation = DataLoader(rows[1], collate_fn=parts.collate, batch_size=eval_size)
        optimizer = torch.optim.AdamW(
            [p for p in parts.model.parameters() if p.requires_grad],
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            fused=True,
        )
        self.model, self._optimizer, self._batches, self._eval_batches = accelerator.prepare(
            parts.model, optimizer, train, evaluation
        )
        self._per_epoch = math.ceil(len(self._batches) / arguments.gradient_accumulation_steps)
        total = math.ceil(arguments.num_train_epochs * self._per_epoch)
        self._steps = arguments.max_steps if arguments.max_steps > 0 else total
        warmup = arguments.warmup_steps
        # The scheduler is stepped once per process and step, so it counts in steps of all processes.
        many = accelerator.num_processes
        self._scheduler = accelerator.prepare(
            get_scheduler(
                arguments.lr_scheduler_type,
                optimizer,
                num_warmup_steps=many * round(warmup if warmup >= 1 else warmup * self._steps),
                num_training_steps=many * self._steps,
            )
        )
        self._clipper = self._make_clipper()
        self._meter = open_meter() if accelerator.is_main_process else None
        self._watch = Stopwatch(self._meter)
        self.last_evaluation: dict[str, float] = {}

    def _make_clipper(self) -> AdaptiveClipper | None:
        if isinstance(self._clip, str):
            return None
        config = self._clip
        if config.ledger == "auto":
            config = config.replace(ledger=str(self._output / LEDGER_FILE))
        if config.static_threshold is None:
            config = config.replace(static_threshold=self._arguments.max_grad_norm)
        if config.pace_start is None:
            warmup = self._arguments.warmup_steps
            config = config.replace(
                pace_start=pace_start(self._steps, warmup if warmup >= 1 else warmup * self._steps)
            )
        return AdaptiveClipper(
            config, accelerator=self._accelerator, optimizer=self._optimizer, model=self.model, ledger=config.ledger
        )

    def train(self) -> dict[str, float]:
        step = self._resume()
        total = torch.zeros((), device=self._accelerator.device)
        begun, done = step, step >= self._steps
        bar = Progress(
            total=self._steps,
            initial=step,
            disable=self._arguments.disable_tqdm or not self._accelerator.is_main_process,
        )
        while not done:
            epoch, within = divmod(step, self._per_epoch)
            self._batches.set_epoch(epoch)
            skipped = within * self._arguments.gradient_accumulation_steps
            batches = self._accelerator.skip_first_batches(self._batches, skipped) if skipped else self._batches
            self.model.train()
            self._watch.run()
            loss_of_step = None
            for batch in batches:
                with self._accelerator.accumulate(self.model):
                    loss = self.model(**batch).loss
                    self._accelerator.backward(loss)
                    part = loss.detach() / self._arguments.gradient_accumulation_steps
                    loss_of_step = part if loss_of_step is None else loss_of_step + part
                    if self._accelerator.sync_gradients:
                        self._clip_gradients(loss_of_step)
                        total, loss_of_step = total + loss_of_step, None
                    self._optimizer.step()
                    self._scheduler.step()
                    self._optimizer.zero_grad()
                if not self._accelerator.sync_gradients:
                    continue
                step += 1
                bar.update()
                done = step >= self._steps
                self._after_step(step, last=done)
                if done:
                    break
        bar.close()
        if self._clipper is not None:
            self._clipper.close()
        self._watch.pause()
        return {"train_loss": float(total) / max(step - begun, 1), "train_runtime": round(self._watch.seconds, 3)}

    def _clip_gradients(self, loss: Tensor) -> None:
        if self._clipper is not None:
            self._clipper.clip_(self.model.parameters(), loss=loss)
        elif self._clip == "stock":
            self._accelerator.clip_grad_norm_(self.model.parameters(), self._arguments.max_grad_norm)

    def _after_step(self, step: int, *, last: bool) -> None:
        arguments = self._arguments
        if arguments.do_eval and (last or (arguments.eval_steps and step % arguments.eval_steps == 0)):
            self._watch.pause()
            self.last_evaluation = self.evaluate()
            self._record(step)
            self._watch.run()
        if arguments.save_steps and step % arguments.save_steps == 0:
            self._watch.pause()
            self._save(step)
            self._watch.run()

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
                scores.append(both[0].float().cpu())
                labels.append(both[1].cpu())
        self.model.train()
        metrics = {"eval_loss": float(torch.cat(losses).float().mean())}
        if self._parts.compute_metrics is not None:
            prediction = EvalPrediction(predictions=torch.cat(scores).numpy(), label_ids=torch.cat(labels).numpy())
            metrics.update({f"eval_{k}": float(v) for k, v in self._parts.compute_metrics(prediction).items()})
        return {**metrics, **self._parts.add(metrics)}

    def _record(self, step: int) -> None:
        if self._accelerator.is_main_process:
            batch = self._arguments.per_device_train_batch_size * self._accelerator.num_processes
            point = Point(
                step=step,
                samples=step * batch * self._arguments.gradient_accumulation_steps,
                tokens=None,
                train_seconds=self._watch.seconds,
                energy_wh=self._watch.energy_wh,
                energy_source=None if self._meter is None else self._meter.source,
                energy_measured=None if self._meter is None else self._meter.measured,
                metrics=self.last_evaluation,
            )
            append_point(self._output / CONVERGENCE_FILE, point)

    def _save(self, step: int) -> None:
        folder = self._output / f"checkpoint-{step}"
        self._accelerator.save_state(str(folder))
        if self._accelerator.is_main_process:
            (folder / "seconds.json").write_text(json.dumps({"train_seconds": self._watch.seconds}), encoding="utf-8")
            limit = self._arguments.save_total_limit
            for old in _checkpoints(self._output)[:-limit] if limit else []:
                shutil.rmtree(old)

    def _resume(self) -> int:
        """Load the checkpoint to go on from; the step that it was written at, 0 without one."""
        found = _checkpoints(self._output)
        named = self._arguments.resume_from_checkpoint
        folder = Path(named) if named else (found[-1] if found else None)
        points = self._output / CONVERGENCE_FILE
        match = None if folder is None else CHECKPOINT.fullmatch(folder.name)
        if folder is None or match is None:
            if folder is not None:
                raise ValueError(f"`--resume_from_checkpoint` must be a folder checkpoint-N, but is {folder} instead.")
            if self._accelerator.is_main_process:
                write_points(points, [])
            return 0
        step = int(match.group(1))
        self._accelerator.load_state(str(folder))
        seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["train_seconds"]
        self._watch = Stopwatch(self._meter, seconds=seconds)
        if self._accelerator.is_main_process:
            write_points(points, [p for p in (read_points(points) if points.is_file() else []) if p.step <= step])
        return step


def _without_unused(rows: Any, model: Any) -> Any:
    """Rows without the columns that the model does not take, as a Trainer leaves them; not those that a transform is made from."""
    if rows.format["type"] == "custom":
        return rows
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels"}
    return rows.remove_columns([c for c in rows.column_names if c not in taken])


def _checkpoints(output: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    found = [p for p in output.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and (p / "seconds.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _write_card(output: Path, results: dict[str, float]) -> None:
    lines = [f"| {name} | {value:.6g} |" for name, value in sorted(results.items())]
    text = "\n".join(["# Results", "", "| | |", "| --- | --- |", *lines])
    ledger = output / LEDGER_FILE
    if ledger.is_file():
        text += f"\n\n{clipping_section(load_run(ledger), find_tail(ledger).sha256)}"
    data = ModelCardData(library_name="transformers", tags=["hf_adaclip"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(output / "README.md")
