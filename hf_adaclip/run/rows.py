"""How many rows a step gives to the hidden matrices: by the batches that a loop shows, or else by what the model is called with."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_adaclip.run.shape_gate import ShapeGate


def rows_of(batch: Any, models: Sequence[Any]) -> int | None:
    """How many rows a micro-batch gives to the hidden matrices; None where that cannot be told.

    Token ids of shape `[batch, length]` are a row each, images `[batch, channels, height, width]` one per patch where the model has a
    `patch_size`, features `[batch, length, size]` one per position.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    tensors = [v for v in values if isinstance(v, Tensor) and not v.is_nested]
    patch = next(
        (p for m in models if isinstance(p := getattr(getattr(m, "config", None), "patch_size", None), int)), 0
    )
    # Labels are such tensors too, and no more than what they are for.
    counts = [v.numel() for v in tensors if v.dim() == 2 and not v.is_floating_point()]
    features = [v for v in tensors if v.is_floating_point()]
    counts += [v.shape[0] * (v.shape[2] // patch) * (v.shape[3] // patch) for v in features if v.dim() == 4 and patch]
    counts += [v.shape[:-1].numel() for v in features if v.dim() in (2, 3)]
    return max(counts, default=None)


class ForwardRows:
    """Tells a gate what a model is called with in training, as long as nothing is decided; then it is gone from the model.

    Args:
        gate: Is told; not kept alive.
        model: Is listened to.
    """

    def __init__(self, gate: "ShapeGate", model: nn.Module) -> None:
        self._gate = weakref.ref(gate)
        self._handle: Any = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # a graph has no place for it
            return
        gate = self._gate() if self._gate is not None else None
        if gate is None or gate.decided:
            self.remove()
        elif model.training and torch.is_grad_enabled():
            try:
                gate.passes(list(_flat((*args, *kwargs.values()))), [model])
            except Exception:  # whatever a model is called with, it is called
                self.remove()

    def remove(self) -> None:
        """Listen no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_gate": None, "_handle": None}  # of a model that is copied or saved with it


def _flat(given: Sequence[Any]) -> Iterator[Any]:
    for value in given:
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        else:
            yield value
