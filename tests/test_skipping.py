"""Steps that are left out because of a spike: nothing moves, and the ledger says so."""

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer
from hf_adaclip.audit import verify_ledger
from tests.integrations.test_fp16 import Fp16Accelerator
from tests.loops import HostReads, make, train, weights

SPIKE = {60: 1e3}


@pytest.mark.parametrize("controller", ["adaptive", "log_zscore", "mean_sd"])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_moments_and_counters_stay(lane, controller, fused, tmp_path):
    model, optimizer = make(fused=fused)
    config = AdaptiveClipConfig(
        controller=controller, on_spike="skip", warmup_observations=20, ledger=str(tmp_path / "l.jsonl")
    )
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    clip = lambda m, loss: clipper.clip_(m.parameters(), loss=loss)  # noqa: E731
    train(model, optimizer, clip, 60)
    before = weights(model), [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    train(model, optimizer, clip, 1, start=60, factors=SPIKE)

    assert torch.equal(before[0], weights(model))
    for old, new in zip(before[1], optimizer.state.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    train(model, optimizer, clip, 20, start=61)
    assert not torch.equal(before[0], weights(model))
    skipped = clipper.metrics()["clip/skipped"]
    clipper.close()
    assert clipper.statistics.counts_by_name()["SKIPPED"] == skipped >= 1
    assert clipper.statistics.consecutive_nonfinite == 0
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_shadow_decides_to_skip_and_does_not(tmp_path):
    model, optimizer = make()
    config = AdaptiveClipConfig(on_spike="skip", warmup_observations=20, shadow=True, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 80, factors=SPIKE)
    clipper.close()
    stock, stock_optimizer = make()
    train(
        stock, stock_optimizer, lambda m, loss: torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0), 80, factors=SPIKE
    )

    assert clipper.statistics.counts_by_name()["SKIPPED"] >= 1
    assert torch.equal(weights(model), weights(stock))
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_a_fused_optimizer_skips_without_a_host_read(on_device):
    model, optimizer = make()
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(on_spike="skip", warmup_observations=20, self_test=False), optimizer=optimizer
    )
    reads = []

    def clip(m, loss):
        with HostReads() as seen:
            norm = clipper.clip_(m.parameters(), loss=loss, measure=False)
        reads.append(seen.count)
        return norm

    train(model, optimizer, clip, 80, factors=SPIKE)
    clipper.close()
    assert [step for step, count in enumerate(reads) if count] == [
        24,
        36,
        48,
        60,
        72,
    ]  # the looks at what was recorded
    assert clipper.statistics.counts_by_name()["SKIPPED"] >= 1


def test_with_a_loss_scaler_a_finite_step_can_be_skipped_too(lane):
    accelerator = Fp16Accelerator()
    model, optimizer = make()
    config = AdaptiveClipConfig(on_spike="skip", warmup_observations=20)
    clipper = AdaptiveClipper(config, accelerator=accelerator, optimizer=optimizer)
    for step in range(70):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :1]).square().mean() * SPIKE.get(step, 1.0)
        accelerator.scaler.scale(loss).backward()
        before = weights(model)
        clipper.clip_(model.parameters(), loss=loss)
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        optimizer.zero_grad()
        if step == 60:
            assert torch.equal(before, weights(model))
    clipper.close()
    assert clipper.statistics.counts_by_name()["SKIPPED"] >= 1
    assert accelerator.scaler.get_scale() == 2.0**10


def test_a_trainer_skips_and_goes_on(tmp_path):
    from tests.integrations.trainers import arguments, dataset, model

    class Spiking(AdaptiveClipTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * 1e4 if self.state.global_step == 25 else loss

    config = AdaptiveClipConfig(controller="log_zscore", warmup_observations=15)
    trainer = Spiking(model=model(), args=arguments(tmp_path, max_steps=30), train_dataset=dataset(), clip=config)
    trainer.train()
    assert trainer.clipper.statistics.counts_by_name()["SKIPPED"] >= 1
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok
