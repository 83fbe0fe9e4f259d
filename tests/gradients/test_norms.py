import pytest
import torch

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients import collect, global_norm, tensor_norms


def parameter(shape, grad=None, dtype=torch.float32, requires_grad=True):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=requires_grad)
    p.grad = grad if grad is None else grad.to(dtype)
    return p


def norm_of(parameters):
    return global_norm(tensor_norms(collect(parameters).tensors))


def test_equals_torch_bit_for_bit_in_float32():
    torch.manual_seed(1)
    ps = [parameter((n, 7), torch.randn(n, 7)) for n in (3, 50, 1000)]

    assert torch.equal(norm_of(ps), torch.nn.utils.get_total_norm([p.grad for p in ps]))


@pytest.mark.parametrize("kind", ["list", "generator", "tuple", "one tensor", "parameters()"])
def test_takes_any_iterable_of_parameters(kind):
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.full((4, 4), 0.5)
    given = {
        "list": [model.weight],
        "generator": (p for p in [model.weight]),
        "tuple": (model.weight,),
        "one tensor": model.weight,
        "parameters()": model.parameters(),
    }[kind]

    assert norm_of(given).item() == 2.0


def test_none_frozen_and_tied_parameters():
    tied = parameter((4,), torch.full((4,), 1.5))
    frozen = parameter((4,), requires_grad=False)
    unused = parameter((4,))
    gradients = collect([frozen, tied, unused, tied])

    assert len(gradients.parameters) == 2
    assert gradients.present == [0]
    assert global_norm(tensor_norms(gradients.tensors)).item() == 3.0


def test_accumulates_in_float32_whatever_the_dtype():
    torch.manual_seed(2)
    exact = torch.randn(200_000)
    for dtype, rtol in ((torch.bfloat16, 2e-3), (torch.float16, 2e-4), (torch.float64, 1e-6)):
        norm = norm_of([parameter((200_000,), exact, dtype)])
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(exact.to(dtype).double().norm().item(), rel=1e-5)
        assert norm.item() == pytest.approx(exact.norm().item(), rel=rtol)
    # torch's own norm of these float16 gradients overflows
    large = parameter((10_000,), torch.full((10_000,), 900.0), torch.float16)
    assert torch.nn.utils.get_total_norm([large.grad]).isinf()
    assert norm_of([large]).item() == pytest.approx(90_000, rel=1e-4)


def test_mixed_dtypes_in_one_model():
    parts = [parameter((50,), torch.randn(50), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    want = torch.cat([p.grad.double() for p in parts]).norm().item()

    assert norm_of(parts).item() == pytest.approx(want, rel=1e-6)
    # and each norm stands where its parameter stands
    assert tensor_norms([p.grad for p in parts]).tolist() == pytest.approx(
        [p.grad.double().norm().item() for p in parts]
    )


def test_an_empty_iterable_is_an_error_with_the_way_out():
    model = torch.nn.Linear(2, 2)
    used_up = model.parameters()
    list(used_up)
    with pytest.raises(ConfigError, match=r"`parameters` must hold at least one tensor.*call it anew in every step"):
        collect(used_up)


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedSetupError, match="sparse"):
        collect(embedding.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(), (7,), (33, 129), (1 << 16,), (64, 3, 32, 32), (1, 100_003), (1100, 1001)], ids=str
)
def test_half_precision_norms_are_right_to_float32(dtype, shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = float(gradient.double().norm())
    assert float(tensor_norms([gradient])[0]) == pytest.approx(want, rel=3e-5)
    turned = gradient.T if gradient.dim() == 2 else gradient
    assert float(tensor_norms([turned])[0]) == pytest.approx(want, rel=1e-4)  # torch's own way


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_half_precision_norm_shows_what_is_not_finite(bad):
    gradient = torch.ones(100_000, dtype=torch.bfloat16)
    gradient[99_999] = bad
    found = tensor_norms([torch.ones(5, dtype=torch.bfloat16), gradient, torch.ones(7, dtype=torch.bfloat16)])
    assert found.isfinite().tolist() == [True, False, True]
