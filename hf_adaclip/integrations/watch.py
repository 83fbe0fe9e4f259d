"""What a Trainer's clipping is held to in every step: that the seam was reached, once, before the optimizer moves."""

import inspect
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_adaclip.errors import ClippingDefeatedError, ConfigError
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.integrations.seam import check_max_grad_norm
from hf_adaclip.run.run_plan import steps_per_epoch

if TYPE_CHECKING:
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin


class SeamWatch(TrainerCallback):
    """Runs the self-test as training begins, and compares the steps that were decided on with those that the Trainer counts.

    All of it is arithmetic on numbers of the host. With `self_test=False` what is found is a warning, and stands in the ledger's footer.

    Args:
        trainer: Whose steps are watched.

    Attributes:
        offset: What the Trainer's steps are ahead of the clipper's.
    """

    def __init__(self, trainer: "AdaptiveClipMixin") -> None:
        self._trainer = trainer
        self.offset = self._decided = self._stepped = 0
        self._looked = self._midway = False
        self._evaluated: str | None = None
        self._once = 1
        self._handle: Any = None

    @property
    def counted_steps(self) -> int:
        """Steps that the Trainer has made, counted as the clipper counts: from where its state begins."""
        return int(self._trainer.state.global_step) - self.offset

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        clipper = self._trainer._ready_clipper()
        self._evaluated = None  # another run may have other sets
        self.offset = state.global_step - clipper.step  # above 0 when the stock Trainer made the checkpoint
        clipper.begins_after(self.offset)
        self._decided, self._looked, self._stepped, self._midway = clipper.step, False, 0, False
        if state.global_step and not args.ignore_data_skip:
            skipped = _skipped(args, state, kwargs.get("train_dataloader"))
            self._midway = bool(skipped)
            self._trainer._samples.begin_midway(skipped)
        if self._trainer.clip_config.self_test:
            clipper.self_test(model.parameters())
        self._count_steps(self._trainer.optimizer)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        midway, self._midway = self._midway, False
        if not midway:  # it had begun before the run was resumed
            self._trainer._ready_clipper().begin_epoch()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # Somebody's own call of `evaluate`, before training or after it, says nothing about this run.
        if self._handle is None or self._trainer.clipper is None or not isinstance(metrics, dict):
            return
        losses = {k: v for k, v in metrics.items() if k.startswith("eval_") and k.endswith("_loss")}
        # Of several sets each has its own level: the first counts.
        self._evaluated = self._evaluated or next(iter(losses), None)
        if self._evaluated in losses:
            self._trainer.clipper.evaluated(losses[self._evaluated])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._looked:  # a training loop that does not tell of its optimizer's steps
            self._look()
        if self._stepped > self._once:
            self._warn(
                "the optimizer stepped more than once in a step of the Trainer, but clipping decided once: a callback or a hook calls "
                "`optimizer.step()` itself. Those steps are not in the ledger."
            )
        self._looked, self._stepped = False, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._joined:
            self._trainer._joined = False
            self._trainer._end_clipping(clean=True)

    def end(self) -> None:
        """Let go of the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self) -> None:
        clipper = self._trainer._ready_clipper()
        calls, self._decided, self._looked = clipper.step - self._decided, clipper.step, True
        if calls > 1:
            self._warn(
                "clipping was called more than once in a step: something besides the Trainer calls `_clip_grad_norm` or `clip_`. "
                "The ledger has a record for each call."
            )
        if calls:
            return
        check_max_grad_norm(self._trainer.args.max_grad_norm)
        if not self._trainer.clip_config.self_test:
            self._warn("a step was made without clipping: `_clip_grad_norm` was not called. The ledger says how many.")
            return
        raise ClippingDefeatedError(
            f"`Trainer._clip_grad_norm` must be called in every optimizer step, but {type(self._trainer).__name__} went without it in "
            f"step {self._trainer.state.global_step}: something has replaced the method or the training loop. Let the mixin stand first "
            "among the bases, attach last, and call `super()._clip_grad_norm(model)` in a method of your own. With `self_test=False` this "
            "is a warning."
        )

    def _warn(self, message: str) -> None:
        self._trainer._ready_clipper().alerts.warn_once(message)

    def _count_steps(self, optimizer: Any) -> None:
        self.end()
        try:
            inner = unwrap_optimizer(optimizer)
        except ConfigError:  # an engine steps by itself
            return
        self._once = _hooks_of_a_step(type(inner))
        self._handle = inner.register_step_post_hook(self._count)

    def _count(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepped += 1


def _skipped(args: Any, state: Any, dataloader: Any) -> int | None:
    """Micro-batches of the present epoch that a resumed Trainer passes over; None where an epoch has no known length."""
    accumulated = int(args.gradient_accumulation_steps)
    steps = steps_per_epoch(dataloader, accumulated)
    return None if steps is None else int(state.global_step) % steps * accumulated


def _hooks_of_a_step(kind: type) -> int:
    """How often torch runs its hooks in one `step`: once for each class whose `step` calls `super().step()`, and once more."""
    steps = dict.fromkeys(inspect.unwrap(vars(k)["step"]) for k in kind.__mro__ if "step" in vars(k))
    count = 1
    for step in list(steps)[:-1]:
        code = getattr(step, "__code__", None)
        if code is None or "__class__" not in code.co_freevars or "step" not in code.co_names:
            break
        count += 1
    return count
