"""The pace in the optimizer's groups for one step: the learning rate times it, the decoupled weight decay divided by it.

AdamW takes `lr * weight_decay` off every weight. The pace is for the way along the gradient; a decay that went with it would shrink the
weights by up to `max_pace` times what was asked for. Coupled decay (L2: Adam, SGD) is part of the gradient, and is left alone.
"""

import logging
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.gradients.norms import HALF
from hf_adaclip.gradients.scale import scale_

logger = logging.getLogger(__name__)

_DECAYS: Final = ("weight_decay", "weight_decay_1d")
_FLAGS: Final = ("decoupled_weight_decay", "weight_decouple", "decouple_wd")
_CLASSES: Final = {
    "torch": dict.fromkeys(("Muon", "Adafactor"), True),
    "transformers": dict.fromkeys(("Adafactor",), True),
    # Without a flag in their groups, or with one that chooses between two decays that both go by the rate.
    "pytorch_optimizer": {
        **dict.fromkeys(
            (
                *(
                    "AdaLOMO",
                    "AdamMini",
                    "Adan",
                    "Conda",
                    "DASH",
                    "DeMo",
                    "FAdam",
                    "FOCUS",
                    "Fira",
                    "FlashAdamW",
                    "GaLore",
                ),
                *("LoRARite", "SOAP", "SPAM", "SaRA", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "StableSPAM"),
            ),
            True,
        ),
        **dict.fromkeys(("AccSGD", "LARS", "ScheduleFreeSGD"), False),
    },
}
"""Whether a class decays by rate times decay beside its gradient; read in the sources of torch 2.13, transformers 5.23 and
pytorch-optimizer 4.1."""
_BITSANDBYTES: Final = {
    **dict.fromkeys(("adam", "lamb", "lion", "ademamix"), True),
    **dict.fromkeys(("momentum", "lars", "rmsprop", "adagrad"), False),
}
"""By the name of the kernel (bitsandbytes 0.50: its Adam decays as AdamW does)."""


def decouples(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether a group's weight decay acts beside the gradient and in proportion to the learning rate; None when that is not known."""
    if group.get("fixed_decay"):
        return False  # does not go by the rate
    roots = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(optimizer).__mro__]
    for root, name in roots:
        if name in _CLASSES.get(root, {}):
            return _CLASSES[root][name]
    if "decouple_lr" in group:  # torch-optimi
        return bool(group.get("decouple_wd", True) or group["decouple_lr"])
    if "weight_decay_type" in group:
        return bool(group["weight_decay_type"] != "l2")
    for flag in _FLAGS:
        if flag in group:
            return bool(group[flag])
    if any(root == "bitsandbytes" for root, _ in roots):
        return _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""))
    return False if type(optimizer).__module__.startswith("torch.optim.") else None


class _Change(NamedTuple):
    group: dict[str, Any]
    key: str
    before: Any
    paced: Any
    version: int


class Pacing:
    """Puts a pace into the groups of one optimizer, and takes it out again.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._changes: list[_Change] = []
        self._told = self._halves = False
        self._groups: tuple[tuple[int, bool], ...] | None = None

    @property
    def needs_number(self) -> bool:
        """Whether a pace on the device would lose the decay: of weights in half precision, of which one that small rounds to nothing.

        In the optimizer's own step decay and update are one rounding.
        """
        groups = self._optimizer.param_groups
        # Thousands of weights are not gone through in every step.
        now = tuple((len(group["params"]), any(group.get(key) for key in _DECAYS)) for group in groups)
        if now != self._groups:
            self._groups = now
            self._halves = any(
                decouples(self._optimizer, group) and any(p.dtype in HALF for p in group["params"])
                for group, (_, decays) in zip(groups, now, strict=True)
                if decays
            )
        return self._halves

    @torch.no_grad()
    def apply(self, pace: Value | float, left_out: Tensor | None = None) -> None:
        """From here until `restore`.

        Args:
            pace: Multiplier on the learning rate, shape `[]`. A tensor stays on its device: only a fused Adam(W) takes the rate so. It
                takes its decay as a number, so the decay is then made here, in a pass over the weights of its own (see `needs_number`).
            left_out: With a tensor: above 0 where the optimizer is going to leave the step out, float32, shape `[]`.
        """
        self.restore()
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            self._set(group, "lr", rate * pace)
            decays = [key for key in _DECAYS if group.get(key)]
            acts = decouples(self._optimizer, group) if decays else False
            if acts is None:
                self._tell()
            for key in decays if acts else ():
                if isinstance(pace, Tensor):
                    kept = 1 - rate * group[key]
                    if left_out is not None:
                        kept = torch.where(left_out > 0, 1.0, kept)
                    scale_(
                        [p for p in group["params"] if p.grad is not None],
                        torch.as_tensor(kept, dtype=pace.dtype, device=pace.device),
                    )
                    self._set(group, key, 0.0)
                else:
                    self._set(group, key, group[key] / pace)

    def restore(self) -> None:
        """Put back what was there, unless somebody has set another value since."""
        for change in reversed(self._changes):
            now = change.group.get(change.key)
            if now is change.paced and getattr(now, "_version", 0) == change.version:
                change.group[change.key] = change.before
        self._changes = []

    def _set(self, group: dict[str, Any], key: str, value: Any) -> None:
        self._changes.append(_Change(group, key, group[key], value, getattr(value, "_version", 0)))
        group[key] = value

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "Adaptive clipping: `weight_decay` of %s may be multiplied by the pace, because how this class decays is not known. Set "
                "`max_pace=1`, or choose an optimizer of torch.",
                type(self._optimizer).__name__,
            )
