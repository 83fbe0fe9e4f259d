"""Hand-written Accelerate loops, in one process: in place of `clip_grad_norm_`, and by `install()`."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClippingDefeatedError, ConfigError
from hf_adaclip.audit import verify_ledger
from tests.loops import make, weights

CONFIG = AdaptiveClipConfig(warmup_observations=10)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def data(steps=40, batch=8):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(steps * batch, 8, generator=g)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1] * 2), batch_size=batch)


def script(accelerator, clip=None, *, steps=40, start=0, model_and_optimizer=None, factors=None):
    """What a user's script looks like. Without `clip` it is the stock one, and cannot be edited."""
    model, optimizer = model_and_optimizer or make()
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    done = 0
    for i, (x, y) in enumerate(loader):
        if i < start or done >= steps:
            continue
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y) * (factors or {}).get(i, 1.0)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                (clip or stock_clip)(accelerator, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        done += 1
    return model, optimizer


def stock_clip(accelerator, model, optimizer):
    return accelerator.clip_grad_norm_(model.parameters(), 0.5)


def test_clip_in_place_of_clip_grad_norm(tmp_path):
    a, _ = script(Accelerator(cpu=True))
    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    clipper = AdaptiveClipper(
        "static", accelerator=accelerator, optimizer=optimizer, static_threshold=0.5, ledger=tmp_path / "l.jsonl"
    )
    b, _ = script(accelerator, lambda acc, m, o: clipper.clip_(m.parameters()), model_and_optimizer=(model, optimizer))
    clipper.close()

    assert torch.equal(weights(a), weights(b))
    assert verify_ledger(tmp_path / "l.jsonl").ok


def test_install_answers_a_script_that_cannot_be_edited_and_undoes_itself():
    a, _ = script(Accelerator(cpu=True))
    accelerator = Accelerator(cpu=True)
    before = accelerator.clip_grad_norm_
    clipper = AdaptiveClipper("static", accelerator=accelerator)
    with clipper.install():
        b, _ = script(accelerator)

    assert torch.equal(weights(a), weights(b))  # the script's own 0.5 is the threshold
    assert clipper.step == 40
    assert accelerator.clip_grad_norm_ == before
    assert "clip_grad_norm_" not in vars(accelerator)
    script(accelerator, steps=3)
    assert clipper.step == 40


def test_an_installed_clipper_writes_its_whole_ledger(tmp_path):
    accelerator = Accelerator(cpu=True)
    with AdaptiveClipper(CONFIG, accelerator=accelerator, ledger=tmp_path / "l.jsonl").install():
        script(accelerator)
    report = verify_ledger(tmp_path / "l.jsonl")

    assert report.ok, report.findings
    assert (report.steps, report.closed, report.measured) == (
        40,
        True,
        1,
    )  # the accelerator's only optimizer was found


def test_install_undoes_itself_after_an_error():
    accelerator = Accelerator(cpu=True)
    clipper = AdaptiveClipper(accelerator=accelerator)
    with pytest.raises(ZeroDivisionError), clipper.install():
        raise ZeroDivisionError
    assert "clip_grad_norm_" not in vars(accelerator)


def test_installed_clipping_cuts_a_planted_spike():
    accelerator = Accelerator(cpu=True)
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, static_threshold=1e9)
    applied = []

    def watch(accelerator, model, optimizer):
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        applied.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    with clipper.install():
        script(accelerator, watch, factors={30: 1e4})

    assert applied[30] < 2 * sorted(applied[20:30])[5]


def test_install_passes_a_call_that_only_asks_for_the_norm_and_refuses_other_norms():
    accelerator = Accelerator(cpu=True)
    model, _ = make()
    model(torch.ones(2, 8)).sum().backward()
    clipper = AdaptiveClipper(accelerator=accelerator)
    with clipper.install():
        norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        with pytest.raises(ConfigError, match="`norm_type` must be 2"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)

    assert norm > 0
    assert clipper.step == 0
    with pytest.raises(ConfigError, match="`accelerator` must be given"), AdaptiveClipper().install():
        pass


def test_accumulated_micro_batches_are_one_step():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
            clipper.clip_(model.parameters())  # called in every micro-batch: only the completed ones count
            optimizer.step()
            optimizer.zero_grad()

    assert clipper.step == 10


def test_state_goes_with_save_state_and_load_state(tmp_path):
    factors = {25: 100.0}
    whole_accelerator = Accelerator(cpu=True)
    pair = make()
    whole_clipper = AdaptiveClipper(CONFIG, accelerator=whole_accelerator, optimizer=pair[1])
    whole, _ = script(
        whole_accelerator,
        lambda a, m, o: whole_clipper.clip_(m.parameters()),
        model_and_optimizer=pair,
        factors=factors,
    )

    accelerator = Accelerator(cpu=True)
    pair = make()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=pair[1])
    script(accelerator, lambda a, m, o: clipper.clip_(m.parameters()), steps=20, model_and_optimizer=pair)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint/clip_state.safetensors").is_file()
    assert not list((tmp_path / "checkpoint").glob("custom_checkpoint_*"))

    accelerator = Accelerator(cpu=True)
    model, optimizer = make(seed=9)
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    # Saved again before any step, as a loop does that is preempted at once: nothing may be lost.
    accelerator.save_state(str(tmp_path / "again"))
    kept = [load_file(tmp_path / name / "clip_state.safetensors") for name in ("checkpoint", "again")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][k], kept[1][k]) or kept[0][k].isnan().all() for k in kept[0])
    accelerator.load_state(str(tmp_path / "again"))
    for i, (x, y) in enumerate(data()):
        if i >= 20:
            loss = torch.nn.functional.mse_loss(model(x), y) * factors.get(i, 1.0)
            accelerator.backward(loss)
            clipper.clip_(model.parameters())
            optimizer.step()
            optimizer.zero_grad()

    assert torch.equal(weights(whole), weights(model))
    assert [float(v) for v in clipper.state.values()] == pytest.approx(
        [float(v) for v in whole_clipper.state.values()], abs=0, nan_ok=True
    )


def test_a_checkpoint_from_before_the_clipper_can_still_be_loaded(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    script(accelerator, steps=5)
    accelerator.save_state(str(tmp_path / "old"))
    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(tmp_path / "old"))

    assert clipper.step == 0
    assert "the controller starts afresh" in caplog.text


def test_closing_lets_go_of_the_accelerator():
    accelerator = Accelerator(cpu=True)
    clipper = AdaptiveClipper(accelerator=accelerator)
    clipper.close()

    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook


def test_two_optimizers_and_parameter_groups_under_one_clipper():
    accelerator = Accelerator(cpu=True)
    model, _ = make()
    body, head = model[0], model[2]
    groups = [{"params": [body.weight], "lr": 1e-2}, {"params": [body.bias], "lr": 1e-3, "weight_decay": 0.1}]
    optimizers = [torch.optim.AdamW(groups, fused=True), torch.optim.SGD(head.parameters(), lr=1e-2, momentum=0.9)]
    clipper = AdaptiveClipper(CONFIG.replace(max_pace=2.0), accelerator=accelerator, optimizer=optimizers)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    seen = []
    for step in range(40):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - 2 * x[:, :1]).square().mean() * {20: float("nan"), 30: 1e3}.get(step, 1.0)
        accelerator.backward(loss)
        clipper.clip_(model.parameters(), loss=loss)
        before = [weights(body), weights(head)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append([not torch.equal(a, b) for a, b in zip(before, (weights(body), weights(head)), strict=True)])
    clipper.close()

    assert seen[20] == [False, False]  # both leave the step out
    assert all(all(moved) for i, moved in enumerate(seen) if i != 20)
    assert [[g["lr"] for g in o.param_groups] for o in optimizers] == rates
    assert clipper.statistics.counts_by_name()["SPIKE"] >= 1


def test_several_models_with_a_clipper_each_keep_their_states_apart(tmp_path):
    def build():
        accelerator = Accelerator(cpu=True)
        parts = []
        for seed in (0, 1):
            model, optimizer = make(seed)
            clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
            parts.append((*accelerator.prepare(model, optimizer), clipper))
        return accelerator, parts

    def train(accelerator, parts, first, last):
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            for scale, (model, optimizer, clipper) in zip((1.0, 50.0), parts, strict=True):
                accelerator.backward((model(x) - 2 * x[:, :1]).square().mean() * scale)
                clipper.clip_(model.parameters())
                optimizer.step()
                optimizer.zero_grad()

    accelerator, parts = build()
    train(accelerator, parts, 0, 20)
    accelerator.save_state(str(tmp_path / "c"))
    train(accelerator, parts, 20, 40)
    assert sorted(p.name for p in (tmp_path / "c").glob("clip_state*")) == [
        "clip_state.safetensors",
        "clip_state_1.safetensors",
    ]

    accelerator, again = build()
    accelerator.load_state(str(tmp_path / "c"))
    train(accelerator, again, 20, 40)
    for before, after in zip(parts, again, strict=True):
        assert torch.equal(weights(before[0]), weights(after[0]))
        assert str(before[2].state) == str(after[2].state)
    assert float(parts[1][2].state["level"]) > 5 * float(parts[0][2].state["level"])


def test_a_clipper_that_is_closed_gives_its_place_to_the_next(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer).close()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    model(torch.ones(2, 8)).sum().backward()
    clipper.clip_(model.parameters())
    clipper.save_state(tmp_path)

    assert [p.name for p in tmp_path.iterdir()] == ["clip_state.safetensors"]


def test_somebody_who_replaces_what_install_had_put_in_place_is_found():
    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, accelerator=accelerator, optimizer=optimizer)
    with clipper.install():
        clipper.self_test(model.parameters())
        accelerator.clip_grad_norm_ = lambda *a, **k: torch.tensor(1.0)
        with pytest.raises(ClippingDefeatedError, match="somebody has replaced it"):
            clipper.self_test(model.parameters())
