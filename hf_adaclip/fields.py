"""Hyperparameters of the controllers: the part of `AdaptiveClipConfig` that each controller takes its own fields from, by name."""

from dataclasses import dataclass, field


# Methods are made for the config that inherits these fields; made here too, they would only cost time at import.
@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class HyperParameters:
    """One field per hyperparameter; the help begins with the controllers that use it, all of them where it names none."""

    warmup_observations: int = field(
        default=50,
        metadata={"help": "Finite norms seen before the controller decides; the static threshold rules until then."},
    )
    decay: float = field(
        default=0.97,
        metadata={
            "help": "adaptive, zscore: decay per step of the running level and spread, in (0, 1): memory of 1/(1-decay) steps."
        },
    )
    far_width: float = field(
        default=5.0,
        metadata={"help": "adaptive: first half-width of the range, in spreads. A norm beyond it is an excursion."},
    )
    near_width: float = field(
        default=1.5,
        metadata={"help": "adaptive: what an excursion is cut back to: this many spreads above the level."},
    )
    min_far_width: float = field(
        default=4.5, metadata={"help": "adaptive: the range never gets narrower, in spreads."}
    )
    max_far_width: float = field(default=8.0, metadata={"help": "adaptive: the range never gets wider, in spreads."})
    widen_step: float = field(
        default=0.01, metadata={"help": "adaptive: spreads by which the range widens per step without an excursion."}
    )
    narrow_factor: float = field(
        default=0.8, metadata={"help": "adaptive: factor in (0, 1] on the range's width after an upward excursion."}
    )
    accept_after: int = field(
        default=6, metadata={"help": "adaptive: excursions in a row at one level that make it the new level."}
    )
    min_spread: float = field(
        default=0.05,
        metadata={"help": "adaptive: floor of the spread, so that a very calm run is not held too tight."},
    )
    max_edge: float = field(
        default=1.3,
        metadata={
            "help": "adaptive: the edge of the range is never farther than this deviation (1.3: 4.7 x the level), and beyond 0.6 "
            "(1.86 x) never above the static threshold."
        },
    )
    max_near: float = field(
        default=0.2,
        metadata={
            "help": "adaptive: an excursion is never left farther out than this deviation (0.2: 1.22 x the level)."
        },
    )
    ceiling_share: float = field(
        default=0.5,
        metadata={
            "help": "adaptive: where the static threshold cut more than this part of the warm-up, it stays the ceiling of the range, until "
            "it cuts less than a fifth of that. 0: for good if it cut any step; 1: never. Only for the global norm."
        },
    )
    pace_start: int | None = field(
        default=None,
        metadata={
            "help": "Steps in which the pace rises to 1 at the start. Unset: in a Trainer a tenth of its steps less those of the "
            "schedule's own warm-up, 50 in a hand-written loop."
        },
    )
    pace_trust: float = field(
        default=3.0,
        metadata={"help": "The pace leaves 1 where the useful rate is estimated at this many times the given one."},
    )
    pace_hold: float = field(
        default=1 / 3, metadata={"help": "Part of the largest estimate that the pace keeps when the estimate falls."}
    )
    pace_growth: float = field(default=1.1, metadata={"help": "Largest factor by which the pace grows per step."})
    pace_shrink: float = field(
        default=0.95,
        metadata={"help": "Factor by which it goes back per step, also after an upward excursion or a skipped step."},
    )
    z_threshold: float = field(
        default=2.5, metadata={"help": "zscore: standard deviations above the mean at which clipping starts."}
    )
    percentile: float = field(
        default=10.0, metadata={"help": "percentile: the percentile of past norms that becomes the threshold."}
    )
    history: int = field(default=1000, metadata={"help": "percentile: how many past norms are kept."})
    percentile_capped: bool = field(
        default=False, metadata={"help": "percentile: the static threshold stays on as a cap, as in TRELLIS."}
    )
    weight_ratio: float = field(
        default=0.01, metadata={"help": "weight_ratio: largest ratio of a unit's gradient to its weights, as norms."}
    )
    weight_floor: float = field(
        default=1e-3, metadata={"help": "weight_ratio: norm that smaller weights count as, so that zeros can train."}
    )
    moment_width: float = field(
        default=3.0,
        metadata={"help": "second_moment: multiples of the root of Adam's second moment; 70.7 is SPAM's theta."},
    )
    ema_factor: float = field(
        default=1.05, metadata={"help": "ema_ratio: multiple of the average of what was let through."}
    )
    ema_decay: float = field(default=0.98, metadata={"help": "ema_ratio: decay of that average per step."})
    median_factor: float = field(
        default=2.0, metadata={"help": "median: multiple of the median that is the threshold."}
    )
    median_window: int = field(default=100, metadata={"help": "median: how many past norms it is taken over."})
    quantile: float = field(
        default=0.99, metadata={"help": "quantile: share of norms that stays below the threshold."}
    )
    quantile_rate: float = field(
        default=0.05, metadata={"help": "quantile: relative step of the threshold when it is exceeded."}
    )
    log_width: float = field(
        default=4.0, metadata={"help": "log_zscore: standard deviations of the logarithm at which a step is left out."}
    )
    log_decay: float = field(default=0.995, metadata={"help": "log_zscore: decay of mean and deviation per step."})
    sd_width: float = field(
        default=6.0, metadata={"help": "mean_sd: standard deviations above the mean at which a step is left out."}
    )
    sd_window: int = field(default=128, metadata={"help": "mean_sd: how many past norms these are taken over."})
