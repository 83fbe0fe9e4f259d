"""What costs time or memory around the step: host reads of the Trainer, copies, compiled models."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer, UnsupportedSetupError
from hf_adaclip.controllers.presets import PRESETS
from hf_adaclip.support import check_capture
from tests.integrations.trainers import arguments, dataset, model
from tests.loops import HostReads, make

pytestmark = pytest.mark.slow


class Poisoned(AdaptiveClipTrainer):
    """One batch in twelve has a loss of NaN."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 6 else loss


def run(folder, **clip):
    args = arguments(folder, max_steps=12, gradient_accumulation_steps=2, logging_steps=4)
    trainer = Poisoned(
        model=model(), args=args, train_dataset=dataset(), clip=AdaptiveClipConfig(ledger="none", **clip)
    )
    with HostReads() as reads:
        trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return reads.count, logs, weights


def test_one_switch_stops_the_trainers_reads_and_keeps_nan_out_of_the_log(tmp_path):
    stock_reads, stock_logs, stock_weights = run(tmp_path / "a")
    reads, logs, weights = run(tmp_path / "b", nan_filter_on_device=True)

    assert stock_reads - reads >= 2 * 12 * 2 - 2  # two per micro-batch (`or` stops at the first for a NaN)
    assert all(math.isfinite(v) for v in (*logs, *stock_logs))
    assert logs[0] == pytest.approx(stock_logs[0])
    assert torch.equal(weights, stock_weights)  # what is logged is all that differs


class Allocations(TorchDispatchMode):
    """Bytes of all results that do not share the memory of an input."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.data_ptr() not in given:
                self.bytes += t.numel() * t.element_size()
        return out


GUARD = PRESETS["guard"].fields


@pytest.mark.parametrize(
    "settings", [GUARD, {"controller": "static", "static_threshold": 1e-3}, {"granularity": "tensor"}], ids=str
)
def test_no_copy_of_the_gradients_is_made(lane, settings):
    net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(6)])
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    clipper = AdaptiveClipper(AdaptiveClipConfig(**settings), optimizer=optimizer)
    size = sum(p.numel() * 4 for p in net.parameters())
    for _ in range(3):
        net(torch.randn(4, 256)).square().mean().backward()
        with Allocations() as ours:
            clipper.clip_(net.parameters(), measure=False)
        optimizer.step()
        optimizer.zero_grad()
    assert ours.bytes < 0.02 * size


def test_a_compiled_model_is_clipped_and_its_parameters_keep_their_names(tmp_path):
    args = arguments(tmp_path, max_steps=6, torch_compile=True, torch_compile_backend="eager")
    config = AdaptiveClipConfig(granularity="module", parameter_rules={"lm_head.*": "exclude"})
    trainer = AdaptiveClipTrainer(model=model(), args=args, train_dataset=dataset(), clip=config)
    trainer.train()
    assert trainer.clipper.step == 6

    net, optimizer = make()
    compiled = torch.compile(net, backend="eager")
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(parameter_rules={"0.*": "exclude"}), optimizer=optimizer, model=compiled
    )
    compiled(torch.ones(2, 8)).sum().backward()
    clipper.clip_(net.parameters())
    assert clipper.step == 1


def test_a_capture_is_refused(monkeypatch):
    check_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedSetupError, match="must not be captured into a CUDA graph"):
        check_capture(torch.device("cuda"))
