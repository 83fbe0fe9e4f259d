"""All optimizers that step on one set of gradients: armed together, and found out when others step in their place."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.gradients.agreement import Agreement
from hf_adaclip.gradients.callers import steps_running
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.optimizers import SkipPath
from hf_adaclip.gradients.probe import probe
from hf_adaclip.gradients.step_guard import StepGuard
from hf_adaclip.gradients.transfer import moved

logger = logging.getLogger(__name__)

PATIENCE: Final = 20
"""Finite steps in a row that are prepared and never made, until somebody is told. A loop may leave out some by itself."""


class Guards:
    """The guards of all optimizers that step on one set of gradients; there may be none, when no optimizer is known.

    Args:
        optimizers: Optimizers, each once, wrapped by Accelerate or not.
        scaler: Whether a `GradScaler` drives them.
        shapes: Whether steps are paced, or in part taken back.
    """

    def __init__(self, optimizers: Sequence[Any], *, scaler: bool, shapes: bool = True) -> None:
        self._scaler, self._shapes = scaler, shapes
        self._guards = self._guard(optimizers)
        self._adopted = False
        self._probed: weakref.WeakSet[StepGuard] = weakref.WeakSet()
        self._seen: tuple[int, ...] | None = None
        self._known: set[int] | None = None
        self._count = -1
        self._paced = False
        self._skip: Value | None = None
        self._known_skip: bool | None = None
        self._idle = 0
        self._told = False
        self._loaded_shares: Tensor | None = None
        self._strangers = _Strangers(self)

    def _guard(self, optimizers: Sequence[Any]) -> list[StepGuard]:
        return [StepGuard(o, scaler=self._scaler, shapes=self._shapes) for o in optimizers]

    def __bool__(self) -> bool:
        return bool(self._guards)

    @property
    def why(self) -> list[str]:
        """Per optimizer, how a step is left out and why so."""
        read = " (but for the pace: in half precision a small decay needs it as a number)"
        return [f"{guard.why}{read if self._paced and guard.reads_pace else ''}" for guard in self._guards]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers, without what Accelerate wraps around them."""
        return [guard.optimizer for guard in self._guards]

    @property
    def others_look(self) -> bool:
        """Whether hooks of others run before a step: they are to see gradients as clipping leaves them."""
        hooks = [h for guard in self._guards for h in guard.optimizer._optimizer_step_pre_hooks.values()]
        return any(not isinstance(getattr(hook, "__self__", None), StepGuard) for hook in hooks)

    @property
    def paths(self) -> list[SkipPath]:
        """How each leaves a step out."""
        return [guard.path for guard in self._guards]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of all optimizers."""
        return [p for guard in self._guards for group in guard.optimizer.param_groups for p in group["params"]]

    @property
    def consumed(self) -> int:
        """Prepared steps that were made or left out, of all optimizers together."""
        return sum(guard.consumed for guard in self._guards)

    @property
    def unarmed(self) -> int:
        """Steps that were made without being prepared, so on gradients that nobody has clipped."""
        return sum(guard.unarmed for guard in self._guards)

    @property
    def in_use(self) -> bool:
        """Whether they seem to be the ones that step on these gradients."""
        return bool(self._guards) and self._idle < PATIENCE

    def adopt(self, optimizers: Sequence[Any]) -> bool:
        """Guard these, if none is guarded yet; should others take their place later, guard those. Returns whether it was so."""
        if self._guards or not optimizers:
            return False
        self._guards, self._adopted = self._guard(optimizers), True
        return True

    def probe(self, *, paced: bool) -> None:
        """Try on copies whether these optimizers do what leaving out, scaling and pacing need; each of them once.

        Raises:
            UnsupportedSetupError: One does not.
        """
        for guard in self._guards:
            if guard not in self._probed:
                probe(guard.optimizer, guard.path, paced=paced)
                self._probed.add(guard)

    def agree(
        self,
        told: Callable[[Tensor], None],
        *,
        change: bool,
        matrices: Callable[[Sequence[Tensor]], Sequence[str | None]] | None = None,
    ) -> None:
        """From the coming step on, take back what goes against the gradient, of every optimizer.

        Args:
            told: As for `Agreement`.
            change: As for `Agreement`.
            matrices: As for `Agreement`.

        Raises:
            UnsupportedSetupError: The step of one of them cannot be taken back in part.
        """
        for position, guard in enumerate(self._guards):
            if guard.agreement is None:
                guard.agreement = Agreement(guard.optimizer, told, change=change, matrices=matrices)
                guard.agreement.running = self._loaded_share(position)

    def disagree(self) -> None:
        """From the coming step on, steps stay as they are made."""
        for guard in self._guards:
            guard.agreement = None
        self._loaded_shares = None

    @property
    def running_shares(self) -> Tensor | None:
        """Of each optimizer, see `Agreement.running`, 1 before its first step: float32, shape `[number of optimizers]`; None before any."""
        shares = [None if guard.agreement is None else guard.agreement.running for guard in self._guards]
        known = next((share for share in shares if share is not None), None)
        if known is None:
            return self._loaded_shares
        return torch.stack([torch.ones_like(known) if s is None else moved(s, known.device) for s in shares])

    @running_shares.setter
    def running_shares(self, shares: Tensor | None) -> None:
        self._loaded_shares = None if shares is None else shares.to(torch.float32)
        for position, guard in enumerate(self._guards):
            if guard.agreement is not None:
                guard.agreement.running = self._loaded_share(position)

    def _loaded_share(self, position: int) -> Tensor | None:
        """What an optimizer had at the moment that was loaded; None without one, and where that knows another number of optimizers."""
        shares = self._loaded_shares
        return None if shares is None or shares.shape != (len(self._guards),) else shares[position]

    def check_owner(self) -> None:
        """Before anything of a step is recorded.

        Raises:
            UnsupportedSetupError: A newer clipper shapes the steps of one of the optimizers.
        """
        for guard in self._guards:
            guard.check_owner()

    def joined(self) -> list[Tensor]:
        """Parameters that the optimizers have got since the last call (`add_param_group`); none at the first."""
        count = sum(len(group["params"]) for guard in self._guards for group in guard.optimizer.param_groups)
        if count == self._count:
            return []
        before, parameters = self._known, self.parameters
        self._known, self._count = {id(p) for p in parameters}, count
        return [] if before is None else [p for p in parameters if id(p) not in before]

    def changed(self) -> bool:
        """Whether the optimizers are others than at the last call, leave steps out in another way, or have other hooks before a step."""
        before = self._seen
        others = {guard for guard in self._guards if guard.choose_again()}
        self._probed -= others
        hooks = sum(hook is not _before_any_step for hook in torch_optimizer._global_optimizer_pre_hooks.values())
        now = tuple(n for g in self._guards for n in (id(g), hooks + len(g.optimizer._optimizer_step_pre_hooks)))
        self._seen = now
        return bool(others) or (before is not None and before != now)

    def arm(
        self,
        gradients: Gradients,
        *,
        finite: Value,
        pace: Value | None,
        ops: Ops,
        measure: Callable[[list[Tensor]], None] | None,
        fold: Tensor | None = None,
        left_out: Value | None = None,
        told: Value | list[Value] | None = None,
    ) -> None:
        """Prepare the coming step.

        Args:
            gradients: What the optimizers step on.
            finite: Bool, shape `[]`; False leaves the step out, be it that it is not finite or that the controller wants it so.
            pace: Multiplier on the learning rate, None to leave it alone.
            ops: The kind of numbers that `finite` and `pace` are.
            measure: Called with the gradients as the first optimizer is about to read them, or has scaled them.
            fold: What the one optimizer is to divide the gradients by; None where they are scaled already.
            left_out: The opposite of `finite` as 1 or 0, float32, where that is known already.
            told: That and the pace in one tensor, shape `[2]`, where there is one.
        """
        self._paced = pace is not None
        idle, within = self._count_idle(), any(guard.running for guard in self._guards)
        skip = self._skip = ~finite if left_out is None else left_out
        known: bool | None = None
        if ops.on_host:
            known = bool(skip)
        elif (
            idle
            or not self._guards
            or any(g.path != "device" or (pace is not None and g.reads_pace) for g in self._guards)
        ):
            # The one host read of this path, for both numbers.
            if isinstance(skip, Tensor) and isinstance(pace, Tensor):
                if not isinstance(told, Tensor):
                    told = torch.stack([skip.float().reshape(()), pace.float().reshape(())])
                flag, pace = told.tolist()
                known = flag > 0
            else:
                known = bool(skip)
        self._known_skip = known
        if known and (idle or within or not self._guards):
            # Every optimizer passes over parameters without a gradient: no weight, moment or counter of theirs moves.
            _drop([gradients.parameters[i] for i in gradients.present])
        if self._guards:
            self._strangers.watch(gradients.parameters)

        def take_measure() -> None:
            tensors = [g for i in gradients.present if (g := gradients.parameters[i].grad) is not None]
            if tensors and measure is not None:
                with torch.no_grad():
                    measure(tensors)

        for position, guard in enumerate(self._guards):
            guard.arm(
                skip=skip if known is None else known,
                pace=pace,
                measure=None if measure is None or position else take_measure,
                fold=fold,
            )

    def detach(self) -> None:
        """Let go of all optimizers."""
        self._strangers.remove()
        for guard in self._guards:
            guard.detach()

    def _count_idle(self) -> int:
        """Steps in a row up to now that were prepared, finite as far as that is known, and not made by any optimizer."""
        if not self._guards or not all(guard.armed for guard in self._guards):
            self._idle = 0
        elif self._known_skip is not True:  # a loop or a loss scaler may leave those out by itself
            self._idle += 1
            if self._idle == PATIENCE:
                self._tell(f"its `step` was not called in {PATIENCE} steps")
        return self._idle

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "Adaptive clipping: `optimizer` must be the one that steps on these gradients, but %s: it is neither paced nor measured. "
                "Make a new clipper with the optimizer that steps.",
                what,
            )

    # -- asked by `_Strangers` -------------------------------------------------------------------------------------

    def _expects(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer is nothing to wonder at: it is known, or called by one that is."""
        return any(guard.optimizer is optimizer or guard.running for guard in self._guards)

    def _untouched(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those whose prepared step nobody has made yet."""
        made = {
            id(p) for g in self._guards if not g.armed for group in g.optimizer.param_groups for p in group["params"]
        }
        return [p for p in parameters if id(p) not in made]

    def _replaced_by(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._adopted and any(id(p) in theirs for p in self.parameters):
            logger.warning(
                "Adaptive clipping: the optimizer that Accelerate had prepared no longer steps on these gradients; the %s that does is "
                "guarded from here on.",
                name,
            )
            for guard in self._guards:
                guard.detach()
            # Its state is new, and so is what it knows of its steps.
            self._guards, self._loaded_shares = self._guard([optimizer]), None
        else:
            self._tell(f"another one, {name}, has made a step on them")


class _Strangers:
    """Looks at every step of any torch optimizer in the process while a prepared step waits: the optimizer may have been made anew.

    Args:
        guards: Who knows the right ones; not kept alive.
    """

    def __init__(self, guards: Guards) -> None:
        self._guards = weakref.ref(guards)
        self._parameters: list[Tensor] = []
        self._ids: set[int] | None = None
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # known to be none of ours
        self._stepping: tuple[torch.optim.Optimizer, int] | None = None

    def watch(self, parameters: list[Tensor]) -> None:
        """From here on, for these parameters, which have just been prepared for a step."""
        self._parameters, self._ids = parameters, None
        _WATCHING.add(self)
        if not _HANDLES:
            _HANDLES.append(torch_optimizer.register_optimizer_step_pre_hook(_before_any_step))
            _HANDLES.append(torch_optimizer.register_optimizer_step_post_hook(_after_any_step))

    def remove(self) -> None:
        """Look no longer."""
        _WATCHING.discard(self)
        while not _WATCHING and _HANDLES and not steps_running(None):
            _HANDLES.pop().remove()

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """A step begins, of any optimizer."""
        guards = self._guards()
        if guards is None or optimizer in self._others or guards._expects(optimizer):
            return
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._ids is None:
            self._ids = {id(p) for p in self._parameters}
        if theirs.isdisjoint(self._ids):
            return
        waiting = [p for p in guards._untouched(self._parameters) if id(p) in theirs and p.grad is not None]
        if waiting:
            if bool(guards._skip):  # a host read, where a device has the flag
                _drop(waiting)
            self._stepping = (optimizer, guards.consumed)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """It has ended."""
        guards = self._guards()
        if guards is None or self._stepping is None or self._stepping[0] is not optimizer:
            return
        before, self._stepping = self._stepping[1], None
        if guards.consumed > before:
            self._others.add(optimizer)  # it wraps one that is known (Lookahead, SAM)
            return
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters, self._ids = [p for p in self._parameters if id(p) not in theirs], None
        guards._replaced_by(optimizer)


# Torch has these hooks for all optimizers of a process only.
_WATCHING: Final[weakref.WeakSet[_Strangers]] = weakref.WeakSet()
_HANDLES: Final[list[Any]] = []


def _before_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for strangers in list(_WATCHING):
        strangers.before(optimizer)


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for strangers in list(_WATCHING):
        strangers.after(optimizer)


def _drop(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
