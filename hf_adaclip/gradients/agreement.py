"""Sign agreement: of a step that an optimizer has made, what goes against the present gradient is taken back.

    mask = [d g < 0]            d the step without decoupled weight decay, g the gradient as the optimizer read it
    w <- w + d (mask / m - 1)   m the share of the mask, per tensor, and at least 1/10
    s <- s + (a - s) / 10       a the share over hidden matrices, s = 1 at first; m is 1 in steps that begin with s < 1/2

The weights are corrected and not set, so what is taken back is back to within a rounding of the weight.

What agrees is made larger by 1/m, so that the step keeps its mean length. Components without a gradient stay where they are, such as the
rows of an embedding whose tokens are not in the batch. Adam would move these on for a while, by up to 1 / (1 - beta1) = 10 times their
first step, and what they lose so the rows in the batch gain. With a large vocabulary that gain would have no bound: hence the 1/10.

Where less than half agrees for a while, steps go against their gradients more than by chance: the rate is too high, or units have died,
whose gradient is 0. What is left is not made larger then. It would kill more of them, which makes the share smaller and the steps larger
(model_cards/RESEARCH.md, entry 40). Tables of rows, tensors that the batch did not use and those that cannot move say nothing of that.

Adam and AdamW keep all that their step follows from, so there it is computed again from their state: nothing is copied. Other optimizers
need one copy of the weights from just before the step until just after it.

Source: Cautious Optimizers, Liang et al. 2024, arXiv 2411.16085, whose m is at least 1/1000.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.pacing import decouples
from hf_adaclip.gradients.sharding import Layout, layout_of, local_part, sum_over_ranks_, summed_part
from hf_adaclip.gradients.transfer import HOST, moved

REVISION: Final = 2
"""Raised with every change of what a step becomes: runs of before are recognised by it."""
SMALLEST_SHARE: Final = 0.1
"""Where less agrees, the step is not made larger any more: no component moves more than ten times as far as the optimizer would."""
CHANCE: Final = 0.5
"""Running share below which nothing is made larger: as much of a step agrees with a gradient that it has nothing to do with."""
_LEARN: Final = 0.1
"""What the running share takes of that of a step."""
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

_Stepped: TypeAlias = list[tuple[Tensor, Tensor, Any]]
"""Parameters, their gradients, and what their step follows from."""


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
            f"`agreement` must be False with {kind.__name__}, but is True instead: {why}. Leave it out, or take AdamW."
        )


class Agreement:
    """Of one optimizer, around one step at a time.

    Args:
        optimizer: The optimizer.
        told: Called after each step with the number of components that agree, and of all, float32, shape `[2]`.
        change: False only finds out.
        matrices: Gives the names of hidden matrices, None for others; None for any tensor of two or more dimensions.

    Raises:
        UnsupportedSetupError: Its step cannot be taken back in part.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        told: Callable[[Tensor], None],
        *,
        change: bool = True,
        matrices: Callable[[Sequence[Tensor]], Sequence[str | None]] | None = None,
    ) -> None:
        check_agreement(optimizer)
        self._optimizer = optimizer
        self._told = told
        self._change = change
        self._matrices = matrices
        self._copies: dict[int, Tensor] | None = None
        self._least: Tensor | float = SMALLEST_SHARE
        self._running: Tensor | None = None

    @property
    def running(self) -> Tensor | None:
        """Running share of what agrees, float32, shape `[]`; None before the first step."""
        return self._running

    @running.setter
    def running(self, share: Tensor | None) -> None:
        self._running = share
        # Once here and not for every batch of tensors.
        self._least = (
            SMALLEST_SHARE if share is None else torch.where(share < CHANCE, torch.ones_like(share), SMALLEST_SHARE)
        )

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
        take_back = self._take_back_copied if self.copies else self._take_back_recomputed
        for group in self._optimizer.param_groups:
            totals += [take_back(stepped, group) for stepped in _alike(self._stepped(group))]
        self._copies = None
        if totals:
            told, learned = torch.stack([moved(t, totals[0].device) for t in totals]).sum(0)
            self._told(told)
            self._learn(learned[0] / learned[1])

    def _learn(self, share: Tensor) -> None:
        """Take the share of a step into the running one; it is NaN where no matrix says anything, and for gradients that are NaN."""
        before = torch.ones_like(share) if self._running is None else moved(self._running, share.device)
        unknown, skip = share.isnan(), getattr(self._optimizer, "found_inf", None)
        if isinstance(skip, Tensor):  # the device may have left the step out
            unknown |= moved(skip, share.device) > 0
        self.running = torch.where(unknown, before, before.lerp(share, _LEARN))

    def _stepped(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The parameters that have made a step, their gradients, and what the step follows from: their state, or the weights of before."""
        state, copies = self._optimizer.state, self._copies or {}
        for p in group["params"]:
            if (gradient := p.grad) is None:
                continue
            kept = copies.get(id(p)) if self.copies else (state.get(p) or None)
            if kept is not None:
                yield p, gradient, kept

    def _take_back_recomputed(self, stepped: _Stepped, group: dict[str, Any]) -> Tensor:
        """From the state of Adam after the step, which was -size m / (sqrt(v) + eps'), both averages as they are in the state."""
        parameters, gradients, states = zip(*stepped, strict=True)
        averages = _parts([s["exp_avg"] for s in states])
        mask, agreeing = _agreeing(parameters, gradients, averages, along=not group["maximize"])
        sizes, least = self._sizes(parameters, agreeing.device)
        if self._change:
            size, root = self._lengths(states, group, parameters[0].device)
            share = self._at_least(agreeing / sizes)
            # w += -size m / (sqrt(v) + eps') (mask / share - 1), in as few passes as that takes.
            torch._foreach_mul_(mask, _factors(-size / moved(share, size.device), mask[0].dtype))
            torch._foreach_add_(mask, _factors(size, mask[0].dtype))
            torch._foreach_mul_(mask, averages)
            squares = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
            below = torch._foreach_sqrt(_parts([s[squares] for s in states]))
            torch._foreach_add_(below, _factors(root * group["eps"], below[0].dtype))
            torch._foreach_addcdiv_(_parts(parameters), mask, below)
        return _totals(agreeing, sizes, least)

    def _sizes(self, parameters: Sequence[Tensor], device: torch.device) -> Tensor:
        """Numbers in each tensor over all ranks, and how many have to agree for it to count as a matrix, float32, shape `[2, n]`."""
        names = (
            ["" if p.dim() > 1 else None for p in parameters] if self._matrices is None else self._matrices(parameters)
        )
        sizes = [(2 if p.is_complex() else 1) * p.numel() for p in parameters]
        least = [math.inf if name is None else SMALLEST_SHARE * size for name, size in zip(names, sizes, strict=True)]
        return moved(torch.tensor([sizes, least], dtype=torch.float32, device=HOST), device)

    def _at_least(self, shares: Tensor) -> Tensor:
        """The shares that what agrees is divided by: not below a tenth, or 1 while less agrees than by chance."""
        least = self._least
        return (
            torch.maximum(shares, moved(least, shares.device))
            if isinstance(least, Tensor)
            else shares.clamp_min(least)
        )

    def _lengths(
        self, states: Sequence[dict[str, Any]], group: dict[str, Any], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Per tensor, what m / (sqrt(v) + root eps) was multiplied by, and root; 0 and anything where the device left the step out."""
        beta1, beta2 = group["betas"]
        counts = torch.stack([s["step"] for s in states]).to(torch.float64)
        rate, skip = group["lr"], getattr(self._optimizer, "found_inf", None)
        if isinstance(rate, Tensor) or isinstance(skip, Tensor):
            counts = moved(counts, device)
        counts = counts.clamp_min(1.0)  # 0 where the first step was left out on the device
        root = (1 - beta2**counts).sqrt()
        size = (moved(rate, device) if isinstance(rate, Tensor) else rate) * root / (1 - beta1**counts)
        if isinstance(skip, Tensor):
            size = torch.where(moved(skip, device) > 0, 0.0, size)
        return size, root

    def _take_back_copied(self, stepped: _Stepped, group: dict[str, Any]) -> Tensor:
        """From the weights of before. Decoupled decay comes first in every optimizer that is known to have it, and stays."""
        parameters, gradients, copies = zip(*stepped, strict=True)
        decay, steps, weights = group.get("weight_decay") or 0.0, list(copies), _parts(parameters)
        if decay and decouples(self._optimizer, group):
            torch._foreach_mul_(steps, 1 - group["lr"] * decay)
        torch._foreach_neg_(steps)
        torch._foreach_add_(steps, weights)
        mask, agreeing = _agreeing(parameters, gradients, steps, along=bool(group.get("maximize")))
        sizes, least = self._sizes(parameters, agreeing.device)
        if self._change:
            torch._foreach_mul_(mask, _factors(1 / self._at_least(agreeing / sizes), mask[0].dtype))
            torch._foreach_sub_(mask, 1)
            torch._foreach_addcmul_(weights, steps, mask)
        return _totals(agreeing, sizes, least)


def _agreeing(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], directions: list[Tensor], *, along: bool
) -> tuple[list[Tensor], Tensor]:
    """Where directions go along gradients, or against them.

    Returns:
        Per tensor 1 or 0; how many are 1, over all ranks, float32, shape `[len(parameters)]`.
    """
    # The sign first: a product of two small numbers may vanish.
    mask = list(torch._foreach_sign(_parts(gradients)))
    torch._foreach_mul_(mask, directions)
    torch._foreach_sign_(mask)
    if not along:
        torch._foreach_neg_(mask)
    torch._foreach_clamp_min_(mask, 0)
    # Half precision cannot count. On a CPU torch's norms take six times as long as sums.
    on_cpu, wide = mask[0].device.type == "cpu", torch.promote_types(mask[0].dtype, torch.float32)
    sums = [m.sum(dtype=wide) for m in mask] if on_cpu else torch._foreach_norm(mask, 1, wide)
    return mask, _over_ranks(parameters, torch.stack(sums).to(torch.float32))


def _totals(agreeing: Tensor, sizes: Tensor, least: Tensor) -> Tensor:
    """How many agree and how many there are: of all tensors, and of those of which at least `least` agree, float32, shape `[2, 2]`."""
    counts = torch.stack([agreeing, sizes])
    return torch.stack([counts.sum(1), (counts * (agreeing >= least)).sum(1)])


def _factors(values: Tensor, dtype: torch.dtype) -> Any:
    """One factor for each tensor of a list, as what a pass over tensors of this dtype takes best."""
    if dtype in (torch.float32, torch.float64):
        wide = values if dtype is torch.float32 else values.to(torch.float64)
        return list(wide.unbind())  # of numbers torch makes tensors like these anew in every pass
    return values.tolist() if values.device.type == "cpu" else list(values.to(torch.float32).unbind())


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of tensors of one dtype, as real numbers."""
    if _are_plain(tensors) and not tensors[0].is_complex():
        return list(tensors)
    return [summed_part(t) for t in tensors]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}


def _alike(stepped: Iterable[tuple[Tensor, Tensor, Any]]) -> list[_Stepped]:
    """By device and dtype, of parameters and of their gradients, and not more at once than there is room for."""
    kinds: dict[Any, list[_Stepped]] = {}
    room: dict[Any, int] = {}
    for each in stepped:
        p, gradient, _ = each
        if not (size := p.numel()):
            continue
        key = (p.device, p.dtype, gradient.dtype)
        if room.get(key, 0) < size:
            kinds.setdefault(key, []).append([])
            room[key] = MOST_AT_ONCE
        kinds[key][-1].append(each)
        room[key] -= size
    return [members for parts in kinds.values() for members in parts]


def _over_ranks(parameters: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Counts of the parts on this rank, shape `[len(parameters)]`, added up over the ranks that hold the other parts."""
    if _are_plain(parameters):
        return counts
    layouts: dict[Layout, list[int]] = {}
    for position, parameter in enumerate(parameters):
        if (layout := layout_of(parameter)) is not None:
            layouts.setdefault(layout, []).append(position)
    for layout, positions in layouts.items():
        counts[positions] = sum_over_ranks_(counts[positions], layout)
    return counts
