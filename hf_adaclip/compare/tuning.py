"""What was fixed before any adaptive run: the stock arm's best learning rate, and the target.

`tuned.json`, shipped with the package, is the recorded output of `hf-adaclip compare --tune`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.arms import STOCK, RunSpec
from hf_adaclip.compare.statistics import median
from hf_adaclip.compare.tasks import TASKS, Task
from hf_adaclip.errors import ConfigError
from hf_adaclip.telemetry.point import Target

TUNING_SEEDS: Final = (100, 101)
"""Never used by a comparison, so that the target is not set on the runs that it judges."""

TARGET_SHARE: Final = 0.8
"""The target is what the tuned stock arm reaches, in every tuning run, within this share of its steps."""

TUNED_FILE: Final = "tuned.json"


def early(values: Sequence[float]) -> Sequence[float]:
    """The evaluations of a run within `TARGET_SHARE` of its steps; at least one, if there is any."""
    return values[: max(1, math.floor(len(values) * TARGET_SHARE))]


@dataclass(frozen=True)
class Tuned:
    """A task's learning rate and target, and where they come from."""

    learning_rate: float
    target: Target
    fingerprint: str
    grid: list[dict[str, Any]]

    @property
    def baseline(self) -> str:
        """How the stock arm was set, in a sentence."""
        rates = ", ".join(f"{rate:g}" for rate in sorted({g["learning_rate"] for g in self.grid}))
        return f"Learning rate {self.learning_rate:g}: the stock arm's best of {rates} on other seeds."


def tuning_specs(task: Task) -> list[RunSpec]:
    """The stock runs over the task's grid of learning rates."""
    return [
        RunSpec(
            task=task.name,
            arm=f"tuning-{STOCK}-{rate:g}",
            seed=seed,
            learning_rate=rate,
            clip=None,
            max_steps=task.max_steps,
            batch_size=task.batch_size,
            eval_steps=task.eval_steps,
            data=task.fingerprint(),
        )
        for rate in task.grid
        for seed in TUNING_SEEDS
    ]


def settle(task: Task, results: Sequence[dict[str, Any]]) -> Tuned:
    """Choose the learning rate with the lowest median final eval loss, and set the target by its runs.

    Raises:
        ConfigError: Every run failed or diverged.
    """
    grid = []
    for result in results:
        losses = [_loss(point) for point in result.get("points", [])]
        final = losses[-1] if losses else math.inf
        within = early(losses)
        grid.append(
            {
                "learning_rate": result["spec"]["learning_rate"],
                "seed": result["spec"]["seed"],
                "final_eval_loss": final if math.isfinite(final) else None,
                "best_eval_loss_within_share": min(within, default=math.inf),
                "error": result.get("error"),
            }
        )

    def final_of(rate: float) -> float:
        finals = [g["final_eval_loss"] for g in grid if g["learning_rate"] == rate]
        return median([math.inf if f is None else f for f in finals])

    best = min(task.grid, key=final_of)
    if not math.isfinite(final_of(best)):
        raise ConfigError(
            f"`{task.name}` must train at one of the learning rates {task.grid}, but failed at all of them."
        )
    target = max(g["best_eval_loss_within_share"] for g in grid if g["learning_rate"] == best)
    return Tuned(best, Target("eval_loss", round(target, 4)), task.fingerprint(), grid)


def load_tuned(path: Path | None = None) -> dict[str, Tuned]:
    """The recorded tuning, by task: the package's own, or the one in a file."""
    source = resources.files("hf_adaclip.compare") / TUNED_FILE if path is None else path
    values = json.loads(source.read_text(encoding="utf-8"))
    return {
        name: Tuned(v["learning_rate"], Target(**v["target"]), v["fingerprint"], v["grid"])
        for name, v in values["tasks"].items()
        if name in TASKS
    }


def tuned_to_json(tuned: dict[str, Tuned], *, command: str, date: str, versions: dict[str, str]) -> dict[str, Any]:
    """What `tuned.json` holds."""
    return {
        "command": command,
        "date": date,
        "versions": versions,
        "rule": (
            f"Stock Trainer, linear schedule with 10 % warm-up, seeds {list(TUNING_SEEDS)}. Best learning rate: lowest median final "
            f"eval loss. Target: the eval loss that every run at that rate reached within {TARGET_SHARE:.0%} of its evaluations."
        ),
        "tasks": {
            name: {
                "learning_rate": t.learning_rate,
                "target": {
                    "metric": t.target.metric,
                    "value": t.target.value,
                    "greater_is_better": t.target.greater_is_better,
                },
                "fingerprint": t.fingerprint,
                "grid": t.grid,
            }
            for name, t in tuned.items()
        },
    }


def _loss(point: dict[str, Any]) -> float:
    value = float(point["metrics"]["eval_loss"])
    return math.inf if math.isnan(value) else value
