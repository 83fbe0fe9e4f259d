"""What deciding costs on a CPU: microseconds per controller update, and `clip_` beside `torch.nn.utils.clip_grad_norm_`.

python -m scripts.bench.update
python -m scripts.bench.update --json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from hf_adaclip import CONTROLLERS, AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.controllers import Observation
from hf_adaclip.controllers.numerics.ops import SCALAR, host_number


def microseconds(call: Callable[[], object], *, calls: int, rounds: int) -> tuple[float, float]:
    """Median and spread (half the distance between the quartiles) over rounds, per call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def update_of(config: AdaptiveClipConfig) -> Callable[[], object]:
    controller = config.settings
    state = controller.init(SCALAR, ())
    rng = np.random.default_rng(0)
    norms = np.exp(0.15 * rng.standard_normal(4096)).astype(np.float32)
    position = 0

    def update() -> None:
        nonlocal state, position
        position = (position + 1) % len(norms)
        seen = Observation(norms[position], host_number(2.0), host_number(1.0))
        with np.errstate(all="ignore"):
            _, state = controller.update(state, seen)

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=500, help="calls in a round (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows: dict[str, tuple[float, float]] = {}
    configs = [AdaptiveClipConfig(controller=name) for name in CONTROLLERS] + [AdaptiveClipConfig(max_pace=2.0)]
    for config in configs:
        name = f"update {config.controller}" + (" with pace" if config.max_pace > 1 else "")
        rows[name] = microseconds(update_of(config), calls=arguments.calls, rounds=arguments.rounds)
    # The smallest model there is, so that what is left is overhead and not arithmetic on gradients.
    model = torch.nn.Linear(8, 1)
    model(torch.randn(4, 8)).sum().backward()
    clipper = AdaptiveClipper("adaptive", optimizer=torch.optim.AdamW(model.parameters(), fused=True))
    rows["clip_ adaptive, 2 tensors"] = microseconds(
        lambda: clipper.clip_(model.parameters()), calls=arguments.calls, rounds=arguments.rounds
    )
    rows["torch clip_grad_norm_, 2 tensors"] = microseconds(
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), calls=arguments.calls, rounds=arguments.rounds
    )
    if arguments.json:
        print(json.dumps({name: {"microseconds": m, "spread": s} for name, (m, s) in rows.items()}, indent=1))
        return
    for name, (middle, spread) in rows.items():
        print(f"{name:36s} {middle:7.1f} us  (+- {spread:.1f})")


if __name__ == "__main__":
    main()
