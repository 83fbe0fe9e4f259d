"""What the default comes to: every part where nothing speaks against it, and the reason where something does."""

import copy

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, RunPlan
from hf_adaclip.drivers.settling import settle
from hf_adaclip.gradients.matrices import hidden_matrices


def llama(**more):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, **sizes, **more))


def settled(
    clip="adaptive", model=None, kind=torch.optim.AdamW, *, plan=None, known=True, in_engine=False, **settings
):
    model = model or llama()
    optimizers = [] if kind is None else [kind(model.parameters(), **settings)]
    config = AdaptiveClipConfig.resolve(clip)
    return settle(config, optimizers, [model] if known else [], plan or RunPlan(), in_engine=in_engine)


def parts(found):
    return found.config.max_pace, found.config.spectral, found.config.agreement


def test_by_default_all_parts_are_on():
    found = settled()
    assert parts(found) == (64.0, 0.0, True)
    assert found.off == {}
    assert found.by_itself == {"spectral", "agreement"}


@pytest.mark.parametrize(
    ("given", "expected", "words"),
    [
        (
            {"kind": None},
            (1.0, None, False),
            {"pace": "no optimizer", "spectral": "no optimizer", "agreement": "no optimizer"},
        ),
        ({"known": False}, (64.0, None, True), {"spectral": "no model is known"}),
        (
            {"kind": torch.optim.SGD, "lr": 0.1},
            (1.0, None, False),
            dict.fromkeys(("pace", "spectral", "agreement"), "is SGD"),
        ),
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


def acting(model, clip="adaptive", folder=None):
    """Which parts act in the first step of a run, and the clipper."""
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = AdaptiveClipper(clip, optimizer=optimizer, model=model)
    if folder is not None:
        clipper.load_state(folder)
    ids = torch.arange(32).repeat(32, 4)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    clipper.clip_(model.parameters(), loss=loss)
    optimizer.step()
    names = {"spectral": "clip/spectral_width", "agreement": "clip/agreeing_share"}
    seen = clipper.metrics()
    return {part for part, name in names.items() if name in seen}, clipper


def test_what_was_trained_before_keeps_its_step(tmp_path):
    llama().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    parts_on, clipper = acting(loaded)
    assert parts_on == set()
    assert clipper.explain().count("the model was trained before") == 2
    assert clipper.config.max_pace == 64.0
    assert acting(loaded, {"spectral_width": 0.0, "agreement": True})[0] == {"spectral", "agreement"}
    assert acting(loaded, {"agreement": True})[0] == {"agreement"}
    assert acting(llama())[0] == {"spectral", "agreement"}


def test_fresh_matrices_beside_frozen_ones_are_trained_from_scratch(tmp_path):
    from peft import LoraConfig, get_peft_model

    llama().save_pretrained(tmp_path)
    factors = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), LoraConfig(r=4, target_modules=["q_proj"]))
    assert acting(factors)[0] == {"spectral", "agreement"}
    for name, parameter in factors.named_parameters():
        if "q_proj.base_layer" in name:
            parameter.requires_grad_(True)
    assert acting(factors)[0] == set()


@pytest.mark.parametrize("trained", [True, False])
def test_of_copies_and_loaded_dictionaries_the_weights_say_whether_they_were_trained(tmp_path, trained):
    """Nothing else is left there of where they came from."""
    before = llama()
    if trained:
        leave_what_training_leaves(before)
    before.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    filled = llama()
    filled.load_state_dict(loaded.state_dict())
    for model in (copy.deepcopy(loaded), filled):
        assert acting(model)[0] == (set() if trained else {"spectral", "agreement"})


def leave_what_training_leaves(model):
    """Directions far beyond those of entries that were drawn one by one."""
    with torch.no_grad():
        for matrix in hidden_matrices([model]):
            u, v = torch.randn(len(matrix)), torch.randn(matrix[0].numel())
            matrix += 2 * matrix.square().mean().sqrt() * torch.outer(u, v).reshape(matrix.shape)


def test_a_run_from_scratch_goes_on_as_such_from_its_own_checkpoint(tmp_path):
    model = llama()
    _, clipper = acting(model)
    clipper.save_state(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert acting(loaded, folder=tmp_path)[0] == {"spectral", "agreement"}


def test_a_fresh_model_with_the_config_of_a_trained_one_is_fresh(tmp_path):
    llama().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.name_or_path
    assert acting(LlamaForCausalLM(config))[0] == {"spectral", "agreement"}


def test_where_loaded_weights_are_not_marked_a_name_tells(tmp_path, monkeypatch):
    import transformers.initialization as initialization

    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(initialization, "zeros_", torch.nn.init.zeros_)
    assert acting(LlamaForCausalLM.from_pretrained(tmp_path))[0] == set()
    assert acting(llama())[0] == {"spectral", "agreement"}


def test_a_clipper_says_what_is_off_and_why():
    model = torch.nn.Linear(4, 4)
    clipper = AdaptiveClipper(optimizer=torch.optim.AdamW(model.parameters()))
    said = clipper.explain()
    assert "pace        a start of 50 steps, then up to x64" in said
    assert "in the last step" not in said
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        clipper.clip_(model.parameters())
    assert "; x0.06 in the last step" in clipper.explain()
    assert "spectral    off: no model is known" in said
    assert "pace        off: no optimizer is known" in AdaptiveClipper().explain()
    assert "spectral" not in AdaptiveClipper("guard").explain()
