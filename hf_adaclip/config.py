"""`AdaptiveClipConfig`: every setting of the package in one dataclass that `HfArgumentParser` turns into flags."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.errors import ConfigError
from hf_adaclip.fields import HyperParameters
from hf_adaclip.hints import FIELDS_ELSEWHERE, near, near_clip, shown
from hf_adaclip.migrate import autoclip_fields, bitsandbytes_fields, zclip_fields
from hf_adaclip.validation import (
    COMMON,
    FOLDS,
    GRANULARITIES,
    ON_SPIKE,
    POLICIES,
    fields_of_text,
    foreign_problems,
    json_or_text,
    problems_of,
)

_MAY_BE_INFINITE: Final = ("static_threshold", "spectral_width")


@dataclass(frozen=True)
class AdaptiveClipConfig(HyperParameters):
    """What the controller does, how far it may go, and where it writes down what it did.

    All problems are reported at once, at construction, as one [`ConfigError`]: types, ranges, names that are near to a field's, and
    hyperparameters of a controller that is not in use.

    A *deviation* is the signed relative distance of a gradient norm `n` from the running level `L`,
    `2 (n - L) / (n + L)`, close to `log(n / L)` for small distances and bounded by 2. A *spread* is its mean
    absolute value. Widths count spreads.
    """

    controller: str = field(
        default="adaptive",
        metadata={
            "help": "Name of the controller: adaptive, static, zscore (ZClip), percentile (AutoClip), ema_ratio (AdaGC), median (icefall), "
            "quantile, weight_ratio (AGC), second_moment (element-wise), and log_zscore (lingvo) and mean_sd (OLMo-core), which skip."
        },
    )
    granularity: str = field(
        default="auto",
        metadata={
            "help": "'global' judges and clips the norm over all parameters; 'tensor' does so for each parameter, 'module' for each "
            "module that owns parameters (needs their names: a Trainer, or `model=`); 'unit' and 'element' belong to weight_ratio and "
            "second_moment. 'auto': what is usual for the controller.",
            "choices": list(GRANULARITIES),
        },
    )
    static_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest gradient norm allowed while the controller warms up, in shadow mode, and as long as `ceiling_share` holds. "
            "Unset: `max_grad_norm` of the Trainer, 1.0 elsewhere. 'inf' never acts."
        },
    )
    shadow: bool = field(
        default=False,
        metadata={"help": "Decide and record, but clip with the static threshold, exactly as the stock Trainer does."},
    )
    max_pace: float = field(
        default=1.0,
        metadata={
            "help": "Largest multiplier on the learning rate of a step (>= 1). 1.0 switches the pace off; 64 leaves it room to find a "
            "rate that is far above the given one."
        },
    )
    spectral_width: float | None = field(
        default=None,
        metadata={
            "help": "Clip the singular values of each hidden matrix's gradient softly at this many times their root mean square, and give "
            "the matrix its norm back: 0 makes them equal, 'inf' changes nothing. Unset: off."
        },
    )
    spectral_every: int = field(
        default=1, metadata={"help": "Steps from one in which the spectral range acts to the next (>= 1)."}
    )
    agreement: bool = field(
        default=False,
        metadata={
            "help": "Take back, after each step of the optimizer, what of it goes against the sign of the present gradient, and make the "
            "rest larger by as much. Needs the optimizer."
        },
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
    ledger_required: bool = field(
        default=False,
        metadata={
            "help": "Stop when the ledger cannot be written; otherwise training goes on, and the gap shows in it."
        },
    )
    self_test: bool = field(
        default=True,
        metadata={"help": "Check at the start that clipping takes effect, and stop if something undoes it."},
    )
    fold: str = field(
        default="auto",
        metadata={
            "help": "On an accelerator, let the fused step scale the gradients where that is the same but for the last bit ('auto'). "
            "Between clipping and the step `p.grad` is unclipped then; 'never' scales in a pass of its own.",
            "choices": list(FOLDS),
        },
    )
    nan_filter_on_device: bool = field(
        default=False,
        metadata={
            "help": "In a Trainer, keep NaN losses out of the log on the device and switch off `logging_nan_inf_filter`, which makes the "
            "host wait twice per micro-batch."
        },
    )
    one_step_late: bool = field(
        default=False,
        metadata={"help": "Apply each threshold one step later. Set by the package under DeepSpeed, not by you."},
    )
    ring_capacity: int = field(
        default=256,
        metadata={"help": "Steps kept on the device between two reads by the host (1 to 65536)."},
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
    on_spike: str = field(
        default="auto",
        metadata={
            "help": "What becomes of a step that the controller would cut: 'clip', 'skip' (the step is left out as a whole), or 'auto' "
            "(as the controller's source does: skip for log_zscore and mean_sd, clip for the others).",
            "choices": list(ON_SPIKE),
        },
    )
    parameter_rules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Other settings for some parameters, as JSON: glob on the parameter's name -> 'exclude', a controller, or fields, "
            """such as '{"classifier.*": {"controller": "static", "static_threshold": 1.0}, "*.bias": "exclude"}'. The first match """
            "counts. With granularity 'global' all matches of one pattern share one norm."
        },
    )

    if not TYPE_CHECKING:  # which is to see the fields, and not `Any`

        def __new__(cls, *args, **fields):
            """Refuse unknown names with a hint, before Python does it without one."""
            names = cls.names()
            if unknown := [_unknown_field(key, names) for key in fields if key not in names]:
                raise ConfigError(unknown)
            made = super().__new__(cls)
            # A parser of flags hands over every field, and another flag (`--clip`) may yet name the controller: `resolve` looks then.
            object.__setattr__(made, "_of_parser", len(fields) == len(names))
            return made

    def __post_init__(self) -> None:
        if isinstance(self.parameter_rules, str):
            object.__setattr__(self, "parameter_rules", json_or_text(self.parameter_rules))
        for name in _MAY_BE_INFINITE:
            if getattr(self, name) == "inf":  # as `to_dict` writes it, because JSON has no infinity
                object.__setattr__(self, name, math.inf)
        problems = problems_of(self)
        if not (self.__dict__.get("_of_parser") and self.controller == type(self).controller):
            problems += foreign_problems(self)
        if problems:
            raise ConfigError(problems)

    def settled(self) -> "AdaptiveClipConfig":
        """The same, once nothing else can name the controller any more.

        Raises:
            ConfigError: A hyperparameter was set that belongs to a controller that is not in use.
        """
        if problems := foreign_problems(self):
            raise ConfigError(problems)
        return self

    @property
    def looks_at_loss(self) -> bool:
        """Whether decisions depend on the training loss; then all ranks have to see the same one."""
        return self.divergence_spreads > 0 or any(CONTROLLERS[name].looks_at_loss for name in self._controllers)

    @property
    def _controllers(self) -> set[str]:
        """Names of all controllers that decide, those of `parameter_rules` among them."""
        rules = self.parameter_rules if isinstance(self.parameter_rules, dict) else {}
        own = (rule if isinstance(rule, str) else rule.get("controller", self.controller) for rule in rules.values())
        return {self.controller, *own} & set(CONTROLLERS)

    def resolved(self) -> "AdaptiveClipConfig":
        """The same with 'auto' granularity spelled out: what runs, ledgers and checkpoints go by.

        The static threshold is one for the global norm, so only there it can be a ceiling.
        """
        share = self.ceiling_share if self.works_on == "global" else 1.0  # "never" belongs to every controller
        return self.replace(granularity=self.works_on, ceiling_share=share)

    @property
    def works_on(self) -> str:
        """The granularity, that of the controller where it is 'auto'."""
        return CONTROLLERS[self.controller].granularities[0] if self.granularity == "auto" else self.granularity

    def for_pattern(self, pattern: str) -> "AdaptiveClipConfig | None":
        """The settings for what a pattern of `parameter_rules` matches; None where it excludes.

        Raises:
            ConfigError: They break a rule.
        """
        assert isinstance(self.parameter_rules, dict)
        rule = self.parameter_rules[pattern]
        if rule == "exclude":
            return None
        own = {"controller": rule} if isinstance(rule, str) else rule
        # What belongs to the run's controller alone is not handed down to another one.
        kind = CONTROLLERS.get(own.get("controller", self.controller))
        kept = COMMON if kind is None else COMMON | {f.name for f in dataclasses.fields(kind)}
        plain = {f.name: f.default for f in dataclasses.fields(HyperParameters) if f.name not in kept}
        return self.replace(parameter_rules=None, granularity=self.works_on, **{**plain, **own})

    @classmethod
    def names(cls) -> list[str]:
        """All fields."""
        return [f.name for f in dataclasses.fields(cls)]

    # -- conversions ---------------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, clip: "ClipArgument") -> "AdaptiveClipConfig":
        """Turn what users pass as `clip=` into a config.

        Args:
            clip: The name of a controller; `NAME:FIELD=VALUE,FIELD=VALUE`; a config; its fields; or the path of its JSON. A value with a
                comma in it (`parameter_rules`) needs one of the latter three.

        Raises:
            ConfigError: `clip` is none of these, or a setting is wrong.
        """
        if isinstance(clip, AdaptiveClipConfig):
            return clip.settled()
        if isinstance(clip, Mapping):
            return cls.from_dict(dict(clip))
        if isinstance(clip, str) and clip in CONTROLLERS:
            return cls(controller=clip)
        if isinstance(clip, str) and (fields := fields_of_text(clip, "clip", CONTROLLERS)) is not None:
            return cls.from_dict(fields)
        if isinstance(clip, str | Path):
            path = Path(clip)
            if path.suffix == ".json" or path.is_file():
                return cls.from_json(path)
        names = ", ".join(sorted(CONTROLLERS))
        raise ConfigError(
            f"`clip` must be a controller ({names}), NAME:FIELD=VALUE,..., an `AdaptiveClipConfig`, a dict of its fields, or the path of "
            f"its JSON file, but is {shown(clip)} instead.{near_clip(clip, CONTROLLERS)}"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdaptiveClipConfig":
        """Build a config from a mapping; unknown keys are an error that suggests the nearest field.

        Raises:
            ConfigError: A key is unknown or a value breaks its rule.
        """
        not_names = [
            f"A field of AdaptiveClipConfig must be a string, but is {k!r} instead."
            for k in values
            if not isinstance(k, str)
        ]
        if not_names:
            raise ConfigError(not_names)
        return cls(**values).settled()

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

    @classmethod
    def from_zclip(
        cls,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | None = 1.0,
        warmup_steps: int = 25,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
    ) -> "AdaptiveClipConfig":
        """What `ZClip(...)` of PyPI `zclip` is here, its static cap included (`controllers/zscore.py` lists what differs).

        Raises:
            ConfigError: A form of ZClip that is not here, or a value breaks its rule.
        """
        return cls(**zclip_fields(alpha, z_thresh, max_grad_norm, warmup_steps, mode, clip_option))

    @classmethod
    def from_autoclip(
        cls, quantile: float = 0.9, history_length: int = 1000, global_threshold: bool = False
    ) -> "AdaptiveClipConfig":
        """What `QuantileClip(...)` of PyPI `autoclip` is here. For AutoClip's own code, set `controller="percentile"` and `percentile`."""
        return cls(**autoclip_fields(quantile, history_length, global_threshold))

    @classmethod
    def from_bitsandbytes_percentile(cls, percentile_clipping: int) -> "AdaptiveClipConfig":
        """What `percentile_clipping=` of bitsandbytes' optimizers was, before it was removed in 0.50.

        Raises:
            ConfigError: It was 100 (off), or no percentile.
        """
        return cls(**bitsandbytes_fields(percentile_clipping))

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for strict JSON: an infinite threshold or width is the string "inf"."""
        values = dataclasses.asdict(self)
        for fields in (values, *(values["parameter_rules"] or {}).values()):
            for name in _MAY_BE_INFINITE:
                if isinstance(fields, dict) and fields.get(name) == math.inf:
                    fields[name] = "inf"
        return values

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def replace(self, **changes: Any) -> "AdaptiveClipConfig":
        """A copy with some fields changed; the copy is validated like any other config."""
        # A config of a parser whose controller is still to be named stays one.
        changed = dataclasses.replace(self, **changes)
        return changed if "controller" not in changes and foreign_problems(self) else changed.settled()


def as_number(value: Any) -> Any:
    """What was given as a number, as a float; what is none, text among it, stays as it is for the checks of types to report."""
    if isinstance(value, str | bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _unknown_field(key: str, names: list[str]) -> str:
    hint = FIELDS_ELSEWHERE.get(key) or near(key, names) or f" Fields: {', '.join(names)}."
    return f"`{key}` must be a field of AdaptiveClipConfig, but is unknown instead.{hint}"


ClipArgument: TypeAlias = str | Path | Mapping[str, Any] | AdaptiveClipConfig
"""What every entry point takes as `clip=`."""
