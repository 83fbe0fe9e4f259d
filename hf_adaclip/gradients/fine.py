"""Bounds on single units or elements of gradients: applying them in place, and saying what norm is left."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.gradients.sharding import is_sharded


class Bound(Protocol):
    """The part of a `FineController` that is needed here."""

    looks_at: ClassVar[Literal["weights", "second moment"]]

    def bound(self, reference: Tensor) -> Tensor: ...


class FineClip:
    """Applies a bound to the gradients of one set of parameters.

    Args:
        rule: The bound.
        optimizers: Those that step on these gradients, wrapped by Accelerate or not; needed for a bound by the second moment.

    Raises:
        ConfigError: No optimizer is given for a bound that follows from its state.
    """

    def __init__(self, rule: Bound, optimizers: Sequence[Any]) -> None:
        self._rule = rule
        self._groups: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
        if rule.looks_at == "second moment":
            if not optimizers:
                raise ConfigError(
                    "`optimizer` must be given with controller 'second_moment', but is None instead: the bound follows from its state."
                )
            for optimizer in map(unwrap_optimizer, optimizers):
                self._groups.update((id(p), (optimizer, g)) for g in optimizer.param_groups for p in g["params"])

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
        kept = torch.zeros((), dtype=torch.float64, device=norm.device)
        altered = torch.zeros((), dtype=torch.bool, device=norm.device)
        for position, gradient in zip(gradients.present, gradients.tensors, strict=True):
            if is_sharded(gradient):
                raise UnsupportedSetupError(
                    "`granularity` must not be 'unit' or 'element' with sharded gradients (FSDP, tensor parallelism), where it has not "
                    "been run. Choose a controller of norms, such as 'adaptive'."
                )
            part = self._limit(gradients.parameters[position], gradient, act=act, leave=position in excluded)
            kept += part[0].to(norm.device, non_blocking=True)
            altered |= part[1].to(norm.device, non_blocking=True)
        return torch.where(altered, kept.sqrt().float(), norm)

    def _limit(self, parameter: Tensor, gradient: Tensor, *, act: bool, leave: bool) -> tuple[Tensor, Tensor]:
        """Bound one gradient; returns the sum of the squares that are left, and whether anything was beyond its bound."""
        if not leave and gradient.numel():
            if self._rule.looks_at == "weights":
                return self._units(parameter, gradient, act)
            root = self._root_of_second_moment(parameter)
            if root is not None:
                return self._elements(root, gradient, act)
        squares = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return squares, torch.zeros((), dtype=torch.bool, device=gradient.device)

    def _units(self, weight: Tensor, gradient: Tensor, act: bool) -> tuple[Tensor, Tensor]:
        norms = _unit_norms(gradient)
        bound = self._rule.bound(_unit_norms(weight.detach()))
        beyond = norms > bound
        if act:
            gradient.mul_(
                torch.where(beyond, bound / norms, 1.0)
            )  # by 1 where nothing is to change, which leaves the bits alone
        return torch.where(beyond, bound, norms).double().square().sum(), beyond.any()

    def _elements(self, root: Tensor, gradient: Tensor, act: bool) -> tuple[Tensor, Tensor]:
        bound = self._rule.bound(root)
        size = gradient.abs().float()
        beyond = size > bound
        if act:
            gradient.copy_(torch.where(beyond, torch.copysign(bound, gradient.float()), gradient))
        return torch.where(beyond, bound, size).double().square().sum(), beyond.any()

    def _root_of_second_moment(self, weight: Tensor) -> Tensor | None:
        """Square root of the bias-corrected second moment; None before the parameter's first step."""
        optimizer, group = self._groups.get(id(weight), (None, {}))
        state = {} if optimizer is None else optimizer.state.get(weight, {})
        if optimizer is None or (state and "exp_avg_sq" not in state):
            name = "no optimizer that is known" if optimizer is None else type(optimizer).__name__
            raise UnsupportedSetupError(
                f"`optimizer` must keep a second moment of every parameter (Adam, AdamW) with controller 'second_moment', but one of "
                f"them belongs to {name} instead. Exclude it by `parameter_rules`, or choose another controller."
            )
        if not state:
            return None
        moment = state["exp_avg_sq"].float()
        step = torch.as_tensor(state["step"], dtype=torch.float32, device=moment.device)
        correction = 1 - torch.pow(torch.tensor(float(group["betas"][1]), device=moment.device), step)
        root: Tensor = (moment / correction).sqrt()
        return root


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norms over all axes but the first, kept as axes of length 1; of a vector or a scalar, the whole."""
    axes = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dim=axes, keepdim=tensor.dim() > 1, dtype=torch.float32)
    return norms
