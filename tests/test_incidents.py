"""Incidents: what is kept of a step that goes wrong, and that nothing is kept, copied or read of any other."""

import json
import shutil
import weakref
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipper
from hf_adaclip.audit.verify import verify_ledger
from hf_adaclip.incidents.contents import load_batch
from hf_adaclip.incidents.folder import find_incidents
from tests.loops import HostReads, make


def batch(step, part=0):
    g = torch.Generator().manual_seed(1000 * part + step)
    x = torch.randn(16, 8, generator=g)
    return {"x": x, "y": x[:, :1] * 2 + 0.1 * torch.randn(16, 1, generator=g)}


def loop(folder, steps=80, *, faults=None, parts=1, watch=True, **settings):
    """A plain loop; `faults[step]` multiplies the loss of its last micro-batch. Returns clipper and batches."""
    model, optimizer = make()
    config = {"controller": "adaptive", "ledger": str(folder / "clip_ledger.jsonl"), **settings}
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    fed = []
    for step in range(steps):
        fed.append([batch(step, part) for part in range(parts)])
        losses = []
        for part, one in enumerate(fed[-1]):
            if watch:
                clipper.watch(one, list(range(16 * step, 16 * step + 16)))
            factor = (faults or {}).get(step, 1.0) if part == parts - 1 else 1.0
            loss = torch.nn.functional.mse_loss(model(one["x"]), one["y"]) * factor / parts
            loss.backward()
            losses.append(loss.detach())
        clipper.clip_(model.parameters(), loss=torch.stack(losses).sum())
        optimizer.step()
        optimizer.zero_grad()
    clipper.close()
    return clipper, fed


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_that_changes_its_working_folder_keeps_its_files_together(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    model, optimizer = make()
    clipper = AdaptiveClipper({"controller": "static", "ledger": "run/clip_ledger.jsonl"}, optimizer=optimizer)
    for step in range(60):
        if step == 40:
            monkeypatch.chdir(elsewhere)
        one = batch(step)
        clipper.watch(one)
        loss = torch.nn.functional.mse_loss(model(one["x"]), one["y"]) * (1e4 if step == 50 else 1.0)
        loss.backward()
        clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    clipper.close()
    assert not list(elsewhere.iterdir())
    report = verify_ledger(tmp_path / "run/clip_ledger.jsonl")
    assert (report.ok, report.steps) == (True, 60)
    assert [i.step for i in find_incidents(tmp_path / "run")] == [50]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("fault", "kind"), [(1e4, "spike"), (float("nan"), "nonfinite"), (float("inf"), "nonfinite")])
def test_a_planted_fault_is_kept_with_its_batch(lane, fault, kind, parts, tmp_path):
    clipper, fed = loop(tmp_path, faults={60: fault}, parts=parts)
    [incident] = clipper.incidents
    assert (incident.step, incident.kind) == (60, kind)
    assert incident.folder == tmp_path / "incidents/step-00060"
    same(load_batch(incident.folder), fed[60])
    [read] = find_incidents(tmp_path)
    facts = json.loads((incident.folder / "incident.json").read_text(), parse_constant=pytest.fail)
    assert read.facts == facts
    assert facts["batch"]["indices"] == [list(range(960, 976))] * parts
    assert len(facts["batch"]["hashes"]) == parts
    assert len(facts["batch"]["hashes"][0]["samples"]) == 16
    assert facts["learning_rates"] == [3e-3]
    assert {m["name"] for m in facts["modules"]} == {"0", "2"}
    assert {t["name"] for t in facts["tensors"]} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    if kind == "spike":
        assert facts["norm"] > 100 * facts["usual_norm"]
        assert facts["norm_left"] < facts["norm"] / 100
        assert sum(t["share"] for t in facts["tensors"]) == pytest.approx(1, abs=1e-5)


def test_a_step_that_the_controller_leaves_out_is_kept(lane, tmp_path):
    clipper, fed = loop(tmp_path, faults={60: 1e4}, controller="zscore", on_spike="skip")
    [incident] = [i for i in clipper.incidents if i.step == 60]
    assert incident.kind == "skipped"
    same(load_batch(incident.folder), fed[60])


def test_a_healthy_run_leaves_no_folder(lane, tmp_path):
    clipper, _ = loop(tmp_path, steps=300)
    assert clipper.incidents == []
    assert not (tmp_path / "incidents").exists()


def test_a_loop_that_shows_nothing_keeps_nothing(lane, tmp_path):
    clipper, _ = loop(tmp_path, faults={60: float("nan")}, watch=False)
    assert clipper.incidents == []
    clipper, _ = loop(tmp_path, faults={60: float("nan")}, incidents=False)
    assert clipper.incidents == []
    assert not (tmp_path / "incidents").exists()


def test_watching_reads_nothing_and_copies_no_batch(lane):
    counts = []
    for watch in (False, True):
        model, optimizer = make()
        clipper = AdaptiveClipper("guard", optimizer=optimizer, model=model)
        reads, before = 0, [batch(0)]
        for step in range(40):
            one = batch(step)
            with HostReads() as seen:
                if watch:
                    assert clipper.watch(one) is one
            assert seen.count == 0
            loss = torch.nn.functional.mse_loss(model(one["x"]), one["y"])
            loss.backward()
            with HostReads() as seen:
                clipper.clip_(model.parameters(), loss=loss.detach())
                optimizer.step()
            reads += seen.count if step > 1 else 0
            optimizer.zero_grad()
            if watch:
                held = [t for s in clipper._capture._ring._steps for b in s.inputs for t in b.values()]
                before = [one] if step == 0 else [one, before[0]]
                assert all(any(t is mine for b in before for mine in b.values()) for t in held)
        counts.append(reads)
    assert counts[0] == counts[1]


class LateEvent:
    """An event that passes only after somebody has looked so often."""

    patience = looks = 0

    def record(self):
        self.passes = LateEvent.looks + LateEvent.patience

    def query(self):
        return LateEvent.looks >= self.passes

    def synchronize(self):
        self.passes = 0


@pytest.mark.parametrize("patience", [1, 2, 5, 6, 20, 10_000])
def test_a_row_that_comes_late_finds_its_batch_or_says_that_it_has_gone(on_device, patience, tmp_path, monkeypatch):
    """Asked twice a step, before a batch is added and after the decision."""
    import hf_adaclip.incidents.rows as rows

    start, landed = rows.RowCopies.start, rows.RowCopies.landed
    monkeypatch.setattr(LateEvent, "patience", patience)

    def looked(self, *, wait=False):
        LateEvent.looks += 1
        return landed(self, wait=wait)

    def late(self, step, row):
        if not self._awaited:
            self._awaited, self._events = True, [LateEvent() for _ in range(rows.SLOTS)]
        start(self, step, row)

    monkeypatch.setattr(rows.RowCopies, "start", late)
    monkeypatch.setattr(rows.RowCopies, "landed", looked)
    monkeypatch.setattr(rows, "start_copy", lambda target, source, awaited: target.copy_(source))
    clipper, fed = loop(tmp_path, faults={60: float("nan")})
    [incident] = clipper.incidents
    assert incident.step == 60
    if patience <= 5:
        same(load_batch(incident.folder), fed[60])
    else:
        assert incident.facts["batch"] == {"file": None, "why": incident.facts["batch"]["why"]}
        assert "more than 2 steps later" in incident.facts["batch"]["why"]


def test_at_most_two_steps_are_held_beside_the_present_one(lane, monkeypatch):
    import hf_adaclip.incidents.rows as rows

    monkeypatch.setattr(rows.RowCopies, "_passed", lambda self, slot: False)  # nothing ever arrives in time
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=model)
    alive = []
    for step in range(20):
        one = batch(step)
        alive.append(weakref.ref(one["x"]))
        clipper.watch(one)
        loss = torch.nn.functional.mse_loss(model(one["x"]), one["y"])
        del one
        loss.backward()
        loss = loss.detach()
        clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        held = sum(ref() is not None for ref in alive)
        assert held <= (0 if isinstance(clipper.state["count"], np.floating) else 3)
    clipper.close()
    assert not any(ref() is not None for ref in alive)


class Odd:
    def __repr__(self):
        raise RuntimeError("no text")


def test_odd_contents_are_kept_as_far_as_they_can_be(lane, tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper({"ledger": str(tmp_path / "clip_ledger.jsonl")}, optimizer=optimizer, model=model)
    shared = torch.arange(12.0)
    odd = UserDict(
        {
            "nested": {"deep": [torch.ones(2, dtype=torch.bfloat16), (1, 2.5, "text", None, True)], 3: "three"},
            "strings": ["a", "b\ud800"],
            "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            "array": np.arange(4),
            "objects": np.array([{"a": 1}, None], dtype=object),
            "number": np.float32(1.5),
            "nan": float("nan"),
            "odd": Odd(),
            "complex": torch.ones(2, dtype=torch.complex64),
            "shared": shared,
            "view": shared[::2],
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "set": {1},
            "grad": torch.nn.Parameter(torch.ones(1)),
        }
    )
    for step in range(2):
        clipper.watch(odd)
        clipper.watch([torch.zeros(1)])
        clipper.watch("just text")
        (model(torch.ones(2, 8)).sum() * (float("nan") if step else 1.0)).backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    clipper.close()
    [incident] = clipper.incidents
    assert incident.facts["batch"]["file"], incident.facts["batch"]
    one, two, three = load_batch(incident.folder)
    assert torch.equal(two[0], torch.zeros(1))
    assert three == "just text"
    assert one["nested"]["deep"][1] == (1, 2.5, "text", None, True)
    assert one["nested"][3] == "three"
    assert torch.equal(one["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(one["csr"].to_dense(), torch.eye(3))
    assert (one["array"] == np.arange(4)).all()
    assert one["number"] == 1.5
    assert one["nan"] != one["nan"]
    assert torch.equal(one["view"], shared[::2])
    assert "complex64 of shape [2]" in one["complex"]
    assert "no text" in one["odd"]


def test_what_cannot_be_written_ends_nothing(lane, tmp_path, monkeypatch, caplog):
    (tmp_path / "incidents").write_text("a file where the folder should be")
    clipper, _ = loop(tmp_path, faults={60: float("nan")})
    assert clipper.step == 80
    assert clipper.incidents == []
    assert "could not be recorded" in caplog.text
    (tmp_path / "incidents").unlink()

    import safetensors.torch

    def full(tensors, name, metadata=None):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    clipper, _ = loop(tmp_path, faults={60: float("nan")})
    [incident] = clipper.incidents
    assert "No space left" in incident.facts["batch"]["why"]
    assert [p.name for p in incident.folder.iterdir()] == ["incident.json"]


def test_a_listener_that_raises_ends_nothing(tmp_path, monkeypatch):
    model, optimizer = make()
    clipper = AdaptiveClipper({"ledger": str(tmp_path / "l.jsonl")}, optimizer=optimizer)
    heard = []

    def hear(incident):
        heard.append(incident.step)
        raise ValueError("of the listener")

    clipper.on_incident(hear)
    for _ in range(3):
        clipper.watch({})
        (model(torch.ones(2, 8)).sum() * float("nan")).backward()
        clipper.clip_(model.parameters())
    assert heard == [0, 1, 2]
    assert [i.step for i in clipper.incidents] == [0, 1, 2]


def test_private_data_stays_out(lane, tmp_path):
    clipper, _ = loop(tmp_path, faults={60: 1e4}, incident_batch="hash")
    [incident] = clipper.incidents
    assert [p.name for p in incident.folder.iterdir()] == ["incident.json"]
    assert incident.facts["batch"]["why"] == "`incident_batch` is 'hash'."
    before = incident.facts["batch"]["hashes"]
    shutil.rmtree(tmp_path / "incidents")
    clipper, _ = loop(tmp_path, faults={60: 1e4})
    assert clipper.incidents[0].facts["batch"]["hashes"] == before


def test_a_number_beside_the_samples_and_indices_of_others(lane, tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=model, output_dir=tmp_path)
    for count in (4, 8):
        clipper.watch({"x": torch.ones(4, 8), "scale": torch.tensor(2.0)}, range(count))
        (model(torch.ones(2, 8)).sum() * float("nan")).backward()
        clipper.clip_(model.parameters())
    clipper.close()
    own, others = (incident.facts["batch"] for incident in clipper.incidents)
    assert own["indices"] == [[0, 1, 2, 3]]
    assert len(own["hashes"][0]["samples"]) == 4
    assert len(set(own["hashes"][0]["samples"])) == 1
    assert "indices" not in others


def test_limits_on_size_and_number(lane, tmp_path):
    faults = {step: float("nan") for step in range(50, 74, 2)}
    clipper, _ = loop(tmp_path, faults=faults, incident_limit=8, incident_run_megabytes=0.0012)
    assert [i.step for i in clipper.incidents] == [50, 52, 54, 56]  # half of them, because they are of one kind
    files = [i.facts["batch"]["file"] for i in clipper.incidents]
    assert files == ["batch.safetensors", "batch.safetensors", None, None]
    shutil.rmtree(tmp_path / "incidents")
    clipper, _ = loop(tmp_path, faults=faults, incident_megabytes=0.0)
    assert {i.facts["batch"]["file"] for i in clipper.incidents} == {None}
    assert len(clipper.incidents) == 10


def test_of_a_series_the_first_three_are_kept(lane, tmp_path):
    clipper, _ = loop(tmp_path, faults={step: float("nan") for step in range(50, 60)})
    assert [i.step for i in clipper.incidents] == [50, 51, 52]


def test_a_second_run_in_the_same_folder_hides_no_incident(lane, tmp_path):
    for _ in range(2):
        loop(tmp_path, faults={60: float("nan")})
    assert [i.folder.name for i in find_incidents(tmp_path)] == ["step-00060", "step-00060-2"]


def test_a_watched_dataloader_is_the_same_and_shows_its_batches(lane, tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=model, output_dir=tmp_path)
    watched = clipper.watched(loader)
    assert len(watched) == 8
    assert watched.dataset is data
    fed = []
    for _ in range(10):
        for x, y in watched:
            fed.append((x, y))
            loss = torch.nn.functional.mse_loss(model(x), y) * (float("nan") if len(fed) == 70 else 1.0)
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    clipper.close()
    [incident] = clipper.incidents
    assert incident.step == 69
    [kept] = load_batch(tmp_path / "incidents/step-00069")
    assert torch.equal(kept[0], fed[69][0])
    assert torch.equal(kept[1], fed[69][1])


def test_a_run_goes_on_with_other_settings_of_incidents_and_back_within_itself(lane, tmp_path):
    model, optimizer = make()
    settings = {"controller": "adaptive", "ledger": str(tmp_path / "clip_ledger.jsonl")}
    clipper = AdaptiveClipper(settings, optimizer=optimizer, model=model)

    def step(number, factor=1.0):
        clipper.watch(batch(number))
        (torch.nn.functional.mse_loss(model(batch(number)["x"]), batch(number)["y"]) * factor).backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()

    for number in range(10):
        step(number)
    clipper.save_state(tmp_path)
    step(10, float("nan"))
    assert clipper.load_state(tmp_path)
    step(110, float("nan"))
    clipper.close()
    assert [i.folder.name for i in clipper.incidents] == ["step-00010", "step-00010-2"]
    for incident, number in zip(clipper.incidents, (10, 110), strict=True):
        same(load_batch(incident.folder), [batch(number)])
    clipper = AdaptiveClipper(
        {**settings, "incident_limit": 3, "incident_batch": "hash"}, optimizer=optimizer, model=model
    )
    assert clipper.load_state(tmp_path)


def test_a_clipper_that_is_dropped_lets_go_of_its_batches_and_of_the_loop(lane):
    import gc

    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=model)
    one = batch(0)
    refs = [weakref.ref(one["x"]), weakref.ref(clipper)]
    clipper.watch(one)
    model(one["x"]).sum().backward()
    clipper.clip_(model.parameters())
    del one, clipper
    optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_batches_of_a_step_that_is_given_up_belong_to_no_other(lane, tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=model, output_dir=tmp_path)
    for step in range(40):
        if step == 30:
            clipper.watch({"x": torch.zeros(1)})
            clipper.unwatch()
        one = clipper.watch(batch(step))
        loss = torch.nn.functional.mse_loss(model(one["x"]), one["y"]) * (float("nan") if step == 30 else 1.0)
        loss.backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    clipper.close()
    [incident] = clipper.incidents
    same(load_batch(incident.folder), [batch(30)])
