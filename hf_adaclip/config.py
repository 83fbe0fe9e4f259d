"""`AdaptiveClipConfig`: the settings of a run, and the controller with its own."""

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias

from hf_adaclip.controllers import CONTROLLERS, Controller, name_of
from hf_adaclip.controllers.percentile import from_autoclip, from_bitsandbytes_percentile
from hf_adaclip.controllers.presets import PRESETS, SHAPE_OFF
from hf_adaclip.controllers.settings import by_key, setting, settings_of
from hf_adaclip.controllers.zscore import from_zclip
from hf_adaclip.errors import ConfigError
from hf_adaclip.flat import carried, choose, clip_names, fields_of_text, flat_names, json_or_text, keyed, lost
from hf_adaclip.hints import near_clip, shown
from hf_adaclip.validation import (
    controller_problem,
    ledger_problem,
    problems_of_run,
    problems_together,
    rules_problem,
)

P = ParamSpec("P")
_MAY_BE_INFINITE: Final = ("static_threshold", "spectral_width")


def _imported(fields: Callable[P, dict[str, Any]]) -> "Callable[P, AdaptiveClipConfig]":
    """A way to make a config of what another package calls its settings."""

    @functools.wraps(fields)
    def make(*args: P.args, **kwargs: P.kwargs) -> "AdaptiveClipConfig":
        return AdaptiveClipConfig(**fields(*args, **kwargs))

    return staticmethod(make)


@dataclass(frozen=True, init=False)
class AdaptiveClipConfig:
    """What the controller does, how far it may go, and where it writes down what it did.

    All problems are reported at once, at construction, as one [`ConfigError`]: types, ranges, names that are near to a field's, and
    settings of a controller that is not in use.

    A *deviation* is the signed relative distance of a gradient norm `n` from the running level `L`,
    `2 (n - L) / (n + L)`, close to `log(n / L)` for small distances and bounded by 2. A *spread* is its mean
    absolute value. Widths count spreads.

    Args:
        controller: A name, or a controller with its settings, such as `ZScore(width=3)`. The field holds the name; `settings` holds the
            controller.
        values: Fields below, and settings of the controller, by their names there or the keys that files have (`z_threshold`).

    Example:
        >>> from hf_adaclip import AdaptiveClipConfig, ZScore
        >>> AdaptiveClipConfig(controller=ZScore(width=3.0)) == AdaptiveClipConfig(controller="zscore", width=3.0)
        True
    """

    controller: str = setting(
        "adaptive",
        help="Name of the controller, or the controller itself.",
        check=controller_problem,
    )
    settings: Controller[Any] = field(init=False)
    granularity: str = setting(
        "auto",
        help="'global' judges and clips the norm over all parameters; 'tensor' does so for each parameter, 'module' for each module that "
        "owns parameters (needs their names: a Trainer, or `model=`); 'unit' and 'element' belong to weight_ratio and second_moment. "
        "'auto': what is usual for the controller.",
        choices=("auto", "global", "module", "tensor", "unit", "element"),
        flag=True,
    )
    static_threshold: float | None = setting(
        None,
        help="Largest gradient norm allowed while the controller warms up, in shadow mode, and as long as `ceiling_share` holds. Unset: "
        "`max_grad_norm` of the Trainer, 1.0 elsewhere. 'inf' never acts.",
        range="(0, inf]",
        flag=True,
    )
    shadow: bool = setting(
        False,
        help="Decide and record, but clip with the static threshold, exactly as the stock Trainer does.",
        flag=True,
    )
    max_consecutive_nonfinite: int = setting(
        50,
        help="Stop after this many steps in a row with a NaN or infinite norm (each one is skipped).",
        range="[1, inf)",
        flag=True,
    )
    spectral_width: float | str | None = setting(
        "auto",
        help="Clip the singular values of each hidden matrix's gradient softly at this many times their root mean square, and give the "
        "matrix its norm back: 0 makes them equal, 'inf' changes nothing, 'none' is off. 'auto': 0 with the controller `adaptive` where "
        "nothing speaks against it (`explain` says what does), else off.",
        range="[0, inf]",
        words=("auto",),
    )
    spectral_every: int = setting(
        1, help="Steps from one in which the spectral range acts to the next.", range="[1, inf)"
    )
    spectral_memory: float = setting(
        0.9,
        help="Singular values are those of an average over steps of which each step leaves this share; 0 takes each step's own and keeps "
        "nothing between steps.",
        range="[0, 1)",
    )
    agreement: bool | str = setting(
        "auto",
        help="Take back, after each step of the optimizer, what of it goes against the sign of the present gradient, and make the rest "
        "larger by as much. Needs the optimizer. 'auto': with the controller `adaptive` and Adam or AdamW.",
        words=("auto",),
    )
    ledger: str | None = setting(
        "auto",
        help="File of the audit ledger. 'auto': clip_ledger.jsonl in the output_dir of a Trainer, no ledger in a hand-written loop. "
        "'none': no ledger.",
        check=ledger_problem,
        flag=True,
    )
    ledger_required: bool = setting(
        False,
        help="Stop when the ledger cannot be written; otherwise training goes on, and the gap shows in it.",
        flag=True,
    )
    self_test: bool = setting(
        True, help="Check at the start that clipping takes effect, and stop if something undoes it.", flag=True
    )
    fold: str = setting(
        "auto",
        help="On an accelerator, let the fused step scale the gradients where that is the same but for the last bit ('auto'). Between "
        "clipping and the step `p.grad` is unclipped then; 'never' scales in a pass of its own.",
        choices=("auto", "never"),
    )
    nan_filter_on_device: bool = setting(
        False,
        help="In a Trainer, keep NaN losses out of the log on the device and switch off `logging_nan_inf_filter`, which makes the host "
        "wait twice per micro-batch.",
    )
    one_step_late: bool = setting(
        False, help="Apply each threshold one step later. Set by the package under DeepSpeed, not by you."
    )
    ring_capacity: int = setting(
        256, help="Steps kept on the device between two reads by the host.", range="[1, 65536]"
    )
    freeze_after: int | None = setting(
        None,
        help="Stop adapting from this step on (counted from 0) and keep range and pace.",
        range="[0, inf)",
    )
    min_threshold: float | None = setting(
        None,
        help="Floor of the threshold, in units of the norm; holds in the warm-up too.",
        range="(0, inf)",
        flag=True,
    )
    max_threshold: float | None = setting(
        None,
        help="Ceiling of the threshold, in units of the norm; holds in the warm-up too.",
        range="(0, inf)",
        flag=True,
    )
    max_widening_step: float | None = setting(
        None,
        help="Largest factor by which the threshold may grow from one step to the next.",
        range="[1, inf)",
    )
    max_widening_100: float | None = setting(
        None, help="Largest factor by which the threshold may grow within 100 steps.", range="[1, inf)"
    )
    max_skipped: int | None = setting(
        None,
        help="Budget of steps left out because they were not finite; more is trouble.",
        range="[0, inf)",
        flag=True,
    )
    divergence_spreads: float = setting(
        0.0,
        help="Trouble when the average loss is this many spreads above its best for `divergence_steps`; 0: off.",
        range="[0, inf)",
    )
    divergence_steps: int = setting(
        50, help="How many steps in a row the loss has to be that high to count as divergence.", range="[1, inf)"
    )
    on_trouble: str = setting(
        "continue",
        help="What to do on trouble: 'continue' (warn), 'fallback' (static threshold from there on), 'stop' (keep a checkpoint and end "
        "the run) or 'rewind' (back to before it, and on without the data from there to past it).",
        choices=("continue", "fallback", "stop", "rewind"),
        flag=True,
    )
    snapshot_steps: int = setting(
        100,
        help="Under 'rewind', steps between two copies in host memory of all that training changes: weights, optimizer, random numbers.",
        range="[1, inf)",
    )
    max_rewinds: int = setting(
        3,
        help="Under 'rewind', how often training goes on from before the trouble; with the next one it stops there.",
        range="[0, inf)",
    )
    on_spike: str = setting(
        "auto",
        help="What becomes of a step that the controller would cut: 'clip', 'skip' (the step is left out as a whole), or 'auto' (as the "
        "controller's source does: skip for log_zscore and mean_sd, clip for the others).",
        choices=("auto", "clip", "skip"),
        flag=True,
    )
    incidents: bool = setting(
        True,
        help="Keep what is known of a step that goes wrong, its batch included, in `incidents/` of the output_dir: in a Trainer, and in a "
        "hand-written loop from the first `watch` on.",
        flag=True,
    )
    incident_batch: str = setting(
        "inputs",
        help="What is kept of the batch of an incident: its 'inputs' with their text, or only a 'hash' of each sample, for private data.",
        choices=("inputs", "hash"),
    )
    incident_limit: int = setting(20, help="Most incidents that are kept in a run.", range="[1, inf)")
    incident_megabytes: float = setting(
        64.0,
        help="Largest batch that is kept with an incident, on every rank, in MB; of a larger one only the hashes.",
        range="[0, inf)",
    )
    incident_run_megabytes: float = setting(
        512.0, help="Most that the batches of all incidents of a run may take, on every rank, in MB.", range="[0, inf)"
    )
    incident_spike: float = setting(
        6.0,
        help="A norm is an incident from this many times the median of the 50 before it on, where it is far outside their scatter too.",
        range="(1, inf)",
    )
    incident_growth: float = setting(
        10.0,
        help="Times that the norm has to have grown, over at least 3 times `incident_steps` without a fall, to be an incident.",
        range="(1, inf)",
    )
    incident_steps: int = setting(
        50,
        help="Steps in a row with the norm exactly at the threshold that are an incident; and the steps over which losses are averaged.",
        range="[5, inf)",
    )
    parameter_rules: dict[str, Any] | str | None = setting(
        None,
        help="Other settings for some parameters, as JSON: glob on the parameter's name -> 'exclude', a controller, or fields, such as "
        """'{"classifier.*": {"controller": "static", "static_threshold": 1.0}, "*.bias": "exclude"}'. The first match counts. With """
        "granularity 'global' all matches of one pattern share one norm.",
        check=rules_problem,
        flag=True,
    )

    def __init__(self, controller: Controller[Any] | str = "adaptive", **values: Any) -> None:
        run = {s.name: values.pop(s.name, s.default) for s in run_settings()}
        if isinstance(run["parameter_rules"], str):
            run["parameter_rules"] = json_or_text(run["parameter_rules"])
        if run["ledger"] == "none":  # as a flag says it
            run["ledger"] = None
        if run["spectral_width"] == "none":
            run["spectral_width"] = None
        # As `to_dict` writes it, because JSON has no infinity.
        run |= {key: math.inf for key in _MAY_BE_INFINITE if run[key] == "inf"}
        chosen = choose(controller, values, run["parameter_rules"], run)
        name = name_of(controller) or controller if isinstance(controller, Controller) else controller
        made = {**run, "parameter_rules": chosen.rules, "controller": name, "settings": chosen.settings}
        for key, value in made.items():
            object.__setattr__(self, key, value)
        if problems := [*problems_of_run(self), *chosen.problems] or problems_together(self):
            raise ConfigError(problems)

    if not TYPE_CHECKING:  # which is to see the fields, and not `Any`

        def __getattr__(self, name):
            """The controller's settings, by key or name, beside the fields."""
            settings = self.__dict__.get("settings")  # not there yet while it is copied
            for s in () if settings is None else settings_of(type(settings)).values():
                if name in (s.key, s.name):
                    return getattr(settings, s.name)
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def ledger_path(self) -> str | None:
        """Where the ledger goes; None where there is none, which 'auto' comes to in a loop."""
        return None if self.ledger == "auto" else self.ledger

    def folder_of_run(self, given: str | Path | None) -> Path:
        """Where a run's files go: the folder that was given, else the ledger's, else the working folder."""
        beside = Path(".") if self.ledger_path is None else Path(self.ledger_path).parent
        return beside if given is None else Path(given)

    @property
    def max_pace(self) -> float:
        """Largest multiplier on the learning rate of a step; 1.0 without a pace, and where nobody has said yet whether there is one."""
        return float(getattr(self.settings, "max_pace", None) or 1.0)

    @property
    def spectral(self) -> float | None:
        """The spectral width as a number; None where it is off, and where nobody has said yet."""
        return None if self.spectral_width in (None, "auto") else float(self.spectral_width)

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
        """The same with 'auto' granularity spelled out: what runs, ledgers and checkpoints go by."""
        apart = self.works_on != "global"
        return self.replace(
            granularity=self.works_on, controller=self.settings.judging_apart() if apart else self.settings
        )

    @property
    def works_on(self) -> str:
        """The granularity, that of the controller where it is 'auto'."""
        return self.settings.granularities[0] if self.granularity == "auto" else self.granularity

    def for_pattern(self, pattern: str) -> "AdaptiveClipConfig | None":
        """The settings for what a pattern of `parameter_rules` matches; None where it excludes.

        Raises:
            ConfigError: They break a rule.
        """
        assert isinstance(self.parameter_rules, dict)
        rule = self.parameter_rules[pattern]
        if rule == "exclude":
            return None
        own = {"controller": rule} if isinstance(rule, str) else dict(rule)
        # What belongs to the run's controller alone is not handed down to another one.
        name = own.setdefault("controller", self.controller)
        kind = CONTROLLERS.get(name) if isinstance(name, str) else None
        shared = {} if kind is None else {**carried(self.settings, kind), **keyed(kind, own)}
        run = {**self._run_values(), "parameter_rules": None, "granularity": self.works_on}
        return AdaptiveClipConfig(**{**run, **(shared or own)})

    @classmethod
    def names(cls) -> list[str]:
        """All that may be set: fields of the run, and settings of controllers by name and by key."""
        return ["controller", *(s.name for s in run_settings()), *flat_names()]

    def with_pace_start(self, steps: int) -> "AdaptiveClipConfig":
        """The same with this start of the pace, where the controller has one and it was left open."""
        return self.replace(pace_start=steps) if getattr(self.settings, "pace_start", 0) is None else self

    def _run_values(self) -> dict[str, Any]:
        return {s.name: getattr(self, s.name) for s in run_settings()}

    # -- conversions ---------------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, clip: "ClipArgument") -> "AdaptiveClipConfig":
        """Turn what users pass as `clip=` into a config.

        Args:
            clip: The name of a controller, or of a preset (`rl`); `NAME:FIELD=VALUE,FIELD=VALUE`; a controller; a config; its fields; or
                the path of its JSON. A value with a comma in it (`parameter_rules`) needs one of the latter three.

        Raises:
            ConfigError: `clip` is none of these, or a setting is wrong.
        """
        if isinstance(clip, AdaptiveClipConfig):
            return clip
        if isinstance(clip, Controller):
            return cls(controller=clip)
        if isinstance(clip, Mapping):
            return cls.from_dict(dict(clip))
        if isinstance(clip, str) and clip in CONTROLLERS:
            return cls(controller=clip)
        if isinstance(clip, str) and (fields := fields_of_text(clip, "clip")) is not None:
            return cls.from_dict(fields)
        if isinstance(clip, str | Path):
            path = Path(clip)
            if path.suffix == ".json" or path.is_file():
                return cls.from_json(path)
        names = ", ".join(sorted(CONTROLLERS))
        raise ConfigError(
            f"`clip` must be a controller ({names}) by name or as an object, a preset ({', '.join(PRESETS)}), NAME:FIELD=VALUE,..., an "
            f"`AdaptiveClipConfig`, a dict of its fields, or the path of its JSON file, but is {shown(clip)} instead."
            f"{near_clip(clip, clip_names())}"
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

    from_zclip = _imported(from_zclip)
    from_autoclip = _imported(from_autoclip)
    from_bitsandbytes_percentile = _imported(from_bitsandbytes_percentile)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the controller's settings by key, ready for strict JSON: an infinite number is the string "inf"."""
        values = {"controller": self.controller, **copy.deepcopy(self._run_values()), **by_key(self.settings)}
        for fields in (values, *(values["parameter_rules"] or {}).values()):
            for name in _MAY_BE_INFINITE:
                if isinstance(fields, dict) and fields.get(name) == math.inf:
                    fields[name] = "inf"
        return values

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def replace(self, **changes: Any) -> "AdaptiveClipConfig":
        """A copy with some fields or settings changed; the copy is validated like any other config.

        Another controller by name takes over what both have.

        Raises:
            ConfigError: A rule is broken, or a setting would be lost that the other controller does not have.
        """
        controller = changes.pop("controller", self.settings)
        values = {**self._run_values(), **changes}
        kind = CONTROLLERS.get(controller) if isinstance(controller, str) else None
        if kind is type(self.settings):
            controller = self.settings
        elif kind is not None:
            if problems := lost(self.settings, controller):
                raise ConfigError(problems)
            values = {**carried(self.settings, kind), **self._run_values(), **keyed(kind, changes)}
        return AdaptiveClipConfig(controller, **values)


def as_written_now(values: dict[str, Any]) -> dict[str, Any]:
    """A config out of a file as this version writes it: files of earlier ones hold the settings of all controllers.

    What this version cannot read stays as it is.
    """
    try:
        return AdaptiveClipConfig.from_dict({**SHAPE_OFF, **values}).to_dict()
    except ConfigError:
        return values


@functools.cache
def run_settings() -> tuple[Any, ...]:
    """What is set for the run as a whole, whatever the controller: all fields but `controller`."""
    return tuple(s for s in settings_of(AdaptiveClipConfig).values() if s.name != "controller")


def incident_settings() -> tuple[str, ...]:
    """Names of those that say what is kept of a step that goes wrong, and decide nothing."""
    return tuple(s.name for s in run_settings() if s.name.startswith("incident"))


def as_number(value: Any) -> Any:
    """What was given as a number, as a float; what is none, text among it, stays as it is for the checks of types to report."""
    if isinstance(value, str | bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return value


ClipArgument: TypeAlias = str | Path | Mapping[str, Any] | Controller[Any] | AdaptiveClipConfig
"""What every entry point takes as `clip=`."""
