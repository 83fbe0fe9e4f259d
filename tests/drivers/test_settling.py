"""What the default comes to: every part where nothing speaks against it, and the reason where something does."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.drivers.settling import settle


def llama(**more):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, **sizes, **more))


def settled(clip="adaptive", model=None, kind=torch.optim.AdamW, *, known=True, in_engine=False, **settings):
    model = model or llama()
    optimizers = [] if kind is None else [kind(model.parameters(), **settings)]
    config = AdaptiveClipConfig.resolve(clip)
    return settle(config, optimizers, [model] if known else [], in_engine=in_engine)


def parts(found):
    return found.config.max_pace, found.config.width, found.config.agreement


def test_by_default_all_parts_are_on():
    found = settled()
    assert parts(found) == (64.0, 0.0, True)
    assert found.off == {} and found.by_cost


@pytest.mark.parametrize(
    ("given", "expected", "words"),
    [
        (
            {"kind": None},
            (1.0, None, False),
            {"pace": "no optimizer", "spectral": "no optimizer", "agreement": "no optimizer"},
        ),
        ({"known": False}, (64.0, None, True), {"spectral": "no model is known"}),
        ({"kind": torch.optim.SGD, "lr": 0.1}, (64.0, None, False), {"spectral": "is SGD", "agreement": "is SGD"}),
        (
            {"kind": torch.optim.LBFGS},
            (1.0, None, False),
            {"pace": "LBFGS", "spectral": "LBFGS", "agreement": "LBFGS"},
        ),
        ({"in_engine": True}, (1.0, None, False), dict.fromkeys(("pace", "spectral", "agreement"), "DeepSpeed")),
        ({"clip": {"shadow": True}}, (1.0, None, False), dict.fromkeys(("pace", "spectral", "agreement"), "shadow")),
        (
            {"clip": {"parameter_rules": {"*.bias": "exclude"}}},
            (1.0, None, False),
            dict.fromkeys(("pace", "spectral", "agreement"), "judged apart"),
        ),
        ({"clip": "zscore"}, (1.0, None, False), {}),
        ({"clip": "guard"}, (1.0, None, False), {}),
        ({"clip": {"max_pace": 4.0}}, (4.0, 0.0, True), {}),
        ({"clip": {"max_pace": 1.0}}, (1.0, 0.0, True), {}),
        ({"clip": {"spectral_width": None}}, (64.0, None, True), {}),
        ({"clip": "adaptive:spectral_width=none,agreement=false"}, (64.0, None, False), {}),
    ],
    ids=str,
)
def test_what_speaks_against_a_part_is_said_and_what_is_set_stays(given, expected, words):
    found = settled(**given)
    assert parts(found) == expected
    assert found.off.keys() == words.keys()
    assert all(words[part] in why for part, why in found.off.items())


def test_what_was_trained_before_keeps_its_step(tmp_path):
    llama().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    found = settled(model=loaded)
    assert parts(found) == (64.0, None, False)
    assert "was trained before" in found.off["spectral"] and "was trained before" in found.off["agreement"]
    assert parts(settled({"spectral_width": 0.0, "agreement": True}, model=loaded)) == (64.0, 0.0, True)


def test_a_fresh_model_with_the_config_of_a_trained_one_is_fresh(tmp_path):
    llama().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.name_or_path
    assert parts(settled(model=LlamaForCausalLM(config))) == (64.0, 0.0, True)


def test_where_loaded_weights_are_not_marked_a_name_tells(tmp_path, monkeypatch):
    import transformers.initialization as initialization

    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(initialization, "zeros_", torch.nn.init.zeros_)
    assert parts(settled(model=LlamaForCausalLM.from_pretrained(tmp_path))) == (64.0, None, False)
    assert parts(settled()) == (64.0, 0.0, True)


def test_a_clipper_says_what_is_off_and_why():
    model = torch.nn.Linear(4, 4)
    said = AdaptiveClipper(optimizer=torch.optim.AdamW(model.parameters())).explain()
    assert "pace        a start of 50 steps, then up to x64" in said
    assert "spectral    off: no model is known" in said
    assert "pace        off: no optimizer is known" in AdaptiveClipper().explain()
    assert "spectral" not in AdaptiveClipper("guard").explain()
