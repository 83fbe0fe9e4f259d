"""Where less agrees than by chance, nothing is made larger: by the definition, through checkpoints, and what it is good for."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.gradients import agreement
from tests.reference import spectral as reference

CONFIG = AdaptiveClipConfig(controller="static", static_threshold=1e9, agreement=True, self_test=False)
SHAPES = ((8, 16), (16,), (12, 16))


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


def running(clipper):
    return float(clipper._driver.guards.agreed[0])


@pytest.mark.parametrize("kind", ["fused", "foreach", "sgd"])
def test_by_the_definition(kind, lane):
    own = parameters()
    weights = [p.detach().double().numpy() for p in own]
    exact = [reference.Adam(w, lr=1e-2, decay=0.1) for w in weights]
    chance, seen, moments = reference.Chance(), [], [np.zeros_like(w) for w in weights]
    if kind == "sgd":
        optimizer = torch.optim.SGD(own, lr=1e-2, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1, **{kind: True})
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
        chance.learn(shares)
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


def test_one_large_table_of_which_few_rows_are_in_a_batch_does_not_decide():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Embedding(20_000, 8), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=net)
    for step in range(30):
        tokens = torch.randint(0, 20_000, (64,), generator=torch.Generator().manual_seed(step))
        net(tokens).square().mean().backward()
        clipper.clip_(net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert clipper.metrics()["clip/agreeing_share"] < 0.1
    assert running(clipper) > agreement.CHANCE


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
