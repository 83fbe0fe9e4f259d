"""The rules of an `AdaptiveClipConfig`. Every problem is one sentence that names field, rule and value."""

import dataclasses
import difflib
import json
import math
from typing import Any

from hf_adaclip.controllers import CONTROLLERS, leaves_out
from hf_adaclip.errors import ConfigError

GRANULARITIES = ("auto", "global", "module", "tensor", "unit", "element")

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


def type_problems(config: Any) -> list[str]:
    """One sentence per field that has the wrong type."""
    problems = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in ("controller", "granularity", "on_trouble", "on_spike", "fold"):
            ok, rule = isinstance(value, str), "a string"
        elif f.name == "parameter_rules":
            ok, rule = value is None or _is_rules(value), "a mapping of patterns to 'exclude', a controller, or fields"
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


def range_problems(config: Any) -> list[str]:
    """One sentence per field, or pair of fields, that breaks a rule; the types are right already."""
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
    elif config.controller in CONTROLLERS:
        problems += _kind_problems(config, CONTROLLERS[config.controller])
    if config.on_trouble not in POLICIES:
        problems.append(f"`on_trouble` must be one of {', '.join(POLICIES)}, but is {config.on_trouble!r} instead.")
    if config.fold not in FOLDS:
        problems.append(f"`fold` must be one of {', '.join(FOLDS)}, but is {config.fold!r} instead.")
    if config.on_spike not in ON_SPIKE:
        problems.append(f"`on_spike` must be one of {', '.join(ON_SPIKE)}, but is {config.on_spike!r} instead.")
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
    if config.one_step_late and config.parameter_rules:
        problems.append(
            "`parameter_rules` must be None under DeepSpeed, whose engine knows one threshold, but are set instead."
        )
    if not problems and config.one_step_late and (config.max_pace > 1 or config.works_on != "global"):
        problems.append(
            f"`max_pace` must be 1.0 and `granularity` 'global' under DeepSpeed, but are {config.max_pace} and {config.works_on!r} "
            "instead: its engine steps before anything outside sees the gradients."
        )
    split = (not problems and config.works_on != "global") or bool(config.parameter_rules)
    if not problems and leaves_out(config) and (config.one_step_late or split):
        where = (
            "under DeepSpeed, whose engine has stepped before"
            if config.one_step_late
            else "where parameters are judged apart: a step is left out as a whole"
        )
        problems.append(
            f"`on_spike` must be 'clip' {where}, but is {config.on_spike!r} with controller '{config.controller}' instead."
        )
    if config.max_pace > 1 and config.controller in CONTROLLERS and not CONTROLLERS[config.controller].paces:
        problems.append(
            f"`max_pace` must be 1.0 with controller '{config.controller}', but is {config.max_pace} instead: "
            "only 'adaptive' changes the pace."
        )
    fine = config.controller in CONTROLLERS and CONTROLLERS[config.controller].fine
    for pattern, rule in ({} if fine else config.parameter_rules or {}).items():
        problems += _rule_problems(config, pattern, rule)
    return problems


def _kind_problems(config: Any, kind: Any) -> list[str]:
    """What the controller cannot do."""
    problems = []
    if config.works_on not in kind.granularities:
        problems.append(
            f"`granularity` must be one of {', '.join(kind.granularities)} with controller '{config.controller}', but is "
            f"{config.granularity!r} instead."
        )
    if kind.fine:
        limits = ("min_threshold", "max_threshold", "max_widening_step", "max_widening_100", "freeze_after")
        limited = [name for name in limits if getattr(config, name) is not None]
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
            near = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            return [
                f"`parameter_rules` must set fields of a controller or its limits, but {pattern!r} sets {key!r} instead.{hint}"
            ]
    if isinstance(rule, str) and rule != "exclude" and rule not in CONTROLLERS:
        near = difflib.get_close_matches(rule, ["exclude", *CONTROLLERS], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
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


def _is_rules(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str | dict) for k, v in value.items())


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> bool:
    # Beyond 2**53 a whole number is no exact float any more, and none of these fields means anything there.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
