"""Streams of norms that real runs have, each with one figure and the bar that `adaptive` is held to. Part of `hf-adaclip gauntlet`.

Norms are a level of 0.8 times exp(noise), noise normal with sd 0.15, 4000 steps; the static threshold is 1 where norms grow and
restart, and 50 times the level where sources are mixed, so that the stock Trainer alters nothing there. The larger source is ten times
the smaller one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hf_adaclip.controllers import Controller, Observation
from hf_adaclip.controllers.numerics.ops import ARRAY, host_number

LEVEL: Final = 0.8
STEPS: Final = 4000
LARGER: Final = 10.0
FIRST: Final = 20
"""Batches in which a second source may be cut."""

WARM: Final = 300
Rng = np.random.Generator


@dataclass(frozen=True)
class Trial:
    """One stream and what is asked of it.

    Attributes:
        name: As a column or row is headed.
        figure: What is measured, in words.
        bar: Largest figure that is right.
        norms: Makes a stream, shape `[steps]`.
        static_threshold: The static threshold there.
        measure: The figure, from norms and coefficients of all streams, shape `[steps, streams]` each.
    """

    name: str
    figure: str
    bar: float
    norms: Callable[[Rng], Any]
    static_threshold: float
    measure: Callable[[np.ndarray, np.ndarray], float]


def _calm(rng: Rng) -> Any:
    """Norms of one source, an array of shape `[steps]`."""
    return LEVEL * np.exp(0.15 * rng.standard_normal(STEPS))


def _growth(rate: float) -> Trial:
    def norms(rng: Rng) -> Any:
        growth: np.ndarray = np.minimum((1 + rate) ** np.maximum(np.arange(STEPS) - WARM, 0.0), 1e30)
        grown: np.ndarray = _calm(rng) * growth
        return grown

    def largest(norms: np.ndarray, coefficients: np.ndarray) -> float:
        return float((norms * coefficients)[WARM:].max()) / LEVEL

    return Trial(f"growth {rate:.0%} a step", "largest norm applied, over the level", 10.0, norms, 1.0, largest)


def _mixed(name: str, larger: Callable[[Rng], np.ndarray]) -> Trial:
    def norms(rng: Rng) -> Any:
        return _calm(rng) * np.where(larger(rng), LARGER, 1.0)

    def cut(norms: np.ndarray, coefficients: np.ndarray) -> float:
        shares = []
        for norm, coefficient in zip(norms.T, coefficients.T, strict=True):
            batches = np.flatnonzero(norm[WARM:] > LEVEL * np.sqrt(LARGER))[FIRST:]
            shares.append(float((coefficient[WARM:][batches] < 1).mean()))
        return 100.0 * float(np.mean(shares))

    figure = f"% of the larger source's batches altered, after its first {FIRST}"
    return Trial(name, figure, 1.0, norms, 50 * LEVEL, cut)


def _late(which: np.ndarray) -> np.ndarray:
    """The larger source comes in when the smaller one is known."""
    return which & (np.arange(STEPS) >= WARM)


def _share(share: float) -> Trial:
    return _mixed(f"a source of {share:.0%}", lambda rng: _late(rng.random(STEPS) < share))


def _restart(rng: Rng) -> Any:
    """Norms that fall to a tenth over 500 steps, and are back at once."""
    return _calm(rng) * 0.1 ** ((np.arange(STEPS) % 500) / 500)


def _after_restarts(norms: np.ndarray, coefficients: np.ndarray) -> float:
    return 100.0 * float((coefficients[np.arange(STEPS) % 500 >= FIRST][WARM:] < 1).mean())


def _altered(norms: np.ndarray, coefficients: np.ndarray) -> float:
    return 100.0 * float((coefficients[WARM:] < 1).mean())


def _with_spikes(rng: Rng) -> Any:
    """Spikes of 5 to 1000 times the norm, one in 300 steps."""
    spikes = _late(rng.random(STEPS) < 1 / 300)
    return _calm(rng) * np.where(spikes, np.exp(rng.uniform(np.log(5), np.log(1000), STEPS)), 1.0)


def _spikes_applied(norms: np.ndarray, coefficients: np.ndarray) -> float:
    spikes = norms > 3 * LEVEL
    return float((norms * coefficients)[spikes].mean()) / LEVEL


TRIALS: Final[tuple[Trial, ...]] = (
    *(_growth(rate) for rate in (0.01, 0.02, 0.05, 0.1)),
    *(_share(share) for share in (0.02, 0.05, 0.1, 0.2, 0.5)),
    _mixed("every 7th batch", lambda rng: _late(np.arange(STEPS) % 7 == 0)),
    _mixed("blocks of eight", lambda rng: _late(np.arange(STEPS) // 8 % 2 == 1)),
    Trial("restarts", f"% altered, after the first {FIRST} steps of each", 1.0, _restart, 1.0, _after_restarts),
    Trial(
        "spikes of many sizes", "applied of a spike, over the level", 1.35, _with_spikes, 50 * LEVEL, _spikes_applied
    ),
    Trial("norms of 1e-8", "% altered", 0.1, lambda rng: 1e-8 * _calm(rng), 1.0, _altered),
    Trial("norms of 1e-40", "% altered", 0.1, lambda rng: 1e-40 * _calm(rng), 1.0, _altered),
    Trial("a constant norm", "% altered", 0.0, lambda rng: np.full(STEPS, LEVEL), 1.0, _altered),
)


def run_stream(
    controller: Controller[Any], norms: np.ndarray, static_threshold: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Drive a batch of streams, shape `[steps, streams]`; returns coefficients and thresholds of that shape."""
    values = norms.astype(np.float32)
    state = controller.init(ARRAY, (norms.shape[1],))
    nan, static = host_number(float("nan")), host_number(static_threshold)
    coefficients: list[Any] = []
    thresholds: list[Any] = []
    with np.errstate(all="ignore"):
        for row in values:
            decision, state = controller.update(state, Observation(row, nan, static))
            coefficients.append(decision.coefficient)
            thresholds.append(decision.threshold)
    return np.stack(coefficients), np.stack(thresholds)


def run_trials(controller: Controller[Any], seeds: int) -> dict[str, float]:
    """The figure of every trial, by name; of each, `seeds` streams are run."""
    found: dict[str, float] = {}
    for static in sorted({trial.static_threshold for trial in TRIALS}):
        alike = [(i, trial) for i, trial in enumerate(TRIALS) if trial.static_threshold == static]
        made = [[trial.norms(np.random.default_rng(10_000 + 100 * i + s)) for s in range(seeds)] for i, trial in alike]
        # Side by side, because an update costs the same for one norm and for many.
        norms = np.stack([stream for streams in made for stream in streams], axis=1)
        coefficients, _ = run_stream(controller, norms, static)
        for place, (_, trial) in enumerate(alike):
            part = slice(place * seeds, (place + 1) * seeds)
            found[trial.name] = trial.measure(norms[:, part], coefficients[:, part])
    return {trial.name: found[trial.name] for trial in TRIALS}


def trial_table(found: dict[str, dict[str, float]]) -> str:
    """Rows are trials, columns controllers; the bar is that of `adaptive`."""
    width = max(len(trial.name) for trial in TRIALS)
    columns = [max(len(name), 9) for name in found]
    head = " ".join(f"{name:>{w}s}" for name, w in zip(found, columns, strict=True))
    lines = [f"{'':{width}s} {'bar':>6s} {head}"]
    for trial in TRIALS:
        row = " ".join(f"{figures[trial.name]:>{w}.3g}" for figures, w in zip(found.values(), columns, strict=True))
        lines.append(f"{trial.name:{width}s} {trial.bar:6.4g} {row}  {trial.figure}")
    return "\n".join(lines)
