"""Bounds on single units or elements of gradients: applying them in place, and saying what norm is left."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.guard import unwrap_optimizer
from hf_adaclip.gradients.norms import Gradients
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
        removed = torch.zeros((), dtype=torch.float64, device=norm.device)
        for position, gradient in zip(gradients.present, gradients.tensors, strict=True):
            if is_sharded(gradient):
                raise UnsupportedSetupError(
                    "`granularity` must not be 'unit' or 'element' with sharded gradients (FSDP, tensor parallelism), where it has not "
                    "been run. Choose a controller of norms, such as 'adaptive'."
                )
            if position not in excluded and gradient.numel():
                parameter = gradients.parameters[position]
                limit = self._units if self._rule.looks_at == "weights" else self._elements
                removed += limit(parameter, gradient, act).to(norm.device, non_blocking=True)
        left = (norm.double().square() - removed).clamp(min=0.0).sqrt().float()
        return torch.where(removed > 0, left, norm)

    def _units(self, weight: Tensor, gradient: Tensor, act: bool) -> Tensor:
        norms = _unit_norms(gradient)
        bound = self._rule.bound(_unit_norms(weight.detach()))
        factor = torch.where(norms > bound, bound / norms, 1.0)
        if act:
            gradient.mul_(factor)  # by 1 where nothing is to change, which leaves the bits alone
        return (norms.double().square() * (1 - factor.double().square())).sum()

    def _elements(self, weight: Tensor, gradient: Tensor, act: bool) -> Tensor:
        optimizer, group = self._groups.get(id(weight), (None, {}))
        state = {} if optimizer is None else optimizer.state.get(weight, {})
        if optimizer is None or (state and "exp_avg_sq" not in state):
            name = "no optimizer that is known" if optimizer is None else type(optimizer).__name__
            raise UnsupportedSetupError(
                f"`optimizer` must keep a second moment of every parameter (Adam, AdamW) with controller 'second_moment', but one of "
                f"them belongs to {name} instead. Exclude it by `parameter_rules`, or choose another controller."
            )
        if not state:  # a parameter that gets its first gradient late
            return torch.zeros((), dtype=torch.float64, device=gradient.device)
        step = torch.as_tensor(state["step"], dtype=torch.float32, device=gradient.device)
        correction = 1 - torch.pow(torch.tensor(float(group["betas"][1]), device=gradient.device), step)
        bound = self._rule.bound((state["exp_avg_sq"].float() / correction).sqrt())
        beyond = gradient.abs().float()
        removed = (beyond.square() - bound.square()).clamp(min=0.0).sum(dtype=torch.float64)
        if act:
            torch.clamp(gradient, -bound, bound, out=gradient) if gradient.dtype == bound.dtype else gradient.copy_(
                torch.clamp(gradient.float(), -bound, bound)
            )
        return removed


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norms over all axes but the first, kept as axes of length 1; of a vector or a scalar, the whole."""
    axes = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dim=axes, keepdim=tensor.dim() > 1, dtype=torch.float32)
    return norms
