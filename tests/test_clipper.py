"""`AdaptiveClipper` in a plain PyTorch loop: what it does to a run, what it costs, what it writes."""

import copy
import json
import math

import pytest
import torch

from hf_adaclip import (
    AdaptiveClipConfig,
    AdaptiveClipper,
    ConfigError,
    NonFiniteGradientError,
    StateError,
    TrainingTroubleError,
)
from hf_adaclip.audit import verify_ledger
from tests.lanes import LANES, on_lane
from tests.loops import HostReads, make, train, weights

CONFIG = AdaptiveClipConfig(warmup_observations=20, ceiling_share=1.0)


def stock_clip(model, loss):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)


def clip_with(clipper):
    return lambda model, loss: clipper.clip_(model.parameters(), loss=loss)


def test_static_is_torch_clip_grad_norm_bit_for_bit(lane):
    a, optimizer_a = make()
    b, optimizer_b = make()
    clipper = AdaptiveClipper("static", optimizer=optimizer_b, static_threshold=0.7)
    norms_a = train(a, optimizer_a, stock_clip, 80)
    norms_b = train(b, optimizer_b, clip_with(clipper), 80)

    assert float(clipper.metrics()["clip/fraction"]) > 0
    assert norms_a == norms_b
    assert torch.equal(weights(a), weights(b))


def test_shadow_decides_and_records_but_is_the_stock_run_bit_for_bit(lane, tmp_path):
    a, optimizer_a = make()
    b, optimizer_b = make()
    config = CONFIG.replace(shadow=True, max_pace=4.0)
    clipper = AdaptiveClipper(config, optimizer=optimizer_b, static_threshold=0.7, ledger=tmp_path / "l.jsonl")
    spike = {60: 100.0}
    train(a, optimizer_a, stock_clip, 80, factors=spike)
    train(b, optimizer_b, clip_with(clipper), 80, factors=spike)
    clipper.close()

    assert torch.equal(weights(a), weights(b))
    assert clipper.statistics.counts_by_name()["SPIKE"] >= 1
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_a_planted_spike_is_cut_before_it_reaches_the_optimizer(lane, granularity, tmp_path):
    model, optimizer = make(lr=1e-3)
    config = CONFIG.replace(granularity=granularity, static_threshold=50.0, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    applied = []
    optimizer.register_step_pre_hook(
        lambda o, a, k: applied.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    )
    norms = train(model, optimizer, clip_with(clipper), 100, factors={70: 1000.0})
    clipper.close()
    level = sorted(norms[50:70])[10]

    assert norms[70] > 100 * level
    assert applied[70] < 2 * level
    if granularity == "global":
        assert applied[50:70] == pytest.approx(norms[50:70], rel=1e-6)  # calm steps are left alone
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings
    assert report.recomputed == report.steps == 100


def test_the_controller_never_reads_the_host(on_device):
    """On an accelerator: norms, decision, scaling, recording, skipping, pace. Counted over everything that a step does."""
    for config in (CONFIG, CONFIG.replace(max_pace=3.0), CONFIG.replace(granularity="tensor")):
        model, optimizer = make()
        clipper = AdaptiveClipper(config, optimizer=optimizer)
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        with HostReads() as reads:
            clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
        assert reads.count <= 3  # the check of the first step, once
        steps = 0
        for _ in range(30):
            with HostReads() as reads:
                clipper.clip_(model.parameters(), loss=loss, measure=True)
                if config.max_pace == 1:
                    optimizer.step()
            steps += reads.count
            if config.max_pace > 1:
                optimizer.step()  # torch's own, on a CPU, reads the rate that is a tensor
        look = 2 if config.granularity == "tensor" else 1  # rows, and the norms by tensor beside them
        assert steps <= 2 * look  # copies of rows that have landed, once in `LOOK_EVERY` steps
        with HostReads() as reads:
            clipper.metrics()
        assert reads.count <= 2 * look  # for all metrics, when somebody logs: the copy that has landed, and the rest


def test_host_reads_of_an_optimizer_that_cannot_skip_are_one_per_step(on_device):
    model, optimizer = make(fused=False, foreach=True)
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    model(torch.ones(4, 8)).sum().backward()
    with HostReads() as reads:
        for _ in range(10):
            clipper.clip_(model.parameters())

    assert reads.count == 10
    assert "one flag is read by the host per step (`fused=True` avoids it)" in clipper.explain()


def test_both_lanes_give_the_same_run_and_the_same_ledger(tmp_path):
    runs, config = [], CONFIG.replace(fold="never", max_pace=1.0, agreement=False)
    for name in LANES:
        model, optimizer = make()
        with on_lane(name):
            clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=tmp_path / f"{name}.jsonl")
            train(model, optimizer, clip_with(clipper), 90, factors={40: 50.0, 60: float("nan")})
            clipper.close()
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        records = [{k: v for k, v in line.items() if k != "time"} for line in lines if line["kind"] == "step"]
        runs.append((weights(model), records))

    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_too_many_bad_steps_in_a_row_stop_the_run_and_say_where():
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(max_consecutive_nonfinite=5, ring_capacity=4), optimizer=optimizer)
    before = weights(model)
    with pytest.raises(
        NonFiniteGradientError, match=r"in [58] steps in a row .*no checkpoint was written before"
    ) as caught:
        train(model, optimizer, clip_with(clipper), 20, factors=dict.fromkeys(range(20), float("nan")))

    assert caught.value.consecutive >= 5
    assert torch.equal(weights(model), before)


def test_bad_steps_with_good_ones_between_do_not_stop_the_run():
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(max_consecutive_nonfinite=3), optimizer=optimizer)
    bad = {s: float("inf") for s in range(60) if s % 3}
    train(model, optimizer, clip_with(clipper), 60, factors=bad)

    assert clipper.metrics()["clip/skipped"] == len(bad)
    assert torch.isfinite(weights(model)).all()


def test_a_gradient_of_1e30_and_gradients_of_zero_are_survived(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(
        model,
        optimizer,
        clip_with(clipper),
        60,
        factors={40: 1e30, 41: 0.0, 42: 0.0, **dict.fromkeys(range(43, 55), 0.0)},
    )

    assert torch.isfinite(weights(model)).all()
    assert float(clipper.state["level"]) > 0


def test_parameters_without_gradients_come_and_go_per_tensor(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(granularity="tensor"), optimizer=optimizer)

    def clip(model, loss):
        if clipper.step % 2:
            model[2].weight.grad = None
        return clipper.clip_(model.parameters(), loss=loss)

    train(model, optimizer, clip, 40)
    assert clipper.state["count"].tolist() == [40.0, 40.0, 20.0, 40.0]


def test_calling_after_zero_grad_is_warned_of_at_once_and_an_error_after_ten_steps(caplog):
    model, _ = make()
    clipper = AdaptiveClipper()
    for _ in range(9):
        assert float(clipper.clip_(model.parameters())) == 0
    assert len([r for r in caplog.records if "a step has no gradient" in r.message]) == 1
    with pytest.raises(ConfigError, match=r"none of the 4 trainable ones has one instead\. Clip after `backward`"):
        clipper.clip_(model.parameters())


def test_the_pace_needs_an_optimizer():
    with pytest.raises(ConfigError, match="`optimizer` must be given when `max_pace` > 1"):
        AdaptiveClipper(AdaptiveClipConfig(max_pace=2.0))


def test_pace_multiplies_the_rate_of_the_step_and_leaves_the_schedule_alone():
    model, optimizer = make(lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)  # reads the group's own rate
    rates, paces = [], []
    begin = optimizer._init_group  # which `step` calls for every group: after it the rate has been put back

    def see(group, *args):
        rates.append(float(group["lr"]))
        return begin(group, *args)

    optimizer._init_group = see
    clipper = AdaptiveClipper(CONFIG.replace(max_pace=4.0), optimizer=optimizer)

    def clip(model, loss):
        norm = clipper.clip_(model.parameters(), loss=loss)
        paces.append(float(clipper.state["pace"]))
        return norm

    for step in range(120):
        train(model, optimizer, clip, 1, start=step)
        scheduler.step()

    assert max(paces) > 1.5
    assert rates == pytest.approx([1e-3 * 0.99**i * pace for i, pace in enumerate(paces)], rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.99**120)
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_resume_in_the_middle_is_the_uninterrupted_run_bit_for_bit(lane, tmp_path):
    config = CONFIG.replace(max_pace=3.0)
    faults = {30: 80.0, 70: 80.0, 71: float("nan")}

    def fresh(ledger):
        model, optimizer = make()
        return model, optimizer, AdaptiveClipper(config, optimizer=optimizer, ledger=ledger)

    whole, optimizer, clipper = fresh(tmp_path / "whole.jsonl")
    train(whole, optimizer, clip_with(clipper), 100, factors=faults)
    clipper.close()

    first, optimizer, clipper = fresh(tmp_path / "parts.jsonl")
    train(first, optimizer, clip_with(clipper), 55, factors=faults)
    clipper.save_state(tmp_path)
    saved = copy.deepcopy({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    train(first, optimizer, clip_with(clipper), 7, start=55)  # these steps are lost in the crash
    clipper.close(clean=False)

    second, optimizer, clipper = fresh(tmp_path / "parts.jsonl")
    assert clipper.load_state(tmp_path)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, clip_with(clipper), 45, start=55, factors=faults)
    clipper.close()

    assert torch.equal(weights(whole), weights(second))
    report = verify_ledger(tmp_path / "parts.jsonl")
    assert report.ok, report.findings
    assert report.segments == 2
    ends = [json.loads(p.read_text().splitlines()[-2]) for p in (tmp_path / "whole.jsonl", tmp_path / "parts.jsonl")]
    assert ends[0] == ends[1]


def test_state_of_another_config_or_a_damaged_file_is_an_error(tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 3)
    clipper.save_state(tmp_path)

    with pytest.raises(StateError, match=r"`decay` was 0.97 and is 0.9"):
        AdaptiveClipper(CONFIG.replace(decay=0.9)).load_state(tmp_path)
    with pytest.raises(StateError, match=r"`controller` was 'adaptive' and is 'zscore'"):
        AdaptiveClipper(CONFIG.replace(controller="zscore")).load_state(tmp_path)
    assert not AdaptiveClipper(CONFIG).load_state(tmp_path / "nowhere")
    path = tmp_path / "clip_state.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:50], b"\x00" * 200, content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match="is damaged"):
            AdaptiveClipper(CONFIG).load_state(tmp_path)


def test_going_back_within_a_run_opens_a_segment_that_says_so(tmp_path):
    """Loading the best checkpoint at the end of a loop, or rolling back after trouble, is ordinary use."""
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    train(model, optimizer, clip_with(clipper), 30)
    clipper.save_state(tmp_path)
    before = {k: float(v) for k, v in clipper.state.items()}
    train(model, optimizer, clip_with(clipper), 20, start=30)
    assert clipper.load_state(tmp_path)
    assert clipper.step == 30
    train(model, optimizer, clip_with(clipper), 1, start=30)
    assert clipper.step == 31
    clipper.close()
    report = verify_ledger(tmp_path / "l.jsonl")

    assert before != {k: float(v) for k, v in clipper.state.items()}
    assert report.ok, report.findings
    assert report.segments == 2
    with pytest.raises(StateError, match="this clipper was closed"):
        train(model, optimizer, clip_with(clipper), 1)


def test_a_series_of_bad_steps_stops_a_bare_loop_at_the_next_step():
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(max_consecutive_nonfinite=5), optimizer=optimizer)
    with pytest.raises(NonFiniteGradientError, match="in 5 steps in a row"):
        train(model, optimizer, clip_with(clipper), 40, factors=dict.fromkeys(range(10, 20), float("nan")))
    assert clipper.step == 15


def test_an_unused_parameter_does_not_hold_the_pace_and_is_not_counted_as_skipped():
    model, optimizer = make()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    config = CONFIG.replace(granularity="tensor", max_pace=3.0, max_skipped=5, on_trouble="fallback")
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 60)

    assert float(clipper.metrics()["clip/pace"]) > 1.05
    assert "FALLBACK" not in clipper.statistics.counts_by_name()


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_the_budget_of_skipped_steps_stops_a_run_of_either_granularity(granularity):
    config = CONFIG.replace(granularity=granularity, max_skipped=2, on_trouble="stop")
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    with pytest.raises(TrainingTroubleError, match="found at step 12"):
        train(model, optimizer, clip_with(clipper), 30, factors=dict.fromkeys((5, 9, 12), float("nan")))
    assert clipper.step == 13


def test_watching_for_divergence_without_a_loss_is_warned_of_once(caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(divergence_spreads=6.0), optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 5)

    assert len([r for r in caplog.records if "needs the training loss" in r.message]) == 1


def test_metrics_names_and_fraction():
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(agreement=False), optimizer=optimizer, static_threshold=1e-6)
    assert clipper.metrics() == {}
    train(model, optimizer, clip_with(clipper), 10)
    metrics = clipper.metrics()

    assert set(metrics) == {
        "clip/norm_max",
        "clip/threshold",
        "clip/coefficient",
        "clip/fraction",
        "clip/spikes",
        "clip/spikes_total",
        "clip/pace",
        "clip/phase",
        "clip/phase_id",
        "clip/skipped",
        "clip/skipped_total",
    }
    assert metrics["clip/fraction"] == 1.0
    assert metrics["clip/phase"] == "warmup"
    assert metrics["clip/threshold"] == pytest.approx(1e-6)
    cut = []

    def clip(model, loss):
        norm = clipper.clip_(model.parameters(), loss=loss)
        cut.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])) < 0.999 * float(norm))
        return norm

    train(model, optimizer, clip, 20, start=10)
    assert cut[:10] == [True] * 10  # of the warm-up
    assert not all(cut[10:])
    assert clipper.metrics()["clip/fraction"] == pytest.approx(sum(cut) / 20)  # since the last call


def test_a_ring_smaller_than_the_run_loses_nothing(lane, tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(ring_capacity=7), optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    train(model, optimizer, clip_with(clipper), 50)
    clipper.close()

    steps = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["kind"] == "step"] == list(range(50))
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_explain_says_which_way_is_taken():
    _, optimizer = make()
    text = AdaptiveClipper(AdaptiveClipConfig(max_pace=2.0), optimizer=optimizer).explain()

    assert "fused AdamW skips a step on the device; the host reads nothing" in text
    assert "up to x2" in text
    assert "pass `optimizer=`" in AdaptiveClipper().explain()


def test_bf16_weights_train_and_are_clipped():
    model, _ = make()
    model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = AdaptiveClipper("static", optimizer=optimizer, static_threshold=0.01)
    model(torch.ones(4, 8, dtype=torch.bfloat16)).square().mean().backward()
    norm = clipper.clip_(model.parameters())

    assert norm.dtype == torch.float32
    after = math.sqrt(sum(float(p.grad.float().square().sum()) for p in model.parameters()))
    assert after == pytest.approx(0.01, rel=0.01)
