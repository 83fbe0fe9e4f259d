"""What somebody probably meant: near names, and what methods known by other names are called here."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

OTHER_NAMES: Final[dict[str, str]] = {
    "zclip": "'zscore', or with its own arguments `AdaptiveClipConfig.from_zclip(...)`",
    "autoclip": "'percentile', or with its own arguments `AdaptiveClipConfig.from_autoclip(...)`",
    "quantileclip": "'percentile', or with its own arguments `AdaptiveClipConfig.from_autoclip(...)`",
    "percentileclipping": "'percentile', or `AdaptiveClipConfig.from_bitsandbytes_percentile(...)`",
    "bitsandbytes": "'percentile', or `AdaptiveClipConfig.from_bitsandbytes_percentile(...)`",
    "trellis": "'percentile' with `capped=True`",
    "adagc": "'ema_ratio'",
    "ema": "'ema_ratio'",
    "agc": "'weight_ratio'",
    "nfnet": "'weight_ratio'",
    "unitwise": "'weight_ratio'",
    "icefall": "'median'",
    "scaledadam": "'median'",
    "zipformer": "'median'",
    "olmo": "'mean_sd'",
    "olmocore": "'mean_sd'",
    "skipstep": "'mean_sd'",
    "skipstepoptimizer": "'mean_sd'",
    "lingvo": "'log_zscore'",
    "gradnormtracker": "'log_zscore'",
    "spam": "'second_moment'",
    "adamwclip": "'second_moment'",
    "dp": "'quantile'",
    "adaclip": "'adaptive', this package's own, or 'quantile' (adaptive clipping as in differential privacy)",
    "hfadaclip": "'adaptive'",
    "auto": "'adaptive'",
    "default": "'adaptive'",
    "constant": "'static'",
    "fixed": "'static'",
    "norm": "'static'",
    "gradnorm": "'static'",
    "maxgradnorm": "'static'",
    "clipgradnorm": "'static'",
    "stock": "'static', or the Trainer of transformers as it is",
    "none": "'static' with a `static_threshold` that never acts, or the Trainer of transformers as it is",
    "off": "'static' with a `static_threshold` that never acts, or the Trainer of transformers as it is",
}
"""Methods by the names that they have elsewhere, in small letters without signs."""

_THRESHOLD: Final = " In a Trainer it is `max_grad_norm` of TrainingArguments, here and in a loop `static_threshold`."
FIELDS_ELSEWHERE: Final[dict[str, str]] = dict.fromkeys(
    (
        "max_grad_norm",
        "max_norm",
        "clip_norm",
        "clip_grad",
        "clip_value",
        "gradient_clip_val",
        "gradient_clipping",
        "threshold",
    ),
    _THRESHOLD,
)
"""Settings by the names that they have elsewhere, with a hint at ours."""


def near(name: object, names: Iterable[str], quote: str = "`") -> str:
    """A hint at the nearest of some names, as a sentence with a space before it; empty where none is near.

    Args:
        name: What was given.
        names: What there is.
        quote: Stands around the name.
    """
    known = {_plain(n): n for n in sorted(names, reverse=True)}
    found = difflib.get_close_matches(_plain(str(name)), list(known), n=1)
    return f" Did you mean {quote}{known[found[0]]}{quote}?" if found else ""


def near_controller(name: object, names: Iterable[str]) -> str:
    """The same for the name of a controller, by its name elsewhere too."""
    other = OTHER_NAMES.get(_plain(str(name)))
    if other is not None:
        return f" {name} is here {other}."
    return near(name, names, "'")


def near_clip(clip: object, names: Iterable[str]) -> str:
    """The same for all that may be given as `clip=`: text, or an object that belongs elsewhere."""
    if isinstance(clip, str):
        return near_controller(clip.partition(":")[0], names)
    if clip is None:
        return near_controller(clip, names)
    if isinstance(clip, type):
        return f" Write {clip.__name__}()."
    if hasattr(clip, "param_groups"):
        return " Pass the optimizer as `optimizer=`."
    return ""


def misplaced(name: str, taken: Iterable[str], fields: Iterable[str]) -> str:
    """A hint where an argument is unknown: at one of those that are taken, or at the config, which has a field of that name.

    Args:
        name: As it was given.
        taken: Arguments that there are.
        fields: Those of the config.
    """
    if name in fields:
        return f" It is a field of the config: pass `clip=AdaptiveClipConfig({name}=...)`."
    return near(name, taken) or FIELDS_ELSEWHERE.get(name, "")


def unknown_arguments(call: Callable[..., Any], given: Iterable[str], fields: Iterable[str]) -> list[str]:
    """A sentence for every argument that a call does not take.

    Args:
        call: A function or `__init__`.
        given: Names of arguments.
        fields: Those of the config.
    """
    parameters = inspect.signature(call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    taken = [name for name in parameters if name != "self" and not name.startswith("_")]
    return [
        f"`{name}` must be one of {', '.join(taken)}, but is unknown instead.{misplaced(name, taken, fields)}"
        for name in given
        if name not in parameters
    ]


def shown(value: object) -> str:
    """A value for a message: as Python writes what is short, and else by its type."""
    if value is None or isinstance(value, str | int | float | Path):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def near_flag(flag: str, flags: Iterable[str]) -> str:
    """The same for a flag of the command line, with or without a value behind `=`."""
    given, known = flag.split("=", 1)[0], list(flags)
    # Parsers of transformers know every flag twice, with - and with _: it is told as it was meant.
    alike = [f for f in known if ("-" in f.lstrip("-")) == ("-" in given.lstrip("-"))]
    return near(given, alike) or near(given, known)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
