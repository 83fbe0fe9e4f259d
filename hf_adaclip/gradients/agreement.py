"""Sign agreement: of a step that an optimizer has made, what goes against the present gradient is taken back.

    mask = [d g < 0]            d the step without decoupled weight decay, g the gradient as the optimizer read it
    w <- w + d (mask / m - 1)   m the share of the mask, per tensor, and at least 1/4

The weights are corrected and not set, so what is taken back is back to within a rounding of the weight.

What agrees is made larger by 1/m, so that the step keeps its mean length. Components without a gradient stay where they are, such as the
rows of an embedding whose tokens are not in the batch: what Adam would still move them by afterwards is what the others gain. That is most
of the gain of an embedding, and with a large vocabulary it has no bound, hence the 1/4.

Adam and AdamW keep all that their step follows from, so there it is computed again from their state: nothing is copied. Other optimizers
need one copy of the weights from just before the step until just after it.

Source: Cautious Optimizers, Liang et al. 2024, arXiv 2411.16085, whose m is at least 1/1000.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.pacing import decouples
from hf_adaclip.gradients.sharding import Layout, layout_of, local_part, sum_over_ranks_, summed_part
from hf_adaclip.gradients.transfer import moved

SMALLEST_SHARE: Final = 0.25
"""Where less agrees, the step is not made larger any more: no component moves more than four times as far as the optimizer would."""
MOST_AT_ONCE: Final = 1 << 22
"""Numbers whose steps are looked at together; three times as many are kept for that. A larger tensor is taken alone."""
_KEEPS_ITS_STEP: Final = (torch.optim.Adam, torch.optim.AdamW)
_REFUSED: Final = {
    "LBFGS": "it makes several steps in one, each with a gradient of its own",
    "SparseAdam": "it steps on the components of a sparse gradient alone",
    "SAM": "it moves the weights to and fro within a step",
    "GSAM": "it moves the weights to and fro within a step",
    "WSAM": "it moves the weights to and fro within a step",
    "BSAM": "it moves the weights to and fro within a step",
    "Lookahead": "it sets the weights back to an average of its own",
}


def check_agreement(optimizer: torch.optim.Optimizer) -> None:
    """Whether the step of an optimizer can be taken back in part.

    Raises:
        UnsupportedSetupError: It cannot.
    """
    kind = type(optimizer)
    names = [base.__name__ for base in kind.__mro__]
    why = next((_REFUSED[name] for name in names if name in _REFUSED), None)
    if why is None and any("ScheduleFree" in name for name in names):
        why = "its weights are an average that it computes from another set of them"
    if why is None and kind not in _KEEPS_ITS_STEP:
        decays = [group for group in optimizer.param_groups if group.get("weight_decay")]
        if any(decouples(optimizer, group) is None for group in decays):
            why = "how its weight decay acts is not known, and that is not to be taken back"
    if why is not None:
        raise UnsupportedSetupError(
            f"`agreement` must be False with {kind.__name__}, but is True instead: {why}. Leave it out, or choose an optimizer such as AdamW."
        )


class Agreement:
    """Of one optimizer, around one step at a time.

    Args:
        optimizer: The optimizer.
        told: Called after each step with the number of components that agree, and of all, float32, shape `[2]`.
        change: False only finds out.

    Raises:
        UnsupportedSetupError: Its step cannot be taken back in part.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, told: Callable[[Tensor], None], *, change: bool = True
    ) -> None:
        check_agreement(optimizer)
        self._optimizer = optimizer
        self._told = told
        self._change = change
        self._copies: dict[int, Tensor] | None = None

    @property
    def copies(self) -> bool:
        """Whether the weights are copied for the time of a step."""
        return type(self._optimizer) not in _KEEPS_ITS_STEP

    @torch.no_grad()
    def before(self) -> None:
        """The optimizer is about to step."""
        if self.copies:
            moving = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._copies = {id(p): local_part(p).clone() for p in moving}

    def forget(self) -> None:
        """The step is not going to be made."""
        self._copies = None

    @torch.no_grad()
    def after(self) -> None:
        """The optimizer has stepped, and its groups are still as they were for that."""
        totals: list[Tensor] = []
        for group in self._optimizer.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None and self._has_stepped(p)]
            for members in _alike(stepped):
                steps = self._recomputed(members, group) if not self.copies else self._observed(members, group)
                totals.append(self._take_back(members, steps, bool(group.get("maximize"))))
        self._copies = None
        if totals:
            self._told(torch.stack([moved(t, totals[0].device) for t in totals]).sum(0))

    def _has_stepped(self, parameter: Tensor) -> bool:
        if self._copies is not None:
            return id(parameter) in self._copies
        return not self.copies and bool(self._optimizer.state.get(parameter))

    def _take_back(self, parameters: list[Tensor], steps: list[Tensor], maximize: bool) -> Tensor:
        gradients = [summed_part(p.grad) for p in parameters if p.grad is not None]
        # By the signs, whose product cannot vanish for being small.
        agrees = torch._foreach_sign(gradients)
        torch._foreach_mul_(agrees, torch._foreach_sign(steps))
        if not maximize:
            torch._foreach_neg_(agrees)
        torch._foreach_clamp_min_(agrees, 0)
        wide = torch.promote_types(agrees[0].dtype, torch.float32)  # half precision cannot count
        agreeing = _over_ranks(parameters, torch.stack(torch._foreach_norm(agrees, 1, wide)).to(torch.float32))
        sizes = torch.tensor([p.numel() for p in parameters], dtype=torch.float32)
        if self._change:
            shares = (agreeing / moved(sizes, agreeing.device)).clamp_min(SMALLEST_SHARE)
            torch._foreach_mul_(agrees, _scalars(1 / shares))
            torch._foreach_sub_(agrees, 1)
            torch._foreach_addcmul_([local_part(p) for p in parameters], steps, agrees)
        return torch.stack([agreeing.sum(), moved(sizes.sum(), agreeing.device)])

    def _recomputed(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What Adam has added to the weights, from its state after the step."""
        states = [self._optimizer.state[p] for p in parameters]
        device = parameters[0].device
        beta1, beta2 = group["betas"]
        squares = [local_part(s["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]) for s in states]
        counts = torch.stack([s["step"].to(torch.float64).reshape(()) for s in states])
        rate, skip = group["lr"], getattr(self._optimizer, "found_inf", None)
        if isinstance(rate, Tensor) or isinstance(skip, Tensor):
            counts = moved(counts, device)
        counts = counts.clamp_min(1.0)  # 0 where the first step was left out on the device
        sizes = (moved(rate, device) if isinstance(rate, Tensor) else rate) / (beta1**counts - 1)
        if isinstance(skip, Tensor):
            sizes = torch.where(moved(skip, device) > 0, 0.0, sizes)
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, _scalars((1 - beta2**counts).sqrt()))
        torch._foreach_add_(below, group["eps"])
        steps = torch._foreach_div([local_part(s["exp_avg"]) for s in states], below)
        torch._foreach_mul_(steps, _scalars(sizes))
        return list(steps)

    def _observed(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What the optimizer has added to the weights but for decoupled decay, which comes first in every one that is known."""
        assert self._copies is not None
        decay = group.get("weight_decay") or 0.0
        kept = 1 - group["lr"] * decay if decay and decouples(self._optimizer, group) else 1.0
        before = [self._copies.pop(id(p)) for p in parameters]
        if kept != 1.0:
            torch._foreach_mul_(before, kept)
        torch._foreach_neg_(before)
        torch._foreach_add_(before, [local_part(p) for p in parameters])
        return before


def _scalars(values: Tensor) -> Any:
    """One factor for each tensor of a list: numbers, where they are in host memory already."""
    return values.tolist() if values.device.type == "cpu" else list(values.to(torch.float32).unbind())


def _alike(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters by device and dtype, of themselves and of their gradients, and not more at once than there is room for."""
    kinds: dict[Any, list[list[Tensor]]] = {}
    room: dict[Any, int] = {}
    for p in parameters:
        if not p.numel() or p.grad is None:
            continue
        key = (p.device, p.dtype, p.grad.dtype)
        if room.get(key, 0) < p.numel():
            kinds.setdefault(key, []).append([])
            room[key] = MOST_AT_ONCE
        kinds[key][-1].append(p)
        room[key] -= p.numel()
    return [members for parts in kinds.values() for members in parts]


def _over_ranks(parameters: list[Tensor], counts: Tensor) -> Tensor:
    """Counts of the parts on this rank, shape `[len(parameters)]`, added up over the ranks that hold the other parts."""
    layouts: dict[Layout, list[int]] = {}
    for position, parameter in enumerate(parameters):
        if (layout := layout_of(parameter)) is not None:
            layouts.setdefault(layout, []).append(position)
    for layout, positions in layouts.items():
        counts[positions] = sum_over_ranks_(counts[positions], layout)
    return counts
