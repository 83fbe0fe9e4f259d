"""Mistakes that a new user makes: each is answered with the argument, the rule, the value and the way out, before anything is trained."""

import logging

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClipArguments, ConfigError, ZScore
from hf_adaclip.errors import LedgerError
from hf_adaclip.hints import near_clip
from hf_adaclip.ledger.writer import Ledger
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.events import ClipEvent


class Adapted(torch.nn.Module):
    """A frozen weight and an adapter under a wrapper's prefix, as PEFT names them."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 1), "lora": torch.nn.Linear(4, 4)})
        self.base["lm_head"].requires_grad_(False)

    def forward(self, x):
        return self.base["lm_head"](self.base["lora"](x))


def stepped(trained, clip, **given):
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    clipper = AdaptiveClipper(clip, optimizer=optimizer, **given)
    trained(torch.ones(2, 4)).square().mean().backward()
    clipper.clip_(trained.parameters())
    return clipper


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("adaptve:max_pace=8", "Did you mean 'adaptive'"),
        ("adaptive:max_pase=8", "`max_pase` must be a field of AdaptiveClipConfig, .* Did you mean `max_pace`"),
        ("adaptive:8", "NAME:FIELD=VALUE,... .* look at '8'"),
        ("adaptive:max_pace=8,max_pace=9", "each field once"),
        ("zscore:max_near=0.5", "belongs to controller 'adaptive'"),
        ({"max_grad_norm": 2.0}, "here and in a loop `static_threshold`"),
        ({"clip_value": 2.0}, "`static_threshold`"),
    ],
)
def test_clip_as_text_or_fields(clip, words):
    with pytest.raises(ConfigError, match=words):
        AdaptiveClipConfig.resolve(clip)


def test_the_text_of_files_and_flags_is_taken_everywhere():
    wanted = AdaptiveClipConfig(controller="zscore", z_threshold=3)
    assert AdaptiveClipConfig.resolve("zscore:z_threshold=3") == wanted
    assert ClipArguments("zscore:z_threshold=3").resolve() == wanted
    assert ClipArguments("zscore:width=3", clip_shadow=True).resolve() == wanted.replace(shadow=True)
    assert AdaptiveClipper("zscore:z_threshold=3").config.settings == ZScore(width=3)
    with pytest.raises(ConfigError, match="Did you mean 'zscore'"):
        ClipArguments("zcore:z_threshold=3").resolve()


def test_an_object_in_the_wrong_place_is_named_in_one_line():
    optimizer = torch.optim.AdamW(torch.nn.Linear(4, 1).parameters())
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipper(optimizer)
    assert "an object of type AdamW instead. Pass the optimizer as `optimizer=`." in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="the class AdaptiveClipConfig"):
        AdaptiveClipConfig.resolve(AdaptiveClipConfig)
    assert near_clip(1.0, ["adaptive"]) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimiser": None}, "`optimiser` must be one of .*Did you mean `optimizer`"),
        ({"max_pace": 8.0}, r"pass `clip=AdaptiveClipConfig\(max_pace=...\)`"),
        ({"max_grad_norm": 2.0}, "`static_threshold`"),
        ({"accelerator": "cpu"}, "`accelerator` must be an accelerate.Accelerator, but is 'cpu'"),
        ({"accelerator": torch.nn.Linear(1, 1)}, "an object of type Linear"),
        ({"optimizer": torch.nn.Linear(1, 1)}, "`optimizer` must be a torch.optim.Optimizer, .*Linear instead"),
        ({"ledger": True}, "`ledger` must be a path as a string, .*True"),
        ({"ledger": "runs/first/"}, "`ledger` must be the path of a file, .*Write 'runs/first/clip_ledger.jsonl'"),
    ],
)
def test_arguments_of_a_clipper(given, words):
    with pytest.raises(ConfigError, match=words):
        AdaptiveClipper("adaptive", **given)


def test_a_subclass_may_take_more():
    class Own(AdaptiveClipper):
        def __init__(self, *args, **more):
            self.more = more.pop("colour")
            super().__init__(*args, **more)

    assert Own("adaptive", colour="red").more == "red"


def test_a_threshold_in_the_step():
    model = torch.nn.Linear(4, 1)
    clipper = AdaptiveClipper("adaptive")
    for call in (
        lambda: clipper.clip_(model.parameters(), 1.0),
        lambda: clipper.clip_(model.parameters(), max_norm=1.0),
    ):
        with pytest.raises(
            ConfigError, match=r"`max_norm` must be left out of `clip_`, but is 1.0 .* `static_threshold`"
        ):
            call()


def test_all_frozen():
    model = torch.nn.Linear(4, 1).requires_grad_(False)
    with pytest.raises(ConfigError, match="`parameters` must be trainable, but all of them are frozen"):
        AdaptiveClipper("adaptive").clip_(model.parameters())


def test_a_folder_in_place_of_a_ledger(tmp_path, caplog):
    with pytest.raises(LedgerError, match=f"is a folder instead. Write {tmp_path / 'clip_ledger.jsonl'}"):
        Ledger(tmp_path, {})
    stepped(torch.nn.Linear(4, 1), "adaptive", ledger=tmp_path).close()  # it only records
    assert "is a folder instead" in caplog.text


def test_a_listener_that_cannot_listen():
    with pytest.raises(ConfigError, match="`listener` must be a function of one ClipEvent, but is 'print'"):
        AdaptiveClipper("adaptive").on_event("print")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("lm_head.*", r"'lm_head.\*' matches none instead. '\*lm_head.\*' matches 2 \(base.lm_head.weight, ...\)"),
        ("base.lora", r"'base.lora\*' matches 2"),
        ("lora.weigh", r"'\*lora.weigh\*' matches 1 \(base.lora.weight\)"),
        ("encoder.*", "Names look like base"),
    ],
)
def test_a_rule_that_matches_nothing_names_one_that_does(rule, words):
    model = Adapted()
    with pytest.raises(ConfigError, match=words):
        stepped(model, AdaptiveClipConfig(parameter_rules={rule: "exclude"}), model=model)


@pytest.mark.parametrize("controller", ["adaptive", "weight_ratio"])
def test_rules_that_do_nothing_are_said(controller, caplog):
    model = Adapted()
    rules = {"*lm_head*": "exclude", "*lora*": "exclude"}
    stepped(model, AdaptiveClipConfig(controller=controller, parameter_rules=rules), model=model)
    assert (
        "the pattern '*lm_head*' of `parameter_rules` does nothing as long as all 2 of its parameters are frozen"
        in caplog.text
    )
    assert "`parameter_rules` exclude all 2 trainable parameters: nothing is clipped" in caplog.text
    caplog.clear()
    stepped(model, AdaptiveClipConfig(controller=controller, parameter_rules={"*lora.bias": "exclude"}), model=model)
    assert "parameter_rules" not in caplog.text


def test_one_rank_of_several_warns_of_events(caplog):
    event = ClipEvent(3, 3, "spike", 9.0, 1.0, "Why.", "norm")
    trouble = ClipEvent(3, 3, "trouble", 9.0, 1.0, "Why.", "norm")
    for speaks, warnings in ((False, 0), (True, 2)):
        caplog.clear()
        heard: list[object] = []
        alerts = Alerts(speaks=speaks)
        alerts.listeners.append(heard.append)
        alerts.tell([event, trouble])
        assert heard == [event, trouble]
        assert sum(r.levelno >= logging.WARNING for r in caplog.records) == warnings
    quiet = AdaptiveClipper("adaptive", is_main_process=False)
    assert quiet.alerts._alarm == logging.DEBUG
