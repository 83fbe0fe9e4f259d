"""A static threshold of infinity never acts: in every controller, in files, on resumption, and in a Trainer."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, StateError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.cli import main
from hf_adaclip.controllers import CONTROLLERS
from tests.loops import make, train, weights


def strict(path):
    """Its lines, read by JSON that knows no infinity."""

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def run(folder, controller, threshold, **settings):
    model, optimizer = make()
    config = AdaptiveClipConfig(
        controller=controller,
        warmup_observations=10,
        static_threshold=threshold,
        ledger=str(folder / "l.jsonl"),
        **settings,
    )
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    clipper.self_test()
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss, measure=True), 40)
    clipper.close()
    return weights(model), clipper


@pytest.mark.parametrize("controller", sorted(CONTROLLERS))
@pytest.mark.parametrize("settings", [{}, {"on_trouble": "fallback", "max_skipped": 9}, {"shadow": True}], ids=str)
def test_it_is_the_run_of_a_threshold_that_no_norm_reaches(lane, tmp_path, controller, settings):
    if CONTROLLERS[controller].fine and "max_skipped" in settings:
        return
    (tmp_path / "finite").mkdir()
    endless, clipper = run(tmp_path, controller, math.inf, **settings)
    finite, other = run(tmp_path / "finite", controller, 1e15, **settings)

    assert torch.equal(endless, finite)
    assert clipper.statistics.counts_by_name() == other.statistics.counts_by_name()
    assert not [name for name in clipper.statistics.counts_by_name() if name.startswith("TROUBLE")]
    header = strict(tmp_path / "l.jsonl")[0]
    assert (header["static_threshold"], header["config"]["static_threshold"]) == ("inf", "inf")
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings
    assert report.recomputed == 40


def test_nothing_is_cut_by_static_and_every_norm_is_recorded(lane, tmp_path):
    model, optimizer = make()
    train(model, optimizer, lambda m, loss: 0.0, 40)
    endless, clipper = run(tmp_path, "static", math.inf)
    assert torch.equal(endless, weights(model))
    assert clipper.statistics.clipped == 0
    assert len([r for r in strict(tmp_path / "l.jsonl") if r["kind"] == "step" and r["norm"] > 0]) == 40


def test_an_infinite_threshold_that_nobody_set_is_still_trouble():
    from hf_adaclip.controllers import Observation, Reason, build_controller
    from hf_adaclip.controllers.numerics.ops import SCALAR

    controller = build_controller(AdaptiveClipConfig(on_trouble="fallback", max_skipped=5, warmup_observations=2))
    reasons = []
    for static in (1.0, math.inf):
        state = controller.init(SCALAR, ())._replace(level=np.float32(3e38), count=np.float32(9))
        seen = Observation(np.float32(1), np.float32("nan"), np.float32(static))
        with np.errstate(all="ignore"):
            decision, _ = controller.update(state._replace(level=np.float32("inf")), seen)
        reasons.append(Reason(int(decision.reason)))
    assert reasons[0] is Reason.TROUBLE_STATISTICS


def test_a_config_goes_through_json_and_back(tmp_path):
    rules: dict[str, Any] = {"a.*": {"static_threshold": math.inf}, "b": "exclude"}
    config = AdaptiveClipConfig(static_threshold=math.inf, parameter_rules=rules)
    config.to_json(tmp_path / "c.json")
    strict_text = (tmp_path / "c.json").read_text()
    json.loads(strict_text, parse_constant=lambda text: pytest.fail(text))
    read = AdaptiveClipConfig.from_json(tmp_path / "c.json")
    assert read.static_threshold == math.inf
    assert read.for_pattern("a.*").static_threshold == math.inf
    assert read.for_pattern("b") is None
    assert read.to_dict() == config.to_dict()
    assert rules["a.*"]["static_threshold"] == math.inf  # the config itself was not touched
    assert AdaptiveClipConfig(static_threshold=float("inf")) == AdaptiveClipConfig(static_threshold="inf")


@pytest.mark.parametrize("value", ["1.0", "auto", "", float("nan"), 0.0, -1.0, -math.inf, True, [1.0], torch.ones(2)])
def test_what_is_no_threshold_is_refused_by_name(value):
    for give in (
        lambda: AdaptiveClipper("adaptive", static_threshold=value),
        lambda: AdaptiveClipConfig(static_threshold=value),
    ):
        with pytest.raises(ConfigError, match="`static_threshold` must be"):
            give()


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.array(2.0), torch.tensor(2.0)], ids=repr)
def test_numbers_of_all_kinds_are_thresholds(value):
    assert AdaptiveClipper("adaptive", static_threshold=value).config.static_threshold == 2.0


@pytest.mark.parametrize(("before", "now"), [(1.0, math.inf), (math.inf, 1.0), (2.0, 1.0)])
def test_another_threshold_on_resumption_is_named_as_people_know_it(tmp_path, before, now):
    model, optimizer = make()
    clipper = AdaptiveClipper("guard", optimizer=optimizer, static_threshold=before)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 3)
    clipper.save_state(tmp_path)
    same = AdaptiveClipper("guard", static_threshold=before)
    assert same.load_state(tmp_path)
    assert same.config.static_threshold == before
    with pytest.raises(StateError, match=r"`static_threshold` \(in a Trainer `max_grad_norm`\) was .* and is "):
        AdaptiveClipper("guard", static_threshold=now).load_state(tmp_path)


def test_a_resumed_run_is_the_uninterrupted_one(lane, tmp_path):
    whole, _ = make()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    clipper = AdaptiveClipper("adaptive", static_threshold=math.inf)
    train(whole, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 30)
    clipper.save_state(tmp_path)
    later, _ = make()
    later.load_state_dict(whole.state_dict())
    resumed = AdaptiveClipper("adaptive", static_threshold=math.inf)
    assert resumed.load_state(tmp_path)
    train(whole, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 30, start=30)
    steps = torch.optim.SGD(later.parameters(), lr=0.05)
    train(later, steps, lambda m, loss: resumed.clip_(m.parameters()), 30, start=30)
    assert torch.equal(weights(whole), weights(later))


def test_the_commands_read_such_a_ledger(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "adaptive", math.inf)
    for command in ("verify", "report", "replay", "advise"):
        assert main([command, "l.jsonl"]) == 0
        out = capsys.readouterr().out
        if command == "replay":
            assert "static threshold inf" in out
    assert main(["advise", "l.jsonl", "--max-grad-norm", "inf"]) == 0
    assert "A static inf never acted" in capsys.readouterr().out


# -- in a Trainer ----------------------------------------------------------------------------------------------------


def test_a_trainer_trains_as_the_stock_one_does_and_resumes(tmp_path):
    from hf_adaclip import AdaptiveClipTrainer
    from tests.integrations import trainers

    def args(name, **changes):
        return trainers.arguments(tmp_path / name, max_grad_norm=changes.pop("max_grad_norm", math.inf), **changes)

    stock = trainers.stock(tmp_path, args=args("stock", max_steps=8))
    ours = trainers.build(
        AdaptiveClipTrainer,
        tmp_path,
        clip="guard",
        args=args("ours", max_steps=8, save_strategy="steps", save_steps=4),
    )
    trainers.run(stock)
    trainers.run(ours)
    assert torch.equal(trainers.weights(stock), trainers.weights(ours))
    assert strict(tmp_path / "ours" / "clip_ledger.jsonl")[0]["static_threshold"] == "inf"
    for value in (1.0, 0.5):
        again = trainers.build(
            AdaptiveClipTrainer, tmp_path, clip="guard", args=args(f"again{value}", max_steps=8, max_grad_norm=value)
        )
        with pytest.raises(StateError, match="`max_grad_norm`"):
            trainers.run(again, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    again = trainers.build(AdaptiveClipTrainer, tmp_path, clip="guard", args=args("again", max_steps=8))
    trainers.run(again, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert torch.equal(trainers.weights(again), trainers.weights(ours))


@pytest.mark.parametrize("value", ["1.0", "auto", [1.0], True])
def test_a_max_grad_norm_that_is_no_number_is_named(tmp_path, value):
    from hf_adaclip import AdaptiveClipTrainer
    from tests.integrations import trainers

    args = trainers.arguments(tmp_path)
    args.max_grad_norm = value
    with pytest.raises(ConfigError, match=r"`max_grad_norm` must be a number, but is .* instead: pass 1.0, or `inf`"):
        trainers.build(AdaptiveClipTrainer, tmp_path, args=args)
