"""`AdaptiveClipConfig`: every setting of the package in one dataclass that `HfArgumentParser` turns into flags."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.errors import ConfigError

GRANULARITIES = ("global", "tensor")

# (field, lower bound, upper bound, lower inclusive, upper inclusive)
_RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("max_pace", 1.0, math.inf, True, False),
    ("max_consecutive_nonfinite", 1, math.inf, True, False),
    ("warmup_observations", 2, math.inf, True, False),
    ("decay", 0.0, 1.0, False, False),
    ("far_width", 0.0, math.inf, False, False),
    ("near_width", 0.0, math.inf, False, False),
    ("min_far_width", 0.0, math.inf, False, False),
    ("max_far_width", 0.0, math.inf, False, False),
    ("widen_step", 0.0, math.inf, True, False),
    ("narrow_factor", 0.0, 1.0, False, True),
    ("accept_after", 2, math.inf, True, False),
    ("min_spread", 0.0, 2.0, False, False),
    ("max_edge", 0.0, 1.9, False, True),
    ("max_near", 0.0, 1.9, True, True),
    ("pace_growth", 1.0, 2.0, False, True),
    ("pace_backoff", 0.0, 1.0, False, False),
    ("pace_progress_fast", 0.0, 1.0, False, False),
    ("pace_progress_slow", 0.0, 1.0, False, False),
    ("z_threshold", 0.0, math.inf, False, False),
    ("percentile", 0.0, 100.0, False, True),
    ("history", 10, 1_000_000, True, True),
    ("ring_capacity", 1, 65536, True, True),
    ("divergence_spreads", 0.0, math.inf, True, False),
    ("divergence_steps", 1, math.inf, True, False),
)
# The same for fields that may be None.
_OPTIONAL_RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("static_threshold", 0.0, math.inf, False, False),
    ("freeze_after", 0, math.inf, True, False),
    ("min_threshold", 0.0, math.inf, False, False),
    ("max_threshold", 0.0, math.inf, False, False),
    ("max_widening_step", 1.0, math.inf, True, False),
    ("max_widening_100", 1.0, math.inf, True, False),
    ("max_skipped", 0, math.inf, True, False),
)
POLICIES = ("continue", "fallback", "stop")


@dataclass(frozen=True)
class AdaptiveClipConfig:
    """What the controller does, how far it may go, and where it writes down what it did.

    All problems are reported at once, at construction, as one [`ConfigError`].

    A *deviation* is the signed relative distance of a gradient norm `n` from the running level `L`,
    `2 (n - L) / (n + L)`, close to `log(n / L)` for small distances and bounded by 2. A *spread* is its mean
    absolute value. Widths count spreads.
    """

    controller: str = field(
        default="adaptive",
        metadata={"help": "Name of the controller: adaptive, static, zscore (ZClip) or percentile (AutoClip)."},
    )
    granularity: str = field(
        default="global",
        metadata={
            "help": "'global' judges and clips the norm over all parameters; 'tensor' does so for each parameter.",
            "choices": list(GRANULARITIES),
        },
    )
    static_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest gradient norm allowed while the controller warms up, and in shadow mode. "
            "Unset: `max_grad_norm` of the Trainer, 1.0 elsewhere."
        },
    )
    shadow: bool = field(
        default=False,
        metadata={"help": "Decide and record, but clip with the static threshold, exactly as the stock Trainer does."},
    )
    max_pace: float = field(
        default=1.0,
        metadata={"help": "Largest multiplier on the learning rate of a step (>= 1). 1.0 switches the pace off."},
    )
    max_consecutive_nonfinite: int = field(
        default=50,
        metadata={"help": "Stop after this many steps in a row with a NaN or infinite norm (each one is skipped)."},
    )
    ledger: str | None = field(
        default="auto",
        metadata={
            "help": "File of the audit ledger. 'auto': clip_ledger.jsonl in the output_dir of a Trainer, "
            "no ledger in a hand-written loop. 'none': no ledger."
        },
    )
    ring_capacity: int = field(
        default=256,
        metadata={"help": "Steps kept on the device between two reads by the host (1 to 65536)."},
    )
    warmup_observations: int = field(
        default=50,
        metadata={"help": "Finite norms seen before the controller decides; the static threshold rules until then."},
    )
    decay: float = field(
        default=0.97,
        metadata={"help": "Decay per step of the running level and spread, in (0, 1): memory of 1/(1-decay) steps."},
    )
    far_width: float = field(
        default=5.0,
        metadata={"help": "adaptive: first half-width of the range, in spreads. A norm beyond it is an excursion."},
    )
    near_width: float = field(
        default=1.5,
        metadata={"help": "adaptive: what an excursion is cut back to: this many spreads above the level."},
    )
    min_far_width: float = field(
        default=4.5, metadata={"help": "adaptive: the range never gets narrower, in spreads."}
    )
    max_far_width: float = field(default=8.0, metadata={"help": "adaptive: the range never gets wider, in spreads."})
    widen_step: float = field(
        default=0.01, metadata={"help": "adaptive: spreads by which the range widens per step without an excursion."}
    )
    narrow_factor: float = field(
        default=0.8, metadata={"help": "adaptive: factor in (0, 1] on the range's width after an upward excursion."}
    )
    accept_after: int = field(
        default=6, metadata={"help": "adaptive: excursions in a row at one level that make it the new level."}
    )
    min_spread: float = field(
        default=0.05,
        metadata={"help": "adaptive: floor of the spread, so that a very calm run is not held too tight."},
    )
    max_edge: float = field(
        default=0.6,
        metadata={
            "help": "adaptive: the edge of the range is never farther than this deviation (0.6: 1.86 x the level)."
        },
    )
    max_near: float = field(
        default=0.2,
        metadata={
            "help": "adaptive: an excursion is never left farther out than this deviation (0.2: 1.22 x the level)."
        },
    )
    pace_growth: float = field(
        default=1.02, metadata={"help": "Factor by which the pace grows per step that is calm and progressing."}
    )
    pace_backoff: float = field(
        default=0.7,
        metadata={"help": "Factor on the pace after an upward excursion or a skipped step; never below 1."},
    )
    pace_progress_fast: float = field(
        default=0.9,
        metadata={"help": "Decay of the fast average of the training loss; below the slow one = progress."},
    )
    pace_progress_slow: float = field(
        default=0.98, metadata={"help": "Decay of the slow average of the training loss."}
    )
    z_threshold: float = field(
        default=2.5, metadata={"help": "zscore: standard deviations above the mean at which clipping starts."}
    )
    percentile: float = field(
        default=10.0, metadata={"help": "percentile: the percentile of past norms that becomes the threshold."}
    )
    freeze_after: int | None = field(
        default=None, metadata={"help": "Stop adapting from this step on (counted from 0) and keep range and pace."}
    )
    min_threshold: float | None = field(
        default=None, metadata={"help": "Floor of the threshold, in units of the norm; holds in the warm-up too."}
    )
    max_threshold: float | None = field(
        default=None, metadata={"help": "Ceiling of the threshold, in units of the norm; holds in the warm-up too."}
    )
    max_widening_step: float | None = field(
        default=None,
        metadata={"help": "Largest factor (>= 1) by which the threshold may grow from one step to the next."},
    )
    max_widening_100: float | None = field(
        default=None, metadata={"help": "Largest factor (>= 1) by which the threshold may grow within 100 steps."}
    )
    max_skipped: int | None = field(
        default=None, metadata={"help": "Budget of steps left out because they were not finite; more is trouble."}
    )
    divergence_spreads: float = field(
        default=0.0,
        metadata={
            "help": "Trouble when the average loss is this many spreads above its best for `divergence_steps`; 0: off."
        },
    )
    divergence_steps: int = field(
        default=50, metadata={"help": "How many steps in a row the loss has to be that high to count as divergence."}
    )
    on_trouble: str = field(
        default="continue",
        metadata={
            "help": "What to do on trouble: 'continue' (warn), 'fallback' (static threshold from there on) or 'stop' (keep a "
            "checkpoint and end the run).",
            "choices": list(POLICIES),
        },
    )
    history: int = field(default=1000, metadata={"help": "percentile: how many past norms are kept."})

    def __post_init__(self) -> None:
        problems = _type_problems(self)
        if not problems:
            problems = _range_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def looks_at_loss(self) -> bool:
        """Whether decisions depend on the training loss; then all ranks have to see the same one."""
        return self.max_pace > 1 or self.divergence_spreads > 0

    # -- conversions ---------------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, clip: "ClipArgument") -> "AdaptiveClipConfig":
        """Turn what users pass as `clip=` into a config: a controller name, a config, or the path of its JSON.

        Raises:
            ConfigError: `clip` is none of these.
        """
        if isinstance(clip, AdaptiveClipConfig):
            return clip
        if isinstance(clip, str) and clip in CONTROLLERS:
            return cls(controller=clip)
        if isinstance(clip, str | Path):
            path = Path(clip)
            if path.suffix == ".json" or path.is_file():
                return cls.from_json(path)
        names = ", ".join(sorted(CONTROLLERS))
        near = difflib.get_close_matches(str(clip), sorted(CONTROLLERS), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"`clip` must be a controller ({names}), an `AdaptiveClipConfig` or the path of its JSON file, "
            f"but is {clip!r} instead.{hint}"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdaptiveClipConfig":
        """Build a config from a mapping; unknown keys are an error that suggests the nearest field.

        Raises:
            ConfigError: A key is unknown or a value breaks its rule.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        problems = []
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                problems.append(
                    f"`{key}` must be a field of AdaptiveClipConfig, but is unknown instead."
                    + (f" Did you mean `{near[0]}`?" if near else f" Fields: {', '.join(names)}.")
                )
        if problems:
            raise ConfigError(problems)
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> "AdaptiveClipConfig":
        """Read the JSON that [`AdaptiveClipConfig.to_json`] wrote.

        Raises:
            ConfigError: The file is missing, is not JSON, or breaks a rule.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"`clip` must be a readable JSON file, but {path} is not: {error}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"`clip` must be a JSON object of fields, but {path} holds {type(values).__name__}.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def replace(self, **changes: Any) -> "AdaptiveClipConfig":
        """A copy with some fields changed; the copy is validated like any other config."""
        return dataclasses.replace(self, **changes)


ClipArgument: TypeAlias = str | Path | AdaptiveClipConfig
"""What every entry point takes as `clip=`."""


def _type_problems(config: AdaptiveClipConfig) -> list[str]:
    problems = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in ("controller", "granularity", "on_trouble"):
            ok, rule = isinstance(value, str), "a string"
        elif f.name == "ledger":
            ok, rule = value is None or isinstance(value, str), "a path as a string, 'auto', 'none' or None"
        elif f.name in ("freeze_after", "max_skipped"):
            ok, rule = (
                value is None or _is_whole(value),
                "a whole number or None",
            )
        elif f.default is None:
            ok, rule = value is None or _is_number(value), "a number or None"
        elif isinstance(f.default, bool):
            ok, rule = isinstance(value, bool), "True or False"
        elif isinstance(f.default, int):
            ok, rule = _is_whole(value), "a whole number"
        else:
            ok, rule = _is_number(value), "a number"
        if not ok:
            problems.append(f"`{f.name}` must be {rule}, but is {value!r} instead.")
    return problems


def _range_problems(config: AdaptiveClipConfig) -> list[str]:
    problems = []
    if config.controller not in CONTROLLERS:
        near = difflib.get_close_matches(config.controller, sorted(CONTROLLERS), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        problems.append(
            f"`controller` must be one of {', '.join(sorted(CONTROLLERS))}, but is {config.controller!r} instead.{hint}"
        )
    if config.granularity not in GRANULARITIES:
        problems.append(
            f"`granularity` must be one of {', '.join(GRANULARITIES)}, but is {config.granularity!r} instead."
        )
    if config.on_trouble not in POLICIES:
        problems.append(f"`on_trouble` must be one of {', '.join(POLICIES)}, but is {config.on_trouble!r} instead.")
    for name, low, high, low_in, high_in in (*_RANGES, *_OPTIONAL_RANGES):
        value = getattr(config, name)
        if value is None:
            continue
        above = value >= low if low_in else value > low
        below = value <= high if high_in else value < high
        if not (above and below):
            interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
            problems.append(f"`{name}` must be in {interval}, but is {value} instead.")
    if not config.min_far_width <= config.far_width <= config.max_far_width:
        problems.append(
            f"`far_width` must be within [`min_far_width`, `max_far_width`] = [{config.min_far_width}, "
            f"{config.max_far_width}], but is {config.far_width} instead."
        )
    if (
        config.min_threshold is not None
        and config.max_threshold is not None
        and config.min_threshold > config.max_threshold
    ):
        problems.append(
            f"`min_threshold` must be at most `max_threshold` ({config.max_threshold}), but is {config.min_threshold} instead."
        )
    if config.on_trouble != "continue" and config.max_skipped is None and config.divergence_spreads == 0:
        problems.append(
            f"`on_trouble` must be 'continue' as long as nothing counts as trouble, but is {config.on_trouble!r} instead: "
            "set `max_skipped` or `divergence_spreads`."
        )
    if config.near_width >= config.min_far_width:
        problems.append(
            f"`near_width` must be below `min_far_width` ({config.min_far_width}), but is {config.near_width} instead: "
            "a step that is cut back must land inside the range."
        )
    if config.pace_progress_fast >= config.pace_progress_slow:
        problems.append(
            f"`pace_progress_fast` must be below `pace_progress_slow` ({config.pace_progress_slow}), but is "
            f"{config.pace_progress_fast} instead."
        )
    if config.max_pace > 1 and config.controller in CONTROLLERS and not CONTROLLERS[config.controller].paces:
        problems.append(
            f"`max_pace` must be 1.0 with controller '{config.controller}', but is {config.max_pace} instead: "
            "only 'adaptive' changes the pace."
        )
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> bool:
    # Beyond 2**53 a whole number is no exact float any more, and none of these fields means anything there.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
