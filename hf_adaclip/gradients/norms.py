"""Gradient norms in float32, whatever the gradients' dtype, device or sharding.

`torch.nn.utils.get_total_norm` returns the norm of bfloat16 gradients in bfloat16 (three significant digits) and lets
float16 norms overflow. Here every norm is accumulated in float32; for float32 gradients on one device the result is that
of torch bit for bit, because the same two kernels run in the same order.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.sharding import is_sharded, norms_over_ranks, real_view, summed_part
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.reliance import require

Parameters = Iterable[Tensor] | Tensor

_BUFFER = 1 << 18  # numbers; 1 MB
_LARGE = 1 << 16
sorted_alike: Final = require(require(torch.utils, "_foreach_utils"), "_group_tensors_by_device_and_dtype")
HALF: Final = (torch.bfloat16, torch.float16)
_DTYPES: Final = (*HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Gradients(NamedTuple):
    """The gradients of one step.

    Attributes:
        parameters: Trainable parameters and others with a gradient, each once (tied parameters are one tensor), in the order given.
        present: Positions in `parameters` of those that have a gradient.
        tensors: Their gradients, same order.
    """

    parameters: list[Tensor]
    present: list[int]
    tensors: list[Tensor]

    def required(self) -> "Gradients":
        """These gradients, if there are any.

        Raises:
            ConfigError: No parameter has a gradient.
        """
        if not self.tensors:
            if not self.parameters:
                raise ConfigError(
                    "`parameters` must be trainable, but all of them are frozen instead. Set `requires_grad` on what is to be trained."
                )
            raise ConfigError(
                f"`parameters` must have gradients, but none of the {len(self.parameters)} trainable ones has one instead. "
                "Clip after `backward` and before `optimizer.step()` and `zero_grad()`."
            )
        return self


def collect(parameters: Parameters, stepped: Callable[[], Sequence[Tensor]] = lambda: ()) -> Gradients:
    """Look up the gradients of any iterable of parameters: a list, a generator, one tensor.

    Frozen parameters are left out, unless they have a gradient from before and an optimizer that steps on it. Trainable ones without a
    gradient keep their place for per-tensor state.

    Args:
        parameters: The parameters.
        stepped: Gives what the optimizers have, asked only where a frozen parameter has a gradient.

    Raises:
        ConfigError: These are no tensors; or there is none at all, most often a generator that was used up before.
        UnsupportedSetupError: A gradient is sparse.
    """
    given = as_tensors(parameters)
    if not given:
        raise ConfigError(
            "`parameters` must hold at least one tensor, but is empty instead. A generator such as "
            "`model.parameters()` can be used only once: call it anew in every step."
        )
    # In plain passes, and each tensor once by identity: with thousands of tensors a call in Python for each is felt.
    each = {id(p): p for p in given}.values()
    unique = [p for p in each if p.requires_grad or p.grad is not None]
    if not all(p.requires_grad for p in unique):
        known = {id(p) for p in stepped()}
        unique = [p for p in each if p.requires_grad or (p.grad is not None and id(p) in known)]
    if not unique and not any(isinstance(p, torch.nn.Parameter) for p in given):
        raise ConfigError(
            f"`parameters` must be trainable, but none of the {len(given)} tensors has `requires_grad` instead. Pass "
            "`model.parameters()`, not gradients and not the values of a state dict."
        )
    gradients = [p.grad for p in unique]
    present = [i for i, g in enumerate(gradients) if g is not None]
    tensors = [g for g in gradients if g is not None]
    for layout in {g.layout for g in tensors} - {torch.strided}:
        raise UnsupportedSetupError(
            f"`parameters` must have dense gradients, but one of them is sparse ({str(layout).removeprefix('torch.')}) instead. "
            "Build the embedding with `sparse=False`."
        )
    return Gradients(unique, present, tensors)


def as_tensors(parameters: Parameters) -> list[Tensor]:
    """What was given as `parameters`, as a list.

    Raises:
        ConfigError: It is something else than tensors; the message names what it looks like, and what to pass.
    """
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise _no_parameters(parameters, f"is {_kind_of(parameters)}")
    given = list(parameters)
    # By the set of types, as below: nearly always it is the one type `Parameter`.
    for wrong in [t for t in set(map(type, given)) if not issubclass(t, Tensor)]:
        first = next(item for item in given if type(item) is wrong)
        what = "is a mapping, as state_dict() gives" if isinstance(parameters, Mapping) else f"holds {_kind_of(first)}"
        raise _no_parameters(first, what)
    return given


def _kind_of(value: Any) -> str:
    if isinstance(value, torch.nn.Module):
        return f"a module ({type(value).__name__})"
    if isinstance(value, torch.optim.Optimizer):
        return f"an optimizer ({type(value).__name__})"
    if isinstance(value, dict) and "params" in value:
        return "param_groups of an optimizer"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return "pairs of names and tensors, as named_parameters() gives"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} in place of a tensor"
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__


def _no_parameters(value: Any, found: str) -> ConfigError:
    groups = isinstance(value, dict | torch.optim.Optimizer)
    way_out = '`[p for g in optimizer.param_groups for p in g["params"]]`' if groups else "`model.parameters()`"
    return ConfigError(f"`parameters` must be an iterable of tensors, but {found} instead. Pass {way_out}.")


def tensor_norms(gradients: list[Tensor]) -> Tensor:
    """L2 norm of every gradient.

    Args:
        gradients: At least one dense tensor; dtypes and devices may differ, of a `DTensor` every rank holds a part, and the ranks
            add theirs up in one collective per layout.

    Returns:
        float32, shape `[len(gradients)]`, on the device of the first gradient.
    """
    # By the set of types, because with thousands of tensors a call for each is felt.
    if set(map(type, gradients)) == {Tensor} or not any(is_sharded(g) for g in gradients):
        return _norms_of(gradients)
    return norms_over_ranks(gradients, _norms_of([summed_part(g) for g in gradients]))


def global_norm(norms: Tensor) -> Tensor:
    """L2 norm over all tensors from their norms, shape `[num_tensors]` -> `[]`."""
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def _norms_of(gradients: list[Tensor]) -> Tensor:
    groups = sorted_alike([gradients], with_indices=True)
    for device, dtype in groups:
        _check_kind(device, dtype)
    if len(groups) == 1:
        return torch.stack(_norms_alike(gradients)).float()
    first = gradients[0].device
    norms: list[Tensor | None] = [None] * len(gradients)
    for (_, _), ([members], positions) in groups.items():
        together = torch.stack(_norms_alike(members)).float()
        # In one copy: one for each would make the host wait as often, where the first gradient is in its memory.
        for position, norm in zip(positions, moved(together, first).unbind(), strict=True):
            norms[position] = norm
    return torch.stack([n for n in norms if n is not None])


def _check_kind(device: torch.device, dtype: torch.dtype | None) -> None:
    if dtype not in _DTYPES or device.type == "meta":
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise UnsupportedSetupError(
            f"`parameters` must have gradients of dtype {known} that hold values, but one of them is "
            f"{str(dtype).removeprefix('torch.')} on {device} instead."
        )


def _norms_alike(gradients: list[Tensor]) -> list[Tensor]:
    if gradients[0].is_complex():
        gradients = [real_view(g) for g in gradients]
    if gradients[0].dtype in HALF and gradients[0].device.type == "cpu":
        large = [i for i, g in enumerate(gradients) if g.numel() >= _LARGE and g.is_contiguous()]
        if large:
            chosen = set(large)
            small = [g for i, g in enumerate(gradients) if i not in chosen]
            norms = iter(torch._foreach_norm(small, 2, dtype=torch.float32) if small else ())
            return [_norm_of_halves(g) if i in chosen else next(norms) for i, g in enumerate(gradients)]
    # float64 gradients keep their precision until the end; asking for float32 would be an error.
    dtype = None if gradients[0].dtype == torch.float64 else torch.float32
    return list(torch._foreach_norm(gradients, 2, dtype))


def _norm_of_halves(gradient: Tensor) -> Tensor:
    """Norm of a large half-precision tensor in host memory, in float32, by way of a small float32 buffer that every thread keeps.

    Asked for a float32 norm, torch's CPU kernel converts the whole tensor into memory that it allocates anew for each: up to three times
    slower, and added up in one long chain whose rounding shows in the fifth digit.
    """
    norms = []
    scratch = _scratch()
    for part in torch.split(gradient.view(-1), _BUFFER):
        buffer = scratch[: part.numel()]
        buffer.copy_(part)
        norms.append(torch.linalg.vector_norm(buffer))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


_of_thread: Final = threading.local()


def _scratch() -> Tensor:
    buffer: Tensor | None = getattr(_of_thread, "buffer", None)
    if buffer is None:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            buffer = _of_thread.buffer = torch.empty(_BUFFER, dtype=torch.float32, device=HOST)
    return buffer
