"""Settings under one name, for a kind of training: `clip="rl"`, and with changes `clip="rl:width=6"`."""

from typing import Any, Final, NamedTuple


class Preset(NamedTuple):
    """A name for settings.

    Attributes:
        fields: Of `AdaptiveClipConfig`, the controller among them.
        use: When to take it, as a clause.
    """

    fields: dict[str, Any]
    use: str


PRESETS: Final[dict[str, Preset]] = {
    "rl": Preset(
        {
            # Rewards make norms that scatter over a decade: on the logarithmic scale that is usual, and a broken reward is not. A step that
            # is broken points nowhere, so it is left out; cut to size it would be one full step into the wrong direction.
            "controller": "log_zscore",
            "log_width": 5.0,
            # Runs of a few hundred steps, in which the policy, and with it the norm, is another one after a hundred.
            "log_decay": 0.99,
            "warmup_observations": 20,
            # A policy with broken weights generates for minutes per step; ten in a row are no accident.
            "max_consecutive_nonfinite": 10,
        },
        "for policies, such as by GRPO: a step with a broken reward leaves no trace",
    ),
}
"""Presets by the names that they go by. None is that of a controller."""
