"""The arms of the study: which flags each adds, which of them are tuned, and in which order they are run."""

from typing import Final

from hf_adaclip.compare.arms import ARMS as KNOWN
from hf_adaclip.compare.arms import STOCK, TUNED, Arm, untuned
from hf_adaclip.drivers.settling import MAX_PACE

AT: Final = "@tuned"
"""Ends the name of an arm that is run with the flags that were best for the stock arm."""
SHORT: Final = "~72"
"""Ends the name of an arm that is run for `HORIZON` of the steps, its schedule scaled to them."""
HORIZON: Final = 0.72
COORDINATES: Final = ("--learning_rate", "--max_grad_norm", "--warmup_steps", "--adam_beta2", "--learning_rate")
"""What the tuning of every arm searches, in this order; the rate once more, because a warm-up may bear a higher one."""
UNTUNED: Final = {"--max_grad_norm": 1.0, "--warmup_steps": 0.0, "--adam_beta2": 0.999}
"""Where the range of learning rates is measured, as values that the tuning begins with."""

OFF: Final = {"max_pace": "1", "spectral_width": "None", "agreement": "false"}
"""The range alone, whatever the default is made of."""


def _parts(**parts: str) -> tuple[str, ...]:
    return "--clip", "adaptive:" + ",".join(f"{name}={value}" for name, value in {**OFF, **parts}.items())


ARMS: Final[dict[str, Arm]] = {
    "guard": Arm("the range alone", _parts()),
    "pace": Arm(f"range and pace (max_pace={MAX_PACE:g})", _parts(max_pace=f"{MAX_PACE:g}")),
    "spectral": Arm("range and equal singular values", _parts(spectral_width="0")),
    "agreement": Arm("range and sign agreement", _parts(agreement="true")),
    "spectral-agreement": Arm(
        "range, equal singular values and sign agreement", _parts(spectral_width="0", agreement="true")
    ),
    "muon": Arm("stock Trainer, Muon on the hidden matrices", ("--clip", "stock", "--optimizer", "muon")),
    "cautious": Arm("stock Trainer with C-AdamW", ("--clip", "stock", "--optimizer", "cautious_adamw")),
}
"""Arms of the study's own; `stock`, `adaptive` (the default), `zscore` and `percentile` are those of `hf-adaclip compare`."""

ABLATIONS: Final = ("spectral", "agreement", "spectral-agreement", "pace")
CORE_WAVES: Final = (
    (STOCK, TUNED, "adaptive", f"adaptive{AT}"),
    ("adaptive-tuned", "spectral-agreement-tuned", "guard"),
    ("tuned~72", "adaptive@tuned~72", "adaptive-tuned~72", "spectral-agreement-tuned~72"),
)
"""What the goals are judged by. A wave is run on all tasks before the next one begins."""
REST_WAVES: Final = (
    ABLATIONS,
    ("muon-tuned", "cautious-tuned", "muon-tuned~72", "cautious-tuned~72"),
    tuple(f"{arm}{AT}" for arm in ABLATIONS),
    ("zscore", "percentile", "muon", "cautious"),
)
CORE: Final = tuple(arm for wave in CORE_WAVES for arm in wave)
REST: Final = tuple(arm for wave in REST_WAVES for arm in wave)
RANGE_ARMS: Final = (STOCK, "adaptive")


def base_of(arm: str) -> str:
    """The arm whose flags it has: without `~72`, `@tuned`, and `-tuned`."""
    return untuned(arm.removesuffix(SHORT).removesuffix(AT))


def is_arm(arm: str) -> bool:
    """Whether there is an arm of that name."""
    return base_of(arm) in KNOWN or base_of(arm) in ARMS


def needs(arm: str) -> str | None:
    """The arm that has to be tuned before it; None where it is run as it comes."""
    long = arm.removesuffix(SHORT)
    if long.endswith(AT):
        return TUNED
    return long if untuned(long) != long else None


def short_steps(steps: int) -> int:
    """Steps of the equivalent horizon."""
    return max(1, round(steps * HORIZON))
