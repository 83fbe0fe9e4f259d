"""Clipping inside the closure of `optimizer.step(closure)`, as Lightning does: the step has begun before anything is armed."""

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClippingDefeatedError

CONFIG = AdaptiveClipConfig(warmup_observations=5, ceiling_share=1.0)


def train(optimizer_of, config, *, closure, ledger, steps=40, nan=None, after=lambda parameters: None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = optimizer_of(model.parameters())
    rows = []
    with AdaptiveClipper(config, optimizer=optimizer, ledger=ledger) as clipper:
        for step in range(steps):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))

            def gradients(x=x, step=step):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), x[:, :1]) * (float("nan") if step == nan else 1.0)
                with torch.enable_grad():
                    loss.backward()
                clipper.clip_(model.parameters(), loss=loss.detach())
                after(model.parameters())
                return loss

            if closure:
                optimizer.step(gradients)
            else:
                gradients()
                optimizer.step()
            rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
            assert optimizer.param_groups[0]["lr"] == 1e-4
    return rows, clipper


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-4),
        lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    ],
    ids=["adamw", "fused", "sgd"],
)
@pytest.mark.parametrize("pace", [1.0, 16.0])
def test_it_is_the_same_run_as_clipping_before_the_step(tmp_path, optimizer, pace):
    config = CONFIG.replace(max_pace=pace, pace_start=5)
    inside, clipper = train(optimizer, config, closure=True, ledger=tmp_path / "in.jsonl", nan=20)
    before, other = train(optimizer, config, closure=False, ledger=tmp_path / "before.jsonl", nan=20)
    assert all(torch.equal(a, b) for a, b in zip(inside, before, strict=True))
    assert torch.equal(inside[20], inside[19])
    assert clipper.statistics.skipped == 1
    assert all(np.array_equal(clipper.state[k], other.state[k]) for k in clipper.state)
    assert (tmp_path / "in.jsonl").read_text().count("applied_norm") == (tmp_path / "before.jsonl").read_text().count(
        "applied_norm"
    )


def test_what_grows_again_within_the_closure_is_found(tmp_path):
    def undo(parameters):
        for p in parameters:
            p.grad.mul_(100)

    with pytest.raises(ClippingDefeatedError, match="something changes it in between"):
        train(lambda p: torch.optim.AdamW(p, lr=1e-4), CONFIG, closure=True, ledger=None, after=undo)
