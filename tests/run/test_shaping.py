"""What the clipper does with the spectral range and the agreement: nothing where they are off, recorded, resumed, refused."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.errors import ConfigError, StateError
from tests.integrations.test_fp16 import Fp16Accelerator
from tests.lanes import on_lane
from tests.loops import HostReads, make, train, weights
from tests.reference import spectral as reference

CONFIG = AdaptiveClipConfig.resolve("guard:warmup_observations=10,ceiling_share=1.0")
BOTH = CONFIG.replace(spectral_width=0.3, agreement=True)


def run(config, *, steps=30, start=0, factors=None, ledger=None, clipper=None, model=None, optimizer=None, **adamw):
    if model is None:
        model, optimizer = make(**adamw)
    clipper = clipper or AdaptiveClipper(config, optimizer=optimizer, model=model, ledger=ledger)
    train(
        model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), steps, start=start, factors=factors
    )
    return model, optimizer, clipper


def records(path):
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "step"]


@pytest.mark.parametrize("changes", [{"spectral_width": 0.3}, {"agreement": True}])
def test_each_part_changes_the_run_and_off_is_off(lane, changes):
    plain, *_ = run(CONFIG)
    off, *_ = run(CONFIG.replace(spectral_width=None, agreement=False))
    changed, *_ = run(CONFIG.replace(**changes))
    assert torch.equal(weights(plain), weights(off))
    assert not torch.allclose(weights(plain), weights(changed), atol=1e-4)


def test_an_infinite_width_is_the_run_without_it_bit_for_bit(lane):
    plain, *_ = run(CONFIG)
    open_range, *_ = run(CONFIG.replace(spectral_width=math.inf))
    assert torch.equal(weights(plain), weights(open_range))


def test_the_gradient_that_reaches_the_optimizer_is_clipped_and_then_in_the_range():
    model, optimizer = make()
    config = CONFIG.replace(controller="static", static_threshold=0.1, spectral_width=0.3)
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    twin, _ = make()
    for net in (model, twin):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
        (net(x) - 2 * x[:, :1]).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    clipper.clip_(model.parameters())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name == "0.weight":
            wanted = torch.from_numpy(reference.soft_clipped(q.grad, 0.3)).float()
            assert float((p.grad - wanted).norm() / wanted.norm()) < 0.05
            assert float(p.grad.norm()) == pytest.approx(float(q.grad.norm()), rel=1e-5)
        else:
            assert torch.equal(p.grad, q.grad)  # vectors, and the head


def test_shadow_decides_and_records_and_changes_nothing(tmp_path, lane):
    plain, *_ = run(CONFIG.replace(shadow=True))
    shadow, _, clipper = run(BOTH.replace(shadow=True), ledger=tmp_path / "ledger.jsonl")
    clipper.close()
    assert torch.equal(weights(plain), weights(shadow))
    assert all(
        0 < r["altered_energy"] < 1 and 0 < r["agreeing_share"] <= 1 for r in records(tmp_path / "ledger.jsonl")
    )
    assert verify_ledger(tmp_path / "ledger.jsonl").ok
    assert clipper.explain().count("recorded only: shadow") == 2


def test_a_step_that_is_left_out_moves_nothing_and_is_recorded_as_such(tmp_path, lane):
    model, optimizer, clipper = run(BOTH, steps=10, ledger=tmp_path / "ledger.jsonl")
    before = weights(model)
    run(BOTH, steps=1, start=10, factors={10: math.nan}, clipper=clipper, model=model, optimizer=optimizer)
    assert torch.equal(weights(model), before)
    run(BOTH, steps=5, start=11, clipper=clipper, model=model, optimizer=optimizer)
    clipper.close()
    assert not torch.equal(weights(model), before)
    assert [r["step"] for r in records(tmp_path / "ledger.jsonl") if "altered_energy" not in r] == [10]
    assert verify_ledger(tmp_path / "ledger.jsonl").ok


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_bit_for_bit(tmp_path, lane, fused):
    whole, *_ = run(BOTH, steps=30, fused=fused)
    model, optimizer, clipper = run(BOTH, steps=15, fused=fused)
    clipper.save_state(tmp_path)
    saved = model.state_dict(), optimizer.state_dict()
    again, fresh = make(seed=7, fused=fused)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    resumed = AdaptiveClipper(BOTH, optimizer=fresh, model=again)
    assert resumed.load_state(tmp_path)
    run(BOTH, steps=15, start=15, clipper=resumed, model=again, optimizer=fresh)
    assert torch.equal(weights(whole), weights(again))


def test_a_checkpoint_of_before_there_was_an_average_goes_on_without_one(tmp_path):
    alone = BOTH.replace(spectral_memory=0.0)
    whole, *_ = run(alone)
    model, optimizer, clipper = run(alone, steps=15)
    clipper.save_state(tmp_path)
    path = tmp_path / "clip_state.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, text = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    config = json.loads(text["config"])
    assert config.pop("spectral_memory") == 0.0
    save_file(tensors, path, metadata={**text, "config": json.dumps(config)})
    with pytest.raises(StateError, match=r"`?spectral_memory`? was 0.0 and is 0.9"):
        AdaptiveClipper(BOTH, optimizer=optimizer, model=model).load_state(tmp_path)
    resumed = AdaptiveClipper(alone, optimizer=optimizer, model=model)
    assert resumed.load_state(tmp_path)
    run(alone, steps=15, start=15, clipper=resumed, model=model, optimizer=optimizer)
    assert torch.equal(weights(whole), weights(model))


def test_every_so_many_steps(tmp_path):
    _, _, clipper = run(BOTH.replace(spectral_every=4), ledger=tmp_path / "ledger.jsonl")
    clipper.close()
    assert [r["step"] for r in records(tmp_path / "ledger.jsonl") if "altered_energy" in r] == list(range(0, 30, 4))
    assert all("agreeing_share" in r for r in records(tmp_path / "ledger.jsonl"))
    assert verify_ledger(tmp_path / "ledger.jsonl").ok


def test_a_coefficient_that_the_step_applies_later_gives_the_same_run(tmp_path, on_device):
    cutting = BOTH.replace(controller="median", median_factor=1.0, warmup_observations=5, ceiling_share=1.0)
    folded, _, clipper = run(cutting, ledger=tmp_path / "folded.jsonl")
    plain, _, other = run(cutting.replace(fold="never"), ledger=tmp_path / "plain.jsonl")
    assert "inside the fused step" in clipper.explain()
    assert "inside the fused step" not in other.explain()
    clipper.close()
    other.close()
    assert float((weights(folded) - weights(plain)).abs().max()) < 1e-4
    for a, b in zip(records(tmp_path / "folded.jsonl")[:8], records(tmp_path / "plain.jsonl")[:8], strict=True):
        assert a["matrix_norm"] == pytest.approx(b["matrix_norm"], rel=1e-3)
    assert verify_ledger(tmp_path / "folded.jsonl").ok


def test_nothing_is_read_by_the_host_on_a_device(on_device):
    model, optimizer = make()
    clipper = AdaptiveClipper(BOTH.replace(self_test=False), optimizer=optimizer, model=model)
    driver: Any = clipper._driver
    for step in range(5):
        model(torch.ones(4, 8) * step).square().mean().backward()
        if step == 4:
            with HostReads() as reads:
                driver._shaping.act_(_gradients(model), taken=torch.tensor(True))
            assert reads.count == 0
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def _gradients(model):
    from hf_adaclip.gradients import collect

    return collect(model.parameters())


def test_accumulated_gradients_are_worked_on_once():
    from accelerate import Accelerator
    from accelerate.state import GradientState

    GradientState._reset_state()  # a loader that another test has left would end every window
    finals = []
    for steps in (1, 2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        model, optimizer = accelerator.prepare(*make())
        clipper = AdaptiveClipper(BOTH, accelerator=accelerator, optimizer=optimizer)
        for step in range(12):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            for part in x.chunk(steps):
                with accelerator.accumulate(model):
                    accelerator.backward((model(part) - 2 * part[:, :1]).square().mean())
                    if accelerator.sync_gradients:
                        clipper.clip_(model.parameters())
                    optimizer.step()
                    optimizer.zero_grad()
        assert clipper.step == 12
        finals.append(weights(accelerator.unwrap_model(model)))
    assert torch.allclose(finals[0], finals[1], atol=1e-5)


def test_a_scaler_of_accelerate_leaves_the_step_out():
    accelerator = Fp16Accelerator()
    model, optimizer = make()
    clipper = AdaptiveClipper(BOTH, accelerator=accelerator, optimizer=optimizer, model=model)
    for step in range(8):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        accelerator.scaler.scale((model(x) - x[:, :1]).square().mean()).backward()
        if step == 5:
            next(model.parameters()).grad[0, 0] = math.inf
        clipper.clip_(model.parameters())
        before = weights(model)
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weights(model)) == (step == 5)


def test_compiled_models_have_their_matrices_found():
    model, optimizer = make()
    compiled = torch.compile(model, backend="eager")
    clipper = AdaptiveClipper(BOTH, optimizer=optimizer, model=compiled)
    compiled(torch.ones(4, 8)).square().mean().backward()
    clipper.clip_(model.parameters())
    optimizer.step()
    assert "clip/altered_energy" in clipper.metrics()


def test_metrics_say_what_was_done():
    _, _, clipper = run(BOTH)
    found = clipper.metrics()
    assert found["clip/spectral_width"] == pytest.approx(0.3)
    assert 0 < found["clip/altered_energy"] < 1
    assert 0 < found["clip/agreeing_share"] <= 1
    _, _, plain = run(CONFIG)
    assert not [name for name in plain.metrics() if "spectral" in name or "altered" in name or "agreeing" in name]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("altered_energy", 1.5, "not a share"),
        ("altered_energy", "nan", "not a share"),
        ("matrix_norm", 1e6, "norm of all gradients"),
        ("spectral_width", 0.7, "settings say"),
        ("agreeing_share", -0.1, "not a share"),
        ("altered_energy", None, "as a whole"),
        ("matrix_norm", "text", "cannot be understood"),
    ],
)
def test_verify_finds_what_cannot_be(tmp_path, field, value, words):
    path = tmp_path / "ledger.jsonl"
    _, _, clipper = run(BOTH, steps=8, ledger=path)
    clipper.close()
    whole = verify_ledger(path)
    assert whole.ok
    assert any("not recomputed" in f.message for f in whole.findings)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    record = next(r for r in lines if r.get("step") == 3)
    record[field] = value
    if value is None:
        del record[field]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    report = verify_ledger(path)
    assert any(f.violation and f.step == 3 and words in f.message for f in report.findings), report.findings


def test_verify_finds_fields_of_parts_that_are_off(tmp_path):
    path = tmp_path / "ledger.jsonl"
    _, _, clipper = run(BOTH, steps=4, ledger=path)
    clipper.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["config"].update(spectral_width=None, agreement=False)
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    messages = [f.message for f in verify_ledger(path).findings if f.violation]
    assert any("does not act" in m for m in messages)
    assert any("agreement is off" in m for m in messages)


def test_refusals():
    model, optimizer = make()
    with pytest.raises(ConfigError, match=r"spectral_width.*\[0, inf\]"):
        AdaptiveClipConfig(spectral_width=-1.0)
    with pytest.raises(ConfigError, match="spectral_every"):
        AdaptiveClipConfig(spectral_width=None, spectral_every=2)
    for changes in ({"spectral_width": 0.3}, {"agreement": True}):
        with pytest.raises(ConfigError, match="DeepSpeed"):
            CONFIG.replace(one_step_late=True, **changes)
    clipper = AdaptiveClipper(BOTH, optimizer=optimizer)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(ConfigError, match="`model` must be given"):
        clipper.clip_(model.parameters())
    assert (
        AdaptiveClipConfig.from_dict(AdaptiveClipConfig(spectral_width=math.inf).to_dict()).spectral_width == math.inf
    )


def test_a_model_without_hidden_matrices_is_told_of(caplog):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = AdaptiveClipper(CONFIG.replace(spectral_width=0.3), optimizer=optimizer, model=model)
    model(torch.ones(2, 4)).sum().backward()
    clipper.clip_(model.parameters())
    assert "acts on nothing" in caplog.text


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_is_not_the_trained_one_is_told_of(own, caplog):
    model, other = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = AdaptiveClipper(optimizer=optimizer, model=model if own else other)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        clipper.clip_(model.parameters())
        optimizer.step()
    told = [r.getMessage() for r in caplog.records if "none of its 4 tensors belongs to Sequential" in r.getMessage()]
    assert len(told) == (not own)


@pytest.mark.parametrize("way", ["class", "attach", "install"])
def test_every_way_in(tmp_path, way):
    from transformers import Trainer

    from hf_adaclip import AdaptiveClipTrainer, attach
    from tests.integrations.trainers import arguments, build
    from tests.integrations.trainers import run as run_trainer

    config = BOTH.replace(spectral_width=0.25)
    if way == "install":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(*make())
        with AdaptiveClipper(config, accelerator=accelerator, ledger=tmp_path / "clip_ledger.jsonl").install():
            for step in range(6):
                accelerator.backward(model(torch.ones(4, 8) * step).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    else:
        kind, more = (AdaptiveClipTrainer, {"clip": config}) if way == "class" else (Trainer, {})
        trainer = build(kind, tmp_path, args=arguments(tmp_path, max_steps=6), **more)
        run_trainer(trainer if way == "class" else attach(trainer, config))
    found = records(tmp_path / "clip_ledger.jsonl")
    assert len(found) == 6
    assert all("agreeing_share" in r for r in found)
    assert all("altered_energy" in r for r in found if r["norm"] > 0)
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


def test_both_lanes_are_one_run():
    finals = []
    for name in ("host", "device"):
        with on_lane(name):
            finals.append(weights(run(BOTH.replace(fold="never"))[0]))
    assert torch.allclose(finals[0], finals[1], atol=1e-5)
