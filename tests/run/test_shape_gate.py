"""The spectral range has to be worth its work where it is on by itself."""

import gc
import json
import pickle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaclip import AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.gradients.movement import Movement
from hf_adaclip.report.run_report import load_run, summary, write_html, write_markdown
from hf_adaclip.run.rows import rows_of
from hf_adaclip.run.shape_gate import FAST, MOST, ShapeGate, how_fast, share
from tests.integrations.trainers import as_loaded
from tests.lanes import on_lane
from tests.loops import make


def test_the_share_is_that_of_the_operations():
    m, n, tokens = 384, 1536, 256
    by_hand = (2 * (2 * m * m * n) + 17 * 2 * m**3) / (6 * m * n * tokens)
    assert share([(m, n)], tokens) == pytest.approx(by_hand)
    assert share([(n, m), (m, n)], tokens) == pytest.approx(by_hand)
    assert share([], tokens) == 0.0


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}, 32),
        ({"pixel_values": torch.zeros(4, 3, 28, 28), "labels": torch.zeros(4, dtype=torch.long)}, 4 * 16),
        ({"labels": torch.zeros(4, 10), "pixel_values": torch.zeros(4, 3, 28, 28)}, 4 * 16),  # mixed ones
        ({"labels": torch.zeros(4, 10, dtype=torch.long), "pixel_values": torch.zeros(4, 3, 28, 28)}, 4 * 16),
        ({"inputs_embeds": torch.zeros(4, 8, 5)}, 32),
        ((torch.zeros(4, 5), torch.zeros(4)), 4),
        (torch.zeros(4, 5), 4),
        ({"text": ["a", "b"]}, None),
    ],
    ids=str,
)
def test_rows_of_what_models_are_given(batch, rows):
    model = SimpleNamespace(config=SimpleNamespace(patch_size=7))
    assert rows_of(batch, [model]) == rows


@pytest.mark.parametrize(
    ("device", "tf32", "memory"),
    [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)],
)
def test_an_average_is_kept_where_its_products_are_worth_it(device, tf32, memory, monkeypatch):
    monkeypatch.setattr("hf_adaclip.run.shape_gate.in_tf32", lambda device: tf32)
    gate = ShapeGate(["spectral", "agreement"], memory=True)
    gate.sees({"input_ids": torch.zeros(4, 512, dtype=torch.long)}, [])
    gate.decide([(64, 256)] * 4, torch.device(device), None, trained=False, ranks_known=True)
    assert gate.spectral is True
    assert gate.memory is memory
    assert ("memory" in gate.why) is not memory
    again = ShapeGate(["spectral", "agreement"], memory=True)
    again.restore(gate.tensor())
    assert (again.spectral, again.agreement, again.memory) == (True, True, memory)
    older = ShapeGate(["spectral", "agreement"], memory=True)
    older.restore(gate.tensor()[:2])
    assert not older.memory  # before there was an average


def test_what_was_trained_before_waits_until_it_moves_fast():
    gate = ShapeGate(["spectral", "agreement"], memory=True)
    gate.sees({"input_ids": torch.zeros(4, 512, dtype=torch.long)}, [])
    gate.decide([(64, 64)], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert (gate.spectral, gate.agreement) == (False, False)
    assert all("trained before" in why for why in gate.why.values())
    assert not gate.moved(FAST["spectral"])
    assert not gate.moved(float("nan"))
    assert not gate.moved(float("inf"))
    waiting = gate.tensor()
    assert gate.moved(1.01 * FAST["spectral"]) == {"spectral"}
    assert (gate.spectral, gate.agreement) == (True, False)
    assert gate.why.keys() == {"agreement"}
    assert gate.moved(1.01 * FAST["agreement"]) == {"agreement"}
    assert (gate.spectral, gate.agreement) == (True, True)
    assert not gate.why
    assert not gate.moved(1.0)  # once
    gate.restore(waiting)  # as going back does
    assert (gate.spectral, gate.agreement) == (False, False)
    assert gate.moved(1.0)
    assert (gate.spectral, gate.agreement) == (True, True)
    gate.restore(None)  # to before the first step
    assert not gate.decided


def test_the_agreement_does_not_act_alone_in_what_was_trained_before():
    gate = ShapeGate(["spectral", "agreement"], memory=True)
    gate.sees({"input_ids": torch.zeros(4, 1, dtype=torch.long)}, [])
    gate.decide([(64, 64)], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert "would take" in gate.why["spectral"]
    assert "without the spectral range" in gate.why["agreement"]
    assert not gate.waiting
    assert not gate.moved(1.0)
    switched_off = ShapeGate(["agreement"], memory=True, ranged=False)
    switched_off.decide([], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert not switched_off.waiting
    set_by_hand = ShapeGate(["agreement"], memory=True)
    set_by_hand.decide([(64, 64)], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert set_by_hand.waiting == {"agreement"}
    on_nothing = ShapeGate(["agreement"], memory=True)
    on_nothing.decide([], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert not on_nothing.waiting
    assert on_nothing.agreement is False


def test_weights_that_were_trained_before_may_join_later():
    gate = ShapeGate(["spectral", "agreement"], memory=True)
    gate.sees({"input_ids": torch.zeros(4, 512, dtype=torch.long)}, [])
    gate.decide([(64, 64)], torch.device("cpu"), None, trained=False, ranks_known=True)
    assert (gate.spectral, gate.agreement) == (True, True)
    gate.wait()
    assert (gate.spectral, gate.agreement) == (False, False)
    assert gate.why.keys() == {"spectral", "agreement"}
    assert gate.moved(1.0) == {"spectral", "agreement"}


def test_what_people_have_set_does_not_wait():
    gate = ShapeGate(["spectral"], memory=True)
    gate.decide([(64, 64)], torch.device("cpu"), None, trained=True, ranks_known=True)
    assert (gate.spectral, gate.agreement) == (False, True)
    assert gate.moved(1.0)
    assert (gate.spectral, gate.agreement) == (True, True)


def test_a_checkpoint_of_before_anything_waited_stays_as_it_was():
    gate = ShapeGate(["spectral", "agreement"], memory=True)
    gate.restore(torch.tensor([0.0, 0.0, 1.0]))
    assert not gate.moved(1.0)
    assert (gate.spectral, gate.agreement) == (False, False)


def trained(width, tokens, steps=3, folder=None, resume=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = AdaptiveClipper(optimizer=optimizer, model=model, output_dir=folder)
    if resume is not None:
        clipper.load_state(resume)
    for _ in range(steps):
        batch = clipper.watch({"input_ids": (ids := torch.randint(0, 32, (1, tokens))), "labels": ids})
        loss = model(**batch).loss
        loss.backward()
        clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    return clipper


def test_it_is_off_where_it_would_take_longer_than_the_step(caplog, tmp_path):
    caplog.set_level("INFO")
    clipper = trained(64, tokens=8, folder=tmp_path)
    assert "the spectral range is off: with 8 tokens in a step" in caplog.text
    assert "spectral    off: with 8 tokens in a step" in clipper.explain()
    assert "clip/spectral_width" not in clipper.metrics()
    assert clipper.config.spectral == 0.0
    assert clipper.config.agreement is True


def test_it_is_on_where_a_step_has_tokens_enough(caplog, tmp_path):
    caplog.set_level("INFO")
    assert share([(16, 16)], 512) < MOST
    clipper = trained(16, tokens=512, folder=tmp_path)
    assert "is off" not in caplog.text
    assert clipper.metrics()["clip/spectral_width"] == 0.0


def test_without_an_average_nothing_is_kept_between_steps(caplog, tmp_path, monkeypatch):
    caplog.set_level("INFO")
    with_it = trained(16, tokens=512, folder=tmp_path / "a")
    monkeypatch.setattr("hf_adaclip.run.shape_gate.slower", lambda device: 15.0)
    without = trained(16, tokens=512, folder=tmp_path / "b")
    assert "the average of the spectral range over steps is off: an average over steps would take" in caplog.text
    assert "each hidden matrix, averaged over about 10 steps, made equal, its norm kept" in with_it.explain()
    assert "each hidden matrix made equal, its norm kept: an average over steps would take" in without.explain()
    for clipper, kept in ((with_it, True), (without, False)):
        (folder := tmp_path / f"state-{kept}").mkdir()
        clipper.save_state(folder)
        names = load_file(folder / "clip_state.safetensors")
        assert any(name.startswith("reach.preconditioner.") for name in names) is kept
    resumed = trained(16, tokens=512, folder=tmp_path / "c", resume=tmp_path / "state-False")
    assert "clip/spectral_width" in resumed.metrics()
    (tmp_path / "d").mkdir()
    resumed.save_state(tmp_path / "d")
    assert not [n for n in load_file(tmp_path / "d" / "clip_state.safetensors") if "preconditioner" in n]


@pytest.mark.parametrize(("before", "after"), [(8, 4096), (4096, 8)])
def test_what_was_decided_holds_after_a_resumption(before, after, tmp_path):
    first = trained(64, tokens=before, folder=tmp_path)
    first.save_state(tmp_path)
    then = trained(64, tokens=after, folder=tmp_path, resume=tmp_path)
    assert ("clip/spectral_width" in then.metrics()) == (before == 4096)


def model_of_before(size=16):
    torch.manual_seed(0)
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 1, "num_attention_heads": 2}
    return as_loaded(LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, initializer_range=0.2, **sizes)))


def one_step(model, optimizer, clipper, step):
    """A step of the loop; which parts acted in it."""
    ids = torch.randint(0, 32, (4, 128), generator=torch.Generator().manual_seed(step))
    loss = model(**clipper.watch({"input_ids": ids, "labels": ids})).loss
    loss.backward()
    clipper.clip_(model.parameters(), loss=loss)
    optimizer.step()
    optimizer.zero_grad()
    return {"clip/spectral_width", "clip/agreeing_share"} & set(clipper.metrics())


def loaded(rate, lane, folder, *, steps=40, weights=None, resume=None, at=None, model=None, parameters=None):
    """A Llama that was trained before, gone on with at that rate; and what acted in which step. `at` has what is done before a step."""
    model = model or model_of_before()
    parameters = model.parameters() if parameters is None else parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    with on_lane(lane):
        clipper = AdaptiveClipper(
            {"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=folder, ledger=folder / "l.jsonl"
        )
    if resume is not None:
        model.load_state_dict(weights[0])
        optimizer.load_state_dict(weights[1])
        assert clipper.load_state(resume)
    acted = []
    for step in range(clipper.step, steps):
        if at is not None and step in at:
            at[step](model)
        acted.append(one_step(model, optimizer, clipper, step))
    return model, optimizer, clipper, acted


BOTH = {"clip/spectral_width", "clip/agreeing_share"}


def begins(acted):
    """The step from which on both acted; None if they never did."""
    first = next((k for k, found in enumerate(acted) if found), None)
    assert first is None or acted[first:] == [BOTH] * (len(acted) - first)
    return first


@pytest.mark.parametrize(("lane", "first"), [("host", 16), ("device", 32)])
def test_both_parts_act_once_loaded_weights_move_fast(lane, first, caplog, tmp_path):
    caplog.set_level("WARNING")  # as a Trainer has it
    _, _, clipper, acted = loaded(1e-2, lane, tmp_path)
    assert begins(acted) == first
    assert f"step {first}: the loaded weights have moved by" in caplog.text
    assert "trained before" not in clipper.explain()


def test_slow_steps_stay_as_they_are(tmp_path):
    model, _, clipper, acted = loaded(1e-4, "host", tmp_path / "a")
    assert not any(acted)
    assert clipper.explain().count("trained before") == 2
    with_off = {"spectral_width": None, "agreement": False, "max_pace": 1.0}
    other = model_of_before()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4)
    plain = AdaptiveClipper(with_off, optimizer=optimizer, model=other, output_dir=tmp_path / "c")
    for step in range(40):
        one_step(other, optimizer, plain, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("lane", ["host", "device"])
@pytest.mark.parametrize("at", [5, 16, 20, 36])
def test_resumed_within_a_window_it_is_the_whole_run_bit_for_bit(lane, at, tmp_path):
    whole, *_, acted = loaded(1e-2, lane, tmp_path / "whole", steps=50)
    model, optimizer, clipper, before = loaded(1e-2, lane, tmp_path / "part", steps=at)
    clipper.save_state(tmp_path)
    kept = model.state_dict(), optimizer.state_dict()
    again, _, _, after = loaded(1e-2, lane, tmp_path / "rest", steps=50, weights=kept, resume=tmp_path)
    assert before + after == acted
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("done", [0, 10])
def test_going_back_to_before_it_takes_the_parts_away_again(done, tmp_path):
    model, optimizer, clipper, _ = loaded(1e-2, "host", tmp_path, steps=done)
    driver = clipper._driver
    put_back = driver.keep()
    first = [one_step(model, optimizer, clipper, step) for step in range(20)]
    assert begins(first) == 16 - done
    put_back()
    assert driver.guards._guards[0].agreement is None
    assert driver._shaping.gate.decided is (done > 0)
    again = [one_step(model, optimizer, clipper, step) for step in range(20)]
    assert begins(again) == 16 - done
    assert "trained before" not in clipper.explain()


def test_steps_that_are_left_out_make_no_window_longer(tmp_path):
    model, optimizer, clipper, _ = loaded(8e-4, "host", tmp_path, steps=16)
    clipper._driver.leave_out()  # the step in which the window would end by its number
    for step in range(17, 60):
        one_step(model, optimizer, clipper, step)
    shares: list[float | None] = []
    step_of = Movement.step

    def step_and_note(self, agree):
        shares.append(step_of(self, agree))
        return shares[-1]

    with mock.patch.object(Movement, "step", step_and_note):
        loaded(8e-4, "host", tmp_path / "whole", steps=60)
    fastest = max(share for share in shares if share is not None)
    assert fastest < FAST["spectral"] < 2 * fastest  # two windows as one would be enough
    assert clipper.explain().count("trained before") == 2


def freeze(model):
    model.model.layers[0].mlp.requires_grad_(False)


def unfreeze(model):
    model.model.layers[0].mlp.requires_grad_(True)


@pytest.mark.parametrize(("before", "within"), [(None, freeze), (freeze, unfreeze)])
def test_what_is_frozen_or_thawed_within_a_window_is_resumed_bit_for_bit(before, within, tmp_path):
    def made():
        model = model_of_before()
        if before is not None:
            before(model)
        return model

    whole, _, _, acted = loaded(1e-2, "host", tmp_path / "whole", at={5: within}, model=made())
    model, optimizer, clipper, first = loaded(1e-2, "host", tmp_path / "part", at={5: within}, model=made(), steps=12)
    clipper.save_state(tmp_path)
    kept = model.state_dict(), optimizer.state_dict()
    again = made()
    within(again)
    again, _, _, rest = loaded(1e-2, "host", tmp_path / "rest", weights=kept, resume=tmp_path, model=again)
    assert first + rest == acted
    assert begins(acted) is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_body_that_is_thawed_later_waits_like_one_that_was_trained_from_the_start(tmp_path):
    model = model_of_before()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # a fresh head
    model.model.requires_grad_(False)
    body = {8: lambda m: m.model.requires_grad_(True)}
    _, _, clipper, acted = loaded(1e-4, "host", tmp_path, model=model, at=body)
    assert all(found == BOTH for found in acted[:8])
    assert not any(acted[8:])
    assert clipper.explain().count("trained before") == 2


def test_what_no_optimizer_has_does_not_count(tmp_path):
    def one(model):
        return [model.model.layers[0].self_attn.q_proj.weight]

    assert begins(loaded(1e-2, "host", tmp_path / "a", parameters=one)[-1]) == 16
    model = model_of_before()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    head = loaded(1e-4, "host", tmp_path / "b", model=model, parameters=lambda m: [m.lm_head.weight])
    assert begins(head[-1]) == 0


def test_weights_of_zero_and_of_another_size_do_no_harm(tmp_path):
    def zero(model):
        for parameter in model.parameters():
            parameter.data.zero_()

    model = model_of_before()
    zero(model)
    _, _, clipper, acted = loaded(1e-2, "host", tmp_path / "a", model=model)
    clipper.close()
    assert verify_ledger(tmp_path / "a" / "l.jsonl").ok
    assert begins(acted) in (None, 32)  # nothing can be said of the first window

    def prune(model):
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[:8].clone()
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[:8].clone()
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :8].clone()

    model = model_of_before()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path / "b")
    for step in range(20):
        if step == 8:
            prune(model)
            optimizer.state.clear()
        one_step(model, optimizer, clipper, step)
    assert clipper.explain().count("trained before") == 2


@pytest.mark.parametrize("tokens", [8, 4096])
def test_a_resumed_run_says_what_is_off(tokens, tmp_path):
    first = trained(64, tokens=tokens, folder=tmp_path)
    first.save_state(tmp_path)
    then = trained(64, tokens=4096, folder=tmp_path, resume=tmp_path)
    assert ("spectral    off" in then.explain()) is (tokens == 8)


def test_a_report_says_when_and_why_the_parts_were_let_in(tmp_path):
    *_, clipper, _ = loaded(1e-2, "host", tmp_path)
    clipper.close()
    (ledger,) = tmp_path.glob("*.jsonl")
    assert verify_ledger(ledger).ok
    report = load_run(ledger)
    [[step, moved]] = summary(report)["let_in"]
    assert step == 16
    words = f"let in as loaded weights moved fast: at step 16 they had moved by {how_fast(moved)}."
    assert words in write_markdown(report, tmp_path / "r.md").read_text()
    assert words in write_html(report, tmp_path / "r.html").read_text()
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    next(line for line in lines if line.get("step") == 16)["moved"] = 0.01
    ledger.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    assert any("had moved by 0.01" in f.message and f.step == 16 for f in verify_ledger(ledger).findings)


# -- what is trained in place of matrices, and what joins ----------------------------------------------------------


def biases(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    as_loaded(model)
    return [p.requires_grad_(name.endswith("bias")) for name, p in model.named_parameters()]


def scales(model):
    return [p.requires_grad_("norm" in name) for name, p in model.named_parameters()]


def experts(model):
    model.model.layers[0].experts = torch.nn.Parameter(torch.randn(4, 16, 16))
    as_loaded(model)

    def with_them(model, given, out):
        out.loss = out.loss + model.model.layers[0].experts.square().mean()
        return out

    model.register_forward_hook(with_them)
    return [p.requires_grad_("experts" in name) for name, p in model.named_parameters()]


@pytest.mark.parametrize("trained", [biases, scales, experts])
def test_vectors_and_experts_that_were_trained_before_keep_their_step(trained, tmp_path):
    model = model_of_before()
    trained(model)
    _, _, clipper, acted = loaded(1e-2, "host", tmp_path, steps=20, model=model)
    assert acted == [set()] * 20
    said = clipper.explain()
    assert "spectral    off: no hidden matrix is trained" in said
    assert "agreement   off: the model was trained before" in said


def test_a_loaded_body_that_joins_the_optimizer_later_waits(tmp_path):
    model = model_of_before()
    body = list(model.model.layers.parameters())
    for part in (model.model.norm, model.lm_head):
        del part.weight._is_hf_initialized
    optimizer = torch.optim.AdamW([*model.model.norm.parameters(), *model.lm_head.parameters()], lr=1e-4)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path)
    acted = [one_step(model, optimizer, clipper, step) for step in range(3)]
    optimizer.add_param_group({"params": body})
    acted += [one_step(model, optimizer, clipper, step) for step in range(3, 6)]
    assert [bool(found) for found in acted] == [True] * 3 + [False] * 3


def test_a_weight_that_another_has_replaced_is_no_longer_watched(tmp_path):
    def replace(model):
        projection = model.lm_head
        projection.weight = torch.nn.Parameter(projection.weight.detach().clone())
        as_loaded(projection)
        optimizer.param_groups[0]["params"] = list(model.parameters())

    model = model_of_before()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path)
    driver: Any = clipper._driver
    loaded_weights = driver._shaping._loaded
    for step in range(50):
        if step == 5:
            replace(model)
            optimizer.state.clear()
        found = one_step(model, optimizer, clipper, step)
        if step == 20:
            movement = loaded_weights._movement
            watched = set() if movement is None else {id(ref()) for ref in movement._weights.values()}
            assert id(model.lm_head.weight) in watched
    assert found == BOTH


# -- how many rows there are ---------------------------------------------------------------------------------------


def not_shown(size, tokens, *, steps=1, micro_batches=1, **more):
    """A loop that shows no batch; the clipper after its steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clipper = AdaptiveClipper({"max_pace": 1.0, **more}, optimizer=optimizer, model=model)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids.repeat(64, 1))  # an evaluation before the first step counts nothing
    for _ in range(steps):
        for _ in range(micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model, clipper


def test_a_loop_that_shows_no_batch_is_weighed_by_what_its_model_is_called_with():
    _, few = not_shown(64, 8)
    assert "with 8 tokens in a step it would take" in few.explain()
    model, many = not_shown(64, 128, micro_batches=8, steps=2)
    assert "clip/spectral_width" in many.metrics()
    assert not model._forward_pre_hooks
    _, by_hand = not_shown(64, 8, spectral_width=0.0)
    assert "clip/spectral_width" in by_hand.metrics()


def test_what_listens_goes_with_its_clipper_and_not_into_copies():
    model, optimizer = make()
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    copied = pickle.loads(pickle.dumps(model))
    copied(torch.zeros(2, 8))
    assert len(model._forward_pre_hooks) == 1
    assert not copied._forward_pre_hooks or all(h._handle is None for h in copied._forward_pre_hooks.values())
    del clipper
    gc.collect()
    model(torch.zeros(2, 8))
    assert not model._forward_pre_hooks


def test_matrices_count_as_trained_before_their_first_gradient(tmp_path):
    model = model_of_before()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path)
    model.model.norm.weight.square().sum().backward()  # a first loss through vectors alone
    clipper.clip_(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert [one_step(model, optimizer, clipper, step) for step in range(1, 4)] == [set()] * 3
    assert clipper.explain().count("trained before") == 2


def test_fresh_matrices_that_join_vectors_of_before_are_decided_on(tmp_path):
    model = model_of_before()
    del model.lm_head.weight._is_hf_initialized
    vectors = [p for name, p in model.named_parameters() if "norm" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is vector for vector in vectors))
    optimizer = torch.optim.AdamW(vectors, lr=1e-4)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path)
    assert [one_step(model, optimizer, clipper, step) for step in range(3)] == [set()] * 3
    assert "no hidden matrix is trained" in clipper.explain()
    optimizer.add_param_group({"params": [model.lm_head.weight.requires_grad_(True)]})
    assert [one_step(model, optimizer, clipper, step) for step in range(3, 6)] == [BOTH] * 3
    assert "no hidden matrix is trained" not in clipper.explain()


def test_vectors_that_join_vectors_are_not_looked_at_in_every_step(tmp_path):
    model = model_of_before()
    scales(model)
    vectors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(vectors[:1], lr=1e-4)
    clipper = AdaptiveClipper({"max_pace": 1.0}, optimizer=optimizer, model=model, output_dir=tmp_path)
    one_step(model, optimizer, clipper, 0)
    optimizer.add_param_group({"params": vectors[1:]})
    one_step(model, optimizer, clipper, 1)
    with mock.patch("hf_adaclip.run.loaded_weights.loaded_weights", side_effect=AssertionError):
        assert [one_step(model, optimizer, clipper, step) for step in range(2, 6)] == [set()] * 4


def test_a_model_may_be_called_with_anything():
    model, optimizer = make()
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    loss = model(nested).values().square().mean()
    loss.backward()
    clipper.clip_(model.parameters(), loss=loss)
    optimizer.step()
    assert clipper.step == 1


def test_closing_leaves_no_hook_on_the_model():
    model, optimizer = make()
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    assert model._forward_pre_hooks
    clipper.close()
    assert not model._forward_pre_hooks
    clipper = AdaptiveClipper(optimizer=optimizer, model=model)
    model(torch.zeros(2, 8)).sum().backward()
    clipper.clip_(model.parameters())
    assert not model._forward_pre_hooks
