"""Going back in a hand-written loop: the documented pattern, and what is put back."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit.verify import verify_ledger
from hf_adaclip.errors import ConfigError, TrainingTroubleError, UnsupportedSetupError
from hf_adaclip.incidents.rules import Finding
from hf_adaclip.incidents.skip_list import SKIP_FILE, SkipList
from tests.loops import HostReads, make

REWIND: dict[str, Any] = {"on_trouble": "rewind", "snapshot_steps": 5, "incident_steps": 5, "warmup_observations": 5}


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


class Average:
    """An average of the weights, as a loop keeps it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.values = [p.detach().clone() for p in model.parameters()]

    def follow(self, model: torch.nn.Module) -> None:
        for value, p in zip(self.values, model.parameters(), strict=True):
            value.lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, kept in zip(self.values, state["values"], strict=True):
            value.copy_(kept)


def loop(folder: Path, trouble: Any = (), steps: int = 40, **settings: Any) -> Any:
    """The documented pattern. Returns clipper, weights, average and the learning rate."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model, optimizer = make()
    model = torch.nn.Sequential(model, torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(1))
    optimizer.add_param_group({"params": [*model[2].parameters()]})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    config = AdaptiveClipConfig(**{"ledger": str(folder / "clip_ledger.jsonl"), **REWIND, **settings})
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model, output_dir=folder)
    events: list[Any] = []
    clipper.on_event(events.append)
    average, due = Average(model), list(trouble)
    for step in range(steps):
        x = clipper.watch(batch(step))
        if not clipper.leaves_out():
            loss = torch.nn.functional.mse_loss(model(x), x[:, :1] * 2)
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            average.follow(model)
        scheduler.step()
        if due and step == due[0]:
            due.pop(0)
            clipper.rewinder.judge(step, Finding("zero_loss", "Planted trouble.", 1.0, 1))
        clipper.snapshot(average, last=step == steps - 1)
        assert (clipper.rewound is not None) == (step in trouble)
    clipper.close()
    told = [(e.step, e.until, e.reason) for e in events if e.kind == "rewound"]
    assert told == [tuple(r) for r in (clipper.rewinder.history if clipper.rewinder else ())]
    return clipper, [*model.state_dict().values()], average.values, scheduler.get_last_lr()


@pytest.mark.parametrize(
    "settings", [{}, {"max_pace": 8.0, "pace_start": 2, "pace_trust": 1.0}], ids=["plain", "pace"]
)
@pytest.mark.parametrize("trouble", [(24,), (3,), (24, 26), (19, 38), (39,)], ids=str)
def test_a_loop_goes_back(lane, trouble, settings, tmp_path):
    back = loop(tmp_path / "back", trouble, **settings)
    undone = json.loads((tmp_path / "back" / SKIP_FILE).read_text())["steps"]
    (tmp_path / "never").mkdir()
    SkipList(frozenset(undone)).write(tmp_path / "never")
    never = loop(tmp_path / "never", **settings)
    plain = loop(tmp_path / "plain", **settings)
    for at in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(back[at], never[at], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(back[at], plain[at], strict=True))
    assert back[3] == never[3]
    assert len(back[0].rewinder.history) == len(trouble)
    for name in ("back", "never"):
        report = verify_ledger(tmp_path / name / "clip_ledger.jsonl")
        assert report.status == "verified", report.findings


def test_a_healthy_step_copies_and_reads_nothing(on_device, tmp_path):
    """Only a snapshot does: none is taken between step 0 and step 100."""
    model, optimizer = make()
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(on_trouble="rewind", ring_capacity=4096),
        optimizer=optimizer,
        model=model,
        output_dir=tmp_path,
    )

    def step(number: int) -> None:
        model(clipper.watch(batch(number))).square().mean().backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        clipper.snapshot()

    for number in range(12):
        step(number)
    with HostReads() as with_it:
        for number in range(12, 90):
            step(number)
    assert clipper.rewinder is not None
    taken = len(clipper.rewinder._snapshots)
    clipper.snapshot = lambda *also, last=False: None  # type: ignore[method-assign]
    with HostReads() as without:
        for number in range(90, 168):
            step(number)
    assert taken == 1
    assert with_it.count == without.count


def test_a_loop_that_cannot_go_back_says_why(tmp_path):
    model, optimizer = make()
    with pytest.raises(ConfigError, match="`model` must be given when `on_trouble` is 'rewind'"):
        AdaptiveClipper(AdaptiveClipConfig(**REWIND), optimizer=optimizer)
    with pytest.raises(ConfigError, match="`optimizer` must be given when `on_trouble` is 'rewind'"):
        AdaptiveClipper(AdaptiveClipConfig(**REWIND), model=model)
    with pytest.raises(UnsupportedSetupError, match="LBFGS"):
        AdaptiveClipper(AdaptiveClipConfig(**REWIND), model=model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TrainingTroubleError, match=r"`max_rewinds` \(1\) is spent: training went back 1 time"):
        loop(tmp_path, (14, 20), max_rewinds=1)
    assert json.loads((tmp_path / SKIP_FILE).read_text())["steps"] == [*range(1, 21)]


def test_parameters_that_join_make_older_snapshots_no_good(tmp_path):
    model, optimizer = make()
    model[0].requires_grad_(False)
    clipper = AdaptiveClipper(AdaptiveClipConfig(**REWIND), optimizer=optimizer, model=model, output_dir=tmp_path)
    for number in range(30):
        if number == 22:
            model[0].requires_grad_(True)
        model(batch(number)).square().mean().backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if number == 25:
            assert clipper.rewinder is not None
            clipper.rewinder.judge(number, Finding("zero_loss", "Planted trouble.", 1.0, 1))
            with pytest.raises(TrainingTroubleError, match="there is no snapshot or checkpoint from before"):
                clipper.snapshot()
            break
        clipper.snapshot()


def test_a_clipper_that_is_dropped_takes_its_snapshots_and_the_model_along(tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper(AdaptiveClipConfig(**REWIND), optimizer=optimizer, model=model, output_dir=tmp_path)
    model(batch(0)).square().mean().backward()
    clipper.clip_(model.parameters())
    optimizer.step()
    clipper.snapshot()
    held = [weakref.ref(model), weakref.ref(clipper), weakref.ref(clipper.rewinder)]
    del model, optimizer, clipper
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
