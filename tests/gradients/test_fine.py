"""Bounds on units and elements: against plain loops, and through the clipper."""

import copy

import pytest
import torch
from transformers.optimization import Adafactor

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers.second_moment import SecondMomentController
from hf_adaclip.controllers.weight_ratio import WeightRatioController
from hf_adaclip.gradients import collect, global_norm, tensor_norms
from hf_adaclip.gradients.elementwise import FineClip
from tests.loops import make, train, weights


def slow_units(w, g, ratio=0.01, floor=1e-3):
    """NFNets, equation 3, unit by unit."""
    out = g.clone()
    rows = [()] if g.dim() <= 1 else [(i,) for i in range(len(g))]
    for row in rows:
        bound = ratio * max(w[row].double().norm().item(), floor)
        norm = g[row].double().norm().item()
        if norm > bound:
            out[row] = g[row] * (bound / norm)
    return out


@pytest.fixture
def parameters(rng):
    torch.manual_seed(int(rng.integers(1000)))
    shapes = [(7, 5), (4, 3, 3, 3), (9,), (), (6, 2), (0, 3)]
    made = [torch.nn.Parameter(torch.randn(s) * 0.3) for s in shapes]
    made[4].data.zero_()  # LoRA's B as it begins
    for p in made:
        p.grad = torch.randn_like(p) * torch.rand(()) * 0.01
    collect(made).tensors[0][0] *= 1e-3  # one unit within its bound, whatever is drawn
    return made


def test_units_are_bounded_by_their_weights(parameters):
    want = [slow_units(p.detach(), p.grad) for p in parameters]
    gradients = collect(parameters)
    before = [g.clone() for g in gradients.tensors]
    norm = global_norm(tensor_norms(gradients.tensors))
    left = FineClip(WeightRatioController(), ()).limit_(gradients, norm, frozenset(), act=True)

    for p, w in zip(parameters, want, strict=True):
        assert torch.allclose(p.grad, w, rtol=1e-5, atol=0)
    assert left == pytest.approx(torch.cat([w.flatten() for w in want]).norm().item(), rel=1e-5)
    untouched = [
        torch.equal(p.grad[i], b[i])
        for p, b, w in zip(parameters, before, want, strict=True)
        if p.dim() > 1
        for i in range(len(p))
        if torch.equal(w[i], b[i])
    ]
    assert all(untouched)
    assert untouched  # some units were within their bound, and kept their bits
    assert parameters[4].grad.abs().max() > 0  # zero weights still train


def test_shadow_only_computes_and_exclusion_leaves_alone(parameters):
    gradients = collect(parameters)
    before = [g.clone() for g in gradients.tensors]
    norm = global_norm(tensor_norms(gradients.tensors))
    fine = FineClip(WeightRatioController(), ())
    left = fine.limit_(gradients, norm, frozenset(), act=False)
    assert left < norm
    assert all(torch.equal(a, b) for a, b in zip(before, gradients.tensors, strict=True))

    assert fine.limit_(gradients, norm, frozenset(range(6)), act=True) == norm
    fine.limit_(gradients, norm, frozenset({0}), act=True)
    assert torch.equal(before[0], gradients.tensors[0])
    assert not torch.equal(before[1], gradients.tensors[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_elements_are_clamped_by_their_second_moment(dtype, fused):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 10).to(dtype))
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.99), fused=fused)
    v, fine = torch.zeros(20, 10), FineClip(SecondMomentController(width=2.0), [optimizer])
    for step in range(1, 30):
        p.grad = (torch.randn(20, 10) * (1 + (torch.rand(20, 10) > 0.95) * 20)).to(dtype)
        g = p.grad.clone()
        gradients = collect([p])
        norm = global_norm(tensor_norms(gradients.tensors))
        left = fine.limit_(gradients, norm, frozenset(), act=True)
        if step > 1:
            bound = 2.0 * (v / (1 - 0.99 ** (step - 1))).sqrt()
            want = torch.minimum(torch.maximum(g.float(), -bound), bound)
            assert torch.allclose(p.grad.float(), want, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-6)
            assert left == pytest.approx(want.norm().item(), rel=1e-2 if dtype is torch.bfloat16 else 1e-4)
            inside = g.float().abs() < bound * 0.98
            assert torch.equal(p.grad[inside], g[inside])
        else:
            assert left == norm
        v = 0.99 * v + 0.01 * p.grad.float() ** 2
        optimizer.step()
        v = optimizer.state[p]["exp_avg_sq"].float().clone()


@pytest.mark.parametrize("controller", ["weight_ratio", "second_moment"])
def test_a_run_with_a_spike_and_a_nan_verifies(controller, tmp_path):
    model, optimizer = make()
    config = AdaptiveClipConfig(controller=controller, warmup_observations=20, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    before = {}

    def clip(model, loss):
        norm = clipper.clip_(model.parameters(), loss=loss, measure=True)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        before[clipper.step] = (float(norm), float(global_norm(tensor_norms(gradients or [norm]))))
        return norm

    train(model, optimizer, clip, 60, factors={40: 1e4, 50: float("nan")})
    clipper.close()
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings
    assert report.measured == 59
    assert before[41][1] < before[41][0] / 1000  # the spike was cut
    assert clipper.statistics.counts_by_name()["NONFINITE"] == 1


def test_a_nan_moves_nothing_and_the_run_resumes(tmp_path):
    model, optimizer = make()
    config = AdaptiveClipConfig(controller="second_moment", warmup_observations=10)
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    clip = lambda m, loss: clipper.clip_(m.parameters(), loss=loss)  # noqa: E731
    train(model, optimizer, clip, 25)
    at = weights(model)
    train(model, optimizer, clip, 1, start=25, factors={25: float("nan")})
    assert torch.equal(at, weights(model))

    clipper.save_state(tmp_path)
    twin, twin_optimizer = make()
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = AdaptiveClipper(config, optimizer=twin_optimizer)
    assert resumed.load_state(tmp_path)
    train(model, optimizer, clip, 20, start=26)
    train(twin, twin_optimizer, lambda m, loss: resumed.clip_(m.parameters(), loss=loss), 20, start=26)
    assert torch.equal(weights(model), weights(twin))


def bounded_before(p, optimizer, width):
    """What one bounded gradient was when the correction was computed parameter by parameter."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    step = torch.as_tensor(state["step"], dtype=torch.float32)
    correction = 1 - torch.pow(torch.tensor(float(group["betas"][1])), step)
    bound = (state["exp_avg_sq"].float() / correction).sqrt() * width
    return torch.where(p.grad.abs() > bound, torch.copysign(bound, p.grad), p.grad)


@pytest.mark.parametrize("kind", ["plain", "fused", "steps on a device", "beta as a tensor", "whole steps"])
def test_one_correction_for_all_parameters_gives_the_bits_of_one_for_each(kind, monkeypatch):
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.98), fused=kind == "fused")
    fine = FineClip(SecondMomentController(width=1.5), [optimizer])
    if kind == "beta as a tensor":
        optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.98))
    if kind == "steps on a device":  # what says so is played: there is no other device here

        class There(torch.Tensor):
            device = torch.device("cuda", 0)

    for step in range(1, 40):
        for i, p in enumerate(parameters):
            p.grad = None if i == 3 and step % 3 else torch.randn(5, 3)
        if step > 1:
            present = [p for p in parameters if p.grad is not None and optimizer.state[p]]
            want = [bounded_before(p, optimizer, 1.5) for p in present]
            kept = [optimizer.state[p]["step"] for p in present]
            for p in present:
                state = optimizer.state[p]
                if kind == "steps on a device":
                    state["step"] = state["step"].as_subclass(There)
                if kind == "whole steps":
                    state["step"] = int(state["step"])
            gradients = collect(parameters)
            norm = global_norm(tensor_norms(gradients.tensors))
            fine.limit_(gradients, norm, frozenset(), act=True)
            assert all(torch.equal(p.grad, w) for p, w in zip(present, want, strict=True))
            for p, count in zip(present, kept, strict=True):
                optimizer.state[p]["step"] = count
        if kind == "beta as a tensor":
            optimizer.param_groups[0]["betas"] = (0.9, 0.98)
        optimizer.step()
        if kind == "beta as a tensor":
            optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.98))


class HostTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts tensors that are made of numbers of the host, each of which is a copy where the device is another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        moves = name == "aten::_to_copy" and (kwargs or {}).get("device") is not None
        self.count += name in ("aten::lift_fresh", "aten::scalar_tensor") or moves
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_makes_as_many_tensors_on_the_host_whatever_the_number_of_parameters(fused):
    counts = []
    for number in (2, 20):
        parameters = [torch.nn.Parameter(torch.randn(4)) for _ in range(number)]
        optimizer = torch.optim.AdamW(parameters, fused=fused)
        fine = FineClip(SecondMomentController(), [optimizer])
        for p in parameters:
            p.grad = torch.randn(4)
        optimizer.step()
        gradients = collect(parameters)
        norm = global_norm(tensor_norms(gradients.tensors))
        with HostTensors() as made:
            fine.limit_(gradients, norm, frozenset(), act=True)
        counts.append(made.count)
    assert counts == [1, 1]  # the count of steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("controller", [WeightRatioController(), SecondMomentController(width=1.0)], ids=repr)
def test_every_dtype_has_its_bounds(dtype, controller):
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(6, 5).to(dtype))
    p.grad = torch.randn(6, 5).to(dtype)
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p] = {"step": torch.tensor(4.0), "exp_avg_sq": (torch.rand(6, 5) * 0.1).to(dtype)}
    if isinstance(controller, WeightRatioController):
        want = slow_units(p.detach().double(), p.grad.double())
    else:
        bound = (optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999**4)).sqrt()
        want = p.grad.double().clamp(-bound, bound)
    gradients = collect([p])
    FineClip(controller, [optimizer]).limit_(
        gradients, global_norm(tensor_norms(gradients.tensors)), frozenset(), act=True
    )
    rtol = {torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert p.grad.dtype == dtype
    torch.testing.assert_close(p.grad.double(), want, rtol=rtol, atol=1e-6)


def test_tiny_second_moments_in_float64_do_not_vanish():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.tensor([1e-25, 5e-25, -5e-25], dtype=torch.float64)
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p] = {"step": torch.tensor(1e6), "exp_avg_sq": torch.full((3,), 1e-50, dtype=torch.float64)}
    gradients = collect([p])
    FineClip(SecondMomentController(), [optimizer]).limit_(gradients, torch.tensor(1e-24), frozenset(), act=True)
    assert p.grad.tolist() == pytest.approx([1e-25, 3e-25, -3e-25], rel=1e-6, abs=0)


def test_parameters_that_are_added_to_the_optimizer_later_are_found():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([p])
    fine = FineClip(SecondMomentController(), [optimizer])
    for parameters in ([p], [p, q]):
        if q in optimizer.state or len(parameters) == 2:
            optimizer.add_param_group({"params": [q]})
        for x in parameters:
            x.grad = torch.ones(3)
        gradients = collect(parameters)
        norm = global_norm(tensor_norms(gradients.tensors))
        assert fine.limit_(gradients, norm, frozenset(), act=True) == norm
        optimizer.step()


def test_what_the_optimizer_does_not_keep_is_an_error():
    config = AdaptiveClipConfig(controller="second_moment", warmup_observations=2)
    model, _ = make()
    with pytest.raises(ConfigError, match="`optimizer` must be given with controller 'second_moment'"):
        AdaptiveClipper(config)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clipper = AdaptiveClipper(config, optimizer=sgd)
    with pytest.raises(UnsupportedSetupError, match="belongs to SGD"):
        train(model, sgd, lambda m, loss: clipper.clip_(m.parameters()), 5)
    # It keeps one of vectors, under the same name, with neither a shape nor a decay that would fit the others.
    factored = Adafactor(model.parameters(), lr=1e-3, relative_step=False, warmup_init=False)
    clipper = AdaptiveClipper(config, optimizer=factored)
    with pytest.raises(UnsupportedSetupError, match="belongs to Adafactor"):
        train(model, factored, lambda m, loss: clipper.clip_(m.parameters()), 5)
