"""Published optimizers that the scripts can train with in the place of the Trainer's own: peers in the study, no part of the package.

    --optimizer muon              torch.optim.Muon on the hidden matrices, AdamW for the rest (Jordan et al. 2024)
    --optimizer cautious_adamw    AdamW that steps only where its momentum agrees with the gradient (Liang et al. 2024, arXiv 2411.16085)

Both go by the Trainer's learning rate, betas, epsilon and weight decay. Who changes what they do raises `PEERS_REVISION` in
scripts/study/records.py, so that runs of before are not taken for runs of today.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments

from hf_adaclip.gradients.matrices import hidden_matrices


@dataclass
class OptimizerArguments:
    """Which optimizer steps, if not that of `--optim`."""

    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "muon: Muon on the hidden matrices and AdamW for the rest; cautious_adamw: AdamW with the sign mask. Default: --optim.",
            "choices": ["muon", "cautious_adamw"],
        },
    )

    def ingredients(self, model: Any, args: TrainingArguments) -> dict[str, Any]:
        """What `make_trainer` takes for it: the class and its settings; nothing where `--optim` chooses."""
        if self.optimizer is None:
            return {}
        settings: dict[str, Any] = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        if self.optimizer == "cautious_adamw":
            return {"optimizer_cls_and_kwargs": (CautiousAdamW, settings)}
        # As in its source the head is AdamW's: what makes outputs of features stands outside of the base model.
        body = {id(p) for p in getattr(model, getattr(model, "base_model_prefix", ""), model).parameters()}
        hidden = [p for p in hidden_matrices([model]) if p.dim() == 2 and id(p) in body]
        return {"optimizer_cls_and_kwargs": (MuonAdamW, {**settings, "hidden": hidden})}


class MuonAdamW(Optimizer):
    """Muon on some matrices, AdamW on all else, as one optimizer. The rate is AdamW's for both: Muon's updates are brought to its size.

    Args:
        params: Groups, with their weight decay.
        hidden: The matrices for Muon, each 2-D.
        lr, betas, eps: Of AdamW; Muon has the rate, and its own momentum.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        hidden: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        matrices, groups = {id(p) for p in hidden}, list(params)
        ours = _only(groups, lambda p: id(p) in matrices)
        rest = _only(groups, lambda p: id(p) not in matrices)
        self._parts: list[Optimizer] = []
        if ours:
            self._parts.append(Muon(ours, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(AdamW(rest, lr=lr, betas=betas, eps=eps))
        super().__init__([dict(g) for part in self._parts for g in part.param_groups], {"lr": lr})
        self._join()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Both step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer does."""
        super().load_state_dict(state_dict)
        self._join()

    def _join(self) -> None:
        """Both parts work on the groups and the state of the whole, which a scheduler and a checkpoint see."""
        begin = 0
        for part in self._parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state, begin = self.param_groups[begin:end], self.state, end


class CautiousAdamW(Optimizer):
    """C-AdamW as published: where the sign of the momentum is not that of the gradient the step is left out, the rest is made larger.

    Args:
        params: Groups, with their weight decay.
        lr, betas, eps, weight_decay: As in AdamW; the decay is decoupled, and not masked.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _cautious_step(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _cautious_step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    state["step"] += 1
    (beta1, beta2), rate = group["betas"], group["lr"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(1 - rate * group["weight_decay"])
    root = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
    mask = (mean * gradient > 0).to(gradient.dtype)
    mask.div_(mask.mean().clamp_(min=1e-3))
    parameter.addcdiv_(mean * mask, root, value=-rate / (1 - beta1 ** state["step"]))


def _only(groups: Iterable[dict[str, Any]], belongs: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    found = [{**group, "params": [p for p in group["params"] if belongs(p)]} for group in groups]
    return [group for group in found if group["params"]]
