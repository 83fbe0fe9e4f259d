"""A step that is left out leaves no trace in weights or optimizer state, whatever the optimizer, whichever way is taken."""

import copy

import pytest
import torch

from hf_adaclip import AdaptiveClipper
from hf_adaclip.gradients import StepGuard

OPTIMIZERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam-fused-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd-momentum-fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    return model, OPTIMIZERS[kind](model.parameters())


def snapshot(model, optimizer):
    return copy.deepcopy([p.detach() for p in model.parameters()]), copy.deepcopy(optimizer.state_dict())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def step(model, optimizer, clipper, factor=1.0):
    (model(torch.ones(3, 6)).square().mean() * factor).backward()
    clipper.clip_(model.parameters())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("known", [True, False], ids=["optimizer known", "optimizer unknown"])
def test_a_step_that_is_not_finite_leaves_no_trace(lane, kind, bad, known):
    model, optimizer = make(kind)
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer if known else None)
    for _ in range(3):
        step(model, optimizer, clipper)
    before = snapshot(model, optimizer)
    state = {k: float(v) for k, v in clipper.state.items()}
    step(model, optimizer, clipper, bad)

    assert equal(before, snapshot(model, optimizer))
    assert {k: float(v) for k, v in clipper.state.items()} == pytest.approx(state, abs=0, nan_ok=True)
    assert clipper.metrics()["clip/skipped"] == 1
    step(model, optimizer, clipper)  # and the next step is an ordinary one
    assert not equal(before, snapshot(model, optimizer))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_step_may_be_the_bad_one(lane, kind):
    """Fused SGD with momentum leaves its buffer uninitialised when its first step is skipped on the device: it must not be."""
    model, optimizer = make(kind)
    reference, reference_optimizer = make(kind)
    clipper = AdaptiveClipper("static", optimizer=optimizer, static_threshold=1e9)
    step(model, optimizer, clipper, float("nan"))
    for _ in range(3):
        step(model, optimizer, clipper)
        reference(torch.ones(3, 6)).square().mean().backward()
        reference_optimizer.step()
        reference_optimizer.zero_grad()

    assert equal(list(model.parameters()), list(reference.parameters()))


def test_which_way_is_taken():
    ways = {kind: StepGuard(make(kind)[1]).path for kind in OPTIMIZERS}

    assert ways.pop("adamw-fused") == "device"
    assert ways.pop("adam-fused-amsgrad") == "device"
    assert set(ways.values()) == {"host"}
    assert StepGuard(make("adamw-fused")[1], scaler=True).path == "scaler"


def test_nothing_stays_behind_after_the_step():
    """A stale flag would skip the next step, a stale rate would compound."""
    model, optimizer = make("adamw-fused")
    guard = StepGuard(optimizer)
    guard.arm(skip=torch.tensor(True), pace=torch.tensor(3.0))
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()

    assert optimizer.found_inf is None
    assert optimizer.param_groups[0]["lr"] == 1e-2
    before = snapshot(model, optimizer)[0]
    optimizer.step()  # not armed: an ordinary step
    assert not equal(before, snapshot(model, optimizer)[0])


@pytest.mark.parametrize("kind", ["adamw-fused", "adamw-loop", "sgd-momentum"])
def test_the_pace_is_a_multiple_of_the_rate_for_one_step(kind):
    paced, paced_optimizer = make(kind)
    plain, plain_optimizer = make(kind)
    for group in paced_optimizer.param_groups + plain_optimizer.param_groups:
        group["weight_decay"] = 0.0
    for group in plain_optimizer.param_groups:
        group["lr"] *= 2.5
    guard = StepGuard(paced_optimizer)
    for model, optimizer in ((paced, paced_optimizer), (plain, plain_optimizer)):
        model(torch.ones(1, 6)).sum().backward()
        if model is paced:
            guard.arm(skip=None, pace=2.5)
        optimizer.step()

    assert equal(list(paced.parameters()), list(plain.parameters()))
    assert paced_optimizer.param_groups[0]["lr"] == 1e-2


def test_detaching_removes_every_hook():
    _, optimizer = make("adamw-fused")
    guard = StepGuard(optimizer)
    guard.detach()

    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
