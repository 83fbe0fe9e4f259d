"""How far the training could usefully go: the distance estimate that the pace goes by.

    w_t = pace_{t-1}^2 lr_{t-1} / |g_t|                    lr over lr_base; every gradient counts with length 1
    r_t = decay r_{t-1} + w_t <g_t, x_0 - x_t>
    s_t = decay s_{t-1} + w_t g_t
    d_t = r_t / |s_t|_1                                    reach_t = d_t / lr_base

<g, x_0 - x> asks whether the present gradient still wants to go the way that was travelled so far. It does while the rate is too small;
where it no longer does, the rate is large enough, or the way was a detour. For Adam, whose step moves every coordinate by about the
learning rate, d is that rate.

g is the gradient that the optimizer reads. Where the spectral range acts that is what the range leaves, and it is known only after the
step was decided on: there the pace goes by the reach of the step before. Raw gradients that one direction rules, to and fro, hide there
how far the others want to go.

x, g and s are looked at on a sample of the coordinates: one in 31, and not more than about 262144. The estimate is a quotient of two sums
over them, so the sample changes its noise and not its size.

Source: Prodigy, Mishchenko and Defazio 2023, algorithm 4, with three differences: gradients of length 1, a memory of 50 steps instead of
about 2000, and no running maximum (the pace keeps a part of it). Why: model_cards/RESEARCH.md, entries 1 to 14 and 38.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.fused import Fused
from hf_adaclip.controllers.numerics.ops import Ops, Value, ops_of
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.coordinates import grid_of, sample_of, spacing
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.observe import to_value
from hf_adaclip.gradients.sharding import Layout, layout_of, local_part, sum_over_ranks_, summed_part
from hf_adaclip.gradients.transfer import HOST, copy_into, moved

REVISION: Final = 2
"""To be raised with every change of what the estimate is, where the spectral range acts."""
DECAY: Final = 0.98
_TINY: Final = 1e-30


class ReachEstimate:
    """Made for the parameters of a run, at its first step.

    Args:
        parameters: The trainable parameters, each once.
        optimizers: Those that step on them; the largest learning rate of all their groups counts.
        device: Where the norms are.
        every: Look at one coordinate in so many; by default as many as the size of the model allows.

    Attributes:
        pace: Of the step before.
        reach: The last one, d / lr_base, shape `[]`; None before the first step.

    Raises:
        ConfigError: An optimizer has no learning rate.
    """

    NAMES: Final = frozenset({"start", "weighted", "gain", "rates", "pace", "reach"})
    """Of the tensors that a checkpoint keeps."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        every: int | None = None,
    ) -> None:
        check_rates(optimizers)
        # Tensors that are spread over ranks alike stand together, so that their sums are one collective.
        layouts: dict[Layout | None, list[int]] = {}
        for position, parameter in enumerate(parameters):
            layouts.setdefault(layout_of(parameter), []).append(position)
        self._order = [position for positions in layouts.values() for position in positions]
        self._parameters = [parameters[i] for i in self._order]
        self.optimizers = optimizers
        self._device = device
        total = sum(local_part(p).numel() for p in parameters)
        self._every = spacing(total) if every is None else every
        grids = [grid_of(local_part(p).numel(), self._every) for p in parameters]
        self._grids = [grids[i] for i in self._order]
        self._sizes = [local_part(p).numel() for p in self._parameters]
        self._sections = [
            (layout, sum(math.prod(grids[i][0]) for i in positions)) for layout, positions in layouts.items()
        ]
        self._base = self._rate = 0.0
        self.pace: Value | float = 1.0
        self.reach: Value | None = None
        # Room for two samples, of weights and of gradients.
        count = sum(size for _, size in self._sections)
        rooms = torch.zeros((2, count), dtype=torch.float32, device=device).unbind()
        sizes = [math.prod(shape) for shape, _ in self._grids]
        self._rooms = [
            (room, [part.view(shape) for part, (shape, _) in zip(torch.split(room, sizes), self._grids, strict=True)])
            for room in rooms
        ]
        self._start = self._look(self._parameters, 0).clone()
        self._weighted = torch.zeros_like(self._start)
        self._gain = torch.zeros((), dtype=torch.float32, device=device)
        self._kernels = Fused(_learn, device, (count,)), Fused(_weigh, device, ())

    def observe(
        self, gradients: Gradients, norm: Tensor, ops: Ops, scale: Value | float = 1.0, taken: Value | bool = True
    ) -> Value:
        """Learn from this step's gradients, unscaled, before the step.

        Args:
            gradients: Of the parameters that the estimate was made for.
            norm: Their global norm, float32, shape `[]`; where it is not finite nothing is learned.
            ops: The kind of number wanted.
            scale: What the gradients were multiplied by since the norm was taken.
            taken: Bool, shape `[]`: False teaches nothing, because the optimizer will not read these gradients.

        Returns:
            d / lr_base, shape `[]`; NaN as long as the learning rate has been 0.
        """
        there = dict(zip(gradients.present, gradients.tensors, strict=True))
        x = self._look(self._parameters, 0)
        g = self._look([there.get(position) for position in self._order], 1)
        pace: Any = self.pace if isinstance(self.pace, Tensor) else float(self.pace)
        learn: Any = _learn
        weigh: Any = _weigh
        if not ops.on_host:
            learn, weigh = self._kernels
            pace = pace if isinstance(pace, Tensor) else ops(pace)
        norm = moved(norm, self._device)
        scale = moved(scale, self._device) if isinstance(scale, Tensor) else float(scale)
        taken = moved(taken, self._device) if isinstance(taken, Tensor) else bool(taken)
        self._weighted, gained, sizes = learn(
            (), self._weighted, norm, scale, taken, pace, self._rate, g, self._start, x
        )
        dot, length = self._sums(gained, sizes)
        rate = self._rate
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        present = max(float(group["lr"]) for group in groups)
        planned = max(float(group.get("initial_lr", 0.0)) for group in groups)
        self._base = max(self._base, present, planned)
        self._rate = present / self._base if self._base > 0 else 0.0
        base = self._base if self._base > 0 else math.nan
        self._gain, reach = weigh((), self._gain, norm, scale, taken, pace, rate, dot, length, base)
        self.reach = to_value(reach, ops)
        return self.reach

    def moved(self, parameters: Sequence[Tensor], kept: Sequence[int]) -> "ReachEstimate":
        """The estimate for other parameters: those that stay keep their start and their sums, new ones start where they are.

        Args:
            parameters: The parameters, in their new order.
            kept: Per parameter, the position that it had here; -1 for one that is new.
        """
        other = ReachEstimate(parameters, self.optimizers, self._device, self._every)
        position_of = {position: place for place, position in enumerate(self._order)}
        sizes = [[math.prod(shape) for shape, _ in estimate._grids] for estimate in (self, other)]
        for name in ("_start", "_weighted"):
            old, new = (
                torch.split(getattr(estimate, name), size) for estimate, size in zip((self, other), sizes, strict=True)
            )
            for place, position in enumerate(other._order):
                if kept[position] >= 0:
                    new[place].copy_(old[position_of[kept[position]]])
        other._gain, other._base, other._rate, other.pace = self._gain, self._base, self._rate, self.pace
        other.reach = self.reach
        return other

    def anew(self) -> "ReachEstimate":
        """One that has seen nothing, of the weights as they are now."""
        # Back in the order in which they were given.
        parameters = [
            self._parameters[place] for place in sorted(range(len(self._order)), key=self._order.__getitem__)
        ]
        return ReachEstimate(parameters, self.optimizers, self._device, self._every)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing where every rank holds a part of its own: there the estimate begins anew."""
        if any(layout is not None for layout, _ in self._sections):
            return {}
        rates = torch.tensor([self._base, self._rate], dtype=torch.float64, device=HOST)
        kept = {"start": self._start, "weighted": self._weighted, "gain": self._gain, "rates": rates}
        kept["pace"] = _as_tensor(self.pace)
        # Without a learning rate it is a NaN, which no checkpoint has.
        return {**kept, "reach": _as_tensor(self.reach)} if self.reach is not None and self._base > 0 else kept

    def restore(self, tensors: dict[str, Tensor], ops: Ops) -> None:
        """Go on from what `tensors` gave.

        Raises:
            ValueError: It was made for other parameters.
        """
        if tensors["start"].shape != self._start.shape:
            raise ValueError(
                f"the distance estimate looks at {tensors['start'].numel()} coordinates, these parameters have {self._start.numel()}"
            )
        self._start, self._weighted, self._gain, pace = (
            moved(tensors[name], self._device).to(torch.float32).clone()
            for name in ("start", "weighted", "gain", "pace")
        )
        self._base, self._rate = tensors["rates"].tolist()
        self.pace = to_value(pace, ops)
        reach = tensors.get("reach")
        self.reach = None if reach is None else to_value(moved(reach, self._device).to(torch.float32).reshape(()), ops)

    @torch.no_grad()
    def _look(self, tensors: Sequence[Tensor | None], where: int) -> Tensor:
        """The samples of all tensors, in one copy; the vector is written over by the next look of the two that have room."""
        found = []
        room, parts = self._rooms[where]
        for tensor, grid, size, part in zip(tensors, self._grids, self._sizes, parts, strict=True):
            if tensor is None:
                continue
            # The signs count here, so a mark of conjugation is carried out.
            local = summed_part(tensor.resolve_conj() if tensor.is_complex() else tensor)
            if local.numel() != size:
                raise UnsupportedSetupError(
                    f"A gradient must be spread over ranks like its weight, but has {local.numel()} of its numbers here, and the weight "
                    f"{size}. Set `max_pace=1`: the distance estimate compares the two number by number."
                )
            found.append((part, sample_of(local, grid)))
        if len(found) < len(parts):
            room.zero_()
        if found:
            copy_into([part for part, _ in found], [sample for _, sample in found])
        return room

    def _sums(self, *values: Tensor) -> Sequence[Tensor]:
        """Sums over the sample, over all ranks' parts of it; each of shape `[]`."""
        if self._sections[0][0] is None and len(self._sections) == 1:
            return [v.sum() for v in values]
        totals = torch.zeros(len(values), dtype=torch.float32, device=self._device)
        begin = 0
        for layout, size in self._sections:
            part = torch.stack([v[begin : begin + size].sum() for v in values])
            totals = totals + (part if layout is None else sum_over_ranks_(part, layout))
            begin += size
        return totals.unbind()


def _as_tensor(value: Value | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float32, device=HOST)


def _learn(
    _: tuple[()],
    weighted: Value,
    norm: Value,
    scale: Value | float,
    taken: Value | bool,
    pace: Value,
    rate: float,
    g: Value,
    start: Value,
    x: Value,
) -> tuple[Value, Value, Value]:
    """s_t, <g, x_0 - x> number by number, and the size of s_t."""
    ops = ops_of(norm)
    weight = pace * pace * rate / (norm * scale + ops(_TINY))
    # A NaN times 0 is a NaN: what is not usable has to be left out by choice.
    after = ops.where(_teaches(norm, taken, ops), weighted * ops(DECAY) + weight * g, weighted)
    return after, g * (start - x), abs(after)


def _weigh(
    _: tuple[()],
    gain: Value,
    norm: Value,
    scale: Value | float,
    taken: Value | bool,
    pace: Value,
    rate: float,
    dot: Value,
    length: Value,
    base: float,
) -> tuple[Value, Value]:
    """r_t, and d_t over the learning rate."""
    ops = ops_of(norm)
    weight = pace * pace * rate / (norm * scale + ops(_TINY))
    after = ops.where(_teaches(norm, taken, ops), gain * ops(DECAY) + weight * dot, gain)
    return after, after / (length + ops(_TINY)) / base


def _teaches(norm: Value, taken: Value | bool, ops: Ops) -> Any:
    """Whether a step counts; a NaN compares as False."""
    finite = norm < ops(math.inf)
    return finite if taken is True else finite & taken


def check_rates(optimizers: Sequence[Any]) -> None:
    """Whether there is a learning rate for the pace to multiply.

    Raises:
        ConfigError: A group has none, because the optimizer finds its own (Adafactor with `relative_step`).
    """
    for optimizer in optimizers:
        if any(group.get("lr") is None for group in getattr(optimizer, "param_groups", ())):
            raise ConfigError(
                f"`optimizer` must have a learning rate when `max_pace` > 1, but {type(optimizer).__name__} has `lr` None instead: it "
                "finds its own. Give it one (Adafactor: `lr=1e-3, relative_step=False, warmup_init=False`), or set `max_pace=1`."
            )
