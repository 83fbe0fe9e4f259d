"""The arms of a comparison and the runs they are made of."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: As in `--arms`.
        title: For people.
        clip: Fields of `AdaptiveClipConfig` that differ from the defaults; None for the stock Trainer.
        rate: `tuned`: the learning rate that is best for the stock arm on its grid; `default`: that of `TrainingArguments`.
    """

    name: str
    title: str
    clip: dict[str, Any] | None
    rate: Literal["tuned", "default"] = "tuned"


STOCK: Final = "stock"
DEFAULT_LEARNING_RATE: Final = 5e-5
PACE: Final = 64.0
"""`max_pace` of the arm `adaptive-pace`: room for the pace to find a rate far above the given one."""

ARMS: Final[dict[str, Arm]] = {
    arm.name: arm
    for arm in (
        Arm(STOCK, "stock Trainer, max_grad_norm 1.0, its best learning rate", None),
        Arm("adaptive", "adaptive clipping, defaults, the stock arm's learning rate", {}),
        Arm(
            "adaptive-pace",
            f"adaptive clipping with max_pace {PACE:g}, the stock arm's learning rate",
            {"max_pace": PACE},
        ),
        Arm("zscore", "ZClip, defaults, the stock arm's learning rate", {"controller": "zscore"}),
        Arm("percentile", "AutoClip p=10, the stock arm's learning rate", {"controller": "percentile"}),
        Arm("stock-default", "stock Trainer exactly as it comes (learning rate 5e-5)", None, "default"),
    )
}

ARMS.update(
    (name, Arm(name, f"{kind.idea} ({kind.source}), the stock arm's learning rate", {"controller": name}))
    for name, kind in CONTROLLERS.items()
    if name not in ARMS
)

DEMO_ARMS: Final = (STOCK, "adaptive", "adaptive-pace")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run: the same spec on the same machine gives the same numbers.

    Attributes:
        task, arm, seed: Which run.
        learning_rate: Peak of a linear schedule.
        warmup_ratio: Share of the steps in which the rate rises.
        max_grad_norm: The stock threshold; for adaptive arms that of the controller's warm-up.
        clip: Complete controller config, None for the stock Trainer.
        max_steps, batch_size, eval_steps: Schedule.
        data: Fingerprint of the data.
    """

    task: str
    arm: str
    seed: int
    learning_rate: float
    clip: dict[str, Any] | None
    max_steps: int
    batch_size: int
    eval_steps: int
    data: str
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.task} {self.arm} seed {self.seed}"

    @property
    def folder(self) -> str:
        """Where the run's files go, relative to the comparison's folder."""
        return f"runs/{self.task}/{self.arm}/seed-{self.seed}"

    @property
    def digest(self) -> str:
        """Hash of the spec: a finished run is reused only under the spec that made it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def clip_config(arm: Arm) -> dict[str, Any] | None:
    """The complete config of an arm, with every default written out, so that a later default cannot pass for the same run."""
    return None if arm.clip is None else AdaptiveClipConfig(**arm.clip).to_dict()
