"""A step that is left out leaves no trace in optimizers that are not torch's own, as the Trainer's `optim=` offers them."""

import copy

import pytest
import torch
from transformers.optimization import Adafactor

from hf_adaclip import AdaptiveClipper
from tests.gradients.test_guard import equal, snapshot

bitsandbytes = pytest.importorskip("bitsandbytes")
optimi = pytest.importorskip("optimi")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

OPTIMIZERS = {
    "adafactor": lambda p: Adafactor(p),
    "adamw_bnb_8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2),
    "lion_8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-2),
    "stable_adamw": lambda p: optimi.StableAdamW(list(p), lr=1e-2),
    "stable_adamw_kahan": lambda p: optimi.StableAdamW(list(p), lr=1e-2, kahan_sum=True),
    "lion": lambda p: optimi.Lion(list(p), lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
    # This one counts steps per group, whether there are gradients or not.
    "stable_adamw_pytorch_optimizer": lambda p: pytorch_optimizer.StableAdamW(p, lr=1e-2),
    "lamb": lambda p: pytorch_optimizer.Lamb(p, lr=1e-2),
    "schedule_free": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=1e-2),
}


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 80, bias=False), torch.nn.Tanh(), torch.nn.Linear(80, 64, bias=False)
    )
    optimizer = OPTIMIZERS[kind](model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    return model, optimizer


def step(model, optimizer, clipper, factor=1.0):
    (model(torch.ones(3, 64)).square().mean() * factor).backward()
    clipper.clip_(model.parameters())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(kind, bad):
    model, optimizer = make(kind)
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer)
    for _ in range(3):
        step(model, optimizer, clipper)
    before = copy.deepcopy(snapshot(model, optimizer))
    step(model, optimizer, clipper, bad)

    assert equal(before, snapshot(model, optimizer))
    assert clipper.metrics()["clip/skipped"] == 1
    step(model, optimizer, clipper)
    assert not equal(before[0], snapshot(model, optimizer)[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_spike_is_cut_before_the_optimizer_reads_it(kind):
    model, optimizer = make(kind)
    clipper = AdaptiveClipper("static", static_threshold=0.1, optimizer=optimizer)
    read = []
    optimizer.register_step_pre_hook(
        lambda *_: read.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    )
    step(model, optimizer, clipper, 1000.0)

    assert read[0] == pytest.approx(0.1, rel=1e-4)
