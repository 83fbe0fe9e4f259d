"""The originals from PyPI beside ours on random streams: equal, or different in what the docstrings say."""

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, Percentile
from hf_adaclip.controllers import CONTROLLERS, Observation
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.gradients import collect, global_norm, tensor_norms
from hf_adaclip.gradients.elementwise import FineClip
from tests.gradients.test_fine import parameters  # noqa: F401 - a fixture

NAN = np.float32("nan")


def linear(norms):
    """A model whose gradient has a given norm: one weight vector, set by hand."""
    model = torch.nn.Linear(16, 1, bias=False)
    direction = torch.nn.functional.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    return model, [direction * float(n) for n in norms]


def ours(config, norms, static=1e9):
    """Applied norms by the controller that a config describes."""
    controller = config.settings
    state, applied = controller.init(SCALAR, ()), []
    with np.errstate(all="ignore"):
        for norm in norms:
            decision, state = controller.update(state, Observation(np.float32(norm), NAN, np.float32(static)))
            applied.append(float(norm * decision.coefficient))
    return applied


def zclip_applied(norms, **settings):
    from zclip import ZClip

    peer = ZClip(max_grad_norm=None, **settings)
    model, gradients = linear(norms)
    applied = []
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        peer.step(model)
        applied.append(model.weight.grad.norm().item())
    return applied


@pytest.mark.parametrize("spike", [2.0, 5.0, 100.0])
def test_zclip_cuts_the_first_spike_after_the_warm_up_as_ours_does(spike):
    norms = np.random.default_rng(0).lognormal(-1, 0.15, 26)
    norms[25] *= spike
    config = AdaptiveClipConfig.from_zclip(max_grad_norm=None)
    assert ours(config, norms) == pytest.approx(zclip_applied(norms), rel=1e-4)


def test_zclip_is_switched_off_by_a_nan_and_locked_in_by_a_rise_and_ours_is_not():
    norms = np.random.default_rng(1).lognormal(-1, 0.15, 400)
    config = AdaptiveClipConfig.from_zclip(max_grad_norm=None)

    poisoned = norms.copy()
    poisoned[50], poisoned[100] = np.nan, norms[100] * 1e4
    assert zclip_applied(poisoned)[100] == pytest.approx(poisoned[100], rel=1e-4)  # the published fault
    assert ours(config, poisoned)[100] < 1.0

    risen = norms.copy()
    risen[100:] *= 3
    assert np.mean(np.array(zclip_applied(risen))[300:] < 0.99 * risen[300:]) > 0.9  # clipped for ever
    assert np.mean(np.array(ours(config, risen))[300:] < 0.99 * risen[300:]) < 0.1


@pytest.mark.parametrize("global_threshold", [True, False])
@pytest.mark.parametrize("quantile", [0.1, 0.9])
def test_autoclip_of_pypi_leaves_the_gradients_that_ours_leaves(global_threshold, quantile):
    from autoclip.torch import QuantileClip

    torch.manual_seed(0)
    shapes = [(5, 4), (7,), (2, 2, 2)]
    theirs = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    mine = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    peer = QuantileClip(theirs, quantile=quantile, history_length=20, global_threshold=global_threshold)
    config = AdaptiveClipConfig.from_autoclip(quantile, 20, global_threshold)
    clipper = AdaptiveClipper(config, static_threshold=1e9)
    altered = 0
    for step in range(80):
        for a, b in zip(theirs, mine, strict=True):
            a.grad = torch.randn_like(a) * torch.rand(()) * (50 if step == 40 else 1)
            b.grad = a.grad.clone()
        before = [p.grad.clone() for p in mine]
        peer.step()
        clipper.clip_(mine)
        if step > 1:  # in the second step theirs clips to a history of one; ours is still learning
            assert all(torch.allclose(a.grad, b.grad, rtol=1e-4) for a, b in zip(theirs, mine, strict=True)), step
            altered += any(not torch.equal(p.grad, g) for p, g in zip(mine, before, strict=True))
    assert altered > 5


def test_adagc_of_pytorch_optimizer_keeps_the_average_that_ours_keeps():
    from pytorch_optimizer import AdaGC

    p = torch.nn.Parameter(torch.randn(30))
    peer = AdaGC([p], lr=1e-4, weight_decay=0.0, warmup_steps=21)
    controller = AdaptiveClipConfig(controller="ema_ratio", warmup_observations=20).settings
    state = controller.init(SCALAR, ())
    rng = np.random.default_rng(2)
    for step in range(200):
        p.grad = torch.from_numpy(rng.standard_normal(30).astype(np.float32)) * (0.2 * (30 if step in (60, 61) else 1))
        norm = np.float32(p.grad.norm())
        _, state = controller.update(state, Observation(norm, NAN, np.float32(1.0)))
        peer.step()
        assert float(state.average) == pytest.approx(peer.state[p]["gamma"].item(), rel=1e-4), step


def test_agc_of_pytorch_optimizer_leaves_the_gradients_that_ours_leaves(parameters):  # noqa: F811
    from pytorch_optimizer.optimizer.agc import agc

    made = [p for p in parameters if p.numel()]
    want = [agc(p.detach(), p.grad) for p in made]
    gradients = collect(made)
    FineClip(CONTROLLERS["weight_ratio"](), ()).limit_(
        gradients, global_norm(tensor_norms(gradients.tensors)), frozenset(), act=True
    )
    for got, w in zip(gradients.tensors, want, strict=True):
        assert torch.allclose(got, w, rtol=1e-4, atol=0)


def test_adamwclip_clamps_the_elements_that_ours_clamps():
    from AdamWClip import AdamWClip

    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40))
    mine = torch.nn.Parameter(p.detach().clone())
    peer = AdamWClip([p], lr=1e-3, weight_decay=0.0, clip_grad_min=0.0, clip_grad_warm_up=10)
    optimizer = torch.optim.AdamW([mine], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    config = AdaptiveClipConfig(controller="second_moment", warmup_observations=10)
    clipper = AdaptiveClipper(config, optimizer=optimizer, static_threshold=1e9)
    clamped = 0
    for step in range(60):
        gradient = torch.randn(40) * (1 + 9 * (torch.rand(40) > 0.9))
        p.grad, mine.grad = gradient.clone(), gradient.clone()
        clipper.clip_([mine])
        got = mine.grad.clone()
        optimizer.step()
        peer.step()
        assert torch.allclose(got, p.grad, rtol=1e-4), step
        clamped += int((got != gradient).sum())
    assert clamped > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveClipConfig.from_zclip(mode="percentile"), "the other forms are not here"),
        (lambda: AdaptiveClipConfig.from_zclip(clip_option="mean"), "the other forms are not here"),
        (lambda: AdaptiveClipConfig.from_zclip(alpha=2.0), "`decay` must be in"),
        (lambda: AdaptiveClipConfig.from_bitsandbytes_percentile(100), "100 was 'off'"),
        (lambda: AdaptiveClipConfig.from_autoclip(quantile=90.0), "`percentile` must be in"),
    ],
)
def test_importers_refuse_what_has_no_equal(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_zclips_static_cap_stays_on():
    config = AdaptiveClipConfig.from_zclip(max_grad_norm=0.5)
    model = torch.nn.Linear(16, 1, bias=False)
    clipper = AdaptiveClipper(config)
    for n in np.random.default_rng(0).lognormal(0.5, 0.15, 60):
        model.weight.grad = torch.full((1, 16), float(n) / 4)
        clipper.clip_(model.parameters())
        assert model.weight.grad.norm() <= 0.5 * 1.001


def test_bitsandbytes_percentile_is_per_tensor_over_100_norms():
    config = AdaptiveClipConfig.from_bitsandbytes_percentile(5)
    assert config.settings == Percentile(percentile=5.0, history=100, warmup_observations=2)
    assert config.works_on == "tensor"
