"""Launches of a step on the lane of an accelerator, by controller, counted on a CPU that plays one.

    python -m scripts.bench.launches                    # the table
    python -m scripts.bench.launches --card             # into the card of speed, which a test holds equal to what is counted

Counted is one `clip_`, from the norms of the gradients to the arming of a fused AdamW, in a step that is not measured: every operation of
torch that is not a view or an allocation, and every kernel of the package's own, as 1. Two tensors; where norms of all gradients together
are judged, more of them cost no more. *One by one* is the same step where no kernel can be made.
"""

import argparse
import contextlib
import json
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adaclip import CONTROLLERS, AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.controllers.numerics import fused
from hf_adaclip.controllers.numerics.ops import Shape, TensorOps, tensor_ops
from hf_adaclip.controllers.presets import PRESETS
from scripts.docs.readme_section import ROOT, write_section

CARD = ROOT / "model_cards" / "speed" / "README.md"
GUARD: dict[str, Any] = PRESETS["guard"].fields
LIMITS = {
    "min_threshold": 1e-3,
    "max_threshold": 9.0,
    "max_widening_step": 2.0,
    "max_widening_100": 4.0,
    "max_skipped": 9,
    "divergence_spreads": 6.0,
}
ROWS: dict[str, dict[str, Any]] = {
    "guard": GUARD,
    "adaptive, without what shapes the step": {**GUARD, "max_pace": None},
    "guard, all limits": {**GUARD, **LIMITS},
    "adaptive, all limits": {**GUARD, "max_pace": None, **LIMITS},
    "guard, per tensor": {**GUARD, "granularity": "tensor"},
    "guard, another static threshold for one tensor": {**GUARD, "parameter_rules": {"1": {"static_threshold": 2.0}}},
    **{name: {"controller": name} for name in CONTROLLERS if name != "adaptive"},
    "second_moment": {"controller": "second_moment", "warmup_observations": 2},  # acts only afterwards
}
# What torch does without a kernel.
_FREE = frozenset(
    (
        *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided"),
        *("expand", "lift_fresh", "select", "slice", "split", "split_with_sizes", "squeeze", "unbind", "unsqueeze"),
        *("view", "view_as_real"),
    )
)


class Launches(TorchDispatchMode):
    """Counts operations of torch, but for views and allocations, and kernels of the package's own.

    Attributes:
        names: Of what was counted, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = contextlib.ExitStack()

    def __enter__(self) -> "Launches":
        results = fused.Fused._results

        def counted(made: Any, *args: Any) -> Any:
            self.names.append("kernel")
            return results(made, *args)

        self._patch.enter_context(mock.patch.object(fused.Fused, "_results", counted))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def on_tensors(device: torch.device, shape: Shape) -> TensorOps:
    """The lane of an accelerator, whatever the device."""
    return tensor_ops(device)


def launches(
    settings: dict[str, Any], *, kernels: bool = True, tensors: int = 2, steps: int = 8, fused_step: bool = True
) -> list[str]:
    """Names of what one `clip_` launches, after the warm-up.

    Args:
        settings: Of the config.
        kernels: Whether kernels can be made.
        tensors: Parameters of the model.
        steps: The last of them is counted.
        fused_step: Whether the optimizer is fused; another one makes the host read a flag.
    """
    torch.manual_seed(0)
    without = contextlib.nullcontext() if kernels else mock.patch.object(fused, "_kernel_of", return_value=None)
    with without:
        model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(4, 8)) for _ in range(tensors))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused_step)
        config = AdaptiveClipConfig(self_test=False, **settings)
        clipper = AdaptiveClipper(config, optimizer=optimizer, model=model, _lane=on_tensors)
        for step in range(steps):
            loss = torch.stack([p.square().sum() for p in model]).sum()
            loss.backward()
            with Launches() if step == steps - 1 else contextlib.nullcontext() as counter:
                clipper.clip_(model.parameters(), loss=loss.detach(), measure=False)
            optimizer.step()
            optimizer.zero_grad()
    assert counter is not None
    return counter.names


def table() -> str:
    """A row for each controller."""
    lines = ["| launches of a step | one by one | now | norms of gradients among them |", "| --- | --- | --- | --- |"]
    for name, settings in ROWS.items():
        before, now = launches(settings, kernels=False), launches(settings)
        norms = sum(n in ("_foreach_norm", "linalg_vector_norm") for n in now[:3]) + 1
        lines.append(f"| {name} | {len(before)} | {len(now)} | {norms} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="write the table into the card of speed")
    parser.add_argument("--json", action="store_true", help="print what is launched, by controller")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps({name: launches(settings) for name, settings in ROWS.items()}, indent=1))
    elif arguments.card:
        write_section("launches", table(), CARD)
    else:
        print(table())


if __name__ == "__main__":
    main()
