"""The checks at the start: they pass where clipping acts, and fail loudly where something defeats it."""

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClippingDefeatedError
from tests.loops import make, train, weights

CONFIG = AdaptiveClipConfig(warmup_observations=10)
SETTINGS = [
    {},
    {"controller": "static"},
    {"controller": "zscore"},
    {"controller": "percentile"},
    {"granularity": "tensor"},
    {"shadow": True},
    {"one_step_late": True},
    {"min_threshold": 1e6},
    {"max_threshold": 1e-3},
    {"freeze_after": 5},
    {"max_pace": 4.0},
    {"static_threshold": 1e-4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_passes_under_every_setting_and_leaves_no_trace(lane, settings):
    model, optimizer = make()
    config = CONFIG.replace(**settings)
    clipper = AdaptiveClipper(config, optimizer=None if config.one_step_late else optimizer)
    before = weights(model)
    clipper.self_test(model.parameters())

    assert torch.equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    assert (clipper.step, clipper.state) == (0, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(lane, dtype):
    model, _ = make()
    AdaptiveClipper(CONFIG).self_test(model.to(dtype).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("threshold", [1e-30, 1e-6, 1.0, 1e4, 1e9, 1e15, 1e16, 1e19, 1e30, 3e38, float("inf")])
@pytest.mark.parametrize(
    "controller", ["static", "adaptive", "zscore", "log_zscore", "percentile", "ema_ratio", "median"]
)
def test_it_passes_at_every_threshold_in_every_dtype(lane, dtype, threshold, controller):
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 5000)]
    AdaptiveClipper(CONFIG.replace(controller=controller, static_threshold=threshold)).self_test(parameters)


@pytest.mark.parametrize(
    "settings", [{"min_threshold": 1e30}, {"min_threshold": 1e20, "max_threshold": 1e25}], ids=str
)
def test_it_passes_with_limits_that_no_norm_reaches(lane, settings):
    AdaptiveClipper(CONFIG.replace(**settings)).self_test([torch.nn.Parameter(torch.ones(8))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threshold", [1e-6, 1.0, 1e9, 1e19, float("inf")])
@pytest.mark.parametrize("large", [False, True])
def test_a_scaling_that_does_nothing_is_found_at_every_threshold(lane, monkeypatch, dtype, threshold, large):
    monkeypatch.setattr("hf_adaclip.run.selftest.scale_", lambda gradients, coefficient: None)
    # A model of which every tensor is large (LoRA on wide layers) is not let through unseen.
    parameters = [torch.nn.Parameter(torch.ones(100_000 if large else 9, dtype=dtype))]
    with pytest.raises(ClippingDefeatedError, match="A planted spike must be cut"):
        AdaptiveClipper(CONFIG.replace(static_threshold=threshold)).self_test(parameters)


def test_a_norm_that_is_taken_too_small_is_found(monkeypatch):
    from hf_adaclip.gradients import tensor_norms

    monkeypatch.setattr("hf_adaclip.run.selftest.tensor_norms", lambda tensors: tensor_norms(tensors) / 1000)
    with pytest.raises(ClippingDefeatedError, match="A planted spike must be cut"):
        AdaptiveClipper(CONFIG).self_test([torch.nn.Parameter(torch.ones(9))])


def test_a_scaling_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr("hf_adaclip.run.selftest.scale_", lambda gradients, coefficient: None)
    _, optimizer = make()
    with pytest.raises(ClippingDefeatedError, match="A planted spike must be cut"):
        AdaptiveClipper(CONFIG.replace(static_threshold=1e-3), optimizer=optimizer).self_test()


def test_a_controller_that_lets_a_spike_through_is_found(monkeypatch):
    from hf_adaclip.controllers import CONTROLLERS
    from hf_adaclip.controllers.static import StaticController

    class Blind(StaticController):
        def update(self, state, observation):
            decision, state = super().update(state, observation)
            return decision._replace(coefficient=decision.coefficient * 0 + 1), state

    monkeypatch.setitem(CONTROLLERS, "blind", Blind)
    _, optimizer = make()
    with pytest.raises(ClippingDefeatedError, match="by controller 'blind'"):
        AdaptiveClipper(AdaptiveClipConfig(controller="blind"), optimizer=optimizer).self_test()


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_a_gradient_that_grows_between_clipping_and_the_step_stops_the_run_before_its_first_step(lane, settings):
    model, optimizer = make()
    before = weights(model)

    def meddling(model, loss):
        norm = clipper.clip_(model.parameters())
        for p in model.parameters():
            p.grad.mul_(3.0)
        return norm

    clipper = AdaptiveClipper(CONFIG.replace(**settings), optimizer=optimizer)
    with pytest.raises(ClippingDefeatedError, match=r"something changes it in between.*`self_test=False`"):
        train(model, optimizer, meddling, 1)
    assert torch.equal(before, weights(model))


def test_it_can_be_switched_off_and_a_first_step_that_is_not_finite_only_delays_it(lane):
    for settings, factors, steps in (({"self_test": False}, {}, 5), ({}, {0: float("nan")}, 2)):
        model, optimizer = make()
        clipper = AdaptiveClipper(CONFIG.replace(**settings), optimizer=optimizer)

        def meddling(model, loss, clipper=clipper):
            norm = clipper.clip_(model.parameters())
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(3.0)
            return norm

        if settings:
            train(model, optimizer, meddling, steps, factors=factors)
        else:
            with pytest.raises(ClippingDefeatedError):
                train(model, optimizer, meddling, steps, factors=factors)
            assert clipper.step == 2


def test_it_costs_nothing_after_the_first_step(lane, monkeypatch):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(model, optimizer, lambda m, _: clipper.clip_(m.parameters()), 2)
    monkeypatch.setattr("hf_adaclip.run.selftest.global_norm", None)
    train(model, optimizer, lambda m, _: clipper.clip_(m.parameters()), 5, start=2)


def test_the_wrong_optimizer_is_warned_of(caplog):
    model, optimizer = make()
    _, other = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=other)
    train(model, optimizer, lambda m, _: clipper.clip_(m.parameters()), 40)

    assert sum("must be the one that steps on these gradients" in r.message for r in caplog.records) == 1


def test_a_series_of_nan_is_not_blamed_on_the_optimizer(caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer)
    bad = {step: float("nan") for step in range(30)}
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 33, factors=bad)

    assert [r.message for r in caplog.records if "`step` was not called" in r.message] == []


def test_an_optimizer_that_never_steps_is_still_found_after_nan(caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=make()[1])
    bad = {step: float("nan") for step in range(5)}
    with caplog.at_level("WARNING"):
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 40, factors=bad)

    assert len([r for r in caplog.records if "`optimizer` must be" in r.message]) == 1
