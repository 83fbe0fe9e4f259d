"""Two drivers behind one interface: which one a clipper has is settled when it is made, and asked nowhere after."""

import ast
import gc
import inspect
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, UnsupportedSetupError, clipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.drivers.clipping import ClippingDriver
from hf_adaclip.drivers.driver import Driver
from hf_adaclip.drivers.following import FollowingDriver
from hf_adaclip.ports.accelerate import AcceleratorPort
from hf_adaclip.ports.plain import PlainLoop, Port
from tests.loops import make, weights


class Engine(torch.nn.Module):
    """What is asked of a DeepSpeed engine: it clips by its optimizer's threshold in a step of its own."""

    def __init__(self, threshold: Any = 0.5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        inner = torch.optim.SGD([self.weight], lr=1.0)
        self.optimizer = SimpleNamespace(clip_grad=threshold, _global_grad_norm=0.0, optimizer=inner)
        self.configured, self.norm = threshold, 0.0

    def forward(self):
        return self.weight.sum()

    def gradient_clipping(self):
        return self.configured

    def get_global_grad_norm(self):
        return self.norm

    def backward(self, norm):
        """Norm of a gradient, which is clipped and stepped on."""
        self()
        self.norm = self.optimizer._global_grad_norm = norm
        self.weight.grad = torch.tensor([min(norm, self.optimizer.clip_grad) if norm == norm else norm, 0.0])
        self.optimizer.optimizer.step()


def loop(engine):
    return SimpleNamespace(
        distributed_type="DEEPSPEED",
        mixed_precision="no",
        sync_gradients=True,
        deepspeed_engine_wrapped=SimpleNamespace(engine=engine),
        clip_grad_norm_=None,
        register_save_state_pre_hook=lambda hook: SimpleNamespace(remove=lambda: None),
        register_load_state_pre_hook=lambda hook: SimpleNamespace(remove=lambda: None),
    )


def test_the_loop_decides_which_driver_it_is():
    model, optimizer = make()
    for made in (AdaptiveClipper(), AdaptiveClipper(optimizer=optimizer, model=model)):
        assert isinstance(made._driver, ClippingDriver)
    assert isinstance(AdaptiveClipper(accelerator=loop(Engine()))._driver, FollowingDriver)


@pytest.mark.parametrize(
    ("kinds", "protocol"), [((ClippingDriver, FollowingDriver), Driver), ((PlainLoop, AcceleratorPort), Port)]
)
def test_both_answer_all_that_is_asked(kinds, protocol):
    asked = {name for name in vars(protocol) if not name.startswith("_")}
    assert asked
    for kind in kinds:
        given = {
            *dir(kind),
            *(n.attr for n in ast.walk(ast.parse(inspect.getsource(kind))) if isinstance(n, ast.Attribute)),
        }
        assert asked <= given


def test_the_clipper_asks_for_the_kind_in_its_constructor_only():
    tree = ast.parse(Path(clipper.__file__).read_text(encoding="utf-8"))
    [kind] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    assert len(methods) > 15
    for method in methods:
        names = {node.id for node in ast.walk(method) if isinstance(node, ast.Name)}
        asked = {ast.unparse(node) for node in ast.walk(method) if isinstance(node, ast.Compare | ast.BoolOp)}
        assert not names & {"ClippingDriver", "FollowingDriver", "AcceleratorPort", "PlainLoop"}, method.name
        assert not [text for text in asked if "_driver" in text or "_port" in text], method.name


def test_a_step_reads_in_its_order():
    """Collect, observe, decide and plan (one launch on an accelerator), apply, arm."""
    order = ["collect", "_observe", "_decide", "_apply_", "_arm"]
    text = inspect.getsource(ClippingDriver.clip_)
    places = [text.index(f"{name}(") for name in order]
    assert places == sorted(places)


def test_an_engine_is_followed_and_told_its_next_threshold(tmp_path):
    engine = Engine()
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(warmup_observations=5), accelerator=loop(engine), ledger=tmp_path / "ledger.jsonl"
    )
    clipper.self_test()
    told, moved = [], []
    for step in range(30):
        before = engine.weight.detach().clone()
        engine.backward({20: float("nan"), 25: 50.0}.get(step, 0.3 + 0.01 * (step % 3)))
        told.append(engine.optimizer.clip_grad)
        moved.append(float((engine.weight.detach() - before).abs().sum()))
        clipper.clip_(engine.parameters())
    clipper.close()
    assert told[:5] == [0.5] * 5  # of the warm-up: what the engine was configured with
    assert 0.3 < told[25] < 0.5
    assert moved[20] == 0.0
    assert moved[25] == pytest.approx(told[25])
    assert verify_ledger(tmp_path / "ledger.jsonl").ok
    last = engine.optimizer.clip_grad
    engine.backward(100.0)
    assert engine.optimizer.clip_grad == last  # nobody tells it any more


def test_an_engine_has_a_threshold_of_its_own():
    made = AdaptiveClipper(accelerator=loop(Engine()))
    with pytest.raises(ConfigError, match="must stay what the DeepSpeed config says"):
        made.set_static_threshold(2.0)
    with pytest.raises(ConfigError, match="must be above 0"):
        made.set_static_threshold(-1.0)
    made._driver.take_script_threshold(3.0)
    assert made._run.static_threshold == 1.0
    with pytest.raises(UnsupportedSetupError, match="`gradient_clipping` of the DeepSpeed config must be above 0"):
        AdaptiveClipper(accelerator=loop(Engine("auto"))).self_test()
    with pytest.raises(ConfigError, match=r"which rules its first step, but is 0.7 instead"):
        AdaptiveClipper(accelerator=loop(Engine()), static_threshold=0.7).self_test()


def test_what_outlives_a_clipper_does_not_lead_back_to_it():
    model, optimizer = make()
    made = AdaptiveClipper(optimizer=optimizer, model=model)
    model.clipper = made  # as scripts do
    model(torch.ones(2, 8)).sum().backward()
    made.clip_(model.parameters())
    before = weights(model)
    gone = weakref.ref(made)
    optimizer.zero_grad()
    del made, model.clipper
    gc.collect()
    assert gone() is None
    optimizer.step()
    assert torch.equal(weights(model), before)
