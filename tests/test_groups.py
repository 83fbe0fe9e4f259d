"""Parameters judged apart: by module, and by patterns on their names."""

import copy
import json

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, StateError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.gradients.groups import group, named_parameters
from tests.loops import weights

RULES = {"head.*": {"controller": "static", "static_threshold": 0.01}, "*.bias": "exclude"}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x))


def net():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, clipper, index, factor=1.0):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean() * factor
    loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    clipper.clip_(model.parameters(), loss=loss)
    after = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return before, after


def test_names_of_wrapped_models_are_the_models_own():
    model, _ = net()
    wrapped = torch.nn.Module()
    wrapped.module = model
    wrapped.module.body._orig_mod = torch.nn.Linear(1, 1)
    names = list(named_parameters([wrapped]))
    assert names[0] == "body.0.weight"
    assert "body.weight" in names


def test_groups_partition_the_parameters():
    model, _ = net()
    parameters = list(model.parameters())
    names = list(named_parameters([model]))
    by_module = group(AdaptiveClipConfig(granularity="module"), len(parameters), names)
    assert by_module.names == ("body.0", "body.2", "head")
    assert by_module.member_of == (0, 0, 1, 1, 2, 2)

    ruled = group(AdaptiveClipConfig(parameter_rules=RULES), len(parameters), names)
    assert ruled.names == ("rest", "head.*", "*.bias")
    assert ruled.parts == ((None, 1), ("head.*", 1), ("*.bias", 1))
    assert ruled.member_of == (0, 2, 0, 2, 1, 1)


def test_a_module_is_clipped_by_the_norm_of_its_own_parameters(lane):
    """Only the module that exploded is cut, to the same coefficient for its weight and its bias."""
    model, optimizer = net()
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(granularity="module", warmup_observations=20), optimizer=optimizer, model=model
    )
    for index in range(60):
        step(model, optimizer, clipper, index)
    handle = model.head.weight.register_hook(lambda g: g * 1000)
    before, after = step(model, optimizer, clipper, 60)
    handle.remove()
    ratio = {n: (after[n].norm() / before[n].norm()).item() for n in before}

    assert ratio["head.weight"] < 0.01
    assert ratio["head.bias"] == pytest.approx(ratio["head.weight"], rel=1e-4)
    assert ratio["body.0.weight"] == ratio["body.2.bias"] == 1.0


def test_rules_give_other_settings_and_exclude(lane, tmp_path):
    model, optimizer = net()
    config = AdaptiveClipConfig(parameter_rules=RULES, warmup_observations=20, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    for index in range(60):
        before, after = step(model, optimizer, clipper, index, factor=1e4 if index == 50 else 1.0)
        head = torch.cat([after["head.weight"].flatten(), after["head.bias"]])
        assert head.norm() <= 0.01 * 1.001
        assert torch.equal(before["body.0.bias"], after["body.0.bias"])
        if index == 50:
            assert after["body.0.weight"].norm() < 0.01 * before["body.0.weight"].norm()
        elif index > 20 and index < 45:
            assert after["body.0.weight"].norm() >= 0.3 * before["body.0.weight"].norm()
    clipper.close()

    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok
    assert report.recomputed == 60
    header = json.loads((tmp_path / "l.jsonl").read_text().splitlines()[0])
    assert header["groups"] == ["rest", "head.*", "*.bias"]
    assert header["parts"] == [[None, 1], ["head.*", 1], ["*.bias", 1]]


def test_a_flipped_rule_is_found_by_verify(tmp_path):
    """The ledger's parts are what its decisions are recomputed from: with other ones they do not follow."""
    model, optimizer = net()
    path = tmp_path / "l.jsonl"
    config = AdaptiveClipConfig(parameter_rules=RULES, warmup_observations=20, ledger=str(path))
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    for index in range(30):
        step(model, optimizer, clipper, index)
    clipper.close()
    lines = path.read_text().splitlines()
    assert verify_ledger(path).ok
    path.write_text(
        "\n".join([lines[0].replace('"static_threshold":0.01', '"static_threshold":0.02'), *lines[1:]]) + "\n"
    )
    report = verify_ledger(path)
    assert any("`threshold` is recorded" in str(f) for f in report.findings)


@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_excluding_everything_but_one_is_clipping_that_one(granularity):
    """With all other parameters excluded, the rest is treated as a clipper of its own would."""
    model, optimizer = net()
    others = {"head.*": "exclude", "body.2.*": "exclude"}
    config = AdaptiveClipConfig(granularity=granularity, warmup_observations=20)
    clipper = AdaptiveClipper(config.replace(parameter_rules=others), optimizer=optimizer, model=model)
    twin, twin_optimizer = net()
    alone = AdaptiveClipper(config, optimizer=twin_optimizer, model=twin)
    for index in range(50):
        factor = 100.0 if index == 40 else 1.0
        step(model, optimizer, clipper, index, factor)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
        loss = (twin(x) - x.sum(1, keepdim=True)).square().mean() * factor
        loss.backward()
        alone.clip_(twin.body[0].parameters(), loss=loss)
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    assert torch.equal(weights(model), weights(twin))


def test_gradients_that_come_and_go_keep_their_place(lane):
    model, optimizer = net()
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(granularity="module", warmup_observations=5), optimizer=optimizer, model=model
    )
    for index in range(30):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
        loss = model.body(x).square().mean() if index % 3 == 0 else model(x).square().mean()
        loss.backward()
        clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    counts = np.asarray(clipper.state["count"])
    assert counts.tolist() == [30, 30, 20]


def test_state_and_rules_survive_a_checkpoint(tmp_path):
    model, optimizer = net()
    config = AdaptiveClipConfig(parameter_rules=RULES, warmup_observations=10)
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    for index in range(30):
        step(model, optimizer, clipper, index)
    clipper.save_state(tmp_path)
    twin, twin_optimizer = net()
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = AdaptiveClipper(config, optimizer=twin_optimizer, model=twin)
    assert resumed.load_state(tmp_path)
    for index in range(30, 45):
        step(model, optimizer, clipper, index)
        step(twin, twin_optimizer, resumed, index)
    assert torch.equal(weights(model), weights(twin))

    other = AdaptiveClipper(config.replace(parameter_rules={"head.*": "static"}), optimizer=twin_optimizer, model=twin)
    with pytest.raises(StateError, match="`parameter_rules` was"):
        other.load_state(tmp_path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"heads.*": "static"}, r"'heads.\*' matches none instead. Names look like head"),
        ({"head.*": "static", "head.weight": "exclude"}, "all 1 matches of 'head.weight' belong to earlier patterns"),
    ],
)
def test_a_pattern_that_does_nothing_is_an_error(rules, message):
    model, _ = net()
    clipper = AdaptiveClipper(AdaptiveClipConfig(parameter_rules=rules), model=model)
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ConfigError, match=message):
        clipper.clip_(model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameter_rules": {"*": "statik"}}, "Did you mean 'static'"),
        ({"parameter_rules": {"*": {"decai": 0.5}}}, "Did you mean `decay`"),
        ({"parameter_rules": {"*": {"decay": 5}}}, r"for '\*': `decay` must be in"),
        ({"parameter_rules": {"*": {"shadow": True}}}, "sets 'shadow' instead"),
        ({"parameter_rules": "{not json"}, "must be a mapping of patterns"),
        ({"parameter_rules": {"*": "weight_ratio"}}, "`granularity` must be one of unit"),
        (
            {"parameter_rules": {"*": "static"}, "on_spike": "skip"},
            "`on_spike` must be 'clip' where parameters are judged apart",
        ),
        ({"parameter_rules": {"*": "static"}, "one_step_late": True}, "must be None under DeepSpeed"),
        ({"parameter_rules": {"*": "static"}, "max_pace": 2.0}, "`max_pace` must be 1.0 with controller 'static'"),
        ({"controller": "weight_ratio", "parameter_rules": {"*": "static"}}, "must only exclude"),
        (
            {"controller": "weight_ratio", "granularity": "tensor"},
            "must be one of unit with controller 'weight_ratio'",
        ),
        ({"controller": "weight_ratio", "max_threshold": 1.0}, "has no threshold to limit"),
        ({"controller": "second_moment", "on_spike": "skip"}, "it changes parts of a gradient"),
        ({"controller": "mean_sd", "granularity": "tensor"}, "a step is left out as a whole"),
        ({"controller": "mean_sd", "one_step_late": True}, "whose engine has stepped before"),
    ],
)
def test_what_cannot_be_is_said_at_construction(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveClipConfig(**settings)


@pytest.mark.parametrize("settings", [{"granularity": "module"}, {"parameter_rules": {"*": "static"}}])
def test_names_that_are_not_known_are_asked_for(settings):
    model, _ = net()
    clipper = AdaptiveClipper(AdaptiveClipConfig(**settings))
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ConfigError, match="Pass it as `model=`"):
        clipper.clip_(model.parameters())


def test_an_excluded_part_does_not_hold_back_the_pace():
    model, optimizer = net()
    config = AdaptiveClipConfig(parameter_rules={"*.bias": "exclude"}, max_pace=4.0, warmup_observations=5)
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    for index in range(60):
        step(model, optimizer, clipper, index)
    assert 1 < clipper.metrics()["clip/pace"] <= 4


def test_a_checkpoint_of_other_parameters_names_them(tmp_path):
    model, optimizer = net()
    config = AdaptiveClipConfig(granularity="tensor", warmup_observations=5)
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    for index in range(10):
        step(model, optimizer, clipper, index)
    clipper.save_state(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1))
    clipper = AdaptiveClipper(config, model=other)
    assert clipper.load_state(tmp_path)
    other(torch.ones(2, 6)).sum().backward()
    with pytest.raises(StateError, match=r"written for \(6 of them\), but the model has no body\.0\.weight"):
        clipper.clip_(other.parameters())


def test_explain_says_what_is_judged():
    config = AdaptiveClipConfig(granularity="module", parameter_rules={"*.bias": "exclude"})
    text = AdaptiveClipper(config, model=net()[0]).explain()
    assert "on the norm of each module's own parameters" in text
    assert "rule        *.bias: exclude" in text
    assert "left out as a whole" in AdaptiveClipper("log_zscore").explain()
