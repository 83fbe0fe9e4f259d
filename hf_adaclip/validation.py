"""The rules of an `AdaptiveClipConfig` as a whole. Every problem is one sentence that names field, rule and value.

What holds for one field stands beside it (`setting`); here is what goes by several, and what controllers cannot do.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_adaclip.controllers import CONTROLLERS, Controller, leaves_out
from hf_adaclip.controllers.settings import keys_of, problems_of, settings_of
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near, near_controller

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
# What a controller without a threshold cannot be limited by.
_FINE_LIMITS = ("min_threshold", "max_threshold", "max_widening_step", "max_widening_100", "freeze_after")


def problems_of_run(config: Any) -> list[str]:
    """One sentence per field of the run, or group of fields, that breaks a rule; all of them at once, of types and of ranges."""
    wrong = problems_of(config)
    problems = list(wrong.values())

    def sound(*names: str) -> bool:
        return not any(name in wrong for name in names)

    for rule, names in _JOINT_RULES:
        if sound(*names) and (problem := rule(config)) is not None:
            problems.append(problem)
    if sound("controller", "granularity", "on_spike", "parameter_rules", *_FINE_LIMITS):
        problems += _kind_problems(config)
    return problems


def problems_together(config: Any) -> list[str]:
    """The same for what goes by so many fields that it would only repeat what is wrong with one of them."""
    problems = _combination_problems(config)
    rules = {} if config.settings.fine else config.parameter_rules or {}
    for pattern, rule in rules.items():
        problems += _rule_problems(config, pattern, rule)
    return problems


def controller_problem(name: str, value: Any) -> str | None:
    """What is wrong with `controller`, as a name or an object."""
    known = ", ".join(sorted(CONTROLLERS))
    if isinstance(value, type) and issubclass(value, Controller):
        return f"`{name}` must be a name or an object, but is the class {value.__name__} instead. Write {value.__name__}()."
    if isinstance(value, Controller):
        kind = type(value).__name__
        return f"`{name}` must be of a class in CONTROLLERS ({known}), but is a {kind} instead. Write CONTROLLERS['...'] = {kind} first."
    if not isinstance(value, str):
        return f"`{name}` must be a string, but is {value!r} instead."
    if value in CONTROLLERS:
        return None
    return f"`{name}` must be one of {known}, but is {value!r} instead.{near_controller(value, CONTROLLERS)}"


def ledger_problem(name: str, value: Any) -> str | None:
    """What is wrong with the path of a ledger."""
    if isinstance(value, str) and value.endswith(("/", os.sep)):
        inside = str(Path(value, "clip_ledger.jsonl"))
        return f"`{name}` must be the path of a file, but is the folder {value!r} instead. Write {inside!r}."
    if value is None or isinstance(value, str):
        return None
    return f"`{name}` must be a path as a string, 'auto', 'none' or None, but is {value!r} instead."


def rules_problem(name: str, value: Any) -> str | None:
    """What is wrong with the form of `parameter_rules`."""
    if value is None or (
        isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str | dict) for k, v in value.items())
    ):
        return None
    return f"`{name}` must be a mapping of patterns to 'exclude', a controller, or fields, but is {value!r} instead."


def _floor_and_ceiling(config: Any) -> str | None:
    low, high = config.min_threshold, config.max_threshold
    if low is None or high is None or low <= high:
        return None
    return f"`min_threshold` must be at most `max_threshold` ({high}), but is {low} instead."


def _trouble(config: Any) -> str | None:
    if config.on_trouble == "continue" or config.max_skipped is not None or config.divergence_spreads != 0:
        return None
    if config.on_trouble == "rewind" and config.incidents is True:
        return None  # incidents tell of spoilt weights too
    more = ", or `incidents=True`" if config.on_trouble == "rewind" else ""
    return (
        f"`on_trouble` must be 'continue' as long as nothing counts as trouble, but is {config.on_trouble!r} instead: "
        f"set `max_skipped` or `divergence_spreads`{more}."
    )


def _rewind(config: Any) -> str | None:
    if config.on_trouble == "rewind" and config.shadow:
        return "`on_trouble` must not be 'rewind' in shadow mode, which only records, but is. Set 'continue'."
    if config.on_trouble != "rewind" or not config.one_step_late:
        return None
    return (
        "`on_trouble` must not be 'rewind' under DeepSpeed, but is: its engine keeps weights and optimizer to itself, spread over ranks. "
        "Set 'stop', and go on from a checkpoint."
    )


def _late_rules(config: Any) -> str | None:
    if not (config.one_step_late and config.parameter_rules):
        return None
    return "`parameter_rules` must be None under DeepSpeed, whose engine knows one threshold, but are set instead."


def _late_shape(config: Any) -> str | None:
    wide, agrees = config.spectral_width not in (None, "auto"), config.agreement is True
    if not config.one_step_late or not (wide or agrees):
        return None
    name, off = ("spectral_width", None) if wide else ("agreement", False)
    return (
        f"`{name}` must be {off} under DeepSpeed, but is {getattr(config, name)} instead: its engine steps before anything outside "
        "sees the gradients."
    )


def _spectral_every(config: Any) -> str | None:
    if config.spectral_every == 1 or config.spectral_width is not None:
        return None
    return f"`spectral_every` must be 1 as long as `spectral_width` is None, but is {config.spectral_every} instead: set the width."


# Fields of the run that do not go together, each looked at where those that it goes by are right by themselves.
_JOINT_RULES: tuple[tuple[Callable[[Any], str | None], tuple[str, ...]], ...] = (
    (_floor_and_ceiling, ("min_threshold", "max_threshold")),
    (_trouble, ("on_trouble", "max_skipped", "divergence_spreads")),
    (_rewind, ("on_trouble", "one_step_late", "shadow")),
    (_late_rules, ("one_step_late", "parameter_rules")),
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


def _kind_problems(config: Any) -> list[str]:
    """What the controller cannot do."""
    problems, kind = [], config.settings
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
    named = rule.get("controller", config.controller) if isinstance(rule, dict) else rule
    kind = CONTROLLERS.get(named) if isinstance(named, str) else None
    fields = {key for c in CONTROLLERS.values() if not c.fine for key in keys_of(c)} | _RULE_FIELDS
    fields = (fields if kind is None else fields | set(settings_of(kind))) - {"max_pace"}
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
    if config.max_pace > 1 and kind is not None and not kind.paces:
        return [
            f"`parameter_rules` for {pattern!r}: `max_pace` must be 1.0 with controller '{named}', but is {config.max_pace} instead: all "
            "parameters have one pace, and only 'adaptive' changes it."
        ]
    try:
        config.for_pattern(pattern)
    except ConfigError as error:
        return [f"`parameter_rules` for {pattern!r}: {problem}" for problem in error.problems]
    return []
