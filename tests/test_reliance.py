"""What is relied on in others: each of it is missed at once where it is gone, and nothing is relied on that the table does not say."""

import argparse
import ast
import copy
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer
from tqdm import tqdm
from transformers import Trainer

import hf_adaclip
from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, UnsupportedSetupError
from hf_adaclip.cli import build_parser
from hf_adaclip.gradients.optimizers import unscales_by_itself, unwrap_optimizer
from hf_adaclip.gradients.probe import check_torch, probe
from hf_adaclip.integrations.seam import check_seam
from hf_adaclip.ports.deepspeed import EnginePort
from hf_adaclip.reliance import RELIANCES, require
from hf_adaclip.telemetry.progress import Progress
from tests.loops import make

PACKAGE = Path(hf_adaclip.__file__).parent
ROWS = {row.name: row for row in RELIANCES}


# -- taken away --------------------------------------------------------------------------------------------------


def without(owner, name):
    """A way to take an attribute away from a module or a class."""

    def take(monkeypatch):
        monkeypatch.delattr(owner, name)
        AdaptiveClipper()

    return take


def unmentioned(owner, name):
    """Code that comes to know of it no longer."""

    def take(monkeypatch):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
        check_torch()

    return take


def ignored_by_adam(name):
    """A fused step that does not look at it."""

    def take(monkeypatch):
        bound: Any = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step
        step = bound.__func__.__wrapped__

        def deaf(self):
            setattr(self, name, None)
            step(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", deaf)
        AdaptiveClipper(optimizer=make(fused=True)[1])

    return take


def from_accelerator(name):
    def take(monkeypatch):
        accelerator = Accelerator(cpu=True)
        monkeypatch.delattr(accelerator, name)
        AdaptiveClipper(accelerator=accelerator)

    return take


def from_its_optimizer(monkeypatch):
    optimizer = Accelerator(cpu=True).prepare(make()[1])
    monkeypatch.delattr(optimizer, "accelerator_state")
    unwrap_optimizer(optimizer)


def from_the_scaler(monkeypatch):
    accelerator = Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    del scaler._scale
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    AdaptiveClipper(accelerator=accelerator)


def from_the_trainer(name):
    def take(monkeypatch):
        monkeypatch.delattr(Trainer, name)
        check_seam()

    return take


def from_all_its_methods(monkeypatch):
    for name, value in list(vars(Trainer).items()):
        if isinstance(value, types.FunctionType) and "_globalstep_last_logged" in _names(value.__code__):
            monkeypatch.setattr(Trainer, name, lambda self: None)
    check_seam()


def _names(code):
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *(n for names in inner for n in names)}


def from_the_engine(name):
    def take(monkeypatch):
        class ZeRO:
            clip_grad, _global_grad_norm = 1.0, 0.5

        ZeRO.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
        delattr(ZeRO, name)
        EnginePort(types.SimpleNamespace(optimizer=ZeRO(), gradient_clipping=lambda: 1.0), lambda: None)

    return take


def from_codecarbon(monkeypatch):
    codecarbon: Any = types.ModuleType("codecarbon")
    codecarbon.OfflineEmissionsTracker = lambda **given: object()
    monkeypatch.setitem(sys.modules, "codecarbon", codecarbon)
    from hf_adaclip.telemetry.energy import CodecarbonMeter, open_meter

    monkeypatch.setattr("hf_adaclip.telemetry.energy.RaplMeter", CodecarbonMeter)
    assert open_meter() is None  # what only records ends nothing
    CodecarbonMeter()


def from_the_bar(monkeypatch):
    monkeypatch.delattr(tqdm, "_decr_instances")
    Progress(total=1)


def of_a_fused_optimizer(monkeypatch):
    optimizer = make(fused=True)[1]
    assert unscales_by_itself(optimizer)
    assert not unscales_by_itself(torch.optim.AdamW(make()[0].parameters(), fused=False))
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda self: None)
    unscales_by_itself(optimizer)


def from_the_parser(monkeypatch):
    parser = build_parser()
    del parser._actions
    require(parser, "_actions")


def of_the_commands(monkeypatch):
    parser = build_parser()
    monkeypatch.delattr(argparse, "_SubParsersAction")
    parser.error("unrecognized arguments: --nonsense")


def from_the_replay(monkeypatch):
    from hf_adaclip.incidents.replay import Request
    from hf_adaclip.integrations.incident_replay import _Answering

    monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    request: Any = mock.Mock(spec=Request)
    _Answering(mock.Mock(spec=Trainer, args=None), request).prepare()


TAKEN = {
    **{name: without(torch, name) for name in ROWS if name.startswith("_foreach_") and name != "_foreach_utils"},
    "_foreach_utils": without(torch.utils, "_foreach_utils"),
    "_group_tensors_by_device_and_dtype": without(torch.utils._foreach_utils, "_group_tensors_by_device_and_dtype"),
    "_version": lambda monkeypatch: require(object(), "_version"),  # from the class in C nobody can take it away
    "_getframe": without(sys, "_getframe"),
    "_global_optimizer_pre_hooks": without(torch_optimizer, "_global_optimizer_pre_hooks"),
    "_optimizer_step_pre_hooks": unmentioned(torch.optim.Optimizer, "__init__"),
    "_optimizer_step_post_hooks": unmentioned(torch.optim.Optimizer, "__init__"),
    "profile_hook_step": without(torch.optim.Optimizer, "profile_hook_step"),
    "found_inf": ignored_by_adam("found_inf"),
    "grad_scale": ignored_by_adam("grad_scale"),
    "_step_supports_amp_scaling": of_a_fused_optimizer,
    "_wrapped_by_lr_sched": unmentioned(lr_scheduler.LRScheduler, "step"),
    "_opt_called": unmentioned(lr_scheduler.LRScheduler, "step"),
    "_scale": from_the_scaler,
    "_optimizers": from_accelerator("_optimizers"),
    "_models": from_accelerator("_models"),
    "accelerator_state": from_its_optimizer,
    **{n: from_the_trainer(n) for n, row in ROWS.items() if row.owner == "Trainer" and n != "_prepare_inputs"},
    "_load_from_checkpoint": from_the_replay,
    "_globalstep_last_logged": from_all_its_methods,
    "_global_grad_norm": from_the_engine("_global_grad_norm"),
    "clip_grad": from_the_engine("clip_grad"),
    "_total_energy": from_codecarbon,
    "_decr_instances": from_the_bar,
    "_actions": from_the_parser,
    "_SubParsersAction": of_the_commands,
}


# Rows that are done without where they are missing, by the test that shows how.
KERNEL = "tests/controllers/test_kernel.py::test_without_a_kernel_the_training_is_the_same_and_one_line_says_so"
SHOWN = "tests/integrations/test_incidents.py::test_a_training_step_that_prepares_nothing_shows_what_it_was_given"
MARKED = "tests/drivers/test_settling.py::test_where_loaded_weights_are_not_marked_a_name_tells"
REWARDS = (
    "tests/integrations/test_incidents_grpo.py::test_without_the_logs_of_the_trainer_there_are_no_rewards_and_no_harm"
)
DONE_WITHOUT = {
    "_is_hf_initialized": MARKED,
    "_prepare_inputs": SHOWN,
    "_logs": REWARDS,
    "_utils": KERNEL,
    "_get_nvrtc_library": KERNEL,
    "_cuda_load_module": KERNEL,
}


def test_every_row_is_tried():
    assert set(TAKEN) | set(DONE_WITHOUT) == set(ROWS)
    assert len(ROWS) == len(RELIANCES)
    for place in DONE_WITHOUT.values():
        path, test = place.split("::")
        assert f"def {test}(" in (PACKAGE.parent / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_gone_is_named_with_package_version_and_way_out(name, monkeypatch):
    row = ROWS[name]
    with pytest.raises(UnsupportedSetupError) as raised:
        TAKEN[name](monkeypatch)
    monkeypatch.undo()
    said = str(raised.value)
    # Two attributes are told by one method that is gone: the first of them is named.
    pairs = ("_wrapped_by_lr_sched", "_opt_called"), ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    names = next((pair for pair in pairs if name in pair), (name,))
    assert any(f"`{row.package}` must have {row.owner}.{n} ({row.seen})" in said for n in names)
    assert row.without in said
    assert re.search(rf"but {row.package} \d+\.\d+|of an unknown version", said)


def test_nothing_is_missing_here():
    check_torch()
    check_seam()


# -- the two-number copy -----------------------------------------------------------------------------------------


def test_an_optimizer_that_does_not_go_by_its_rate_is_not_paced():
    weight = torch.nn.Parameter(torch.zeros(3))
    for kind in (torch.optim.Rprop, torch.optim.ASGD):
        with pytest.raises(
            UnsupportedSetupError, match=f"{kind.__name__} moved as far at 2 times the rate. Set `max_pace=1`"
        ):
            AdaptiveClipper(AdaptiveClipConfig(max_pace=8.0), optimizer=kind([weight]))
        AdaptiveClipper(optimizer=kind([weight]))


ALL = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
    "Adafactor",
    "Muon",
    "LBFGS",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_the_real_optimizer_is_not_touched(name, dtype):
    weight = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))
    optimizer = getattr(torch.optim, name)([weight], lr=1e-3)
    seen: list[object] = []
    state = copy.deepcopy(optimizer.state_dict())
    handle = torch_optimizer.register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    random = torch.get_rng_state()
    probe(optimizer, "host", paced=True)
    handle.remove()
    assert (seen, weight.grad, str(optimizer.state_dict())) == ([], None, str(state))
    assert torch.equal(weight, torch.ones(3, 3, dtype=dtype))
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1}], ids=str)
def test_a_fused_step_is_left_out_and_scaled(name, more):
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))], fused=True, **more)
    with mock.patch.object(torch.Tensor, "__float__", autospec=True, side_effect=torch.Tensor.__float__) as reads:
        probe(optimizer, "device", paced=True)
    assert 0 < reads.call_count < 20


def test_a_class_of_somebody_else_is_not_copied():
    class Counted(torch.optim.SGD):
        made = 0

        def __init__(self, *args, **kwargs):
            type(self).made += 1
            super().__init__(*args, **kwargs)

    AdaptiveClipper(AdaptiveClipConfig(max_pace=8.0), optimizer=Counted([torch.nn.Parameter(torch.zeros(3))], lr=0.1))
    assert Counted.made == 1


def test_without_the_self_test_nothing_is_tried(monkeypatch):
    monkeypatch.setattr("hf_adaclip.gradients.guards.probe", lambda *args, **kwargs: pytest.fail("tried"))
    AdaptiveClipper(AdaptiveClipConfig(self_test=False), optimizer=make(fused=True)[1])


# -- the table is complete ---------------------------------------------------------------------------------------

TUPLE = {"_fields", "_replace", "_asdict", "_make"}  # the documented names of named tuples
DOCUMENTED = {"os._exit"}
OWN = {
    # Objects of the package whose private side another object of it knows.
    "audit/segment.py": {"before"},
    "drivers/watching.py": {"self"},
    "gradients/distance.py": {"other", "estimate"},
    "gradients/guards.py": {"guards"},
    "integrations/attaching.py": {"AdaptiveClipMixin"},
    "integrations/checkpoints.py": {"trainer"},
    "integrations/incident_replay.py": {"trainer"},
    "integrations/launch.py": {"trainer"},
    "integrations/rewinding.py": {"trainer", "self._trainer"},
    "integrations/watch.py": {"self._trainer"},
    "ports/accelerate.py": {"slot", "other"},
    "run/moments.py": {"self"},
    "run/recorder.py": {"before"},
}
READERS = {"getattr", "hasattr", "setattr", "delattr", "require", "require_mention"}


def accesses(tree):
    """Every private name that is asked of an object, and the object, in words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                yield ast.unparse(node.args[0]), str(node.args[1].value)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_adaclip"):
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                yield node.module or "", name


def foreign(path, tree):
    own = {f"self.{n.attr}" for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {f"self.{n.name}" for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for owner, name in accesses(tree):
        if not re.fullmatch(r"_[^_].*", name) or name in TUPLE or f"{owner}.{name}" in DOCUMENTED:
            continue
        if owner in OWN.get(str(path.relative_to(PACKAGE)), ()) or f"{owner}.{name}" in own:
            continue
        yield owner, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_private_attribute_of_somebody_else_has_a_row(path):
    for owner, name in foreign(path, ast.parse(path.read_text(encoding="utf-8"))):
        assert name in ROWS, f"{path} relies on {owner}.{name}"


def test_no_row_is_left_over():
    texts = [p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py") if p.name != "reliance.py"]
    for name in ROWS:
        assert any(re.search(rf"\b{name}\b", text) for text in texts) or name.startswith("_foreach_"), name


def test_methods_of_the_trainer_that_are_overridden_have_a_row():
    from hf_adaclip import AdaptiveClipMixin

    ours = {name for name in vars(AdaptiveClipMixin) if re.fullmatch(r"_[^_].*", name)}
    assert ours & set(dir(Trainer)) <= set(ROWS)


def test_the_check_finds_what_it_is_for():
    planted = "import torch\nfrom torch._inductor import config\ndef f(o):\n    getattr(o, '_a', 0)\n    return o._b, torch._c(o)\n"
    found = {name for _, name in foreign(PACKAGE / "x.py", ast.parse(planted))}
    assert found == {"_inductor", "_a", "_b", "_c"}
