"""What training changes, kept in host memory so that it can be put back where it was: the same tensors, the same objects.

Each function here keeps one thing and gives a function that puts it back, as often as it is called. On an accelerator the copies are made
into pinned memory, in the order of the stream: nobody waits for them, and what comes back is read behind them.
"""

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.sharding import is_sharded
from hf_adaclip.gradients.transfer import HOST, copy_into, start_copy

PutBack: TypeAlias = Callable[[], None]

SCHEDULED: Final = frozenset(
    {
        *("lr", "initial_lr", "min_lr", "max_lr", "betas", "momentum", "weight_decay"),
        *("base_momentum", "max_momentum", "params"),
    }
)
"""Entries of an optimizer's groups that a schedule sets by the number of the step, which goes on."""

_KNOWN: Final = ("state", "param_groups", "defaults", "name2qmap")
"""Attributes of an optimizer that are kept, or that are constants (the tables of bitsandbytes)."""


class Held(NamedTuple):
    """A tensor's values.

    Attributes:
        values: In host memory.
        device: Where the tensor is.
    """

    values: Tensor
    device: torch.device

    @property
    def size(self) -> int:
        return self.values.numel() * self.values.element_size()


def hold(tensor: Tensor) -> Held:
    """A copy of its values, which nobody waits for."""
    tensor = tensor.detach()
    pinned = tensor.device.type in ("cuda", "xpu")
    room = torch.empty_like(tensor, device=HOST, pin_memory=pinned)
    start_copy(room, tensor, awaited=pinned)
    return Held(room, tensor.device)


def keep_weights(weights: Sequence[Tensor]) -> tuple[PutBack, int]:
    """Of parameters and buffers; and the bytes that they take.

    Args:
        weights: Each once.
    """
    held = [hold(tensor) for tensor in weights]

    @torch.no_grad()
    def put_back() -> None:
        for device in {kept.device for kept in held}:
            here = [(t, kept.values) for t, kept in zip(weights, held, strict=True) if kept.device == device]
            copy_into([t.detach() for t, _ in here], [values for _, values in here])

    return put_back, sum(kept.size for kept in held)


def keep_optimizer(optimizer: torch.optim.Optimizer) -> tuple[PutBack, int]:
    """Of its state and of what it counts in its groups; learning rates stay those of the schedule. And the bytes that they take."""
    sizes: list[int] = []
    state = [(key, _kept(value, sizes)) for key, value in optimizer.state.items()]
    groups = [
        {name: _kept(value, sizes) for name, value in group.items() if name not in SCHEDULED}
        for group in optimizer.param_groups
    ]

    @torch.no_grad()
    def put_back() -> None:
        known = {id(key) for key, _ in state}
        for key in [k for k in optimizer.state if id(k) not in known]:
            del optimizer.state[key]  # it began after the snapshot, and begins again
        for key, kept in state:
            optimizer.state[key] = _restored(optimizer.state.get(key), kept)
        for group, values in zip(optimizer.param_groups, groups, strict=False):
            for name in [n for n in group if n not in values and n not in SCHEDULED]:
                del group[name]
            for name, kept in values.items():
                group[name] = _restored(group.get(name), kept)

    return put_back, sum(sizes)


def _kept(value: Any, sizes: list[int]) -> Any:
    if isinstance(value, Tensor):
        held = hold(value)
        sizes.append(held.size)
        return held
    if isinstance(value, Mapping):
        return {name: _kept(inner, sizes) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept(inner, sizes) for inner in value)
    return copy.deepcopy(value)


def _restored(now: Any, kept: Any) -> Any:
    """What was kept, in the tensors and tables that are there as far as they fit."""
    if isinstance(kept, Held):
        fits = isinstance(now, Tensor) and (now.shape, now.dtype, now.device) == (
            kept.values.shape,
            kept.values.dtype,
            kept.device,
        )
        target: Tensor = now.detach() if fits else torch.empty_like(kept.values, device=kept.device, pin_memory=False)
        copy_into([target], [kept.values])
        return now if fits else target
    if isinstance(kept, Mapping):
        there = now if isinstance(now, dict) else {}
        for name in [n for n in there if n not in kept]:
            del there[name]
        for name, inner in kept.items():
            there[name] = _restored(there.get(name), inner)
        return there
    if type(kept) in (list, tuple):
        same = type(now) is type(kept) and len(now) == len(kept)
        return type(kept)(_restored(now[i] if same else None, inner) for i, inner in enumerate(kept))
    return copy.deepcopy(kept)


def keep_random(devices: Iterable[torch.device]) -> PutBack:
    """Of the generators of this process: Python's, numpy's, torch's, and those of these devices."""
    python, numpy_state, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    others = [
        (torch.get_device_module(device), device, torch.get_device_module(device).get_rng_state(device))
        for device in devices
        if device.type != "cpu"
    ]

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(host)
        for module, device, state in others:
            module.set_rng_state(state, device)

    return put_back


def keep_stateful(thing: Any) -> PutBack:
    """Of anything with `state_dict` and `load_state_dict`: a loss scaler, an average of the weights."""
    state = copy.deepcopy(thing.state_dict())

    def put_back() -> None:
        thing.load_state_dict(copy.deepcopy(state))

    return put_back


def check_weights(weights: Iterable[Tensor]) -> None:
    """Whether every process has all of them.

    Raises:
        UnsupportedSetupError: They are spread over ranks.
    """
    if any(is_sharded(weight) for weight in weights):
        raise spread_out()


def spread_out() -> UnsupportedSetupError:
    """The error for weights of which every process has a part."""
    return UnsupportedSetupError(
        "`on_trouble` must not be 'rewind' where weights are spread over ranks (FSDP2, tensor parallelism), but is: putting them back has "
        "not been run there. Set 'stop', and go on from a checkpoint."
    )


def check_optimizer(optimizer: Any) -> None:
    """Whether all that an optimizer remembers is where it can be found.

    Raises:
        UnsupportedSetupError: It is not.
    """
    name = type(optimizer).__name__
    why = None
    if not isinstance(optimizer, torch.optim.Optimizer):
        why = "it is no optimizer of torch, so what it remembers is not known"
    elif isinstance(optimizer, torch.optim.LBFGS):
        why = "it takes many looks at one batch within a step, and cannot be led past one"
    else:
        rest = {key: value for key, value in vars(optimizer).items() if key not in _KNOWN}
        where = next((key for key, value in rest.items() if _remembers(value)), None)
        if where is not None:
            why = f"it keeps tensors or another optimizer in `{where}`, beside its `state`"
    if why is not None:
        raise UnsupportedSetupError(
            f"`on_trouble` must not be 'rewind' with {name}, but is: {why}. Set 'stop', or choose an optimizer of torch."
        )


def _remembers(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor | torch.nn.Module | torch.optim.Optimizer):
        return True
    if depth > 3:
        return False
    if isinstance(value, Mapping):
        return any(_remembers(inner, depth + 1) for inner in value.values())
    return isinstance(value, list | tuple) and any(_remembers(inner, depth + 1) for inner in value)
