"""Where less agrees than by chance, nothing is made larger: by the definition, through checkpoints, and what it is good for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.gradients import agreement
from tests.reference import spectral as reference

CONFIG = AdaptiveClipConfig(controller="static", static_threshold=1e9, agreement=True, self_test=False)
SHAPES = ((8, 16), (16,), (12, 16))
OPTIMIZERS: dict[str, Any] = {
    "fused": lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1, fused=True),
    "foreach": lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1, foreach=True),
    "sgd": lambda own: torch.optim.SGD(own, lr=1e-2, momentum=0.9),
}


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step):
    """Of three tenths of all components in the first 20 steps, then of all."""
    rng = np.random.default_rng(step)
    live = 0.3 if step < 20 else 1.1
    return [torch.tensor(rng.normal(size=shape) * (rng.random(shape) < live), dtype=torch.float32) for shape in SHAPES]


def walk(own, optimizer, clipper, steps):
    for step in steps:
        for p, g in zip(own, gradients(step), strict=True):
            p.grad = g.clone()
        clipper.clip_(own)
        optimizer.step()
        yield step


def shares_of(clipper: Any) -> torch.Tensor:
    shares: torch.Tensor = clipper._driver.guards.running_shares
    return shares


def running(clipper):
    return float(shares_of(clipper)[0])


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_by_the_definition(kind, lane):
    own = parameters()
    weights = [p.detach().double().numpy() for p in own]
    exact = [reference.Adam(w, lr=1e-2, decay=0.1) for w in weights]
    chance, seen, moments = reference.Chance(), [], [np.zeros_like(w) for w in weights]
    optimizer = OPTIMIZERS[kind](own)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    for step in walk(own, optimizer, clipper, range(45)):
        least, shares = chance.least, []
        for i, g in enumerate(g.double().numpy() for g in gradients(step)):
            if kind == "sgd":
                moments[i] = 0.9 * moments[i] + g
                d = -1e-2 * moments[i]
                weights[i] = weights[i] + reference.agreeing(d, g, least)
                shares.append(np.mean(d * g < 0))
            else:
                weights[i] = exact[i].step(g, agreement=True, least=least)
                shares.append(exact[i].share)
            assert np.abs(weights[i] - own[i].detach().double().numpy()).max() < 3e-6 * (step + 1)
        matrices = [i for i, shape in enumerate(SHAPES) if len(shape) == 2]
        chance.learn([shares[i] for i in matrices], [weights[i].size for i in matrices])
        seen.append(least)
        assert abs(running(clipper) - chance.running) < 1e-5
    assert (seen[0], seen[19], seen[-1]) == (0.1, 1.0, 0.1)


def test_a_resumed_run_makes_the_same_steps(tmp_path, lane):
    finals = []
    for resumed in (False, True):
        own = parameters()
        optimizer = torch.optim.AdamW(own, lr=1e-2, fused=True)
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
        list(walk(own, optimizer, clipper, range(15)))
        if resumed:
            assert running(clipper) < agreement.CHANCE
            clipper.save_state(tmp_path)
            again = [torch.nn.Parameter(p.detach().clone()) for p in own]
            other = torch.optim.AdamW(again, lr=1e-2, fused=True)
            other.load_state_dict(optimizer.state_dict())
            clipper.close()
            own, optimizer, clipper = again, other, AdaptiveClipper(CONFIG, optimizer=other)
            clipper.load_state(tmp_path)
        list(walk(own, optimizer, clipper, range(15, 30)))
        finals.append(torch.cat([p.detach().flatten() for p in own]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_step_that_is_left_out_teaches_nothing(fault, lane):
    own = parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-2, fused=True)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    list(walk(own, optimizer, clipper, range(5)))
    before = running(clipper)
    for p in own:
        p.grad = torch.full_like(p, fault)
    clipper.clip_(own)
    optimizer.step()
    assert running(clipper) == before
    list(walk(own, optimizer, clipper, range(5, 6)))
    assert running(clipper) != before


@pytest.mark.parametrize("late", [False, True])
def test_two_optimizers_resume_each_with_its_own_share(late, tmp_path, lane):
    """The second may not have made a step yet when the checkpoint is written."""

    def make(weights):
        own = [torch.nn.Parameter(w.clone()) for w in weights]
        return own, [torch.optim.AdamW(own[:1], lr=1e-2, fused=True), torch.optim.AdamW(own[1:], lr=1e-2, fused=True)]

    def steps(own, optimizers, clipper, which):
        for step in which:
            for i, (p, g) in enumerate(zip(own, gradients(step), strict=True)):
                p.grad = None if i and late and step < 17 else g.clone()
            clipper.clip_(own)
            for optimizer in optimizers:
                optimizer.step()

    finals = []
    for resumed in (False, True):
        own, optimizers = make([p.detach() for p in parameters()])
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizers)
        steps(own, optimizers, clipper, range(15))
        shares = shares_of(clipper)
        assert float(shares[0]) < agreement.CHANCE
        assert (float(shares[1]) == 1) == late
        if resumed:
            clipper.save_state(tmp_path)
            again, others = make([p.detach() for p in own])
            for optimizer, other in zip(optimizers, others, strict=True):
                other.load_state_dict(optimizer.state_dict())
            clipper.close()
            own, optimizers, clipper = again, others, AdaptiveClipper(CONFIG, optimizer=others)
            clipper.load_state(tmp_path)
            assert torch.equal(shares_of(clipper), shares)
        steps(own, optimizers, clipper, range(15, 30))
        finals.append(torch.cat([p.detach().flatten() for p in own]))
    assert torch.equal(*finals)


def test_what_is_put_back_is_put_back_for_every_optimizer():
    own = parameters()
    optimizers = [torch.optim.AdamW(own[:1], lr=1e-2), torch.optim.AdamW(own[1:], lr=1e-2)]
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizers)
    driver: Any = clipper._driver

    def step(number):
        for p, g in zip(own, gradients(number), strict=True):
            p.grad = g.clone()
        clipper.clip_(own)
        for optimizer in optimizers:
            optimizer.step()

    for number in range(10):
        step(number)
    before, put_back = shares_of(clipper), driver.keep()
    assert len(set(before.tolist())) == 2
    step(10)
    assert not torch.equal(shares_of(clipper), before)
    put_back()
    assert torch.equal(shares_of(clipper), before)


def test_shares_of_another_number_of_optimizers_are_not_taken(tmp_path):
    own = parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    list(walk(own, optimizer, clipper, range(5)))
    clipper.save_state(tmp_path)
    clipper.close()
    two = [torch.optim.AdamW(own[:1], lr=1e-2), torch.optim.AdamW(own[1:], lr=1e-2)]
    other = AdaptiveClipper(CONFIG, optimizer=two)
    other.load_state(tmp_path)
    for p in own:
        p.grad = torch.ones_like(p)
    other.clip_(own)
    for optimizer in two:
        optimizer.step()
    assert shares_of(other).tolist() == [1.0, 1.0]


def test_nan_that_is_not_left_out_teaches_nothing():
    """SGD on a NaN, as where a run does not guard its steps: the agreement alone."""
    own = [torch.nn.Parameter(torch.ones(4, 4))]
    optimizer = torch.optim.SGD(own, lr=0.1)
    taking = agreement.Agreement(optimizer, lambda counts: None)
    for fill in (1.0, math.nan, 1.0):
        own[0].grad = torch.full_like(own[0], fill)
        taking.before()
        optimizer.step()
        taking.after()
        assert taking.running is not None
        assert float(taking.running) == 1
        with torch.no_grad():
            own[0].fill_(1.0)


def share_after(net, inputs, steps=30, optimizer=None):
    """Share that the last step's record has, and the running one of the matrices."""
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=1e-3)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(steps):
        net(inputs(torch.Generator().manual_seed(step))).square().mean().backward()
        clipper.clip_(net.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return clipper.metrics()["clip/agreeing_share"], running(clipper)


def test_a_table_of_which_few_rows_are_in_a_batch_says_nothing():
    torch.manual_seed(0)
    bag = torch.nn.Sequential(torch.nn.EmbeddingBag(20_000, 8), torch.nn.Linear(8, 8))
    of_all, of_matrices = share_after(bag, lambda generator: torch.randint(0, 20_000, (16, 8), generator=generator))
    assert of_all < 0.1
    assert of_matrices > agreement.CHANCE


def test_heads_that_are_used_in_turn_and_weights_that_cannot_move_say_nothing():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(8, 8)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 64) for _ in range(8))

        def forward(self, x):
            return self.heads[int(x[0, 0] > 0)](torch.tanh(self.body(x)))

    torch.manual_seed(0)
    assert share_after(Heads(), lambda g: torch.randn(16, 8, generator=g))[1] > agreement.CHANCE
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    still = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    optimizer = torch.optim.SGD(still, lr=1e-2, momentum=0.9)
    assert share_after(net, lambda g: torch.randn(16, 8, generator=g), optimizer=optimizer)[1] > agreement.CHANCE


def accuracy(rate, net, x, y):
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    clipper = AdaptiveClipper(optimizer=optimizer, model=net)
    order = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = torch.randint(0, 1200, (32,), generator=order)
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        clipper.clip_(net.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((net(x[1200:]).argmax(1) == y[1200:]).float().mean())


def test_a_rate_that_is_far_too_high_kills_no_network(monkeypatch):
    """Units die at first, and steps of the others that are made ten times as long for it kill these too."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    found = []
    for chance in (agreement.CHANCE, 0.0):
        monkeypatch.setattr(agreement, "CHANCE", chance)
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()
        found.append(accuracy(0.1, torch.nn.Sequential(*layers, torch.nn.Linear(128, 10)), x, y))
    now, without = found
    assert now > 0.8
    assert without < 0.2
