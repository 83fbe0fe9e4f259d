"""`install()` around scripts that clip otherwise than it needs, or not at all: nothing of it goes unnoticed."""

import pytest
import torch
from accelerate import Accelerator

from hf_adaclip import AdaptiveClipper, ConfigError, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger


def prepared(count=1):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 4) for _ in range(count)]
    optimizer = torch.optim.AdamW([p for m in models for p in m.parameters()], lr=1e-3)
    *models, optimizer = accelerator.prepare(*models, optimizer)
    return accelerator, models, optimizer


def run(accelerator, model, optimizer, clip, steps=30):
    for step in range(steps):
        accelerator.backward(model(torch.ones(2, 4)).square().sum())
        clip(step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["torch", "value", "nothing"])
def test_a_script_that_never_calls_the_accelerators_clipping_is_told_of(way, caplog):
    accelerator, [model], optimizer = prepared()
    clips = {
        "torch": lambda step: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "value": lambda step: accelerator.clip_grad_value_(model.parameters(), 1.0),
        "nothing": lambda step: None,
    }
    with AdaptiveClipper("adaptive", accelerator=accelerator).install() as clipper:
        run(accelerator, model, optimizer, clips[way], steps=10)
        assert "it only clips: no optimizer is known (pass `optimizer=`)." in caplog.text
        assert "10 optimizer steps in a row were not clipped" in caplog.text
        run(accelerator, model, optimizer, clips[way], steps=20)
    assert clipper.step == 0
    assert "0 of 30 optimizer steps were clipped" in caplog.text


def test_a_script_that_stops_calling_it_is_told_of(caplog):
    accelerator, [model], optimizer = prepared()

    def clip(step):
        if step < 15:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)

    with AdaptiveClipper("adaptive", accelerator=accelerator).install():
        run(accelerator, model, optimizer, clip, steps=24)
        assert "in a row were not clipped" not in caplog.text  # the guard has told of the first one
        run(accelerator, model, optimizer, lambda step: None, steps=1)
        assert "10 optimizer steps in a row were not clipped" in caplog.text
    assert "15 of 25 optimizer steps were clipped" in caplog.text


def test_nothing_is_said_of_accumulation_a_critic_or_an_optimizer_of_somebody_else(caplog):
    accelerator, [model], optimizer = prepared()
    critic = accelerator.prepare(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    foreign = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)

    def clip(step):
        for other in (critic, foreign):
            for _ in range(5):
                other.step()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)

    with AdaptiveClipper("guard", accelerator=accelerator, optimizer=optimizer).install() as clipper:
        run(accelerator, model, optimizer, clip)
    assert clipper.step == 30
    assert not caplog.text


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_max_norm_that_would_destroy_gradients_is_refused_and_nothing_is_changed(max_norm):
    accelerator, [model], _ = prepared()
    with AdaptiveClipper("adaptive", accelerator=accelerator).install():
        accelerator.backward(model(torch.ones(2, 4)).square().sum())
        before = model.weight.grad.clone()
        with pytest.raises(ConfigError, match="`max_norm` must be above 0"):
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
        assert torch.equal(model.weight.grad, before)


def test_a_max_norm_that_changes_is_followed(tmp_path):
    accelerator, [model], optimizer = prepared()
    left = []
    with AdaptiveClipper("static", accelerator=accelerator, ledger=tmp_path / "l.jsonl").install():
        for max_norm in (1.0, 1.0, 0.1, 0.1, 0.5):
            accelerator.backward(model(torch.ones(2, 4)).square().sum() * 100)
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
            left.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            optimizer.zero_grad()
    assert left == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.5], rel=1e-5)
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_two_models_that_are_clipped_apart_are_not_mixed():
    accelerator, models, optimizer = prepared(2)

    def step():
        accelerator.backward(sum(m(torch.ones(2, 4)).square().sum() for m in models))
        for model in models:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with AdaptiveClipper("adaptive", accelerator=accelerator).install():
        step()
        with pytest.raises(UnsupportedSetupError, match="two sets of parameters take turns"):
            step()
