"""Bounds on single units or elements of gradients: applying them in place, and saying what norm is left."""

import itertools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.controllers.elementwise import FineController
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.gradients.sharding import is_sharded, real_view
from hf_adaclip.gradients.transfer import HOST, copy_into, moved

_TOGETHER: Final = 1 << 22  # numbers


class FineClip:
    """Applies a bound to the gradients of one set of parameters.

    Args:
        rule: The bound.
        optimizers: Those that step on these gradients, wrapped by Accelerate or not; needed for a bound by the second moment.

    Raises:
        ConfigError: No optimizer is given for a bound that follows from its state.
    """

    def __init__(self, rule: FineController, optimizers: Sequence[Any]) -> None:
        self._rule = rule
        self._moments: SecondMoments | None = None
        if rule.looks_at == "second moment":
            if not optimizers:
                raise ConfigError(
                    "`optimizer` must be given with controller 'second_moment', but is None instead: the bound follows from its state."
                )
            self._moments = SecondMoments([unwrap_optimizer(o) for o in optimizers])

    def limit_(self, gradients: Gradients, norm: Tensor, excluded: frozenset[int], *, act: bool) -> Tensor:
        """Bound the gradients in place.

        Args:
            gradients: The gradients of this step.
            norm: Their global norm, shape `[]`.
            excluded: Positions of parameters that are left alone.
            act: False only computes.

        Returns:
            The global norm that is left (`norm` itself when nothing was beyond its bound), float32, shape `[]`.

        Raises:
            UnsupportedSetupError: Gradients are sharded, or the optimizer keeps no second moment.
        """
        if any(is_sharded(g) for g in gradients.tensors):
            raise UnsupportedSetupError(
                "`granularity` must not be 'unit' or 'element' with sharded gradients (FSDP, tensor parallelism), where it has not "
                "been run. Choose a controller of norms, such as 'adaptive'."
            )
        judged: dict[torch.device, list[tuple[int, Tensor]]] = {}
        others: dict[torch.device, list[Tensor]] = {}
        corrections = {} if self._moments is None else self._moments.corrections(self._judged(gradients, excluded))
        for position, gradient in zip(gradients.present, gradients.tensors, strict=True):
            numbers = real_view(gradient) if gradient.is_complex() else gradient
            if (
                position in excluded
                or not gradient.numel()
                or (self._moments is not None and position not in corrections)
            ):
                others.setdefault(numbers.device, []).append(numbers)
            else:
                judged.setdefault(numbers.device, []).append((position, numbers))
        parts = [_Part(_squares(tensors), None) for tensors in others.values()]
        for members in judged.values():
            weights = [gradients.parameters[position] for position, _ in members]
            numbers_of = [numbers for _, numbers in members]
            if self._moments is None:
                parts.append(self._units([w.detach() for w in weights], numbers_of, act))
            else:
                factors = [corrections[position] for position, _ in members]
                parts += [
                    self._elements(weights[chunk], factors[chunk], numbers_of[chunk], act)
                    for chunk in _chunks(numbers_of)
                ]
        kept = torch.stack([moved(part.squares, norm.device) for part in parts]).sum().sqrt().float()
        beyond = [moved(part.beyond, norm.device) for part in parts if part.beyond is not None]
        return torch.where(torch.stack(beyond).any(), kept, norm) if beyond else norm

    def _judged(self, gradients: Gradients, excluded: frozenset[int]) -> dict[int, Tensor]:
        return {
            position: gradients.parameters[position]
            for position, gradient in zip(gradients.present, gradients.tensors, strict=True)
            if position not in excluded and gradient.numel()
        }

    def _units(self, weights: list[Tensor], gradients: list[Tensor], act: bool) -> "_Part":
        """Bound the units of gradients on one device: their norms one by one, and all that follows for all units of all tensors at once."""
        found = [_unit_norms(g, w.dim()) for g, w in zip(gradients, weights, strict=True)]
        sizes = [_unit_norms(real_view(w) if w.is_complex() else w, w.dim()) for w in weights]
        norms = torch.cat([n.reshape(-1) for n in found])
        bound = self._rule.bound(torch.cat([size.reshape(-1) for size in sizes]))
        beyond = norms > bound
        if act:
            # By 1 where nothing is to change, which leaves the bits alone.
            factors = torch.split(torch.where(beyond, bound / norms, 1.0), [n.numel() for n in found])
            torch._foreach_mul_(gradients, [f.view(n.shape) for f, n in zip(factors, found, strict=True)])
        return _Part(torch.where(beyond, bound, norms).double().square().sum(), beyond.any())

    def _elements(
        self, weights: list[Tensor], corrections: list[Tensor], gradients: list[Tensor], act: bool
    ) -> "_Part":
        """Bound the elements of some gradients on one device."""
        assert self._moments is not None
        bounds = self._rule.bounds(self._moments.roots(weights, corrections))
        numbers = [g.float() for g in gradients]
        if not act:
            numbers = [n.clone() if n is g else n for n, g in zip(numbers, gradients, strict=True)]
        excess = torch._foreach_sub(torch._foreach_abs(numbers), bounds)
        beyond = torch.stack(torch._foreach_max(excess)) > 0
        # A number that is none stays what it is.
        torch._foreach_minimum_(numbers, bounds)
        torch._foreach_neg_(bounds)
        torch._foreach_maximum_(numbers, bounds)
        if act:
            copies = [(g, n) for g, n in zip(gradients, numbers, strict=True) if n is not g]
            if copies:
                copy_into([g for g, _ in copies], [n for _, n in copies])
        return _Part(_squares(numbers), beyond.any())


class _Part(NamedTuple):
    """Of some gradients the sum of the squares that are left, float64, and whether anything was beyond its bound; both shape `[]`."""

    squares: Tensor
    beyond: Tensor | None


def _squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum()


def _chunks(tensors: Sequence[Tensor]) -> list[slice]:
    """Neighbours that are looked at together: as many as need no more memory than a large one alone."""
    slices: list[slice] = []
    begin = size = 0
    for place, tensor in enumerate(tensors):
        if size and size + tensor.numel() > _TOGETHER:
            slices.append(slice(begin, place))
            begin, size = place, 0
        size += tensor.numel()
    return [*slices, slice(begin, len(tensors))]


class SecondMoments:
    """What Adam and its kin keep of the squares of gradients, without the bias of their start.

    Args:
        optimizers: Torch optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._groups: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}

    def corrections(self, parameters: dict[int, Tensor]) -> dict[int, Tensor]:
        """1 - beta2^steps by position, float32, shape `[]`, on the moment's device; none for those that have made no step yet.

        Computed once for all parameters of a group that have made equally many steps, where the host knows the counts (optimizers that
        are not fused keep them there); and without a copy from the host where the device does.

        Raises:
            UnsupportedSetupError: The optimizer keeps no second moment of a parameter.
        """
        found: dict[int, Tensor] = {}
        made: dict[tuple[int, float, torch.device], Tensor] = {}
        on_device: dict[int, tuple[Any, list[int], list[Tensor]]] = {}
        for position, parameter in parameters.items():
            optimizer, group = self._group_of(parameter)
            state = optimizer.state.get(parameter, {})
            if not state:
                continue
            step, moment = state.get("step", group.get("step")), state.get("exp_avg_sq")
            if step is None or "betas" not in group or moment is None or moment.shape != parameter.shape:
                raise _no_moment(type(optimizer).__name__)
            beta = group["betas"][1]
            if isinstance(step, Tensor) and step.device.type != "cpu":
                _, positions, steps = on_device.setdefault(id(group), (beta, [], []))
                positions.append(position)
                steps.append(step.reshape(()).float())
                continue
            count = float(step.numpy().item() if isinstance(step, Tensor) else step)
            key = (id(group), count, moment.device)
            if key not in made:
                made[key] = moved(_correction(beta, count), moment.device)
            found[position] = made[key]
        for beta, positions, steps in on_device.values():
            powers = _powers(beta, steps)
            torch._foreach_neg_(powers)
            torch._foreach_add_(powers, 1.0)
            found.update(zip(positions, powers, strict=True))
        return found

    def roots(self, parameters: Sequence[Tensor], corrections: Sequence[Tensor]) -> list[Tensor]:
        """Square roots of second moments, of the parameters' shapes (real numbers where those are complex).

        Args:
            parameters: On one device.
            corrections: As `corrections` gives them.
        """
        moments: list[Tensor] = []
        for parameter in parameters:
            moment: Tensor = self._group_of(parameter)[0].state[parameter]["exp_avg_sq"]
            if moment.is_complex():
                moment = real_view(moment)
            # Of float64, squares are kept that float32 could not hold.
            moments.append(moment if moment.dtype == torch.float64 else moment.float())
        roots: list[Tensor] = []
        for correction, members in itertools.groupby(
            zip(moments, corrections, strict=True), key=lambda pair: id(pair[1])
        ):
            del correction
            alike = list(members)
            roots += torch._foreach_div([moment for moment, _ in alike], alike[0][1])
        torch._foreach_sqrt_(roots)
        return [root.float() for root in roots]

    def _group_of(self, parameter: Tensor) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        if id(parameter) not in self._groups:
            # The first time, and whenever somebody has added parameters.
            self._groups = {id(p): (o, g) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        if id(parameter) not in self._groups:
            raise _no_moment("no optimizer that is known")
        return self._groups[id(parameter)]


def _correction(beta: Any, count: float) -> Tensor:
    steps = torch.tensor(count, dtype=torch.float32, device=HOST)
    return 1 - _powers(beta, [steps])[0]


def _powers(beta: Any, steps: list[Tensor]) -> list[Tensor]:
    """beta^steps one by one: over a vector torch's kernel rounds otherwise."""
    if isinstance(beta, Tensor):  # torch takes one where it captures steps into graphs
        return [torch.pow(moved(beta.float().reshape(()), s.device), s) for s in steps]
    return list(torch._foreach_pow(float(beta), steps))


def _no_moment(name: str) -> UnsupportedSetupError:
    return UnsupportedSetupError(
        f"`optimizer` must keep a second moment of every parameter (Adam, AdamW) with controller 'second_moment', but one of "
        f"them belongs to {name} instead. Exclude it by `parameter_rules`, or choose another controller."
    )


def _unit_norms(tensor: Tensor, dimensions: int) -> Tensor:
    """L2 norms over all axes but the first, kept as axes of length 1; of a vector or a scalar, the whole.

    Args:
        tensor: Real numbers.
        dimensions: Axes of the parameter, of which a complex one has one less than `tensor`.
    """
    axes = tuple(range(1, tensor.dim())) if dimensions > 1 else None
    # Torch narrows no float64; anything else is added up in float32.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dim=axes, keepdim=dimensions > 1, dtype=dtype)
    return norms.float()
