"""What 'auto' comes to: which parts of the default are on in a run, and why the others are not.

The default goes for speed: the pace, the spectral range and the agreement, each where nothing that is known when the clipper is made
speaks against it. What is set by hand stays as it is.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.gradients.sharding import is_sharded
from hf_adaclip.reliance import is_of
from hf_adaclip.run.run_plan import HeldBack, RunPlan, follow_plan

MAX_PACE: Final = 64.0
_ADAM: Final = (torch.optim.Adam, torch.optim.AdamW)


class Settled(NamedTuple):
    """A config without 'auto'.

    Attributes:
        config: The settings of the run.
        off: Why a part of the default is off, by part.
        by_itself: Parts that shape the step and are on without having been set; the first step says whether they act.
        held: What the plan of the run holds back.
    """

    config: AdaptiveClipConfig
    off: dict[str, str]
    by_itself: frozenset[str]
    held: HeldBack


def settle(
    config: AdaptiveClipConfig,
    optimizers: Sequence[Any],
    models: Sequence[Any],
    plan: RunPlan,
    *,
    in_engine: bool,
) -> Settled:
    """Decide on what was left open.

    Args:
        config: As it was given.
        optimizers: Those that are known to step on the gradients.
        models: Those that are known.
        plan: What is known of the run.
        in_engine: Whether an engine steps by itself (DeepSpeed).
    """
    held = follow_plan(config, plan, models)
    config = held.config
    changes: dict[str, Any] = {}
    off: dict[str, str] = {"pace": held.why} if "max_pace" in held.fields else {}
    whole = _against_all(config, in_engine=in_engine)
    inner = [unwrap_optimizer(o) for o in optimizers] if not in_engine else []
    rule = config.settings
    if isinstance(rule, AdaptiveController) and rule.max_pace is None:
        why = whole or _against_pace(inner)
        changes["max_pace"] = 1.0 if why else MAX_PACE
        off |= {"pace": why} if why else {}
    against = whole or _against_shape(inner)
    if config.agreement == "auto":
        changes["agreement"] = against is None
        off |= {"agreement": against} if against else {}
    if config.spectral_width == "auto":
        why = against or _against_spectral(models)
        changes |= {"spectral_width": None, "spectral_every": 1} if why else {"spectral_width": 0.0}
        off |= {"spectral": why} if why else {}
    made = config.replace(**changes) if changes else config
    on = {"spectral": changes.get("spectral_width") is not None, "agreement": changes.get("agreement") is True}
    by_itself = frozenset(part for part, is_on in on.items() if is_on)
    if made.max_pace == 1 and "fresh" in held.fields:
        held = held._replace(fields=tuple(name for name in held.fields if name != "fresh"))
    return Settled(made, off if config.controller == "adaptive" else {}, by_itself, held)


def _against_all(config: AdaptiveClipConfig, *, in_engine: bool) -> str | None:
    if config.controller != "adaptive":
        return "it belongs to the controller `adaptive`"
    if in_engine:
        return "the engine of DeepSpeed steps before anything outside sees the gradients"
    if config.shadow:
        return "shadow mode only records"
    if config.works_on != "global" or config.parameter_rules:
        return "parameters are judged apart"
    return None


def _against_pace(optimizers: Sequence[Any]) -> str | None:
    if not optimizers:
        return "no optimizer is known (pass `optimizer=`)"
    for optimizer in optimizers:
        if not _is_adam(optimizer):
            name = type(optimizer).__name__
            return (
                f"the optimizer is {name}, and the estimate is for steps as long as Adam's (set `max_pace` to have it)"
            )
        if any(group.get("lr") is None for group in optimizer.param_groups):
            return f"{type(optimizer).__name__} finds its learning rate by itself"
    if _sharded(optimizers):
        return (
            "the weights are spread over ranks, where the estimate begins anew on resuming (set `max_pace` to have it)"
        )
    return None


def _is_adam(optimizer: Any) -> bool:
    """Whether every component moves by about the learning rate, and the weights are where the optimizer says."""
    kind = type(optimizer)
    return kind in _ADAM or (is_of("bitsandbytes", optimizer) and "Adam" in kind.__name__)


def _against_shape(optimizers: Sequence[Any]) -> str | None:
    """What speaks against the agreement, and against the spectral range too."""
    if not optimizers:
        return "no optimizer is known (pass `optimizer=`)"
    other = next((o for o in optimizers if type(o) not in _ADAM), None)
    if other is not None:
        root = type(other).__module__.partition(".")[0]
        whose = "" if root == "torch" else f" of {root}"
        return (
            f"the optimizer is {type(other).__name__}{whose}, and only Adam and AdamW of torch were measured with it"
        )
    if _sharded(optimizers):
        return "the weights are spread over ranks, and would have to be gathered in every step"
    return None


def _sharded(optimizers: Sequence[Any]) -> bool:
    return any(is_sharded(p) for o in optimizers for group in o.param_groups for p in group["params"])


def _against_spectral(models: Sequence[Any]) -> str | None:
    if not models:
        return "no model is known, which tells matrices from embeddings (pass `model=`)"
    return None
