"""`hf-adaclip incident RUN STEP --replay SCRIPT`: the batch of an incident through the model of a training script, in this process.

The script runs as always, up to the training loop of its Trainer. That loop is the real one, so the loss is made as it was: precision,
accumulation, label smoothing, a policy's objective. It gets the weights of the checkpoint, and the micro-batches of the incident for its
data, and ends in place of the first clipping. Callbacks are left out, so nothing is written, reported or saved.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, set_seed

from hf_adaclip.errors import ConfigError, LedgerError, UnsupportedSetupError
from hf_adaclip.incidents.contents import contents_of, hashes
from hf_adaclip.incidents.folder import Incident
from hf_adaclip.incidents.kept import Part, parts_of
from hf_adaclip.incidents.replay import (
    Batches,
    Passed,
    Request,
    answer_of,
    asked,
    asking,
    norm_of,
    number_of,
)
from hf_adaclip.integrations.transformers import AdaptiveClipMixin
from hf_adaclip.reliance import require
from hf_adaclip.run.checkpoint import CHECKPOINT
from hf_adaclip.run.ranks import world_size

_NO_ANSWER: Final = (
    "`--replay` must come to a training by transformers.Trainer, but the script {}. Give the flags of the run; a loop of its own calls "
    "`hf_adaclip.incidents.replay.replay_if_asked` before its first step."
)


def last_checkpoint(incident: Incident) -> Path | None:
    """The last one of the run that was written before the step, or right before it; None where there is none."""
    run = incident.folder.parent.parent
    known = [(int(m[1]), f) for f in run.iterdir() if (m := CHECKPOINT.fullmatch(f.name)) and f.is_dir()]
    return max(((n, folder) for n, folder in known if n <= _trainer_step(incident)), default=(0, None))[1]


def _trainer_step(incident: Incident) -> int:
    """As checkpoints count: another number where the run went on from a checkpoint of the stock Trainer."""
    return int(incident.facts.get("trainer_step", incident.step))


def replay_by_script(request: Request, command: Sequence[str]) -> dict[str, Any]:
    """Run a training script up to its training, and have it answer.

    Args:
        request: Which incident, and from which weights.
        command: The script and its flags; `-m MODULE` and its flags for a module. What it prints goes to stderr.

    Returns:
        As `incidents.replay.replay`, with `weights` and `steps_before`.

    Raises:
        ConfigError: There is no such script, or it has not come to a training.
        LedgerError: The batch was not kept.
        UnsupportedSetupError: The script shards its model, or runs in several processes.
    """
    module, rest = command[:1] == ["-m"], list(command)
    name, flags = (rest[1] if len(rest) > 1 else "", rest[2:]) if module else (rest[0], rest[1:])
    if not module and not Path(name).is_file():
        raise ConfigError(f"`--replay` must be followed by a script, or by -m and a module, but {name!r} is no file.")
    if world_size() > 1 or int(os.environ.get("WORLD_SIZE") or 1) > 1:  # torch may not know of it yet
        raise UnsupportedSetupError(
            "`--replay` must run in one process, but several were launched. Call it by itself."
        )
    before, path = sys.argv, list(sys.path)
    sys.argv = [name, *flags]
    if not module:
        sys.path.insert(0, str(Path(name).resolve().parent))
    try:
        with _asking(request), contextlib.redirect_stdout(sys.stderr):
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if request.answer is None and end.code not in (None, 0):
            raise ConfigError(f"`--replay` must come to a training, but {name} ended with status {end.code}.") from end
    finally:
        sys.argv, sys.path[:] = before, path
    if request.answer is None:
        raise ConfigError(_NO_ANSWER.format("ended without one"))
    found = CHECKPOINT.fullmatch(request.checkpoint.name) if request.checkpoint is not None else None
    weights = {
        "weights": None if request.checkpoint is None else str(request.checkpoint),
        "steps_before": None
        if request.checkpoint is not None and found is None
        else _trainer_step(request.incident) - int(found[1] if found else 0),
    }
    return {**request.answer, **weights}


@contextlib.contextmanager
def _asking(request: Request) -> Iterator[None]:
    """While this is open, a Trainer answers in place of training."""
    train, guard = Trainer.train, register_optimizer_step_pre_hook(_refuse_step)

    def answer(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (present := asked()) is not None:
            _Answering(self, present).prepare()
        return train(self, None, *args, **kwargs)

    Trainer.train = answer  # type: ignore[method-assign]
    try:
        with asking(request):
            yield
    finally:
        guard.remove()
        Trainer.train = train  # type: ignore[method-assign]


def _refuse_step(*_: Any) -> NoReturn:
    """Who has not answered by now would train, and write over the run."""
    raise ConfigError(_NO_ANSWER.format("has begun to train without an answer, and was ended before its first step"))


class _Answering:
    """A Trainer whose `train` gives an answer.

    Args:
        trainer: Of any kind.
        request: What is asked.
    """

    def __init__(self, trainer: Any, request: Request) -> None:
        self._trainer, self._request = trainer, request
        self._given = trainer.training_step
        self._dataloader = trainer.get_train_dataloader
        self._losses: list[float] = []
        self._batches: Batches | None = None

    def prepare(self) -> None:
        """Put what answers in the place of what trains.

        Raises:
            UnsupportedSetupError: The model is sharded, or transformers has no seam.
        """
        trainer, args = self._trainer, self._trainer.args
        for name in ("_clip_grad_norm", "_prepare_inputs", "_load_from_checkpoint"):
            require(Trainer, name)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise UnsupportedSetupError(
                "`--replay` must have the whole model in one process, but the script asks for "
                f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'FSDP'}. Leave that flag out, and name a folder with whole weights by "
                "`--checkpoint`."
            )
        if isinstance(trainer, AdaptiveClipMixin):  # it keeps nothing of this, and needs no clipper
            own = {"incidents": False, "self_test": False, "ledger": None}
            trainer._given_config = trainer._given_config.replace(**own)
        trainer.callback_handler.callbacks = []
        args.max_steps, args.eval_on_start, args.auto_find_batch_size = 1, False, False
        args.max_grad_norm = args.max_grad_norm or 1.0  # at 0 the seam is not called
        trainer.get_train_dataloader = self._data
        trainer.training_step = self._step
        trainer._clip_grad_norm = self._end
        # What was kept is what came out of it: no policy is to generate anew.
        trainer._prepare_inputs = lambda inputs: Trainer._prepare_inputs(trainer, inputs)

    def _data(self) -> list[Any]:
        """Where the loop begins, and the model is still as the script has made it."""
        trainer, request = self._trainer, self._request
        parts = parts_of(request.incident, request.rank)
        self._batches = Batches(request.incident, [self._whole(part) for part in parts])
        if request.checkpoint is not None:
            try:
                trainer._load_from_checkpoint(str(request.checkpoint))
            except (ValueError, OSError) as error:
                raise LedgerError(
                    f"{request.checkpoint} must hold the model's whole weights, but does not: {error}. Name another folder by "
                    "`--checkpoint`."
                ) from error
        trainer.args.gradient_accumulation_steps = len(self._batches.all)
        set_seed(trainer.args.seed)
        # Copies, because losses take entries out of theirs.
        return [dict(one) if isinstance(one, dict) else one for one in self._batches.all]

    def _whole(self, part: Part) -> Part:
        """With its micro-batches: made anew from the dataset where only hashes were kept and the samples are known.

        Raises:
            LedgerError: They are not, or the dataset gives others.
        """
        if part.micro_batches is not None or not part.indices or any(one is None for one in part.indices):
            return part
        loader = self._dataloader()
        try:
            made = [dict(loader.collate_fn([loader.dataset[i] for i in places or ()])) for places in part.indices]
        except Exception as error:  # a dataset and a collator of anybody
            raise LedgerError(
                f"{self._request.incident.folder} must hold the batch of the step, or the dataset its samples, but the dataset gives none: "
                f"{type(error).__name__}: {error}."
            ) from error
        if [one["sha256"] for one in hashes(contents_of(made))] != part.hashes:
            raise LedgerError(
                f"{self._request.incident.folder} must hold the batch of the step, or the dataset its samples, but those that the dataset "
                "gives have other hashes: it was changed, is drawn from anew each time, or the flags are others."
            )
        return part._replace(micro_batches=made)

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._losses:
            self._set_scale()
        loss: torch.Tensor = self._given(model, inputs, num_items_in_batch)
        self._losses.append(number_of(loss))
        return loss

    def _set_scale(self) -> None:
        """The loss scale of the step, lest a scaler begin with one that overflows."""
        scaler, recorded = self._scaler, self._request.incident.facts.get("loss_scale")
        if scaler is not None and isinstance(recorded, int | float):
            scaler.load_state_dict({**scaler.state_dict(), "scale": float(recorded)})

    @property
    def _scaler(self) -> Any:
        return getattr(self._trainer.accelerator, "scaler", None)

    def _end(self, model: Any) -> NoReturn:
        """In place of clipping: the gradient of the step is complete."""
        assert self._batches is not None
        trainer, inner = self._trainer, self._trainer.accelerator.unwrap_model(model)
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        passed = Passed(sum(self._losses), *norm_of(inner, scale))

        def alone(number: int, rows: Any) -> tuple[float, float]:
            inner.zero_grad()
            trainer.current_gradient_accumulation_steps = 1
            loss = number_of(self._given(model, rows, None))
            return loss, norm_of(inner, scale)[0]

        processing_class = getattr(trainer, "processing_class", None)
        answer = answer_of(self._batches, passed, alone if self._request.bisect else None, processing_class)
        self._request.end(answer)
