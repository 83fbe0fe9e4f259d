"""Settings under one name, for a kind of training: `clip="rl"`, and with changes `clip="rl:accept_after=60"`."""

from typing import Any, Final, NamedTuple


class Preset(NamedTuple):
    """A name for settings.

    Attributes:
        fields: Of `AdaptiveClipConfig`, the controller among them.
        use: When to take it, as a clause.
    """

    fields: dict[str, Any]
    use: str


SHAPE_OFF: Final[dict[str, Any]] = {"spectral_width": None, "agreement": False}
"""Nothing changes the direction of a step; so every run of a version without these parts was set."""
_RANGE_ALONE: Final[dict[str, Any]] = {"controller": "adaptive", "max_pace": 1.0, **SHAPE_OFF}

PRESETS: Final[dict[str, Preset]] = {
    "guard": Preset(_RANGE_ALONE, "to clip and nothing else: the step is the given one in length and direction"),
    "rl": Preset(
        {
            # The loss of a policy says nothing of its progress, so the step is the given one but for what is clipped.
            # A broken reward gives a step that points nowhere, and often several: a generation is trained on more than once. Cut to
            # size, each would be a full step into the wrong direction; left out, none is made.
            **_RANGE_ALONE,
            "on_spike": "skip",
            # Longer than any generation is trained on: what lasts is the policy's own, and becomes the new level.
            "accept_after": 30,
            # Healthy norms scatter over a decade, and a rare success is large: only what is 9 times the level is left out.
            "far_width": 8.0,
            "min_far_width": 8.0,
            "max_far_width": 10.0,
            "max_edge": 1.6,
            # Below that, what `max_grad_norm` has cut in the warm-up it goes on to cut, as in the stock Trainer.
            "ceiling_share": 0.0,
            # Runs of a few hundred steps.
            "warmup_observations": 20,
            # A policy with broken weights generates for minutes; ten steps in a row are no accident.
            "max_consecutive_nonfinite": 10,
        },
        "for policies, such as by GRPO: a step with a broken reward leaves no trace",
    ),
}
"""Presets by the names that they go by. None is that of a controller."""
