"""The agreement against its definition on copies of the weights, for every kind of optimizer, and where it is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients import agreement
from hf_adaclip.gradients.agreement import Agreement
from tests.lanes import on_lane
from tests.reference import spectral as reference

CONFIG = AdaptiveClipConfig(controller="static", static_threshold=1.0, agreement=True, self_test=False)


def _guards(clipper: Any) -> Any:
    return clipper._driver.guards._guards


def model():
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)
    return torch.nn.Sequential(*layers)


def backward(net, step, factor=1.0):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(net[0].weight.dtype)
    ((net(x) - 2 * x[:, :1]).square().mean() * factor).backward()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def largest_difference(net, others):
    return max(float((p - q).detach().abs().max()) for p, q in zip(net.parameters(), others, strict=True))


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    "foreach": (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    "plain": (torch.optim.AdamW, {"foreach": False, "weight_decay": 0.0}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "betas": (0.8, 0.95)}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "coupled": (torch.optim.Adam, {"weight_decay": 0.1}),
    "eps": (torch.optim.AdamW, {"eps": 1e-2}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_adam_and_adamw_by_their_definition_and_without_a_copy(kind, lane, monkeypatch):
    cls, settings = KINDS[kind]
    net = model()
    optimizer = cls(net.parameters(), lr=1e-2, **settings)
    decay = optimizer.defaults["weight_decay"]
    own = {
        "lr": 1e-2,
        "decay": decay,
        "decoupled": cls is torch.optim.AdamW,
        "amsgrad": settings.get("amsgrad", False),
    }
    own |= {"betas": optimizer.defaults["betas"], "eps": optimizer.defaults["eps"]}
    exact = [reference.Adam(w, **own) for w in weights(net)]
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(12):
        backward(net, step)
        clipper.clip_(net.parameters())
        gradients = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert all(guard.agreement._copies is None for guard in _guards(clipper))
        for one, g, p in zip(exact, gradients, net.parameters(), strict=True):
            one.step(g, agreement=True)
            assert np.abs(one.w - p.detach().double().numpy()).max() < 2e-6 * (step + 1)
        optimizer.zero_grad()


OTHERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=True, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_any_other_optimizer_by_a_copy_for_the_time_of_the_step(kind):
    """Two optimizers in step: one makes its whole step from the same weights, of which the agreeing part is what the other has made."""
    net, twin = model(), model()
    optimizer, whole = OTHERS[kind](net.parameters()), OTHERS[kind](twin.parameters())
    group = optimizer.param_groups[0]
    decoupled = kind in ("nadam", "adafactor", "maximize")
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(8):
        backward(net, step)
        clipper.clip_(net.parameters())
        with torch.no_grad():
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
                q.grad = p.grad.clone()
        before = weights(net)
        optimizer.step()
        whole.step()
        for p, q, w in zip(net.parameters(), twin.parameters(), before, strict=True):
            start = w.double() * (1 - group["lr"] * group["weight_decay"] if decoupled else 1)
            d = q.detach().double() - start
            sign = -1 if kind == "maximize" else 1
            wanted = start.numpy() + reference.agreeing(d.numpy(), sign * p.grad.double().numpy())
            assert np.abs(wanted - p.detach().double().numpy()).max() < 1e-6
        optimizer.zero_grad()


def test_muon_with_its_decay():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 1, bias=False))
    optimizer = torch.optim.Muon(net.parameters(), lr=0.02, weight_decay=0.1)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(3):
        backward(net, step)
        clipper.clip_(net.parameters())
        before = weights(net)
        optimizer.step()
        for p, w in zip(net.parameters(), before, strict=True):
            d = p.detach() - w * (1 - 0.02 * 0.1)
            assert bool(((d * p.grad <= 0) | (d.abs() < 1e-7)).all())
        optimizer.zero_grad()


def test_components_without_a_gradient_stay_and_no_step_is_made_more_than_ten_times_as_long():
    table = torch.nn.Embedding(100, 4)
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-2, weight_decay=0.0)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=table)
    for tokens in ([1, 2, 3], [4, 5]):
        before = table.weight.detach().clone()
        (table(torch.tensor(tokens)).sum() * 0.1).backward()
        clipper.clip_(table.parameters())
        optimizer.step()
        moved = (table.weight.detach() - before).abs().amax(1)
        assert sorted((moved > 1e-6).nonzero().flatten().tolist()) == tokens
        assert float(moved.max()) <= 10 * 1e-2 * 1.001
        optimizer.zero_grad()


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["fused", "foreach", "sgd"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_left_out_takes_nothing_back(kind, fault, at, lane):
    net = model()
    optimizer = OTHERS[kind](net.parameters()) if kind == "sgd" else KINDS[kind][0](net.parameters(), **KINDS[kind][1])
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(6):
        backward(net, step, fault if step == at else 1.0)
        clipper.clip_(net.parameters())
        before = weights(net)
        optimizer.step()
        assert (largest_difference(net, before) == 0) == (step == at)
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        optimizer.zero_grad()


def test_a_grad_scaler_that_leaves_a_step_out_takes_nothing_back():
    for fused in (True, False):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
        for step in range(6):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = (net(x) - 2 * x[:, :1]).square().mean() * (math.inf if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clipper.clip_(net.parameters())
            before = weights(net)
            scaler.step(optimizer)
            scaler.update()
            assert (largest_difference(net, before) == 0) == (step == 3)
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["fused", "sgd"])
def test_weights_that_somebody_limits_after_each_step_stay_limited(kind):
    net = model()
    kinds = {**KINDS, "sgd": (torch.optim.SGD, {"momentum": 0.9})}
    optimizer = kinds[kind][0](net.parameters(), lr=0.05, **kinds[kind][1])

    def limit(*_):
        with torch.no_grad():
            for p in net.parameters():
                p.clamp_(-0.05, 0.05)

    optimizer.register_step_post_hook(limit)  # before ours
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    for step in range(20):
        backward(net, step)
        clipper.clip_(net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert max(float(p.abs().max()) for p in net.parameters()) <= 0.05 + 1e-9


def test_a_step_that_raises_leaves_no_copy_behind():
    net = model()
    optimizer = OTHERS["sgd"](net.parameters())
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    backward(net, 0)
    clipper.clip_(net.parameters())
    optimizer.param_groups[0]["lr"] = "none"
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    before = weights(net)
    optimizer.step()
    assert largest_difference(net, before) > 0
    clipper.close()
    assert all(guard.agreement is None for guard in _guards(clipper))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_weights_of_other_precisions(dtype, kind):
    net = model().to(dtype)
    optimizer = KINDS[kind][0](net.parameters(), lr=1e-2, **KINDS[kind][1])
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(5):
        backward(net, step)
        clipper.clip_(net.parameters())
        before = weights(net)
        optimizer.step()
        for p, w in zip(net.parameters(), before, strict=True):
            start = w.double() * (1 - 1e-2 * 0.1)
            against = (p.detach().double() - start) * p.grad.double() > 0
            left = (p.detach().double() - start).abs() / (start.abs() + 0.1)  # of weights, and of the largest steps
            assert bool((left[against] <= 2 * torch.finfo(dtype).eps).all())
        optimizer.zero_grad()


def test_the_rate_of_a_pace_and_of_a_tensor_counts(lane):
    """With a pace the step is longer, and as much more is taken back; a rate in a tensor is a rate."""
    config = CONFIG.replace(controller="adaptive", max_pace=8.0, pace_start=5, warmup_observations=5)
    for rate in (3e-4, torch.tensor(3e-4)):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, fused=True, weight_decay=0.0)
        clipper = AdaptiveClipper(config, optimizer=optimizer, model=net)
        paces = []
        for step in range(30):
            backward(net, step)
            clipper.clip_(net.parameters())
            before = weights(net)
            optimizer.step()
            paces.append(float(clipper.state["pace"]))
            for p, w in zip(net.parameters(), before, strict=True):
                assert bool(((p.detach() - w) * p.grad <= 1e-7).all())
            optimizer.zero_grad()
        assert max(paces) > 1.5


def test_chunks_do_not_matter(monkeypatch):
    finals = []
    for room in (1 << 22, 60):
        monkeypatch.setattr(agreement, "MOST_AT_ONCE", room)
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
        for step in range(5):
            backward(net, step)
            clipper.clip_(net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        finals.append(torch.cat([w.flatten() for w in weights(net)]))
    assert torch.equal(*finals)


def test_clipping_within_a_closure():
    for make in (KINDS["fused"][0], torch.optim.SGD):
        net = model()
        optimizer = make(net.parameters(), lr=1e-2)
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
        for step in range(4):

            def closure(step=step, net=net, clipper=clipper, optimizer=optimizer):
                optimizer.zero_grad()
                backward(net, step)
                clipper.clip_(net.parameters())
                return torch.zeros(())

            before = weights(net)
            optimizer.step(closure)
            decay = 1 - 1e-2 * optimizer.param_groups[0]["weight_decay"]
            for p, w in zip(net.parameters(), before, strict=True):
                assert bool(((p.detach() - w * decay) * p.grad <= 1e-7).all())


class ScheduleFreeAdamW(torch.optim.SGD):
    """Stands for the optimizers of that name."""


class Unknown(torch.optim.Optimizer):
    def __init__(self, params, weight_decay):
        super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def test_refusals_name_the_reason():
    net = model()
    for optimizer, why in (
        (torch.optim.LBFGS(net.parameters()), "several steps in one"),
        (ScheduleFreeAdamW(net.parameters(), lr=0.1), "average"),
        (Unknown(net.parameters(), 0.1), "decay"),
    ):
        with pytest.raises(UnsupportedSetupError, match=why):
            AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    Agreement(Unknown(net.parameters(), 0.0), lambda counts: None)
    with pytest.raises(ConfigError, match="optimizer"):
        AdaptiveClipper(CONFIG)


def test_both_lanes_make_the_same_step():
    finals = []
    for name in ("host", "device"):
        with on_lane(name):
            net = model()
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
            clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
            for step in range(5):
                backward(net, step)
                clipper.clip_(net.parameters())
                optimizer.step()
                optimizer.zero_grad()
            finals.append(torch.cat([w.flatten() for w in weights(net)]))
    assert torch.allclose(finals[0], finals[1], atol=1e-7)
