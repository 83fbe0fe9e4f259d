"""The spectral range has to be worth its work where it is on by itself."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaclip import AdaptiveClipper
from hf_adaclip.run.shape_gate import MOST, ShapeGate, rows_of, share


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
    gate.decide([], [(64, 256)] * 4, torch.device(device), None, ranks_known=True)
    assert gate.spectral is True
    assert gate.memory is memory
    assert ("memory" in gate.why) is not memory
    again = ShapeGate(["spectral", "agreement"], memory=True)
    again.restore(gate.tensor())
    assert (again.spectral, again.agreement, again.memory) == (True, True, memory)
    older = ShapeGate(["spectral", "agreement"], memory=True)
    older.restore(gate.tensor()[:2])
    assert not older.memory  # before there was an average


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
