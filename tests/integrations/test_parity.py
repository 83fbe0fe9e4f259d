"""`static` and `shadow` are the stock Trainer, bit for bit, over a table of settings; whole runs, not single steps."""

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipMixin
from hf_adaclip.audit import verify_ledger
from tests.integrations.settings import SETTINGS, play

pytestmark = pytest.mark.slow

# A short warm-up: for most of the run the controller in the shadow decides otherwise than what acts.
SHADOW = AdaptiveClipConfig(shadow=True, warmup_observations=2, ceiling_share=1.0)
TIMES = ("runtime", "per_second")


def ours(base: type[Trainer]) -> type[Trainer]:
    return type(f"Adaptive{base.__name__}", (AdaptiveClipMixin, base), {})


def trace(trainer: Trainer) -> dict[str, object]:
    """All that a training leaves behind, flat: every tensor and number of model, optimizer and schedule, the log, the generators."""
    found: dict[str, object] = {}
    kept = (
        ("model", trainer.model.state_dict()),
        ("optimizer", trainer.optimizer.state_dict()),
        ("schedule", trainer.lr_scheduler.state_dict()),
        ("log", [{k: v for k, v in entry.items() if "clip/" not in k} for entry in trainer.state.log_history]),
        ("state", {"step": trainer.state.global_step, "best": trainer.state.best_metric}),
        ("generators", {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False)}),
    )
    for name, value in kept:
        flatten(name, value, found)
    return {k: v for k, v in found.items() if not k.endswith(TIMES)}


def flatten(name: str, value: object, found: dict[str, object]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            flatten(f"{name}.{key}", inner, found)
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            flatten(f"{name}.{position}", inner, found)
    elif isinstance(value, torch.Tensor):
        found[name] = (str(value.dtype), tuple(value.shape), bits(value))
    elif isinstance(value, np.ndarray):
        found[name] = value.tobytes()
    elif not callable(value):
        found[name] = repr(value)


def require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor has no compiler here: {error}")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Some settings switch the process: full determinism, and the environment that goes with it."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is taken back, also where it was not there
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


@pytest.mark.parametrize("name", SETTINGS)
def test_static_and_shadow_are_the_stock_trainer(name, tmp_path):
    setting = SETTINGS[name]
    if setting.needs is not None:
        pytest.importorskip(setting.needs)
    if setting.args.get("torch_compile"):
        require_compiler()
    stock = trace(play(setting, tmp_path / "stock", lambda base: base))
    assert len([k for k in stock if k.endswith(".grad_norm")]) >= 2

    cut = []
    for clip in ("static", SHADOW):
        folder = tmp_path / str(getattr(clip, "controller", clip))
        trainer = play(setting, folder, ours, clip=clip)
        different = differences(stock, trace(trainer))
        assert different == [], f"under {clip}"
        report = verify_ledger(folder / "clip_ledger.jsonl")
        assert report.ok, report.findings
        clipper = getattr(trainer, "clipper")  # noqa: B009 - a class made on the spot has it
        cut.append(clipper.statistics.clipped / clipper.step)

    assert {"some": 0 < cut[0] < 1, "all": cut[0] == 1, "none": cut[0] == 0}[setting.cut], cut
    assert setting.cut == "none" or cut[1] < cut[0], "the controller in the shadow would have done otherwise"


def differences(stock: dict[str, object], found: dict[str, object]) -> list[str]:
    return [k for k in sorted({*stock, *found}) if stock.get(k, "none") != found.get(k, "none")]
