"""float16 with a loss scaler: torch's own CPU GradScaler behind the few methods of an accelerator that clipping uses."""

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from tests.loops import make, weights

CONFIG = AdaptiveClipConfig(controller="static")


class Fp16Accelerator:
    """Accelerate itself makes no scaler on a CPU, so its part is played here; scaler and optimizer are real."""

    distributed_type = "NO"
    mixed_precision = "fp16"
    is_main_process = sync_gradients = True

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        self.unscaled = 0

    def unscale_gradients(self, optimizer=None):
        self.unscaled += 1
        for one in optimizer:
            self.scaler.unscale_(one)

    def clip_grad_norm_(self, parameters, max_norm):
        raise AssertionError("the stock clipping must not run")

    def register_save_state_pre_hook(self, hook):
        return self

    register_load_state_pre_hook = register_save_state_pre_hook

    def remove(self):
        pass


def train(overflow_at=None, ledger=None, steps=30, **optimizer_settings):
    accelerator = Fp16Accelerator()
    model, optimizer = make(**optimizer_settings)
    clipper = AdaptiveClipper(
        CONFIG, accelerator=accelerator, optimizer=optimizer, static_threshold=0.5, ledger=ledger
    )
    scales = []
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :1]).square().mean()
        accelerator.scaler.scale(loss).backward()
        if step == overflow_at:
            next(model.parameters()).grad[0, 0] = float("inf")  # what a float16 backward leaves when it overflows
        before = weights(model)
        norm = clipper.clip_(model.parameters(), loss=loss)
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        optimizer.zero_grad()
        scales.append(accelerator.scaler.get_scale())
        if step == overflow_at:
            assert torch.equal(before, weights(model))
        else:
            assert norm < 100  # of the unscaled gradient
    clipper.close()
    assert accelerator.unscaled == steps
    return model, clipper, scales


def unscaled_reference(steps=30, **optimizer_settings):
    model, optimizer = make(**optimizer_settings)
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, :1]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("settings", [{"fused": True}, {"fused": False}], ids=str)
def test_the_unscaled_gradient_is_clipped(lane, settings):
    model, clipper, _ = train(**settings)

    assert clipper.statistics.clipped > 0
    # scales are powers of two, so scaling and unscaling lose nothing
    assert torch.equal(weights(model), weights(unscaled_reference(**settings)))


@pytest.mark.parametrize("settings", [{"fused": True}, {"fused": False}], ids=str)
def test_an_overflow_is_the_scalers_skip_and_teaches_nothing(lane, settings, tmp_path):
    _, clipper, scales = train(overflow_at=12, ledger=tmp_path / "l.jsonl", **settings)

    assert clipper.statistics.counts_by_name()["SCALER_SKIPPED"] == 1
    assert "NONFINITE" not in clipper.statistics.counts_by_name()
    assert float(clipper.state["count"]) == 29
    assert scales[12] == scales[11] / 2
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings
    assert '"loss_scale":1024.0' in (tmp_path / "l.jsonl").read_text()
