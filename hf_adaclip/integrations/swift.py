"""ms-swift: `--external_plugins "$(python -m hf_adaclip.integrations.swift_plugin)" --callbacks adaclip`, or both keys in its YAML.

ms-swift hands a callback no settings, so they come from `HF_ADACLIP` in the environment, or under `ENV:` of its YAML:
`zscore:width=3`, or the path of a JSON file.

ms-swift trains with `Accelerator.clip_grad_norm_` replaced: on a NaN norm the replacement drops all gradients. It is not reached from here,
since a Trainer that is attached clips in `_clip_grad_norm`, and there a step that is not finite is left out anyhow.
"""

import os
from typing import Any

from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback

from hf_adaclip.integrations.launch import VARIABLE, attach_and_say
from hf_adaclip.integrations.transformers import AdaptiveClipMixin

NAME = "adaclip"


class AdaptiveClipCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches to its Trainer once that is built. ms-swift makes callbacks before; nothing of the Trainer may be asked for until then.

    Raises:
        ConfigError: `HF_ADACLIP` is wrong, or `max_grad_norm` is 0.
        UnsupportedSetupError: The setup is not supported.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer, AdaptiveClipMixin):
            return
        attach_and_say(self.trainer, os.environ.get(VARIABLE) or "adaptive")


def register() -> None:
    """Make `--callbacks adaclip` known."""
    callbacks_map[NAME] = AdaptiveClipCallback
