"""One optimizer and more than one that knows it: clippers, schedules in hooks, and optimizers that change while they are guarded."""

import copy

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger
from tests.lanes import on_lane
from tests.loops import guards_of, make

PACED = AdaptiveClipConfig(max_pace=8.0, pace_start=1, pace_trust=1.0, spectral_width=None, agreement=False)
RATE = 1e-4


def parts(**adamw):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, **adamw)


def backward(model, step):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - 3 * x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss.detach()


def rate_of(optimizer):
    group = optimizer.param_groups[0]
    return float(group["lr"]), group["weight_decay"]


# -- several clippers ----------------------------------------------------------------------------------------------


def test_an_older_clipper_that_would_pace_the_same_optimizer_says_so(lane):
    model, optimizer = parts()
    first, second = (AdaptiveClipper(optimizer=optimizer, model=part) for part in (model[0], model[2]))
    backward(model, 0)
    with pytest.raises(UnsupportedSetupError, match=r'must be paced by one clipper.*make both with `clip="guard"`'):
        first.clip_(model[0].parameters())
    second.clip_(model[2].parameters())
    optimizer.step()
    assert rate_of(optimizer) == (RATE, 0.1)
    second.close()
    first.clip_(model[0].parameters())
    optimizer.step()
    assert rate_of(optimizer) == (RATE, 0.1)


def test_guards_of_two_parts_share_an_optimizer(lane):
    model, optimizer = parts()
    clippers = [AdaptiveClipper("guard", optimizer=optimizer, model=part) for part in (model[0], model[2])]
    for step in range(5):
        loss = backward(model, step)
        for clipper, part in zip(clippers, (model[0], model[2]), strict=True):
            clipper.clip_(part.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    assert [clipper.step for clipper in clippers] == [5, 5]
    assert rate_of(optimizer) == (RATE, 0.1)


def test_an_older_clipper_whose_step_was_never_made_does_not_pace_those_of_the_next(lane):
    model, optimizer = parts()
    older = []
    for _ in range(3):
        clipper = AdaptiveClipper(PACED, optimizer=optimizer)
        for step in range(6):
            loss = backward(model, step)
            clipper.clip_(model.parameters(), loss=loss)
            if step < 5:
                optimizer.step()
                assert rate_of(optimizer) == (RATE, 0.1)
            optimizer.zero_grad()
        older.append(clipper)  # as a notebook holds it, after an interrupt
    assert rate_of(optimizer) == (RATE, 0.1)


def test_a_step_that_an_older_clipper_would_have_left_out_is_made(lane):
    model, optimizer = parts()
    older = AdaptiveClipper(PACED, optimizer=optimizer)
    backward(model, 0)
    model[0].weight.grad[0, 0] = float("nan")
    older.clip_(model.parameters())  # and no step
    optimizer.zero_grad()
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)
    before = model[0].weight.detach().clone()
    clipper.clip_(model.parameters(), loss=backward(model, 1))
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert older.step == 1


def test_a_refused_step_leaves_ledger_and_state_as_they_were(tmp_path):
    model, optimizer = parts()
    first = AdaptiveClipper(PACED, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    first.clip_(model.parameters(), loss=backward(model, 0))
    optimizer.step()
    optimizer.zero_grad()
    second = AdaptiveClipper(PACED, optimizer=optimizer)
    loss = backward(model, 1)
    with pytest.raises(UnsupportedSetupError, match="must be paced by one clipper"):
        first.clip_(model.parameters(), loss=loss)
    second.close()
    first.clip_(model.parameters(), loss=loss)
    optimizer.step()
    first.save_state(tmp_path)
    assert first.load_state(tmp_path)
    first.close()
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_an_optimizer_that_is_named_twice_is_one(lane):
    model, optimizer = parts()
    clipper = AdaptiveClipper(PACED, optimizer=[optimizer, optimizer])
    assert len(guards_of(clipper).optimizers) == 1
    for step in range(5):
        clipper.clip_(model.parameters(), loss=backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
        assert rate_of(optimizer) == (RATE, 0.1)


def test_several_models_are_given_as_several_optimizers_are():
    model, optimizer = parts()
    clipper = AdaptiveClipper(optimizer=optimizer, model=[model[0], model[2]])
    clipper.clip_(model.parameters(), loss=backward(model, 0))
    with pytest.raises(ConfigError, match=r"`model` must be a torch\.nn\.Module, or a list of them, but is 'gpt2'"):
        AdaptiveClipper(optimizer=optimizer, model="gpt2")


# -- hooks of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_schedule_in_a_hook_sees_the_given_rate_whenever_it_was_registered(lane, first):
    model, optimizer = parts()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def register():
        optimizer.register_step_post_hook(lambda *_: schedule.step())

    if first:
        register()
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)
    if not first:
        register()
    paces = []
    for step in range(30):
        clipper.clip_(model.parameters(), loss=backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
        paces.append(clipper.metrics()["clip/pace"])
    assert max(paces) > 1
    assert rate_of(optimizer)[0] == pytest.approx(RATE * 0.99**30)


# -- optimizers that change ----------------------------------------------------------------------------------------


def loaded_foreach(model, optimizer):
    old = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, foreach=True)
    backward(model, 99)
    old.step()
    old.zero_grad()
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))  # torch takes `fused` from there


def joined_foreach(model, optimizer):
    model.append(torch.nn.Linear(1, 1))
    optimizer.add_param_group({"params": list(model[3].parameters()), "fused": False, "foreach": True})


@pytest.mark.parametrize("change", [loaded_foreach, joined_foreach])
@pytest.mark.parametrize("name", ["host", "device"])
def test_an_optimizer_that_is_no_longer_fused_is_led_another_way(name, change):
    with on_lane(name):
        model, optimizer = parts(fused=True)
        clipper = AdaptiveClipper(PACED.replace(self_test=True), optimizer=optimizer, model=model)
        change(model, optimizer)
        for step in range(6):
            loss = backward(model, step)
            if step == 3:
                model[0].weight.grad[0, 0] = float("nan")
            before = model[0].weight.detach().clone()
            clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(model[0].weight, before) is (step == 3)
        assert clipper.metrics()["clip/skipped"] == 1
        assert "not fused" in clipper.explain()


def test_weights_in_bfloat16_decay_at_any_pace_as_they_do_without_a_clipper():
    ends = {}
    for name in ("stock", "host", "device"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([weight], lr=4e-3, weight_decay=0.2, fused=True)
        clipper = None
        if name != "stock":
            with on_lane(name):
                config = PACED.replace(static_threshold=float("inf"), pace_trust=60.0)  # on, and never above 1
                clipper = AdaptiveClipper(config, optimizer=optimizer)
        for _ in range(200):
            weight.grad = torch.randn(4096).to(torch.bfloat16)
            if clipper is not None:
                clipper.clip_([weight])
            optimizer.step()
        ends[name] = weight.detach().float().mean().item()
    assert ends["stock"] < 0.95
    assert ends["host"] == ends["device"] == pytest.approx(ends["stock"], abs=1e-3)


# -- gradients of what is frozen -----------------------------------------------------------------------------------


def test_a_gradient_that_was_there_before_freezing_is_clipped_as_the_stock_norm_has_it(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper("static:static_threshold=1.0", optimizer=optimizer, model=model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        if step == 2:
            next(model.parameters()).requires_grad_(False).grad.fill_(1e6)
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        norm = clipper.clip_(model.parameters())
        assert norm.item() == pytest.approx(expected.item())
        left = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert left.item() == pytest.approx(min(1.0, expected.item()), rel=1e-4)
        optimizer.step()
    optimizer.zero_grad()
    backward(model, 3)  # the frozen one has none any more
    clipper.clip_(model.parameters())
    optimizer.step()


def test_a_gradient_that_no_optimizer_steps_on_does_not_count(lane):
    model, _ = make()
    backward(model, 0)
    first = model[0].requires_grad_(False)
    first.weight.grad.fill_(1e6)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model[2].parameters()])
    assert clipper.clip_(model.parameters()).item() == pytest.approx(expected.item())


def test_a_frozen_gradient_that_is_not_finite_is_not_stepped_on(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    backward(model, 0)
    first = next(model.parameters()).requires_grad_(False)
    first.grad.fill_(float("nan"))
    before = first.detach().clone()
    clipper.clip_(model.parameters())
    optimizer.step()
    assert torch.equal(first, before)
