"""The stream gauntlet: what a rule does to norms whose story is known. Pure numpy streams, any controller as the rule.

Streams are n_t = 0.3 exp(noise_t) with 2000 steps of burn-in. Noise: normal with sd 0.15, or Student-t with 5 degrees of
freedom and scale 0.12 (heavy tails, as gradient norms have them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_adaclip.controllers import Controller, Observation
from hf_adaclip.controllers.ops import ARRAY

CALM_LEVEL = 0.3
BURN_IN = 2000
MEASURED = 5000
NOISES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: 0.15 * rng.standard_normal(n),
    "student": lambda rng, n: 0.12 * rng.standard_t(5, n),
}


@dataclass
class Verdict:
    """Altered shares in percent, applied spikes as multiples of the calm level, shift in steps, averaged over seeds."""

    altered_calm: float
    first_spike: float
    second_spike: float
    accepted_after: float
    altered_decay: float


def run_stream(
    controller: Controller[Any], norms: np.ndarray, static_threshold: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Drive a batch of streams, shape [steps, streams]; returns coefficients and thresholds of that shape."""
    values = norms.astype(np.float32)
    state = controller.init(ARRAY, (norms.shape[1],))
    nan, static = np.float32("nan"), np.float32(static_threshold)
    coefficients, thresholds = [], []
    with np.errstate(all="ignore"):
        for row in values:
            decision, state = controller.update(state, Observation(row, nan, static))
            coefficients.append(decision.coefficient)
            thresholds.append(decision.threshold)
    return np.stack(coefficients), np.stack(thresholds)


def judge(controller: Controller[Any], noise: str, seeds: int) -> Verdict:
    def stream(steps: int, base: int) -> np.ndarray:
        return np.stack(
            [
                CALM_LEVEL * np.exp(NOISES[noise](np.random.default_rng(base + s), BURN_IN + steps))
                for s in range(seeds)
            ],
            axis=1,
        )

    calm = stream(MEASURED, 0)
    coefficient, _ = run_stream(controller, calm)
    altered_calm = 100.0 * float((coefficient[BURN_IN:] < 1).mean())

    spikes = stream(10, 1000)
    spikes[BURN_IN] *= 100
    spikes[BURN_IN + 3] *= 100
    coefficient, _ = run_stream(controller, spikes)
    applied = spikes * coefficient / CALM_LEVEL

    shift = stream(1000, 2000)
    shift[BURN_IN:] *= 3
    coefficient, _ = run_stream(controller, shift)
    altered = coefficient[BURN_IN:] < 1
    accepted = []
    for column in altered.T:
        busy = np.convolve(column, np.ones(50), mode="valid")
        first = np.flatnonzero(busy < 25)
        accepted.append(float(first[0]) if len(first) else float("inf"))

    decay = stream(MEASURED, 3000)
    decay[BURN_IN:] *= (8.0 ** -(np.arange(MEASURED) / MEASURED))[:, None]
    coefficient, _ = run_stream(controller, decay)
    return Verdict(
        altered_calm=altered_calm,
        first_spike=float(applied[BURN_IN].mean()),
        second_spike=float(applied[BURN_IN + 3].mean()),
        accepted_after=float(np.mean(accepted)),
        altered_decay=100.0 * float((coefficient[BURN_IN:] < 1).mean()),
    )
