"""Logarithm and exponential of our own: right to float32, and the same bits as scalars, arrays and tensors."""

import numpy as np
import pytest
import torch

from hf_adaclip.controllers.numerics.logarithm import exponential, logarithm
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, tensor_ops
from hf_adaclip.controllers.numerics.window import Window, mean_and_sd

OPS = tensor_ops(torch.device("cpu"))


def test_the_logarithm_is_right():
    values = np.exp(np.random.default_rng(0).uniform(-80, 80, 20_000)).astype(np.float32)
    want = np.log(values.astype(np.float64))
    got = np.asarray(logarithm(values, ARRAY), dtype=np.float64)
    assert np.max(np.abs(got - want) / np.maximum(np.abs(want), 1)) < 4e-7
    assert logarithm(np.float32(1.0), SCALAR) == 0.0
    assert np.isfinite(float(logarithm(np.float32(0.0), SCALAR)))


def test_the_exponential_is_right():
    values = np.random.default_rng(1).uniform(-80, 80, 20_000).astype(np.float32)
    want = np.exp(values.astype(np.float64))
    got = np.asarray(exponential(values, ARRAY), dtype=np.float64)
    assert np.max(np.abs(got / want - 1)) < 4e-7
    assert exponential(np.float32(0.0), SCALAR) == 1.0
    assert np.isfinite(float(exponential(np.float32(1e9), SCALAR)))
    assert exponential(np.float32(-1e9), SCALAR) > 0


@pytest.mark.parametrize("function", [logarithm, exponential])
def test_the_bits_are_the_same_in_every_lane(function):
    rng = np.random.default_rng(2)
    values = rng.uniform(-60, 60, 3000).astype(np.float32)
    values = np.exp(values) if function is logarithm else values
    array = function(values, ARRAY)
    tensor = function(torch.from_numpy(values), OPS).numpy()
    scalar = np.array([function(v, SCALAR) for v in values])
    assert array.dtype == scalar.dtype == np.float32
    assert array.tobytes() == tensor.tobytes() == scalar.tobytes()


@pytest.mark.parametrize("size", [10, 37, 128])
@pytest.mark.parametrize("known", [1, 2, 9, 200])
def test_mean_and_deviation_are_those_of_numpy_and_the_same_in_every_lane(size, known):
    rng = np.random.default_rng(size + known)
    history = np.full((size, 3), np.inf, np.float32)
    there = min(size, known)
    history[:there] = rng.lognormal(0, 1, (there, 3))
    count = np.full(3, known, np.float32)
    mean, sd = mean_and_sd(Window(history, count, count), ARRAY)
    assert mean == pytest.approx(history[:there].mean(0), rel=1e-5)
    assert sd == pytest.approx(history[:there].std(0, ddof=1) if there > 1 else np.zeros(3), rel=1e-4)
    on_device = mean_and_sd(Window(*map(torch.from_numpy, (history, count, count))), OPS)
    assert [np.asarray(v).tobytes() for v in (mean, sd)] == [np.asarray(v).tobytes() for v in on_device]
    for i in range(3):
        single = mean_and_sd(Window(history[:, i], np.float32(known), np.float32(known)), SCALAR)
        assert (single[0], single[1]) == (mean[i], sd[i])
