"""The distance estimate against its formulas in float64, and what it must not do."""

import numpy as np
import pytest
import torch

from hf_adaclip.controllers.numerics.ops import SCALAR, tensor_ops
from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients import Gradients, collect, global_norm, tensor_norms
from hf_adaclip.gradients.coordinates import EVERY, MOST, grid_of, sample_of
from hf_adaclip.gradients.distance import ReachEstimate


def problem(seed=0, sizes=((40, 30), (700,), (3,))):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(*size)) for size in sizes]
    return parameters, [torch.randn_like(p) for p in parameters]


def steps(parameters, goals, *, lr, count, pace=1.0, broken=(), ops=SCALAR, optimizer=None):
    """Walk towards `goals` with Adam; yields the estimate's answer, and records what it was made of."""
    optimizer = optimizer or torch.optim.Adam(parameters, lr=lr)
    estimate = ReachEstimate(parameters, [optimizer], torch.device("cpu"))
    rows = []
    for step in range(count):
        for p, goal in zip(parameters, goals, strict=True):
            p.grad = (p.detach() - goal) * (float("nan") if step in broken else 1.0)
        gradients = collect(parameters)
        norm = global_norm(tensor_norms(gradients.tensors))
        seen = (
            torch.cat([p.detach().flatten().double() for p in parameters]),
            torch.cat([p.grad.flatten().double() for p in parameters]),
        )
        reach = estimate.observe(gradients, norm, ops)
        estimate.pace = ops(pace) if ops is not SCALAR else pace
        rows.append((*seen, float(norm), float(reach)))
        if step not in broken:
            for group in optimizer.param_groups:
                group["lr"] = lr * pace
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = lr
    return rows


def reference(rows, picks, *, lr, pace=1.0):
    """The formulas of the file's head, one step after another, in float64, on the coordinates `picks`."""
    start, s, r, rate, answers = rows[0][0][picks], 0.0, 0.0, 0.0, []
    before = 1.0
    for x, g, norm, _ in rows:
        if np.isfinite(norm):
            w = before**2 * rate / norm
            r = 0.98 * r + w * float(g[picks] @ (start - x[picks]))
            s = 0.98 * s + w * g[picks]
        length = 0.0 if isinstance(s, float) else float(s.abs().sum())
        answers.append(r / (length + 1e-30) / lr)
        rate, before = 1.0, pace
    return answers


def picks_of(parameters, every=EVERY):
    numbered, begin = [], 0
    for p in parameters:
        index = torch.arange(begin, begin + p.numel()).reshape(p.shape)
        numbered.append(sample_of(index, grid_of(index.numel(), every)).reshape(-1))
        begin += p.numel()
    return torch.cat(numbered)


@pytest.mark.parametrize("pace", [1.0, 3.0])
@pytest.mark.parametrize("broken", [(), (0, 7)])
def test_equals_the_formulas(pace, broken):
    parameters, goals = problem()
    rows = steps(parameters, goals, lr=1e-3, count=60, pace=pace, broken=broken)
    expected = reference(rows, picks_of(parameters), lr=1e-3, pace=pace)
    assert [row[3] for row in rows] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(expected) > 1


def test_on_a_device_the_numbers_are_the_same_bits():
    answers = []
    for ops in (SCALAR, tensor_ops(torch.device("cpu"))):
        parameters, goals = problem()
        answers.append([row[3] for row in steps(parameters, goals, lr=1e-3, count=30, ops=ops)])
    assert answers[0] == answers[1]


def test_far_below_the_useful_rate_it_grows_and_where_the_rate_is_too_large_it_does_not():
    slow, fast = (steps(*problem(), lr=lr, count=60)[-1][3] for lr in (1e-4, 3.0))
    assert slow > 10
    assert fast < 1


def test_a_step_that_is_not_finite_teaches_nothing():
    parameters, goals = problem()
    rows = steps(parameters, goals, lr=1e-3, count=20, broken=(10,))
    assert rows[10][3] == rows[9][3]
    assert np.isfinite([row[3] for row in rows]).all()


def test_without_a_learning_rate_nothing_is_known():
    parameters, goals = problem()
    assert np.isnan(steps(parameters, goals, lr=0.0, count=2)[-1][3])


def test_a_checkpoint_goes_on_bit_for_bit_and_one_of_other_parameters_is_refused():
    parameters, goals = problem()
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    one = ReachEstimate(parameters, [optimizer], torch.device("cpu"))

    def step(estimate):
        for p, goal in zip(parameters, goals, strict=True):
            p.grad = p.detach() - goal
        gradients = collect(parameters)
        return float(estimate.observe(gradients, global_norm(tensor_norms(gradients.tensors)), SCALAR))

    for _ in range(10):
        step(one)
        optimizer.step()
    saved = {k: v.clone() for k, v in one.tensors().items()}
    other = ReachEstimate(parameters, [optimizer], torch.device("cpu"))
    other.restore(saved, SCALAR)
    for _ in range(5):
        assert step(one) == step(other)
        optimizer.step()
    with pytest.raises(ValueError, match="these parameters have"):
        ReachEstimate(parameters[:1], [optimizer], torch.device("cpu")).restore(saved, SCALAR)


def test_the_sample_is_small_spread_out_and_the_same_for_a_weight_and_its_gradient():
    tensor = torch.arange(10_000.0).reshape(100, 100)
    grid = grid_of(10_000, EVERY)
    sample = sample_of(tensor, grid)
    assert sample.numel() == 10_000 // (16 * EVERY) * 16
    assert sample.max() > 9_000
    assert torch.equal(sample_of(tensor.t().contiguous().t(), grid), sample)
    assert torch.equal(sample_of(torch.cat([torch.zeros(100, 100), tensor])[100:], grid), sample)
    assert [len(sample_of(torch.zeros(n), grid_of(n, EVERY))) for n in (0, 5, 31, 32)] == [0, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 30, 31, 495, 496, 497, 5000])
def test_the_sample_is_blocks_of_16_or_every_31st(count, dtype):
    flat = torch.randn(count + 7).to(dtype)[7:]  # a view with an offset
    found = sample_of(flat, grid_of(count, EVERY))
    blocks = [flat[begin : begin + 16] for begin in range(0, count - count % 496, 496)]
    assert torch.equal(found, torch.stack(blocks) if blocks else flat[::31])


def test_weights_that_move_in_memory_are_followed():
    parameters, _ = problem()
    moved = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    estimates = [ReachEstimate(ps, [torch.optim.SGD(ps, lr=1e-3)], torch.device("cpu")) for ps in (parameters, moved)]
    for step in range(6):
        gradients = [torch.full_like(p, 0.1 + step) for p in parameters]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        there = Gradients(parameters, list(range(len(parameters))), gradients)
        a, b = (estimate.observe(there, norm, SCALAR) for estimate in estimates)
        assert a == b or step == 0
        for p, q in zip(parameters, moved, strict=True):
            p.data.sub_(0.01)
            q.data = q.data - 0.01  # another memory
    assert a > 0


def test_a_gradient_of_another_size_is_refused():
    parameters, _ = problem()
    estimate = ReachEstimate(parameters, [torch.optim.SGD(parameters, lr=1e-3)], torch.device("cpu"))
    gradients = [torch.ones(p.numel() + 1) for p in parameters]
    with pytest.raises(UnsupportedSetupError, match="must be spread over ranks like its weight"):
        estimate.observe(Gradients(parameters, [0, 1, 2], gradients), torch.tensor(1.0), SCALAR)


def test_a_gradient_that_is_missing_counts_as_zero():
    parameters, _ = problem()
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    with_none, with_zero = (ReachEstimate(parameters, [optimizer], torch.device("cpu")) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        if step == 4:  # after others, whose samples must not be taken for it
            gradients[0].zero_()
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        everything = Gradients(parameters, list(range(len(parameters))), gradients)
        present = Gradients(parameters, list(range(1, len(parameters))), gradients[1:]) if step == 4 else everything
        assert with_none.observe(present, norm, SCALAR) == with_zero.observe(everything, norm, SCALAR)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 1e-3 * g


def test_large_models_are_sampled_more_thinly():
    parameter = torch.nn.Parameter(torch.zeros(40 * MOST))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    estimate = ReachEstimate([parameter], [optimizer], torch.device("cpu"))
    assert len(estimate.tensors()["start"]) == pytest.approx(MOST, rel=0.01)
