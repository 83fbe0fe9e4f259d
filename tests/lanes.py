"""The two lanes of a run: numbers of the host, or tensors as on an accelerator, which the CPU plays here."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from hf_adaclip.controllers.numerics import ops

LANES = ("host", "device")


@contextlib.contextmanager
def on_lane(name: str) -> Iterator[None]:
    """Whatever begins within works as it does where its gradients are in host memory, or on an accelerator."""
    assert name in LANES, name
    with mock.patch.object(ops, "HOST_DEVICES", frozenset({"cpu"} if name == "host" else ())):
        yield
