"""Clipping in one string, as configuration files, flags and environment variables hold it."""

from pathlib import Path
from typing import Any

from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.errors import ConfigError
from hf_adaclip.validation import json_or_text


def clip_from_text(clip: ClipArgument) -> AdaptiveClipConfig:
    """A config from `NAME`, `NAME:FIELD=VALUE,FIELD=VALUE` or the path of its JSON; a config passes as it is.

    Args:
        clip: The text. A value with a comma in it (`parameter_rules`) needs a JSON file.

    Raises:
        ConfigError: It is none of these, or a setting is wrong.
    """
    name, colon, settings = str(clip).partition(":")
    if not isinstance(clip, str) or not colon or name not in CONTROLLERS:
        return AdaptiveClipConfig.resolve(clip)
    fields: dict[str, Any] = {"controller": name}
    for setting in filter(None, settings.split(",")):
        field, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"`clip` must be NAME or NAME:FIELD=VALUE,..., but is {clip!r} instead.")
        fields[field.strip()] = json_or_text(value.strip())
    return AdaptiveClipConfig.from_dict(fields)


def portable(clip: str) -> str:
    """The same text for a process that starts in another folder: the path of a file becomes absolute.

    Raises:
        ConfigError: As for [`clip_from_text`].
    """
    clip_from_text(clip)
    name = clip.partition(":")[0]
    return clip if name in CONTROLLERS else str(Path(clip).resolve())
