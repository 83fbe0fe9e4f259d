"""Fixed runs of the clipper, and all that each leaves behind, as text.

Nothing here depends on the machine. Gradients are small integers times a power of two, put into `p.grad` by hand, such that the norm of
every tensor is exact in float32 whatever the order of the sum; there is no forward pass, no BLAS and no random generator of a library;
the optimizer rounds after each operation. What changes in a file has therefore changed in the package.

Left out are what differs between two runs of one version (times, seals), the versions, and the config of the header: the settings of a
run are in `RUNS`, and a new field with a default is to move no file. That the header's config is right is what `verify_ledger` replays.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from tests.lanes import on_lane

FOLDER = Path(__file__).parent
STEPS, HALF = 96, 48
SHAPES = {"body.weight": (4, 4), "body.bias": (4,), "head.weight": (1, 4), "head.bias": (1,)}
# Of four numbers the squares add up to 36, and of any power of 4 of them to a square: norms are whole.
PATTERN = (1, 1, 3, 5)
UNIT = 2.0**-10
VOLATILE = {"header": {"created", "versions", "config", "seed"}, "step": {"time"}, "footer": set()}
SMALL = 32  # numbers that are written out; of more, a hash


@dataclass(frozen=True)
class Recorded:
    """One run.

    Attributes:
        settings: Fields of the config, beside those of all runs.
        resumed: Half way, another clipper goes on from a saved state.
        spread: Every tensor has a stream of its own; else all are scaled alike.
        steady: All gradients point the same way, so that there is a distance to travel.
    """

    settings: dict[str, Any]
    resumed: bool = False
    spread: bool = False
    steady: bool = False


COMMON = {"static_threshold": 2.0, "warmup_observations": 10}
RULES = {
    "*.bias": "exclude",
    "head.*": {"controller": "median", "median_window": 12, "static_threshold": 0.5},
    "body.weight": {"max_threshold": 4.0},
}
LIMITS = {
    "min_threshold": 1.2,
    "max_threshold": 3.0,
    "max_widening_step": 1.05,
    "max_widening_100": 2.5,
    "max_skipped": 2,
    "freeze_after": 75,
}
TROUBLE = {"divergence_spreads": 2.0, "divergence_steps": 6, "on_trouble": "fallback"}
RUNS = {
    "adaptive": Recorded({"ceiling_share": 1.0}),
    "adaptive_ceiling": Recorded({"static_threshold": 1.0, "ceiling_share": 0.5}),
    "static": Recorded({"controller": "static"}),
    "percentile": Recorded({"controller": "percentile", "percentile": 75.0, "history": 24}),
    "zscore": Recorded({"controller": "zscore"}),
    "ema_ratio": Recorded({"controller": "ema_ratio"}),
    "log_zscore": Recorded({"controller": "log_zscore"}),
    "mean_sd": Recorded({"controller": "mean_sd", "sd_window": 16, "sd_width": 4.0}),
    "median": Recorded({"controller": "median", "median_window": 16}),
    "quantile": Recorded({"controller": "quantile"}),
    "weight_ratio": Recorded({"controller": "weight_ratio", "weight_ratio": 0.125}),
    "second_moment": Recorded({"controller": "second_moment", "moment_width": 1.25}),
    "per_tensor": Recorded({"granularity": "tensor"}, spread=True, resumed=True),
    "per_module": Recorded({"granularity": "module", "controller": "zscore"}, spread=True),
    "parameter_rules": Recorded({"granularity": "tensor", "parameter_rules": RULES}, spread=True),
    "limits": Recorded(LIMITS),
    "trouble": Recorded(TROUBLE),
    "pace": Recorded({"max_pace": 8.0, "pace_start": 8, "ceiling_share": 1.0}, steady=True, resumed=True),
    "late": Recorded({"one_step_late": True, "ceiling_share": 1.0}),
    "shadow": Recorded({"shadow": True, "ceiling_share": 1.0}),
    "skip": Recorded({"on_spike": "skip", "ceiling_share": 1.0}, resumed=True),
}


def golden_file(name: str, lane: str) -> Path:
    """Where a run is recorded. The lanes share a file as long as they leave the same behind."""
    own = FOLDER / f"{name}.{lane}.json"
    return own if lane != "host" and own.exists() else FOLDER / f"{name}.json"


def play(name: str, lane: str, folder: Path) -> str:
    """Run `name` on a lane and return what it left behind, as the text of its file; `folder` is for the ledger and checkpoints."""
    run, model = RUNS[name], _model()
    seen = hashlib.sha256()
    optimizer = Portable(model.parameters(), seen)
    config = AdaptiveClipConfig(**{**COMMON, **run.settings})
    draw = Draw()

    def clipper() -> AdaptiveClipper:
        return AdaptiveClipper(
            config, optimizer=None if config.one_step_late else optimizer, model=model, ledger=folder / "ledger.jsonl"
        )

    with on_lane(lane), torch.no_grad():
        clip = clipper()
        for step in range(STEPS):
            if run.resumed and step == HALF:
                clip.save_state(folder)
                clip.close(clean=False)
                clip = clipper()
                assert clip.load_state(folder)
            _put_gradients(model, step, draw, run)
            loss = None if step == 5 else torch.tensor(_loss(step, draw))
            clip.clip_(model.parameters(), loss=loss, measure=step % 16 == 0)
            optimizer.step()
        clip.save_state(folder)
        clip.close()

    report = verify_ledger(folder / "ledger.jsonl")
    assert report.ok, report.findings
    lines = _ledger(folder / "ledger.jsonl")
    return _text(
        {
            "ledger": lines,
            "clip_state": _state(folder / "clip_state.safetensors"),
            "stepped_on_sha256": seen.hexdigest(),
            "weights": {n: p.detach().flatten().tolist() for n, p in model.named_parameters()},
        }
    )


# -- the streams -------------------------------------------------------------------------------------------------


@dataclass
class Draw:
    """Whole numbers that look random, from whole numbers alone (splitmix64)."""

    state: int = field(default=20)

    def below(self, limit: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) % limit


def _level(step: int) -> float:
    """What the norm is multiplied by: spikes, a lasting rise, a lasting fall, a step of zeros."""
    if step == 40:
        return 0.0
    spike = 64.0 if step in (24, 31, 32, 58, 80) else 1.0
    return spike * (4.0 if 46 <= step < 66 else 0.5 if step >= 66 else 1.0)


def _put_gradients(model: torch.nn.Module, step: int, draw: Draw, run: Recorded) -> None:
    size, way = 64 + draw.below(48), Draw(3) if run.steady else draw
    for name, p in model.named_parameters():
        own = 64 + draw.below(48) if run.spread else size
        if run.spread and name == "head.weight" and step in (36, 70):
            own *= 32  # a spike of one tensor
        factor = own * UNIT * _level(step)
        values = [(m if way.below(2) else -m) * factor for m in _pattern(p.numel(), way)]
        if name == "body.bias" and step in (12, 52):
            values[2] = float("nan")
        if name == "head.weight" and step == 37:
            values[1] = float("inf")
        p.grad = torch.tensor(values, dtype=torch.float32).reshape(p.shape)


def _pattern(count: int, draw: Draw) -> list[int]:
    values = [2] if count == 1 else list(PATTERN) * (count // 4)
    for i in range(count - 1, 0, -1):
        k = draw.below(i + 1)
        values[i], values[k] = values[k], values[i]
    return values


def _loss(step: int, draw: Draw) -> float:
    """Falls until step 60, and is far above everything before from there on; NaN once."""
    if step == 52:
        return float("nan")
    return (3000 - 20 * step if step < 60 else 20000 + draw.below(64)) / 1024


# -- model and optimizer -----------------------------------------------------------------------------------------


def _model() -> torch.nn.Module:
    model = torch.nn.Module()
    model.body, model.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    draw = Draw(7)
    for name, p in model.named_parameters():
        assert tuple(p.shape) == SHAPES[name]
        p.data = torch.tensor([(draw.below(129) - 64) / 64 for _ in range(p.numel())]).reshape(p.shape)
    return model


class Portable(torch.optim.Optimizer):
    """Steps along the gradient and keeps Adam's second moment; torch's own optimizers fuse products and sums where the CPU can.

    `seen` takes in every gradient that is stepped on, and the rate; of a step that is left out, by whatever means, nothing.
    """

    def __init__(self, parameters: Any, seen: Any) -> None:
        super().__init__(parameters, {"lr": 2.0**-6, "betas": (0.5, 0.5)})
        self._seen = seen

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._seen.update(p.grad.numpy().tobytes() + str(float(group["lr"])).encode())
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg_sq"].mul_(0.5).add_(p.grad.square().mul_(0.5))
                p.sub_(p.grad * group["lr"])


# -- what is left ------------------------------------------------------------------------------------------------


def _ledger(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = []
    for line in lines:
        if line["kind"] == "seal":
            continue
        line = {k: v for k, v in line.items() if k not in VOLATILE[line["kind"]]}
        if line.get("parent"):
            line["parent"] = {"step": line["parent"]["step"]}
        kept.append(line)
    return kept


def _state(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads(file.metadata()["metadata"])
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    return {
        "metadata": {k: v for k, v in metadata.items() if k != "ledger"},
        "tensors": {key: _tensor(value) for key, value in tensors.items()},
    }


def _tensor(value: torch.Tensor) -> list[Any]:
    bits = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    numbers = [str(v) for v in value.flatten().tolist()] if value.numel() <= SMALL else bits
    return [str(value.dtype), list(value.shape), numbers]


def _text(left: dict[str, Any]) -> str:
    """JSON with a line for every line of the ledger and every tensor, so that a change shows where it is.

    A step is a row of values; the keys stand in `step_fields`, but for a step that has others.
    """
    ledger, state = left["ledger"], left["clip_state"]
    fields = list(next(line for line in ledger if line["kind"] == "step"))
    lines = [json.dumps(list(line.values()) if list(line) == fields else line) for line in ledger]
    tensors = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in state["tensors"].items()]
    blocks = {
        "step_fields": json.dumps(fields),
        "ledger": "[\n  " + ",\n  ".join(lines) + "\n ]",
        "clip_state": json.dumps(state["metadata"]),
        "clip_state_tensors": "{\n  " + ",\n  ".join(tensors) + "\n }",
        "stepped_on_sha256": json.dumps(left["stepped_on_sha256"]),
        "weights": json.dumps(left["weights"]),
    }
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {block}" for name, block in blocks.items()) + "\n}\n"
