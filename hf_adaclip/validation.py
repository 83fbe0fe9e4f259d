"""The rules of an `AdaptiveClipConfig`. Every problem is one sentence that names field, rule and value."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_adaclip.controllers import CONTROLLERS, leaves_out
from hf_adaclip.errors import ConfigError
from hf_adaclip.fields import HyperParameters
from hf_adaclip.hints import near, near_controller

GRANULARITIES = ("auto", "global", "module", "tensor", "unit", "element")

# (field, lower bound, upper bound, lower inclusive, upper inclusive)
_RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("max_pace", 1.0, math.inf, True, False),
    ("max_consecutive_nonfinite", 1, math.inf, True, False),
    ("spectral_every", 1, math.inf, True, False),
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
    ("ceiling_share", 0.0, 1.0, True, True),
    ("pace_growth", 1.0, 2.0, False, True),
    ("pace_shrink", 0.0, 1.0, False, False),
    ("pace_trust", 1.0, math.inf, True, False),
    ("pace_hold", 0.0, 1.0, True, True),
    ("z_threshold", 0.0, math.inf, False, False),
    ("percentile", 0.0, 100.0, False, True),
    ("history", 10, 1_000_000, True, True),
    ("weight_ratio", 0.0, math.inf, False, False),
    ("weight_floor", 0.0, math.inf, False, False),
    ("moment_width", 0.0, math.inf, False, False),
    ("ema_factor", 1.0, math.inf, True, False),
    ("ema_decay", 0.0, 1.0, False, False),
    ("median_factor", 1.0, math.inf, True, False),
    ("median_window", 10, 1_000_000, True, True),
    ("quantile", 0.0, 1.0, False, False),
    ("quantile_rate", 0.0, 1.0, False, False),
    ("log_width", 0.0, math.inf, False, False),
    ("log_decay", 0.0, 1.0, False, False),
    ("sd_width", 0.0, math.inf, False, False),
    ("sd_window", 10, 1_000_000, True, True),
    ("ring_capacity", 1, 65536, True, True),
    ("divergence_spreads", 0.0, math.inf, True, False),
    ("divergence_steps", 1, math.inf, True, False),
)
# The same for fields that may be None.
_OPTIONAL_RANGES: tuple[tuple[str, float, float, bool, bool], ...] = (
    ("static_threshold", 0.0, math.inf, False, True),
    ("spectral_width", 0.0, math.inf, True, True),
    ("pace_start", 1, math.inf, True, False),
    ("freeze_after", 0, math.inf, True, False),
    ("min_threshold", 0.0, math.inf, False, False),
    ("max_threshold", 0.0, math.inf, False, False),
    ("max_widening_step", 1.0, math.inf, True, False),
    ("max_widening_100", 1.0, math.inf, True, False),
    ("max_skipped", 0, math.inf, True, False),
)
# What a rule for some parameters may set besides the fields of controllers; the rest belongs to the run as a whole.
_RULE_FIELDS = {
    "controller",
    "static_threshold",
    "freeze_after",
    "min_threshold",
    "max_threshold",
    "max_widening_step",
    "max_widening_100",
}
FOLDS = ("auto", "never")
ON_SPIKE = ("auto", "clip", "skip")
POLICIES = ("continue", "fallback", "stop")
_CHOICES = {"granularity": GRANULARITIES, "on_trouble": POLICIES, "fold": FOLDS, "on_spike": ON_SPIKE}
_BOUNDS = {name: bounds for name, *bounds in (*_RANGES, *_OPTIONAL_RANGES)}
# What a controller without a threshold cannot be limited by.
_FINE_LIMITS = ("min_threshold", "max_threshold", "max_widening_step", "max_widening_100", "freeze_after")


COMMON = frozenset({"warmup_observations", "pace_start"})
"""Hyperparameters that no controller minds: there is a warm-up or there is none, and a Trainer sets the start of a pace by itself."""


def problems_of(config: Any) -> list[str]:
    """One sentence per field, or group of fields, that breaks a rule; all of them at once, of types and of ranges."""
    wrong = {
        f.name: problem
        for f in dataclasses.fields(config)
        if (problem := _type_problem(config, f) or _range_problem(config, f.name)) is not None
    }
    problems = list(wrong.values())

    def sound(*names: str) -> bool:
        return not any(name in wrong for name in names)

    for rule, names in _JOINT_RULES:
        if sound(*names) and (problem := rule(config)) is not None:
            problems.append(problem)
    if sound("controller", "granularity"):
        kind = CONTROLLERS[config.controller]
        if sound("on_spike", "parameter_rules", *_FINE_LIMITS):
            problems += _kind_problems(config, kind)
    if (
        not problems
    ):  # what follows goes by several fields at once, and would only repeat what is wrong with one of them
        problems += _combination_problems(config)
        fine = CONTROLLERS[config.controller].fine
        for pattern, rule_of in ({} if fine else config.parameter_rules or {}).items():
            problems += _rule_problems(config, pattern, rule_of)
    return problems


def foreign_problems(config: Any) -> list[str]:
    """One sentence per hyperparameter that was set and belongs to a controller that is not in use: it would do nothing."""
    if config.controller not in CONTROLLERS:
        return []
    used = {config.controller, *_controllers_of(config.parameter_rules)}
    own = {f.name for name in used if name in CONTROLLERS for f in dataclasses.fields(CONTROLLERS[name])}
    problems = []
    for f in dataclasses.fields(HyperParameters):
        value = getattr(config, f.name)
        if f.name in own or f.name in COMMON or value == f.default or (f.name == "ceiling_share" and value == 1):
            continue  # a ceiling share of 1 is "never", as for all other controllers
        owners = [name for name, kind in CONTROLLERS.items() if f.name in {g.name for g in dataclasses.fields(kind)}]
        have = " and ".join(f"'{name}'" for name in owners)
        problems.append(
            f"`{f.name}` must be left at {f.default} with controller '{config.controller}', but is {value}: it belongs to controller "
            f"{have}. Set `controller`, or leave `{f.name}` out."
        )
    return problems


def own_settings(controller: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that mean something to a controller: its hyperparameters, and all that is none."""
    kind = CONTROLLERS.get(controller)
    if kind is None:
        return values
    others = {f.name for f in dataclasses.fields(HyperParameters)} - {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name not in others - COMMON}


def _controllers_of(rules: Any) -> list[str]:
    values = rules.values() if isinstance(rules, dict) else ()
    named = [rule.get("controller") if isinstance(rule, dict) else rule for rule in values]
    return [name for name in named if isinstance(name, str)]


def _type_problem(config: Any, f: Any) -> str | None:
    value = getattr(config, f.name)
    if f.name in ("controller", "granularity", "on_trouble", "on_spike", "fold"):
        ok, rule = isinstance(value, str), "a string"
    elif f.name == "parameter_rules":
        ok, rule = value is None or _is_rules(value), "a mapping of patterns to 'exclude', a controller, or fields"
    elif f.name == "ledger":
        if isinstance(value, str) and value.endswith(("/", os.sep)):
            inside = str(Path(value, "clip_ledger.jsonl"))
            return f"`ledger` must be the path of a file, but is the folder {value!r} instead. Write {inside!r}."
        ok, rule = value is None or isinstance(value, str), "a path as a string, 'auto', 'none' or None"
    elif f.name in ("freeze_after", "max_skipped"):
        ok, rule = value is None or _is_whole(value), "a whole number or None"
    elif f.default is None:
        ok, rule = value is None or _is_number(value), "a number or None"
    elif isinstance(f.default, bool):
        ok, rule = isinstance(value, bool), "True or False"
    elif isinstance(f.default, int):
        ok, rule = _is_whole(value), "a whole number"
    else:
        ok, rule = _is_number(value), "a number"
    return None if ok else f"`{f.name}` must be {rule}, but is {value!r} instead."


def _range_problem(config: Any, name: str) -> str | None:
    value = getattr(config, name)
    if name == "controller" and value not in CONTROLLERS:
        hint = near_controller(value, CONTROLLERS)
        return f"`controller` must be one of {', '.join(sorted(CONTROLLERS))}, but is {value!r} instead.{hint}"
    if name in _CHOICES and value not in _CHOICES[name]:
        hint = near(value, _CHOICES[name], "'")
        return f"`{name}` must be one of {', '.join(_CHOICES[name])}, but is {value!r} instead.{hint}"
    if name not in _BOUNDS or value is None:
        return None
    low, high, low_in, high_in = _BOUNDS[name]
    if (value >= low if low_in else value > low) and (value <= high if high_in else value < high):
        return None
    interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
    return f"`{name}` must be in {interval}, but is {value} instead."


def _widths(config: Any) -> str | None:
    if config.min_far_width <= config.far_width <= config.max_far_width:
        return None
    return (
        f"`far_width` must be within [`min_far_width`, `max_far_width`] = [{config.min_far_width}, "
        f"{config.max_far_width}], but is {config.far_width} instead."
    )


def _floor_and_ceiling(config: Any) -> str | None:
    low, high = config.min_threshold, config.max_threshold
    if low is None or high is None or low <= high:
        return None
    return f"`min_threshold` must be at most `max_threshold` ({high}), but is {low} instead."


def _trouble(config: Any) -> str | None:
    if config.on_trouble == "continue" or config.max_skipped is not None or config.divergence_spreads != 0:
        return None
    return (
        f"`on_trouble` must be 'continue' as long as nothing counts as trouble, but is {config.on_trouble!r} instead: "
        "set `max_skipped` or `divergence_spreads`."
    )


def _near_and_far(config: Any) -> str | None:
    if config.near_width < config.min_far_width:
        return None
    return (
        f"`near_width` must be below `min_far_width` ({config.min_far_width}), but is {config.near_width} instead: "
        "a step that is cut back must land inside the range."
    )


def _late_rules(config: Any) -> str | None:
    if not (config.one_step_late and config.parameter_rules):
        return None
    return "`parameter_rules` must be None under DeepSpeed, whose engine knows one threshold, but are set instead."


def _late_shape(config: Any) -> str | None:
    if not config.one_step_late or (config.spectral_width is None and not config.agreement):
        return None
    name, off = ("agreement", False) if config.spectral_width is None else ("spectral_width", None)
    return (
        f"`{name}` must be {off} under DeepSpeed, but is {getattr(config, name)} instead: its engine steps before anything outside "
        "sees the gradients."
    )


def _spectral_every(config: Any) -> str | None:
    if config.spectral_every == 1 or config.spectral_width is not None:
        return None
    return f"`spectral_every` must be 1 as long as `spectral_width` is None, but is {config.spectral_every} instead: set the width."


def _paces(config: Any) -> str | None:
    if config.max_pace == 1 or CONTROLLERS[config.controller].paces:
        return None
    return (
        f"`max_pace` must be 1.0 with controller '{config.controller}', but is {config.max_pace} instead: "
        "only 'adaptive' changes the pace."
    )


# Rules on several fields, each looked at where the fields that it goes by are right by themselves.
_JOINT_RULES: tuple[tuple[Callable[[Any], str | None], tuple[str, ...]], ...] = (
    (_widths, ("min_far_width", "far_width", "max_far_width")),
    (_floor_and_ceiling, ("min_threshold", "max_threshold")),
    (_trouble, ("on_trouble", "max_skipped", "divergence_spreads")),
    (_near_and_far, ("near_width", "min_far_width")),
    (_late_rules, ("one_step_late", "parameter_rules")),
    (_paces, ("controller", "max_pace")),
    (_late_shape, ("one_step_late", "spectral_width", "agreement")),
    (_spectral_every, ("spectral_width", "spectral_every")),
)


def _combination_problems(config: Any) -> list[str]:
    """What cannot be had together; every field is right by itself."""
    if config.one_step_late and (config.max_pace > 1 or config.works_on != "global"):
        return [
            f"`max_pace` must be 1.0 and `granularity` 'global' under DeepSpeed, but are {config.max_pace} and {config.works_on!r} "
            "instead: its engine steps before anything outside sees the gradients."
        ]
    split = config.works_on != "global" or bool(config.parameter_rules)
    if leaves_out(config) and (config.one_step_late or split):
        where = (
            "under DeepSpeed, whose engine has stepped before"
            if config.one_step_late
            else "where parameters are judged apart: a step is left out as a whole"
        )
        return [
            f"`on_spike` must be 'clip' {where}, but is {config.on_spike!r} with controller '{config.controller}' instead."
        ]
    return []


def _kind_problems(config: Any, kind: Any) -> list[str]:
    """What the controller cannot do."""
    problems = []
    if config.works_on not in kind.granularities:
        problems.append(
            f"`granularity` must be one of {', '.join(kind.granularities)} with controller '{config.controller}', but is "
            f"{config.granularity!r} instead."
        )
    if kind.fine:
        limited = [name for name in _FINE_LIMITS if getattr(config, name) is not None]
        if limited:
            problems.append(
                f"`{limited[0]}` must be None with controller '{config.controller}', which has no threshold to limit, but is "
                f"{getattr(config, limited[0])} instead."
            )
        if config.on_spike == "skip":
            problems.append(
                f"`on_spike` must be 'clip' with controller '{config.controller}', but is 'skip' instead: it changes parts of a gradient."
            )
        others = [p for p, rule in (config.parameter_rules or {}).items() if rule != "exclude"]
        if others:
            problems.append(
                f"`parameter_rules` must only exclude with controller '{config.controller}', but {others[0]!r} sets something else instead."
            )
    return problems


def _rule_problems(config: Any, pattern: str, rule: Any) -> list[str]:
    fields = {f.name for c in CONTROLLERS.values() if not c.fine for f in dataclasses.fields(c)} | _RULE_FIELDS
    fields -= {"max_pace"}
    for key in rule if isinstance(rule, dict) else ():
        if key not in fields:
            return [
                f"`parameter_rules` must set fields of a controller or its limits, but {pattern!r} sets {key!r} instead."
                + near(key, fields)
            ]
    if isinstance(rule, str) and rule != "exclude" and rule not in CONTROLLERS:
        hint = near_controller(rule, ["exclude", *CONTROLLERS])
        return [
            f"`parameter_rules` must give 'exclude', a controller ({', '.join(sorted(CONTROLLERS))}) or a mapping of fields, but "
            f"{pattern!r} gives {rule!r} instead.{hint}"
        ]
    try:
        config.for_pattern(pattern)
    except ConfigError as error:
        return [f"`parameter_rules` for {pattern!r}: {problem}" for problem in error.problems]
    return []


def json_or_text(text: str) -> Any:
    """The value that a flag's text stands for: JSON, or else the text itself, for the checks of types to report."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def fields_of_text(text: str, what: str, names: Iterable[str]) -> dict[str, Any] | None:
    """Fields of a config from `NAME:FIELD=VALUE,FIELD=VALUE`; None where the text has no such form.

    Args:
        text: The text. There is no way to write a value with a comma in it.
        what: The argument that it was given as.
        names: Controllers.

    Raises:
        ConfigError: A piece behind the name is no FIELD=VALUE, or a field comes twice.
    """
    name, colon, settings = text.partition(":")
    if not colon or name not in names:
        return None
    fields: dict[str, Any] = {"controller": name}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or key.strip() in fields:
            raise ConfigError(
                f"`{what}` must be NAME or NAME:FIELD=VALUE,... with each field once, but is {text!r} instead: look at {setting!r}."
            )
        fields[key.strip()] = json_or_text(value.strip())
    return fields


def _is_rules(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str | dict) for k, v in value.items())


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> bool:
    # Beyond 2**53 a whole number is no exact float any more, and none of these fields means anything there.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
