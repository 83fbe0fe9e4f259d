import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.gradients import scale_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensors):
    return [t.view(torch.int8).clone() for t in tensors]


def odd_values(dtype):
    """Negative zero, subnormals, the largest numbers: what a careless multiplication by one could change."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, info.tiny / 2, info.max, -info.max, info.eps, 1.0]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "one", [np.float32(1), torch.tensor(1.0), np.ones(2, np.float32), torch.ones(2)], ids=lambda o: type(o).__name__
)
def test_a_coefficient_of_one_changes_no_bit(dtype, one):
    gradients = [odd_values(dtype), torch.randn(33).to(dtype)]
    before = bits(gradients)
    scale_(gradients, one)

    assert all(torch.equal(a, b) for a, b in zip(before, bits(gradients), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_and_device_numbers_scale_alike(dtype):
    # For half-precision gradients torch rounds one of the two to their dtype first: on a CPU the number of the host.
    atol = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    torch.manual_seed(3)
    a = [torch.randn(1000).to(dtype), torch.randn(7, 3).to(dtype)]
    b = [t.clone() for t in a]
    scale_(a, np.float32(0.3))
    scale_(b, torch.tensor(0.3))

    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2 * atol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_host_number_scales_as_torch_does_by_a_number(dtype):
    # To the bit. In place, torch rounds the number to a half-precision dtype first; out of place it does not.
    torch.manual_seed(4)
    gradients = [torch.randn(1000).to(dtype), torch.randn(7, 3).to(dtype)]
    expected = [g.clone() for g in gradients]
    torch._foreach_mul_(expected, float(np.float32(0.3)))
    scale_(gradients, np.float32(0.3))

    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_one_factor_each(kind):
    gradients = [torch.ones(3), torch.ones(2), torch.ones(1)]
    factors = np.array([0.5, 1.0, 0.25], dtype=np.float32)
    scale_(gradients, factors if kind is np.array else torch.from_numpy(factors))

    assert [g[0].item() for g in gradients] == [0.5, 1.0, 0.25]


def test_mixed_dtypes():
    gradients = [torch.full((4,), 2.0), torch.full((4,), 2.0, dtype=torch.bfloat16)]
    scale_(gradients, torch.tensor(0.5))

    assert [g[0].item() for g in gradients] == [1.0, 1.0]


@pytest.mark.parametrize("coefficient", [np.array(0.5, np.float32), np.array(1.0, np.float32)])
def test_an_array_of_no_axes_is_one_factor(coefficient):
    gradients = [torch.full((3,), 2.0), torch.full((2,), 4.0)]
    scale_(gradients, coefficient)

    assert [g[0].item() for g in gradients] == [2 * float(coefficient), 4 * float(coefficient)]


@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_shadow_by_tensor_scales_by_the_static_threshold(granularity):
    model = torch.nn.Linear(4, 4)
    config = AdaptiveClipConfig(granularity=granularity, shadow=True, static_threshold=0.1)
    clipper = AdaptiveClipper(config, model=model)
    model(torch.ones(2, 4)).square().sum().mul(100).backward()
    clipper.clip_(model.parameters())

    assert torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    ).item() == pytest.approx(0.1, rel=1e-4)
