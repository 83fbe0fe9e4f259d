"""The gauntlet: what a rule does to norms whose story is known. `hf-adaclip gauntlet`.

Streams are n_t = 0.3 exp(noise_t) with 2000 steps of burn-in. Noise: normal with sd 0.15, or Student-t with 5 degrees of freedom and scale
0.12 (heavy tails, as gradient norms have them). Four stories: nothing happens; one spike of 100 times the norm and another three steps
later; a lasting rise to three times the level; a slow decay to an eighth. Three ways to fail show here: always on (alters what is calm),
self-masking (the second spike passes), lock-in (a lasting rise is never accepted). The streams of `trials.py` come on top: growth that
does not end, sources that are mixed, restarts, spikes of many sizes, tiny and constant norms.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.audit.replay import REPLAYABLE
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Controller, Observation, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR, host_number
from hf_adaclip.errors import ConfigError
from hf_adaclip.flat import fields_of_text
from hf_adaclip.gauntlet.trials import run_stream, run_trials, trial_table

__all__ = ["judge", "judge_config", "run_stream", "trial_table"]

CALM_LEVEL: Final = 0.3
BURN_IN: Final = 2000
MEASURED: Final = 5000
SPIKE: Final = 100.0
RISE: Final = 3.0
NOISES: Final[dict[str, Callable[[np.random.Generator, int], np.ndarray]]] = {
    "normal": lambda rng, n: 0.15 * rng.standard_normal(n),
    "student": lambda rng, n: 0.12 * rng.standard_t(5, n),
}


@dataclass(frozen=True)
class Verdict:
    """How a rule did, averaged over seeds.

    Attributes:
        altered_calm: Share of steps altered when nothing is wrong, in percent.
        first_spike, second_spike: What is applied of the spikes, as multiples of the calm level; 0 when they are left out.
        accepted_after: Steps after a lasting rise until fewer than half of the next 50 are altered; inf when that never comes.
        altered_decay: Share of steps altered while norms fall, in percent.
        state_numbers: Numbers that the rule keeps per norm.
        update_microseconds: Time of one decision on the host, median.
        streams: The figures of `TRIALS`, by name.
    """

    altered_calm: float
    first_spike: float
    second_spike: float
    accepted_after: float
    altered_decay: float
    state_numbers: int
    update_microseconds: float
    streams: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(controller: Controller[Any], noise: str, seeds: int) -> Verdict:
    """Put a controller through all four stories.

    Args:
        controller: What decides.
        noise: A key of `NOISES`.
        seeds: Streams of each story.
    """

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
    spikes[BURN_IN] *= SPIKE
    spikes[BURN_IN + 3] *= SPIKE
    coefficient, _ = run_stream(controller, spikes)
    applied = spikes * coefficient / CALM_LEVEL

    shift = stream(1000, 2000)
    shift[BURN_IN:] *= RISE
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
        state_numbers=sum(np.size(value) for value in controller.init(SCALAR, ())),
        update_microseconds=_time_update(controller, calm[:500, 0]),
        streams=run_trials(controller, seeds),
    )


def _time_update(controller: Controller[Any], norms: np.ndarray) -> float:
    state, times = controller.init(SCALAR, ()), []
    nan, static = host_number(float("nan")), host_number(1.0)
    with np.errstate(all="ignore"):
        for norm in norms.astype(np.float32):
            begin = time.perf_counter()
            _, state = controller.update(state, Observation(norm, nan, static))
            times.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(times))


def parse_controller(text: str) -> AdaptiveClipConfig:
    """A config from `name` or `name:field=value,field=value`, as the command line takes it.

    Raises:
        ConfigError: It names no controller of norms, or a setting breaks its rule.
    """
    fields = fields_of_text(text, "controller") or {"controller": text}
    config, name = AdaptiveClipConfig.from_dict(fields), fields["controller"]
    if name not in REPLAYABLE:
        raise ConfigError(
            f"`controller` must go by norms here ({', '.join(REPLAYABLE)}), but is {name!r} instead: that one goes by weights or moments."
        )
    return config


def judge_config(config: AdaptiveClipConfig, noise: str = "normal", seeds: int = 5) -> Verdict:
    """The verdict on what a config describes, skips and limits included."""
    return judge(build_controller(config), noise, seeds)


def story(noise: str = "normal", seed: int = 0) -> Series:
    """One stream in which everything happens, for the eye: calm, two spikes, a lasting rise, NaN, decay."""
    rng = np.random.default_rng(seed)
    norms = CALM_LEVEL * np.exp(NOISES[noise](rng, 1500))
    norms[400] *= SPIKE
    norms[403] *= SPIKE
    norms[600:] *= RISE
    norms[800], norms[801] = np.nan, np.inf
    norms[900:] *= 8.0 ** -(np.arange(600) / 600)
    size = len(norms)
    return Series(
        path=f"the gauntlet, {noise} noise",
        source="CSV",
        steps=np.arange(size),
        norms=norms.astype(np.float32),
        losses=np.full(size, np.nan, np.float32),
        thresholds=None,
        coefficients=None,
        paces=None,
        reaches=None,
        reasons=None,
        header=None,
        every=1,
    )


def header_line(width: int) -> str:
    """Names of the columns: what `Verdict` holds, `us` for the microseconds of a decision."""
    columns = f"{'altered calm':>13s} {'spike 1':>9s} {'spike 2':>9s} {'3x accepted':>12s} {'in decay':>9s} {'state':>7s} {'us':>6s}"
    return f"{'':{width}s} {columns}"


def verdict_line(name: str, v: Verdict, width: int) -> str:
    """One row of the table."""
    return (
        f"{name:{width}s} {percent(v.altered_calm):>13s} {spike(v.first_spike):>9s} {spike(v.second_spike):>9s} "
        f"{steps(v.accepted_after):>12s} {percent(v.altered_decay):>9s} {v.state_numbers:7d} {v.update_microseconds:6.0f}"
    )


def percent(value: float) -> str:
    """A share in percent with two significant digits."""
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def spike(value: float) -> str:
    """What was applied of a spike."""
    return "skipped" if value == 0 else f"{value:.2f}x"


def steps(value: float) -> str:
    """Steps until a rise was accepted."""
    return "never" if np.isinf(value) else f"{value:.0f} steps"
