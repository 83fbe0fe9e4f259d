"""Settings of other packages as an `AdaptiveClipConfig`: what people have today, said in our words."""

from typing import Any

from hf_adaclip.errors import ConfigError


def zclip_fields(
    alpha: float, z_thresh: float, max_grad_norm: float | None, warmup_steps: int, mode: str, clip_option: str
) -> dict[str, Any]:
    """Fields for `ZClip(alpha, z_thresh, max_grad_norm, ...)` of PyPI `zclip`."""
    if (mode, clip_option) != ("zscore", "adaptive_scaling"):
        raise ConfigError(
            f"`mode` and `clip_option` must be 'zscore' and 'adaptive_scaling' (the form that the paper recommends), but are {mode!r} and "
            f"{clip_option!r} instead: the other forms are not here."
        )
    return {
        "controller": "zscore",
        "decay": alpha,
        "z_threshold": z_thresh,
        "warmup_observations": warmup_steps,
        "static_threshold": max_grad_norm,
        "max_threshold": max_grad_norm,
    }


def autoclip_fields(quantile: float, history_length: int, global_threshold: bool) -> dict[str, Any]:
    """Fields for `QuantileClip(quantile, history_length, global_threshold)` of PyPI `autoclip`."""
    return {
        "controller": "percentile",
        "percentile": 100.0 * quantile,
        "history": history_length,
        "granularity": "global" if global_threshold else "tensor",
        "warmup_observations": 2,
    }


def bitsandbytes_fields(percentile_clipping: int) -> dict[str, Any]:
    """Fields for `percentile_clipping=` of the optimizers of bitsandbytes before 0.50."""
    if not 1 <= percentile_clipping < 100:
        raise ConfigError(
            f"`percentile_clipping` must be in [1, 99], but is {percentile_clipping} instead: 100 was 'off' in bitsandbytes. "
            "Leave adaptive clipping out for that."
        )
    return {
        "controller": "percentile",
        "percentile": float(percentile_clipping),
        "history": 100,
        "granularity": "tensor",
        "warmup_observations": 2,
    }
