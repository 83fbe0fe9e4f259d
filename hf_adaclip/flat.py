"""Settings by flat names: how keywords, files and flags name those of a run and of its controller side by side.

In a file every setting goes by its key, which says whose it is where several controllers have a setting of one name: `z_threshold` is
`width` of `zscore`, `log_width` that of `log_zscore`. People may write either; files of earlier versions hold the keys of all controllers.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from hf_adaclip.controllers import CONTROLLERS, Controller, name_of
from hf_adaclip.controllers.presets import PRESETS
from hf_adaclip.controllers.settings import Setting, by_key, conflicts_left, drafted, keys_of, settings_of
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import FIELDS_ELSEWHERE, near

COMMON: Final = frozenset({"warmup_observations", "pace_start"})
"""Settings that no controller minds: there is a warm-up or there is none, and a Trainer sets the start of a pace by itself."""

_NEVER: Final = (("ceiling_share", 1), ("max_pace", 1), ("pace_growth", 1.1))
"""What is so with every controller but `adaptive`, and was written into ledgers of earlier versions."""


class Chosen(NamedTuple):
    """What flat names come to.

    Attributes:
        settings: The controller; None where there is none of that name.
        rules: `parameter_rules`, with what was handed down to them.
        problems: A sentence for each setting that is wrong.
    """

    settings: Controller[Any] | None
    rules: Any
    problems: list[str]


def choose(controller: Controller[Any] | str, values: Mapping[str, Any], rules: Any, run: Iterable[str]) -> Chosen:
    """Make the controller that flat names describe.

    Args:
        controller: A name, or a controller that `values` changes.
        values: Settings by name or key, all but those of the run.
        rules: `parameter_rules`; a setting of a controller that only they name is handed down to them.
        run: Names of the settings of the run, for hints.
    """
    named = controller if isinstance(controller, str) else name_of(controller)
    kind, label = (None if named is None else CONTROLLERS.get(named)), str(named)
    own: dict[str, tuple[str, Any]] = {}
    foreign: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        found = None if kind is None else _setting_of(kind, name, values)
        if found is not None:
            own[found.name] = (name, value)
        elif _owners(name):
            foreign[name] = value
        else:
            problems.append(_unknown(name, kind, label, run))
    rules, taken = _handed_down(controller, kind, foreign, rules)
    for name, value in foreign.items():
        if kind is None or name in COMMON:
            wrong = _owners(name)[0][1].problem(value, name)
        else:
            wrong = None if name in taken or _means_nothing(name, value) else _of_another(name, value, label)
        problems += [] if wrong is None else [wrong]
    if kind is None:
        return Chosen(None, rules, problems)
    base = kind() if isinstance(controller, str) else controller
    settings, wrongs = _changed(base, own)
    return Chosen(settings, rules, [*wrongs, *problems])


def _changed(base: Controller[Any], own: Mapping[str, tuple[str, Any]]) -> tuple[Controller[Any], list[str]]:
    """A controller with some settings changed, by field; `base` and what is wrong where they break a rule."""
    known = settings_of(type(base))
    wrong = {
        field: problem
        for field, setting in known.items()
        if field in own and (problem := setting.problem(own[field][1], own[field][0])) is not None
    }
    values = {field: own[field][1] if field in own else getattr(base, field) for field in known}
    draft = drafted(type(base), {f: getattr(base, f) if f in wrong else v for f, v in values.items()})
    problems = [*wrong.values(), *conflicts_left(draft.conflicts(), wrong)]
    return (base, problems) if problems else (type(base)(**values), [])


def _setting_of(kind: type, name: str, values: Iterable[str]) -> Setting | None:
    """The setting of a controller that goes by this key, or by this name where its key is not there too."""
    if (found := keys_of(kind).get(name)) is not None:
        return found
    found = settings_of(kind).get(name)
    return None if found is None or found.key in values else found


def _owners(key: str) -> list[tuple[str, Setting]]:
    """Who has a setting of this key."""
    return [(name, keys_of(kind)[key]) for name, kind in CONTROLLERS.items() if key in keys_of(kind)]


def _means_nothing(name: str, value: Any) -> bool:
    return name in COMMON or (name, value) in _NEVER or any(value == s.default for _, s in _owners(name))


def _handed_down(
    controller: Controller[Any] | str, kind: type | None, foreign: Mapping[str, Any], rules: Any
) -> tuple[Any, set[str]]:
    """Rules with the settings that were given for the controllers they name, and the keys of those settings."""
    if not isinstance(rules, dict):
        return rules, set()
    taken: set[str] = set()
    handed: dict[Any, Any] = {}
    for pattern, rule in rules.items():
        rule = _as_fields(rule) if isinstance(rule, Controller) else rule
        handed[pattern] = rule
        named = rule.get("controller", controller) if isinstance(rule, dict) else rule
        other = CONTROLLERS.get(named) if isinstance(named, str) else kind
        if other is None or other is kind:
            continue
        own = rule if isinstance(rule, dict) else {"controller": rule}
        mine = {key: s for key, s in keys_of(other).items() if key in foreign}
        taken |= set(mine)
        added = {
            key: foreign[key]
            for key, s in mine.items()
            if key not in own and s.name not in own and foreign[key] != s.default
        }
        handed[pattern] = {**own, **added} if added else rule
    return handed, taken


def _as_fields(controller: Controller[Any]) -> dict[str, Any]:
    # Left at its default the pace is that of the run, which all parameters share.
    kept = {key: value for key, value in by_key(controller).items() if key != "max_pace" or value not in (None, 1)}
    return {"controller": name_of(controller), **kept}


def carried(settings: Controller[Any], kind: type) -> dict[str, Any]:
    """What a controller and another one have both, by key: that much of its settings holds for the other too."""
    return {key: value for key, value in by_key(settings).items() if key in keys_of(kind)}


def lost(settings: Controller[Any], name: str) -> list[str]:
    """A sentence for each setting that was set and that the controller of this name does not have."""
    others = {key: value for key, value in by_key(settings).items() if key not in keys_of(CONTROLLERS[name])}
    return [_of_another(key, value, name) for key, value in others.items() if not _means_nothing(key, value)]


def keyed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with each setting of the controller by its key."""
    found = {name: _setting_of(kind, name, values) for name in values}
    return {name if (s := found[name]) is None else s.key: value for name, value in values.items()}


def own_settings(controller: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that mean something to a controller: its own, and all that is none of another one."""
    kind = CONTROLLERS.get(controller)
    if kind is None:
        return values
    mine = {*keys_of(kind), *settings_of(kind), *COMMON}
    return {name: value for name, value in values.items() if name in mine or not _named_by(name)}


def flat_names() -> list[str]:
    """Names of the settings of all controllers: every key, and every name."""
    return sorted({name for kind in CONTROLLERS.values() for name in (*keys_of(kind), *settings_of(kind))})


def _named_by(name: str) -> list[str]:
    """Controllers that have a setting of this key or name."""
    return [c for c, kind in CONTROLLERS.items() if name in keys_of(kind) or name in settings_of(kind)]


def _of_another(name: str, value: Any, controller: str) -> str:
    owners = _owners(name)
    have = " and ".join(f"'{owner}'" for owner, _ in owners)
    return (
        f"`{name}` must be left at {owners[0][1].default} with controller '{controller}', but is {value}: it belongs to controller {have}. "
        f"Set `controller`, or leave `{name}` out."
    )


def _unknown(name: str, kind: type | None, controller: str, run: Iterable[str]) -> str:
    if kind is not None and (same := settings_of(kind).get(name)) is not None:
        return f"`{name}` must be given once, but is given as `{same.key}` too, its name in files. Leave one of the two out."
    if kind is not None and (others := _named_by(name)):
        have = " and ".join(f"'{other}'" for other in others)
        return f"`{name}` must be left out with controller '{controller}', which has no such setting: it belongs to controller {have}."
    mine = () if kind is None else (*settings_of(kind), *keys_of(kind))
    known = list(dict.fromkeys(("controller", *run, *mine)))
    hint = (
        FIELDS_ELSEWHERE.get(name) or near(name, known) or near(name, flat_names()) or f" Fields: {', '.join(known)}."
    )
    return f"`{name}` must be a field of AdaptiveClipConfig, but is unknown instead.{hint}"


_AS_PYTHON: Final = {"True": True, "False": False, "None": None}


def json_or_text(text: str) -> Any:
    """The value that a flag's text stands for: JSON, a word of Python, or else the text itself, for the checks of types to report."""
    if text in _AS_PYTHON:
        return _AS_PYTHON[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def clip_names() -> tuple[str, ...]:
    """What text for `clip=` may begin with: a controller or a preset."""
    return (*CONTROLLERS, *PRESETS)


def fields_of_text(text: str, what: str) -> dict[str, Any] | None:
    """Settings from `NAME:FIELD=VALUE,FIELD=VALUE`, or of a preset by its name alone; None where the text has no such form.

    Args:
        text: The text. There is no way to write a value with a comma in it.
        what: The argument that it was given as.

    Raises:
        ConfigError: A piece behind the name is no FIELD=VALUE, or a field comes twice.
    """
    name, colon, settings = text.partition(":")
    if not (colon and name in CONTROLLERS) and name not in PRESETS:
        return None
    preset = PRESETS[name].fields if name in PRESETS else {"controller": name}
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or key.strip() in (*given, "controller"):
            raise ConfigError(
                f"`{what}` must be NAME or NAME:FIELD=VALUE,... with each field once, but is {text!r} instead: look at {setting!r}."
            )
        given[key.strip()] = json_or_text(value.strip())
    return {**preset, **(keyed(CONTROLLERS[preset["controller"]], given) if name in PRESETS else given)}
