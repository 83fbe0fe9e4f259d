"""The peers' optimizers: each step is the published rule's, and a run of the Trainer really steps with them."""

import copy
import math

import pytest
import torch
from optimizers import CautiousAdamW, MuonAdamW, OptimizerArguments
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def pair(shape=(6, 4)):
    torch.manual_seed(1)
    one = nn.Parameter(torch.randn(shape))
    return one, nn.Parameter(one.detach().clone())


def test_cautious_adamw_steps_where_momentum_and_gradient_agree():
    weight, _ = pair()
    optimizer = CautiousAdamW([{"params": [weight], "weight_decay": 0.1}], **SETTINGS)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    expected = weight.detach().clone().double()
    mean, square = mean.double(), square.double()
    for step in range(1, 6):
        gradient = torch.randn(weight.shape)
        weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g * g
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
        mask = (mean * g > 0).double()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update * mask / mask.mean().clamp(min=1e-3)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_its_first_step_is_that_of_adamw():
    ours, theirs = pair()
    ours.grad = torch.randn(ours.shape)
    theirs.grad = ours.grad.clone()
    CautiousAdamW([{"params": [ours]}], **SETTINGS).step()
    torch.optim.AdamW([theirs], weight_decay=0.0, **SETTINGS).step()
    torch.testing.assert_close(ours, theirs)


def test_muon_steps_the_hidden_matrices_and_adamw_the_rest():
    matrix, same_matrix = pair()
    other, same_other = pair((5,))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [other], "weight_decay": 0.0}]
    whole = MuonAdamW(groups, hidden=[matrix], **SETTINGS)
    muon = torch.optim.Muon([same_matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([same_other], weight_decay=0.0, **SETTINGS)
    for _ in range(3):
        for ours, theirs in ((matrix, same_matrix), (other, same_other)):
            ours.grad = torch.randn(ours.shape)
            theirs.grad = ours.grad.clone()
        for optimizer in (whole, muon, adamw):
            optimizer.step()
    assert torch.equal(matrix, same_matrix)
    assert torch.equal(other, same_other)


@pytest.mark.parametrize("kind", [MuonAdamW, CautiousAdamW])
def test_schedules_reach_them_and_a_checkpoint_goes_on(kind):
    def make():
        weights = [nn.Parameter(torch.full((3, 2), 0.5)), nn.Parameter(torch.ones(4))]
        more = {"hidden": weights[:1]} if kind is MuonAdamW else {}
        optimizer = kind([{"params": weights, "weight_decay": 0.0}], **SETTINGS, **more)
        return weights, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(weights, optimizer, schedule, steps):
        for step in steps:
            for weight in weights:
                weight.grad = torch.sin(torch.arange(weight.numel()).reshape(weight.shape) + float(step))
            optimizer.step()
            schedule.step()

    weights, optimizer, schedule = make()
    train(weights, optimizer, schedule, range(3))
    middle = copy.deepcopy(([w.detach() for w in weights], optimizer.state_dict(), schedule.state_dict()))
    train(weights, optimizer, schedule, range(3, 6))
    again, other, later = make()
    for weight, value in zip(again, middle[0], strict=True):
        weight.data.copy_(value)
    other.load_state_dict(middle[1])
    later.load_state_dict(middle[2])
    train(again, other, later, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert all(math.isclose(group["lr"], 0.01 / 7) for group in optimizer.param_groups)


def test_without_the_flag_the_trainer_chooses(tmp_path):
    assert OptimizerArguments().ingredients(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True)) == {}


@pytest.mark.parametrize(("name", "kind"), [("muon", MuonAdamW), ("cautious_adamw", CautiousAdamW)])
def test_the_trainer_gets_it_with_its_own_settings(tmp_path, name, kind):
    model, args = tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.02, adam_beta2=0.95)
    made, settings = OptimizerArguments(name).ingredients(model, args)["optimizer_cls_and_kwargs"]
    assert made is kind
    assert (settings["lr"], settings["betas"]) == (0.02, (0.9, 0.95))
    if kind is MuonAdamW:
        hidden = {n for n, p in model.named_parameters() if any(p is h for h in settings["hidden"])}
        assert all("proj" in n for n in hidden)
        assert len(hidden) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "cautious_adamw"])
def test_a_script_trains_with_it(here, tmp_path, name):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(200)))
    flags = {
        "train_file": tmp_path / "text.txt",
        "train_tokenizer": 300,
        "config_overrides": "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2",
        "block_size": 16,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "none",
        "save_strategy": "no",
        "clip": "stock",
        "learning_rate": 0.01,
        "seed": 1,
    }

    def loss(*more):
        listed = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
        folder = tmp_path / "-".join(["out", *more]).replace("--", "")
        return here("run_clm", [*listed, "--do_train", "--do_eval", "--use_cpu", "--output_dir", folder, *more])[
            "eval_loss"
        ]

    assert loss("--optimizer", name) != loss()
