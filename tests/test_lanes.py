"""What the other tests lean on: the CPU plays an accelerator wherever the package asks, and every way to a tensor's value is counted."""

import contextlib
import operator
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipper
from hf_adaclip.controllers.numerics import ops
from tests.lanes import BY_NAME, LANES, on_lane
from tests.loops import HostReads, make

ONE = torch.ones(1)


@pytest.mark.parametrize("lane", LANES)
def test_a_run_and_its_self_test_work_with_the_numbers_of_the_lane(lane):
    asked: list[Any] = []

    def kept(device, shape):
        asked.append(BY_NAME[lane](device, shape))
        return asked[-1]

    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, _lane=kept)
    clipper.self_test()
    model(torch.ones(2, 8)).sum().backward()
    clipper.clip_(model.parameters())
    assert [type(kind) for kind in asked] == [ops.ScalarOps if lane == "host" else ops.TensorOps] * 2
    assert isinstance(clipper.state["count"], np.floating if lane == "host" else torch.Tensor)


def test_a_clipper_that_others_make_is_on_the_lane_too_and_the_next_is_not():
    kinds = []
    for names in (["device"], []):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(on_lane(name))
            clipper = AdaptiveClipper()
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        clipper.clip_([weight])
        kinds.append(type(clipper.state["count"]))
    assert issubclass(kinds[0], torch.Tensor)
    assert issubclass(kinds[1], np.floating)


READS: dict[str, Any] = {read.__name__: read for read in (float, bool, int, np.asarray)}
READS |= {name: operator.methodcaller(name) for name in ("item", "tolist", "numpy", "nonzero")}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_counted_once_however_it_is_made(read):
    with HostReads() as reads:
        read(ONE)
    assert reads.count == 1
    read(ONE)
    assert reads.count == 1


def test_work_that_stays_on_the_device_is_not_counted():
    with HostReads() as reads:
        torch.where(ONE > 0, ONE * 2, ONE).clone().copy_(ONE)
    assert reads.count == 0
