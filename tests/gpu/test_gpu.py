"""What only a GPU can show. `make test-gpu` runs it and writes down what came out; without a GPU it is skipped.

ADACLIP_GPU_DRY_RUN=1 runs the same tests on a CPU, which shows only that they are written right.
"""

import contextlib
import os
import warnings

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipMixin, AdaptiveClipper, AdaptiveClipTrainer
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.numerics.fused import Fused, failures
from hf_adaclip.controllers.numerics.ops import SCALAR, tensor_ops
from hf_adaclip.gradients.movement import WINDOW, Movement
from hf_adaclip.incidents.contents import load_batch
from hf_adaclip.run.plan import GlobalRule
from hf_adaclip.run.ring import LOOK_EVERY
from tests.integrations.launching import launch
from tests.integrations.trainers import arguments, build, run, stock, weights
from tests.loops import make

DRY = bool(os.environ.get("ADACLIP_GPU_DRY_RUN"))
DEVICE = "cpu" if DRY else "cuda"
CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextlib.contextmanager
def no_sync():
    """Any operation that makes the host wait for the device is an error."""
    if DRY:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(step):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return x.to(DEVICE), 2 * x[:, :1].to(DEVICE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "tensor"}, {"max_pace": 3.0}, {"controller": "zscore"}, {"controller": "percentile"}],
    ids=str,
)
def test_the_host_never_waits_for_the_controller(tmp_path, settings):
    model, optimizer = make()
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3, device=DEVICE), fused=True)
    batches = [batch(s) for s in range(60)]
    clipper = AdaptiveClipper(CONFIG.replace(**settings), optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    for step, (x, y) in enumerate(batches):
        loss = (model(x) - y).square().mean() * {30: float("nan"), 40: 500.0}.get(step, 1.0)
        loss.backward()
        # The first step is where clipping is checked, and where tables of constants are made; then the rows are read now and then.
        with no_sync() if step % LOOK_EVERY else contextlib.nullcontext():
            clipper.clip_(model.parameters(), loss=loss, measure=True)
            optimizer.step()
            optimizer.zero_grad()
    clipper.close()

    assert clipper.statistics.skipped == 1
    assert clipper.statistics.clipped >= 1
    assert all(p.isfinite().all() for p in model.parameters())
    report = verify_ledger(tmp_path / "l.jsonl")  # on the host, from the norms that the device has recorded
    assert report.ok, report.findings
    assert report.recomputed == 60


def test_the_device_decides_as_the_host_does(tmp_path):
    runs = []
    for device in ("cpu", DEVICE):
        model, _ = make()
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
        thresholds = []
        for step in range(80):
            g = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = (torch.randn(p.shape, generator=g) * (100 if step == 50 else 1)).to(device)
            clipper.clip_(model.parameters())
            thresholds.append(float(clipper.state["level"]))
            optimizer.step()
        runs.append(thresholds)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"max_pace": 8.0}, {"controller": "log_zscore"}], ids=str)
def test_a_step_is_one_kernel_with_the_bits_of_the_host(settings):
    config = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0).replace(**settings)
    rule = GlobalRule(build_controller(config), shadow=False, leaves_out=False, paced="max_pace" in settings)
    device = torch.zeros(1, device=DEVICE).device
    made = Fused(rule, device, ())
    state, host = rule.controller.init(tensor_ops(device), ()), rule.controller.init(SCALAR, ())
    rng = np.random.default_rng(0)
    for step in range(200):
        numbers = [
            np.float32(v) for v in (np.exp(rng.normal(0, 0.3)) * (9 if step % 40 == 39 else 1), 1 / (1 + step), 0.5)
        ]
        reach = np.float32(rng.random() * 9)
        with np.errstate(all="ignore"):
            host, _ = rule(host, Observation(numbers[0], numbers[1], numbers[2], reach=reach))
        there = [torch.tensor(v, device=device) for v in (*numbers, reach)]
        state, _ = made(state, Observation(there[0], there[1], there[2], reach=there[3]))
        assert [float(v) for v in state] == pytest.approx([float(v) for v in host], rel=0, abs=0, nan_ok=True), step
    assert failures(device) == []
    assert made.launches == 1


@pytest.mark.parametrize("order", [(DEVICE, "cpu", DEVICE), ("cpu", DEVICE, DEVICE)], ids=str)
def test_gradients_on_host_and_device_together_are_one_norm(order):
    sizes = zip((3, 5, 7), order, strict=True)
    parameters = [torch.nn.Parameter(torch.ones(n, device=d)) for n, d in sizes]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    clipper = AdaptiveClipper("static", static_threshold=1.0)
    norm = clipper.clip_(parameters, loss=torch.tensor(0.5, device=DEVICE))

    assert float(norm) == pytest.approx(2.0 * 15**0.5)
    assert all(p.grad is not None and p.grad.tolist() == pytest.approx([15**-0.5] * p.numel()) for p in parameters)


@pytest.mark.skipif(DRY, reason="Accelerate makes no loss scaler on a CPU")
@pytest.mark.parametrize("fused", [True, False])
def test_fp16_overflow_is_the_scalers_skip(tmp_path, fused):
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    model, _ = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.scaler.update(2.0**10)
    skipped = []
    for step in range(40):
        x, y = batch(step)
        accelerator.backward((model(x) - y).square().mean() * (1e8 if step == 20 else 1.0))
        before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
        norm = clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(bool(accelerator.optimizer_step_was_skipped))
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(before, after) == (step == 20), step
        assert step == 20 or float(norm) < 100
    clipper.close()

    counts = clipper.statistics.counts_by_name()
    assert counts["SCALER_SKIPPED"] == 1
    assert "NONFINITE" not in counts
    assert float(clipper.state["count"]) == 39
    assert skipped[20] == (not fused)  # a fused optimizer is called all the same, and skips on the device
    assert verify_ledger(tmp_path / "l.jsonl").ok


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_static_is_the_stock_trainer_in_mixed_precision(tmp_path, precision):
    changes = {"use_cpu": DRY, "full_determinism": not DRY, **({} if DRY and "fp16" in precision else precision)}
    a = stock(tmp_path / "a", args=arguments(tmp_path / "a", **changes))
    b = build(AdaptiveClipTrainer, tmp_path / "b", args=arguments(tmp_path / "b", **changes), clip="static")
    run(a)
    run(b)

    assert b.clipper.statistics.clipped > 0
    assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_resume_is_bit_for_bit(tmp_path, precision):
    changes = {"use_cpu": DRY, "full_determinism": not DRY, "save_strategy": "steps", "save_steps": 20}
    changes.update({} if DRY and "fp16" in precision else precision)
    config = CONFIG.replace(max_pace=2.0)
    whole = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, **changes), clip=config)
    run(whole)
    again = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, **changes), clip=config)
    run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))

    assert torch.equal(weights(whole), weights(again))
    assert str(whole.clipper.state) == str(again.clipper.state)
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings


@pytest.mark.skipif(DRY, reason="counts synchronisations of CUDA")
def test_the_trainer_waits_no_more_often_than_the_stock_one(tmp_path):
    def syncs(kind, **kwargs):
        args = arguments(
            tmp_path / kind.__name__, use_cpu=False, logging_nan_inf_filter=False, logging_steps=1000, max_steps=60
        )
        trainer = build(kind, tmp_path / kind.__name__, args=args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)

    from transformers import Trainer

    ours = syncs(AdaptiveClipTrainer, clip=CONFIG)
    assert ours <= syncs(Trainer) + 20  # the checks of the start, the end, and one reading of the rows; none per step


def test_a_planted_spike_is_cut_in_bf16(tmp_path):
    from tests.integrations.test_trainer import SpikeTrainer, Watch

    class Ours(AdaptiveClipMixin, SpikeTrainer):
        pass

    watch = Watch()
    args = arguments(tmp_path, use_cpu=DRY, bf16=True, max_grad_norm=1e9)
    run(build(Ours, tmp_path, args=args, callbacks=[watch], clip=CONFIG))

    assert watch.applied[30] < 2 * sorted(watch.applied[20:30])[5]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_accelerate_at_world_size_one(tmp_path, kind):
    environment = {"ADACLIP_TEST_DEVICES": "0", "ACCELERATE_USE_CPU": "true" if DRY else "false"}
    [result] = launch("tests.gpu.gpu_worker", [kind], tmp_path, processes=1, **environment)

    assert result["counts"]["SPIKE"] >= 1
    assert result["counts"]["NONFINITE"] == 1
    assert result["finite"]
    assert result["resumed"]
    if not DRY:
        assert result["setup"] == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[kind]
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings


def test_an_incident_keeps_its_batch_and_the_host_waits_for_nothing(tmp_path):
    """The row of a step arrives by itself, before its batch is let go, as long as the host is no more than two steps ahead."""
    model, optimizer = make()
    model.to(DEVICE)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, model=model, output_dir=tmp_path)
    for step in range(60):
        x, y = batch(step)
        with no_sync() if 2 < step < 45 else contextlib.nullcontext():
            clipper.watch({"x": x, "y": y})
            loss = (model(x) - y).square().mean() * (float("nan") if step == 50 else 1.0)
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        if step >= 45 and not DRY:
            torch.cuda.synchronize()  # as a loop that logs does
    clipper.close()
    [incident] = clipper.incidents
    assert (incident.step, incident.kind) == (50, "nonfinite")
    [kept] = load_batch(incident.folder)
    assert torch.equal(kept["x"], batch(50)[0].cpu())


def test_how_fast_weights_move_is_known_without_waiting_for_it():
    def weights_of(device):
        generator = torch.Generator().manual_seed(0)
        return {f"w{k}": torch.randn(256, 64 * (k + 1), generator=generator).to(device) for k in range(3)}

    found: dict[tuple[str, int], list[float | None]] = {}
    for device in ("cpu", DEVICE):
        tensors = weights_of(device)
        movement = Movement(tensors, delayed=True)
        movement.begin()
        found[device, len(found)] = said = []
        with no_sync():
            for step in range(3 * WINDOW):
                for tensor in tensors.values():
                    tensor.mul_(1 + 1e-3 * (step // WINDOW + 1))
                said.append(movement.step())
    here, there = found.values()
    assert [k for k, share in enumerate(there) if share is not None] == [2 * WINDOW - 1, 3 * WINDOW - 1]
    assert [x for x in here if x is not None] == pytest.approx([x for x in there if x is not None], rel=1e-4)
