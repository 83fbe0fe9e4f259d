"""Parameters that come and go in the middle of a run: frozen and unfrozen layers, adapters that are switched, made anew or added."""

import gc
import json

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, StateError, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger
from tests.loops import weights

LOUD = {"a": 1.0, "b": 50.0, "c": 0.02}


def layers(names="abc"):
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in names})


def config(**settings):
    return AdaptiveClipConfig(
        **{"granularity": "tensor", "warmup_observations": 6, "static_threshold": 1e6, **settings}
    )


def train(model, clipper, optimizer, plan, *, toggle, seed=0, spikes=()):
    """One step per letter of `plan` on that layer alone; returns what was kept of its gradient."""
    kept = []
    for index, name in enumerate(plan):
        for other, layer in model.items():
            layer.weight.requires_grad_(other == name or not toggle)
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed + index))
        loss = (model[name](x) - 1).square().mean() * LOUD[name] * (1e3 if index in spikes else 1.0)
        loss.backward()
        before = model[name].weight.grad.norm()
        clipper.clip_(model.parameters(), loss=loss)
        kept.append(float(model[name].weight.grad.norm() / before))
        optimizer.step()
        optimizer.zero_grad()
    return kept


PLAN = "a" * 20 + "b" * 12 + "a" * 8 + "c" * 12 + "b" * 6 + "a" * 4
SPIKES = (36, 54)  # one of `a` after its rest, one of `b` after its rest


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("granularity", "pace"), [("tensor", 1.0), ("module", 1.0), ("tensor", 16.0)])
def test_layers_that_rest_keep_what_is_theirs(lane, granularity, pace, named, tmp_path):
    """As in the run in which nothing is frozen and resting layers merely have no gradient."""
    if granularity == "module" and not named:
        pytest.skip("modules need names")
    runs = []
    for toggle in (False, True):
        model = layers()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ledger = tmp_path / f"{toggle}.jsonl"
        clipper = AdaptiveClipper(
            config(granularity=granularity, max_pace=pace, ledger=str(ledger)),
            optimizer=optimizer,
            model=model if named else None,
        )
        kept = train(model, clipper, optimizer, PLAN, toggle=toggle, spikes=SPIKES)
        clipper.close()
        assert verify_ledger(ledger).ok
        runs.append((kept, weights(model), ledger))
    (wanted, at_rest, _), (got, switched, ledger) = runs
    assert got == wanted
    assert min(wanted[i] for i in SPIKES) < 0.1
    if pace == 1.0:  # a layer that joins later starts its estimate there, and not at the beginning of the run
        assert torch.equal(switched, at_rest)
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    changes = {r["step"]: r["parameters"] for r in records if "parameters" in r}
    assert changes == {
        20: {"trainable": 1, "joined": 1, "resting": 1},
        32: {"trainable": 1, "joined": 0, "resting": 1},
        40: {"trainable": 1, "joined": 1, "resting": 2},
        52: {"trainable": 1, "joined": 0, "resting": 2},
        58: {"trainable": 1, "joined": 0, "resting": 2},
    }
    headers = [r for r in records if r["kind"] == "header"]
    assert [len(h["groups"]) for h in headers] == [1, 2, 3]


def test_a_new_tensor_begins_a_warm_up_of_its_own(lane):
    model = layers("ab")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clipper = AdaptiveClipper(config(static_threshold=1e-3), optimizer=optimizer, model=model)
    train(model, clipper, optimizer, "a" * 20 + "bb", toggle=True)
    counts = np.asarray(torch.as_tensor(clipper.state["count"]))
    assert counts.tolist() == [20.0, 2.0]


def test_the_range_of_the_global_norm_is_learned_anew_when_tensors_join(lane, tmp_path):
    """The whole model has another norm than its head alone: it is not a spike, and is not cut to the head's level."""
    model = layers("ab")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ledger = tmp_path / "l.jsonl"
    clipper = AdaptiveClipper(
        config(granularity="global", ledger=str(ledger), max_pace=4.0), optimizer=optimizer, model=model
    )
    kept = train(model, clipper, optimizer, "a" * 20 + "b" * 20, toggle=True, spikes=(35,))
    pace_steps = float(clipper.state["pace_steps"])
    clipper.close()
    assert kept[20:35] == [1.0] * 15
    assert kept[35] < 0.1
    assert pace_steps == 40  # the pace is the run's, and does not start again
    report = verify_ledger(ledger)
    assert report.ok
    assert report.segments == 2


def test_rules_follow_names(lane):
    """A pattern may name what is frozen at first; what it names is treated by it when it is trained, whatever its place in the list is."""
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rules = {"c.*": {"controller": "static", "static_threshold": 1e-3}, "b.*": "exclude"}
    clipper = AdaptiveClipper(config(parameter_rules=rules), optimizer=optimizer, model=model)
    kept = train(model, clipper, optimizer, PLAN, toggle=True, spikes=SPIKES)
    by_layer = {name: [k for k, which in zip(kept, PLAN, strict=True) if which == name] for name in "abc"}
    assert by_layer["b"] == [1.0] * 18
    assert max(by_layer["c"]) < 1
    assert kept[36] < 0.1


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_resuming_while_other_tensors_are_trained(granularity, tmp_path):
    """The checkpoint is written while `b` is trained; the run goes on with `a`, bit for bit as the one that was not interrupted."""
    plans, model = ("a" * 20 + "b" * 12, "a" * 8 + "b" * 8), layers("ab")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = config(granularity=granularity, max_pace=16.0, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(settings, optimizer=optimizer, model=model)
    train(model, clipper, optimizer, plans[0], toggle=True)
    clipper.save_state(tmp_path)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "both.pt")
    wanted = train(model, clipper, optimizer, plans[1], toggle=True, seed=100, spikes=(4,))
    clipper.close()

    twin = layers("ab")
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for part, saved in zip((twin, twin_optimizer), torch.load(tmp_path / "both.pt"), strict=True):
        part.load_state_dict(saved)
    resumed = AdaptiveClipper(settings, optimizer=twin_optimizer, model=twin)
    assert resumed.load_state(tmp_path)
    got = train(twin, resumed, twin_optimizer, plans[1], toggle=True, seed=100, spikes=(4,))
    resumed.close()
    assert got == wanted
    assert torch.equal(weights(twin), weights(model))
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_a_tensor_made_anew_under_its_name_takes_over(lane):
    model = layers("ab")
    clipper = AdaptiveClipper(config(), model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    train(model, clipper, optimizer, "ab" * 10, toggle=False)
    model["a"] = torch.nn.Linear(8, 8, bias=False)
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    kept = train(model, clipper, optimizer, "aab", toggle=False, spikes=(1,))
    counts = np.asarray(torch.as_tensor(clipper.state["count"]))
    assert counts.tolist() == [12.0, 11.0]
    assert kept[1] < 0.1


def test_an_adapter_that_is_added_and_one_that_is_deleted(lane):
    model = layers("ab")
    clipper = AdaptiveClipper(config(), model=model)
    train(model, clipper, torch.optim.SGD(model.parameters(), lr=1e-4), "ab" * 10, toggle=False)
    del model["a"]
    model["c"] = torch.nn.Linear(8, 8, bias=False)
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    kept = train(model, clipper, optimizer, "bc" * 10, toggle=False, spikes=(18,))
    assert kept[18] < 0.1
    assert kept[:18] == [1.0] * 18


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_a_model_that_is_built_anew_for_every_task(granularity):
    """Without names and with nothing of the old one left, the new one takes its places, and nothing is learned anew."""
    clipper = AdaptiveClipper(config(granularity=granularity))
    for _ in range(30):
        model = torch.nn.Linear(4, 4)
        (model(torch.ones(2, 4)).square().sum()).backward()
        clipper.clip_(model.parameters())
        del model
    count = np.asarray(clipper.state["count"])
    assert (count == 30).all()
    assert count.shape == ((2,) if granularity == "tensor" else ())


def test_the_order_in_which_parameters_are_given_does_not_matter(lane):
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clipper = AdaptiveClipper(config(), optimizer=optimizer)
    parameters = list(model.parameters())
    for index in range(30):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(index))
        sum((model[n](x) - 1).square().mean() * LOUD[n] for n in "abc").backward()
        before = [p.grad.clone() for p in parameters]
        clipper.clip_(parameters if index % 2 else parameters[::-1])
        assert all(torch.equal(b, p.grad) for b, p in zip(before, parameters, strict=True))
        optimizer.zero_grad()


@pytest.mark.parametrize("controller", ["weight_ratio", "second_moment"])
def test_bounds_on_units_follow_their_tensors(controller):
    model = layers("ab")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rules = {"b.*": "exclude"}
    settings = AdaptiveClipConfig(
        controller=controller, parameter_rules=rules, warmup_observations=5, static_threshold=1e6
    )
    clipper = AdaptiveClipper(settings, optimizer=optimizer, model=model)
    kept = train(model, clipper, optimizer, "a" * 15 + "b" * 15 + "a" * 5, toggle=True, spikes=(12, 27, 33))
    assert kept[27] == 1.0
    assert max(kept[12], kept[33]) < 1


def test_two_sets_within_one_step_are_refused():
    model = layers("ab")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer)

    def step():
        (model["a"](torch.ones(2, 8)) + model["b"](torch.ones(2, 8))).square().mean().backward()
        clipper.clip_(model["a"].parameters())
        clipper.clip_(model["b"].parameters())
        optimizer.step()
        optimizer.zero_grad()

    step()
    with pytest.raises(UnsupportedSetupError, match="two sets of parameters take turns"):
        step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_layers_that_are_switched_in_every_step_are_not_taken_for_two_sets(set_to_none, caplog):
    model = layers("ab")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clipper = AdaptiveClipper("adaptive")
    for index in range(60):
        for name, layer in model.items():
            layer.weight.requires_grad_((name == "a") == (index % 2 == 0))
        model["ab"[index % 2]](torch.ones(2, 8)).square().mean().backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert "other parameters in each of the last 20 calls" in caplog.text


def test_a_state_of_another_model_is_refused(tmp_path):
    model = layers("ab")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clipper = AdaptiveClipper(config(), optimizer=optimizer, model=model)
    train(model, clipper, optimizer, "ab" * 5, toggle=False)
    clipper.save_state(tmp_path)
    other = layers("ac")
    resumed = AdaptiveClipper(config(), model=other)
    assert resumed.load_state(tmp_path)
    with pytest.raises(StateError, match=r"the model has no b\.weight"):
        train(other, resumed, torch.optim.SGD(other.parameters(), lr=1e-4), "a", toggle=False)
