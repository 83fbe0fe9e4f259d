"""Scaling inside the fused step: the same as scaling before it, and the traps on the way."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers.numerics.ops import tensor_ops
from hf_adaclip.gradients.fused import scale_of
from hf_adaclip.gradients.step_guard import StepGuard
from tests.integrations.test_fp16 import Fp16Accelerator
from tests.loops import HostReads, make, train, weights

CPU = torch.device("cpu")
CONFIG = AdaptiveClipConfig(controller="median", median_factor=1.0, warmup_observations=5)  # cuts every second step
INSIDE, OUTSIDE = "scaling     inside the fused step", "scaling     in a pass of its own: "


def run(config, steps=40, factors=None, seed=0, ledger=None, optimizer=None, **adamw):
    model, adam = make(seed, **adamw)
    used = adam if optimizer is None else optimizer(model)
    clipper = AdaptiveClipper(config, optimizer=used, ledger=ledger)
    train(model, used, lambda m, loss: clipper.clip_(m.parameters(), loss=loss, measure=True), steps, factors=factors)
    clipper.close()
    return model, used, clipper


def reference(loop, **changes):
    return loop(CONFIG.replace(fold="never", **changes))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_folded_is_unfolded_but_for_the_last_bits(on_device, kind, extra):
    def optimizer(model):
        return getattr(torch.optim, kind)(model.parameters(), lr=3e-3, fused=True, **extra)

    folded, _, clipper = run(CONFIG, optimizer=optimizer)
    plain, _, other = run(CONFIG.replace(fold="never"), optimizer=optimizer)
    assert INSIDE in clipper.explain()
    assert OUTSIDE + "`fold` is 'never'" in other.explain()
    assert clipper.statistics.clipped > 10
    assert clipper.statistics.counts_by_name() == other.statistics.counts_by_name()
    assert (weights(folded) - weights(plain)).abs().max() <= 2e-6  # 40 steps of up to 3e-3


@given(
    data=st.data(),
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=5),
    coefficient=st.floats(2.0**-13, 1.0, width=32),
    kind=st.sampled_from(["Adam", "AdamW"]),
)
@settings(max_examples=50, deadline=None)
def test_one_step_of_any_model(data, shapes, coefficient, kind):
    seed = data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    optimizers = [getattr(torch.optim, kind)(ps, lr=1e-2, fused=True) for ps in (parameters, twins)]
    guard = StepGuard(optimizers[0])
    factor = torch.tensor(coefficient)
    for _ in range(3):
        for p, t in zip(parameters, twins, strict=True):
            p.grad = torch.randn_like(p)
            t.grad = p.grad * factor
        guard.arm(skip=torch.tensor(False), fold=scale_of(factor, tensor_ops(CPU)))
        for optimizer in optimizers:
            optimizer.step()
        for p, t in zip(parameters, twins, strict=True):
            assert torch.allclose(p.grad, t.grad, rtol=3e-7, atol=0)  # the step has written the scaled gradient back
            assert torch.allclose(p, t, rtol=2e-6, atol=2e-7)


def test_a_coefficient_of_one_leaves_the_bits_of_a_plain_step(on_device):
    calm = AdaptiveClipConfig(controller="median", median_factor=1e6, static_threshold=1e6)
    folded, _, clipper = run(calm)
    plain, _, _ = run(calm.replace(fold="never"))
    assert INSIDE in clipper.explain()
    assert torch.equal(weights(folded), weights(plain))


def test_the_applied_norm_is_measured_after_the_step_has_scaled(on_device, tmp_path):
    _, _, clipper = run(CONFIG, ledger=tmp_path / "l.jsonl", factors={20: 1e3, 30: float("nan")})
    assert INSIDE in clipper.explain()
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings
    assert report.measured == 39
    assert report.recomputed == 40


def test_no_host_read(on_device):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(self_test=False), optimizer=optimizer)

    def clip(m, loss):
        with HostReads() as reads:
            norm = clipper.clip_(m.parameters(), loss=loss, measure=False)
        assert reads.count == 0
        return norm

    train(model, optimizer, clip, 20)
    with HostReads() as reads:
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss, measure=False), 1, start=20)
    with HostReads() as without:
        train(model, optimizer, lambda m, loss: torch.tensor(0.0), 1, start=21)
    assert reads.count == without.count  # the hooks of the step read nothing either


# -- the traps ----------------------------------------------------------------------------------------------------


def test_trap_1_a_stale_scale_is_not_applied_to_the_next_step(on_device):
    model, optimizer, _ = run(CONFIG, factors={39: 1e4})
    assert optimizer.grad_scale is None
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-3, fused=True)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):  # a step that nobody clips
        train(m, o, lambda m, loss: torch.tensor(0.0), 1, start=50)
    assert torch.equal(weights(model), weights(twin))


def test_trap_2_a_loss_scaler_owns_the_attribute(lane):
    accelerator = Fp16Accelerator()
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    for step in range(20):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        accelerator.scaler.scale((model(x) - x[:, :1]).square().mean()).backward()
        clipper.clip_(model.parameters())
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        optimizer.zero_grad()
    assert OUTSIDE in clipper.explain()


def test_trap_3_the_scale_is_float32_whatever_the_weights_and_is_in_no_state_dict(on_device, tmp_path):
    model, _ = make()
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    for step in range(20):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float32).bfloat16()
        model(x).square().mean().backward()
        clipper.clip_(model.parameters())
        if step:  # the first one is checked, and not folded
            assert optimizer.grad_scale.dtype is torch.float32  # type: ignore[attr-defined]
        assert "grad_scale" not in str(optimizer.state_dict().keys())
        optimizer.step()
        optimizer.zero_grad()
    assert INSIDE in clipper.explain()
    assert clipper.metrics()["clip/fraction"] > 0


def test_trap_4_a_callback_that_may_look_at_gradients_sees_them_clipped(on_device, tmp_path):
    from transformers import TrainerCallback

    from hf_adaclip import AdaptiveClipTrainer
    from tests.integrations.trainers import arguments, dataset
    from tests.integrations.trainers import model as build

    seen = []

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            )

    settings = {
        "args": arguments(tmp_path, max_steps=12, max_grad_norm=0.1),
        "train_dataset": dataset(),
        "clip": "adaptive",
    }
    trainer = AdaptiveClipTrainer(model=build(), callbacks=[Looks()], **settings)
    trainer.train()
    assert OUTSIDE + "`fold` is 'never'" in trainer.clipper.explain()
    assert max(seen) <= 0.1001
    quiet = AdaptiveClipTrainer(model=build(), **settings)
    quiet.train()
    assert INSIDE in quiet.clipper.explain()


def test_trap_5_a_step_that_is_left_out_is_left_out_folded_too(on_device):
    model, optimizer, _ = run(CONFIG, steps=20)
    before = weights(model), [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 1, start=20, factors={20: float("nan")})
    assert INSIDE in clipper.explain()
    assert torch.equal(before[0], weights(model))
    for old, new in zip(before[1], optimizer.state.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),  # traps 6 and 7: fused SGD is trusted with neither flag
        ("RMSprop", {"lr": 1e-3}),  # ignores `grad_scale` silently
        ("Adagrad", {"lr": 1e-2, "fused": True}),
        ("AdamW", {"lr": 1e-3, "foreach": True}),
        ("AdamW", {"lr": 1e-3, "fused": False, "foreach": False}),
    ],
    ids=str,
)
def test_traps_6_and_7_only_fused_adam_is_trusted(on_device, name, settings):
    def optimizer(model):
        return getattr(torch.optim, name)(model.parameters(), **settings)

    model, used, clipper = run(CONFIG, optimizer=optimizer)
    plain, _, _ = run(CONFIG.replace(fold="never"), optimizer=optimizer)
    assert OUTSIDE + f"{name} is not a fused Adam" in clipper.explain()
    assert torch.equal(weights(model), weights(plain))
    assert clipper.statistics.clipped > 10
    assert getattr(used, "grad_scale", None) is None


def test_trap_8_a_tensor_is_never_asked_for_its_truth(on_device):
    """`x and None` in a hook would read the device in every step."""
    _, optimizer = make()
    guard = StepGuard(optimizer)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with HostReads() as reads:
        guard.arm(skip=torch.tensor(False), fold=torch.tensor(2.0), pace=torch.tensor(1.5))
        guard._before_step(optimizer, (), {})
        guard._after_step(optimizer, (), {})
    assert reads.count == 0


def test_trap_9_a_step_that_builds_state_neither_counts_nor_scales(on_device):
    """Loading a checkpoint into FSDP2 calls `optimizer.step` on gradients of zero."""
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates = [g["lr"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["lr"] = 0.0
    optimizer.step()
    for g, rate in zip(optimizer.param_groups, rates, strict=True):
        g["lr"] = rate
    optimizer.zero_grad()
    assert clipper.step == 0
    assert clipper.state == {}
    assert torch.equal(before, weights(model))


# -- when not ----------------------------------------------------------------------------------------------------


def test_reasons_not_to_fold(on_device):
    assert "bits of the stock Trainer" in run(AdaptiveClipConfig(controller="static"), steps=2)[2].explain()
    assert "bits of the stock Trainer" in run(CONFIG.replace(shadow=True), steps=2)[2].explain()
    assert "these are judged apart" in run(CONFIG.replace(granularity="tensor"), steps=2)[2].explain()

    model, optimizer = make()
    first = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(model, optimizer, lambda m, loss: first.clip_(m[0].parameters()), 2)
    assert "other parameters than those that are clipped" in first.explain()
    nobody = AdaptiveClipper(CONFIG)
    train(model, optimizer, lambda m, loss: nobody.clip_(m.parameters()), 2)
    assert "0 are known" in nobody.explain()
    assert "decided in the first step" in AdaptiveClipper(CONFIG).explain()


def test_other_peoples_hooks_see_clipped_gradients(on_device):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 3)
    assert "somebody else's hook" in clipper.explain()


def test_in_host_memory_nothing_is_folded():
    clipper = run(CONFIG, steps=3)[2]
    assert "in host memory a step inside the range scales nothing" in clipper.explain()
