"""The two lanes of a run: numbers of the host, or tensors as on an accelerator, which the CPU plays here."""

import contextlib
from collections.abc import Iterator
from typing import Final
from unittest import mock

import torch

from hf_adaclip import AdaptiveClipper
from hf_adaclip.controllers.numerics.ops import Lane, Shape, TensorOps, ops_for, tensor_ops


def on_tensors(device: torch.device, shape: Shape) -> TensorOps:
    """The lane of an accelerator, whatever the device."""
    return tensor_ops(device)


BY_NAME: Final[dict[str, Lane]] = {"host": ops_for, "device": on_tensors}
LANES: Final = tuple(BY_NAME)


@contextlib.contextmanager
def on_lane(name: str) -> Iterator[None]:
    """Every clipper that is made within gets this lane for its argument, be it made by a Trainer."""
    with mock.patch.dict(AdaptiveClipper.__init__.__kwdefaults__, _lane=BY_NAME[name]):
        yield
