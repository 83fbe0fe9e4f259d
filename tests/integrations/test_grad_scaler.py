"""torch's own `GradScaler` in a plain loop, of which the clipper is not told: what is recorded as left out is left out."""

import copy

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClippingDefeatedError
from tests.gradients.test_guard import equal
from tests.loops import HostReads, make, weights

BAD = 30
SPIKES = {
    "log_zscore": {"controller": "log_zscore", "warmup_observations": 10},
    "mean_sd": {"controller": "mean_sd", "warmup_observations": 10, "sd_window": 20},
    "skip": {"controller": "zscore", "on_spike": "skip", "warmup_observations": 10},
}
OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


def train(kind, config, *, factor=1.0, unscale=True, steps=34, left_out=(), scaled=True):
    """Returns snapshots of weights and state after every step, the scales, and the clipper."""
    model, _ = make()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000, enabled=scaled)
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    taken, scales = [], []
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :1]).square().mean() * (factor if step == BAD else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        clipper.clip_(model.parameters(), loss=loss.detach())
        if step not in left_out:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale() if scaled else 1.0)
        taken.append(copy.deepcopy([[p.detach() for p in model.parameters()], optimizer.state_dict()]))
    return taken, scales, clipper


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("spike", SPIKES)
def test_a_spike_that_is_left_out_moves_nothing_and_the_loss_scale_stays(lane, kind, spike):
    taken, scales, clipper = train(kind, AdaptiveClipConfig(**SPIKES[spike]), factor=1e4)
    counts = clipper.metrics()
    assert counts["clip/skipped"] >= 1
    assert equal(taken[BAD - 1], taken[BAD])
    assert not equal(taken[BAD], taken[BAD + 1])
    assert set(scales) == {2.0**10}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_is_not_finite_moves_nothing_and_the_scaler_learns_of_it(lane, kind):
    taken, scales, _ = train(kind, AdaptiveClipConfig("static", static_threshold=1e9), factor=float("nan"))
    assert equal(taken[BAD - 1], taken[BAD])
    assert not equal(taken[BAD], taken[BAD + 1])
    assert scales[BAD] == scales[BAD - 1] / 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "controller", ["static", "median"]
)  # on the device lane the second is scaled inside the fused step
def test_ordinary_steps_are_those_without_a_scaler(lane, kind, controller):
    config = AdaptiveClipConfig(controller, static_threshold=0.5, warmup_observations=5)
    if controller == "median":
        config = config.replace(median_factor=1.0)
    scaled, _, _ = train(kind, config)
    plain, _, _ = train(kind, config, scaled=False)
    assert equal(scaled, plain)  # scales are powers of two


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("self_test", [True, False])
def test_a_forgotten_unscale_is_refused_before_anything_has_moved(lane, kind, self_test, caplog):
    config = AdaptiveClipConfig("static", static_threshold=0.5, self_test=self_test)
    if kind in ("foreach", "sgd") and not self_test:
        return  # the scaler divides before `step`, so it takes the measurement of the first step to see it
    with pytest.raises(ClippingDefeatedError, match=r"`scaler.unscale_\(optimizer\)` must be called before `clip_`"):
        train(kind, config, unscale=False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_overflows_at_the_start_do_not_hide_it(lane, kind):
    """The first steps of a scaler overflow as a rule; it finds them itself, on gradients that we must not have taken away."""
    model, _ = make()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    clipper = AdaptiveClipper("static", optimizer=optimizer)
    before, scales = weights(model), []

    def step(factor):
        scaler.scale(model(torch.ones(2, 8)).square().mean() * factor).backward()
        clipper.clip_(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()

    def run():
        for factor in (float("inf"), float("inf"), 1.0):
            step(factor)

    with pytest.raises(ClippingDefeatedError, match="unscale_"):
        run()
    assert scales in ([], [2.0**9, 2.0**8])  # at once, or as soon as a step is finite
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_second_clipping_after_unscaling_is_not_taken_for_it(lane, kind, caplog):
    model, _ = make()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    clipper = AdaptiveClipper("static", optimizer=optimizer)
    scaler.scale(model(torch.ones(2, 8)).square().mean()).backward()
    scaler.unscale_(optimizer)
    clipper.clip_(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    assert "something makes it smaller" in caplog.text


def test_nothing_is_warned_of_and_no_number_is_read_beyond_the_scalers_own(on_device, caplog):
    reads = []
    for clipped in (True, False):
        model, _ = make()
        optimizer = OPTIMIZERS["fused"](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        clipper = AdaptiveClipper("guard", optimizer=optimizer)
        for step in range(30):
            scaler.scale(model(torch.ones(2, 8)).square().mean()).backward()
            with HostReads() as seen:
                scaler.unscale_(optimizer)
                if clipped:
                    clipper.clip_(model.parameters(), measure=False)
                scaler.step(optimizer)
            if step == 20:
                reads.append(seen.count)
            scaler.update()
            optimizer.zero_grad()
        clipper.close()
    assert reads[0] == reads[1]
    assert not caplog.records
