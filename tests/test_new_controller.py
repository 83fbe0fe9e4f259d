"""A new controller is one file and one line of the registry: config, flags, files, ledger and checkpoint follow from them."""

import json
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch

from hf_adaclip import CONTROLLERS, AdaptiveClipConfig, AdaptiveClipper, ClipArguments, ConfigError, StateError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers.base import Controller, decide_by_threshold
from hf_adaclip.controllers.numerics.ops import Value, ops_of
from hf_adaclip.controllers.settings import setting, warmup
from hf_adaclip.integrations.script_args import parse_arguments


class ToyState(NamedTuple):
    last: Value
    count: Value  # type: ignore[assignment] # of a tuple it is a method, which nobody calls


@dataclass(frozen=True)
class ToyController(Controller[ToyState]):
    """Clip to a multiple of the norm before."""

    idea: ClassVar[str] = "a multiple of the norm before"
    source: ClassVar[str] = "this test"
    choose: ClassVar[str] = "never"

    width: float = setting(3.0, help="Multiple of the norm before.", range="[1, inf)")
    mood: int | None = setting(None, help="A number that nothing goes by.", range="[0, 10]")
    warmup_observations: int = warmup()

    def init(self, ops, shape):
        return ToyState(ops.full(shape, 0.0), ops.full(shape, 0.0))

    def update(self, state, observation):
        ops = ops_of(observation.norm)
        warm = state.count < ops(float(self.warmup_observations))
        threshold = ops(self.width) * state.last
        decision, usable = decide_by_threshold(
            observation.norm, threshold, observation.static_threshold, warm=warm, ops=ops
        )
        last = ops.where(usable, observation.norm * decision.coefficient, state.last)
        return decision, ToyState(last, ops.where(usable, state.count + ops(1.0), state.count))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(CONTROLLERS, "toy", ToyController)


def test_every_way_of_writing_it_down(tmp_path):
    want = AdaptiveClipConfig(controller=ToyController(width=2.0, warmup_observations=4), shadow=True)
    want.to_json(tmp_path / "c.json")
    flags = ["--output_dir", str(tmp_path), "--clip", "toy:width=2,warmup_observations=4", "--clip_shadow"]
    *_, clip = parse_arguments(flags)

    assert clip.resolve() == want
    assert ClipArguments(str(tmp_path / "c.json")).resolve() == want
    assert AdaptiveClipConfig(controller="toy", width=2.0, warmup_observations=4, shadow=True) == want
    assert AdaptiveClipConfig.from_dict(json.loads(json.dumps(want.to_dict()))) == want
    assert AdaptiveClipConfig.resolve(want.settings).replace(shadow=True) == want
    assert want.to_dict()["width"] == 2.0


def test_its_settings_are_held_to_their_rules_beside_those_of_the_run():
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipConfig.resolve(
            'toy:width=0.5,mood=11,warmup_observations="x",max_skipped=-1,widht=3,z_threshold=3'
        )
    assert caught.value.problems == [
        "`max_skipped` must be in [0, inf), but is -1 instead.",
        "`width` must be in [1, inf), but is 0.5 instead.",
        "`mood` must be in [0, 10], but is 11 instead.",
        "`warmup_observations` must be a whole number, but is 'x' instead.",
        "`widht` must be a field of AdaptiveClipConfig, but is unknown instead. Did you mean `width`?",
        "`z_threshold` must be left at 2.5 with controller 'toy', but is 3: it belongs to controller 'zscore'. Set `controller`, or leave "
        "`z_threshold` out.",
    ]


def test_an_unregistered_one_is_refused(monkeypatch):
    monkeypatch.delitem(CONTROLLERS, "toy")
    with pytest.raises(ConfigError, match=r"must be of a class in CONTROLLERS .* is a ToyController instead"):
        AdaptiveClipConfig.resolve(ToyController())


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_it_trains_writes_a_ledger_is_verified_and_resumed(granularity, lane, tmp_path):
    """The run that was cut off and gone on with ends with the weights of the one that was not, and both ledgers follow from their norms."""
    config = AdaptiveClipConfig(controller=ToyController(width=1.2, warmup_observations=4), granularity=granularity)
    whole, model = Steps(config, tmp_path / "whole.jsonl"), None
    whole.take(0, 40)
    whole.clipper.close()

    first = Steps(config, tmp_path / "cut.jsonl")
    first.take(0, 25)
    first.clipper.save_state(tmp_path)
    first.clipper.close(clean=False)
    model = first.model
    second = Steps(config, tmp_path / "cut.jsonl", model, first.optimizer)
    assert second.clipper.load_state(tmp_path)
    second.take(25, 40)
    second.clipper.close()

    for a, b in zip(whole.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("whole", "cut"):
        report = verify_ledger(tmp_path / f"{name}.jsonl")
        assert report.ok, report.findings
        assert report.recomputed == 40
    lines = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert (lines[0]["controller"], lines[0]["config"]["width"]) == ("toy", 1.2)
    assert any(line.get("reason") == "CLIPPED" for line in lines)

    other = ToyController(width=2.0, warmup_observations=4)
    third = Steps(config.replace(controller=other), tmp_path / "other.jsonl")
    with pytest.raises(StateError, match="width"):
        third.clipper.load_state(tmp_path)
    third.clipper.close()


class Steps:
    """A model that is trained on drawn batches, with a spike."""

    def __init__(self, config, ledger, model=None, optimizer=None):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 1) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2) if optimizer is None else optimizer
        self.clipper = AdaptiveClipper(config, optimizer=self.optimizer, model=self.model, ledger=ledger)

    def take(self, begin, end):
        for index in range(begin, end):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean() * (50.0 if index == 30 else 1.0)
            loss.backward()
            self.clipper.clip_(self.model.parameters(), loss=loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
