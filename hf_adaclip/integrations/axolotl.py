"""Axolotl: `plugins: [hf_adaclip.integrations.axolotl.AdaptiveClipPlugin]`, and settings as `adaclip_*` keys of the same YAML.

The plugin attaches to whatever Trainer Axolotl has built (`post_trainer_create`). Axolotl logs a plugin that cannot be imported and trains
without it; so this one says a line on stderr once it has attached, and a run without `clip_ledger.jsonl` was not clipped by it.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, ValidationError, create_model

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.controllers.settings import keys_of, settings_of
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.hints import near
from hf_adaclip.integrations.launch import attach_and_say

PREFIX = "adaclip_"


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        f"{PREFIX}clip": (
            str | None,
            Field(None, description="A controller, NAME:FIELD=VALUE,..., or the path of a config's JSON."),
        )
    }
    # A key of several controllers is of one type in all of them.
    known = [
        *settings_of(AdaptiveClipConfig).values(),
        *(s for kind in CONTROLLERS.values() for s in keys_of(kind).values()),
    ]
    for s in known:
        kind = dict[str, Any] | str if s.name == "parameter_rules" else s.kind
        fields[f"{PREFIX}{s.key}"] = (kind | None, Field(None, description=s.help))
    return fields


AdaclipArgs: type[BaseModel] = create_model("AdaclipArgs", **_fields())
"""The keys that Axolotl's YAML may have with this plugin: `adaclip_clip` for all in one, every field of `AdaptiveClipConfig`, and every
setting of a controller by its key."""


def config_from(cfg: Any) -> AdaptiveClipConfig:
    """The config that the `adaclip_*` keys of an Axolotl config describe.

    Args:
        cfg: A mapping, as read from YAML or as Axolotl has validated it.

    Raises:
        ConfigError: A key is unknown, or a value breaks its rule.
    """
    known = AdaclipArgs.model_fields
    given = {key: value for key, value in dict(cfg).items() if str(key).startswith(PREFIX) and value is not None}
    problems = []
    for key in given:
        if key not in known:
            problems.append(f"`{key}` must be a key of this plugin, but is unknown instead.{near(key, known)}")
    if problems:
        raise ConfigError(problems)
    try:
        values = AdaclipArgs(**given).model_dump(include=set(given))
    except ValidationError as error:
        raise ConfigError(
            [f"`{e['loc'][0]}` must be otherwise: {e['msg']}, but is {e['input']!r} instead." for e in error.errors()]
        ) from error
    config = AdaptiveClipConfig.resolve(values.pop(f"{PREFIX}clip", None) or "adaptive")
    return config.replace(**{key.removeprefix(PREFIX): value for key, value in values.items()})


class AdaptiveClipPlugin(BasePlugin):  # type: ignore[misc]
    """Adaptive gradient clipping in every Trainer that Axolotl builds, for SFT and for RL."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the model of the keys."""
        return f"{__name__}.AdaclipArgs"

    def register(self, cfg: Any) -> None:
        """Check the keys before anything is loaded; Axolotl itself passes over keys that it does not know.

        Raises:
            ConfigError: A key is unknown, or a value breaks its rule.
            UnsupportedSetupError: Experts are spread over ranks.
        """
        config_from(cfg)
        if (dict(cfg).get("expert_parallel_size") or 1) > 1:
            raise UnsupportedSetupError(
                "`expert_parallel_size` must be 1 under adaptive clipping, but is "
                f"{dict(cfg)['expert_parallel_size']} instead: gradients on several meshes have not been run here. Leave the plugin out."
            )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach, and say so.

        Raises:
            ConfigError: `max_grad_norm` is 0 or null.
            UnsupportedSetupError: The setup is not supported.
        """
        attach_and_say(trainer, config_from(cfg))
