"""What `hf-adaclip compare` compares where no script is given: the two tasks of `demo`.

The stock arm's learning rate and the target are read from `demo_target.json`, shipped with the package: the recorded output of
`hf-adaclip compare --tune`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import resources
from typing import Any, Final

from hf_adaclip.compare.arms import (
    ADAPTIVE_DEFAULT,
    DEFAULT_LEARNING_RATE,
    STOCK,
    STOCK_DEFAULT,
    TUNED,
    Arm,
    Study,
)
from hf_adaclip.compare.demo import TASKS
from hf_adaclip.compare.runs import MODULE
from hf_adaclip.compare.tuning import TARGET_SHARE, TUNING_SEEDS, as_flags, set_target, tune
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near_controller
from hf_adaclip.ledger.schema import plain
from hf_adaclip.run.versions import environment

TARGET_FILE: Final = "demo_target.json"
DEMO_ARMS: Final = (STOCK, STOCK_DEFAULT, "adaptive", ADAPTIVE_DEFAULT)


def demo_studies(study: Study, tasks: Sequence[str], steps: int | None, fixed: dict[str, Any] | None) -> list[Study]:
    """The studies of the demo, one for each task.

    Args:
        study: Folder, arms, seeds, jobs; its script is put in.
        tasks: Names out of `TASKS`.
        steps: Optimizer steps of each run in place of the task's own (for a quick look; the target no longer means much).
        fixed: What `demo_target.json` holds; None where it is still to be found.

    Raises:
        ConfigError: A task is unknown.
    """
    unknown = [
        f"`--tasks` must be among {', '.join(TASKS)}, but {t!r} is not.{near_controller(t, TASKS)}"
        for t in tasks
        if t not in TASKS
    ]
    if unknown:
        raise ConfigError(unknown)
    return [_study(study, name, steps, None if fixed is None else fixed["tasks"][name]) for name in tasks]


def _study(study: Study, name: str, steps: int | None, fixed: dict[str, Any] | None) -> Study:
    task = TASKS[name]
    length = () if steps is None else ("--max_steps", str(steps), "--eval_steps", str(min(steps, task.eval_steps)))
    script = (MODULE, "hf_adaclip.compare.demo", "--task", name, *length)
    as_it_comes = ("--learning_rate", f"{DEFAULT_LEARNING_RATE:g}")
    own = {
        STOCK: Arm("stock Trainer, max_grad_norm 1.0, its best learning rate", ("--clip", "stock")),
        STOCK_DEFAULT: Arm(
            f"stock Trainer exactly as it comes (learning rate {DEFAULT_LEARNING_RATE:g})",
            ("--clip", "stock", *as_it_comes),
        ),
        "adaptive": Arm("adaptive clipping, defaults, the stock arm's best learning rate", ("--clip", "adaptive")),
        ADAPTIVE_DEFAULT: Arm(
            f"adaptive clipping exactly as it comes (learning rate {DEFAULT_LEARNING_RATE:g})",
            ("--clip", "adaptive", *as_it_comes),
        ),
    }
    study = replace(
        study,
        script=script,
        extra={**own, **study.extra},
        name=name,
        title=task.title,
        quality=task.quality,
        rates=task.rates,
        coordinates=("--learning_rate",),
        warm=True,
    )
    if fixed is None:
        return study
    rates = ", ".join(f"{rate:g}" for rate in task.rates)
    return replace(
        study,
        script=(*script, *as_flags(fixed["chosen"])),
        target=fixed["target"],
        same_data=fixed["fingerprint"] == task.fingerprint,
        baseline=f"Learning rate {fixed['chosen']['--learning_rate']:g}: the stock arm's best of {rates} on other seeds.",
    )


def fixed_before() -> dict[str, Any]:
    """What was fixed before any adaptive run, as it is shipped with the package."""
    found: dict[str, Any] = json.loads((resources.files(__package__) / TARGET_FILE).read_text(encoding="utf-8"))
    return found


def fix(studies: Sequence[Study]) -> dict[str, Any]:
    """Tune the stock arm on every task, set the targets, and write both to `demo_target.json` in the studies' folder."""
    found = {}
    for study in studies:
        tuned = tune(study, TUNED)
        target = set_target(study, (*study.flags_of(TUNED), *as_flags(tuned["chosen"])))
        found[study.name] = {**tuned, "target": target, "fingerprint": TASKS[study.name].fingerprint}
    fixed = {
        "command": studies[0].command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": environment(),
        "rule": (
            f"Stock Trainer, linear schedule with 10 % warm-up, seeds {list(TUNING_SEEDS)}. Best learning rate: lowest median final "
            f"eval loss. Target: the eval loss that every run at that rate reached within {TARGET_SHARE:.0%} of its evaluations."
        ),
        "tasks": found,
    }
    path = studies[0].output / TARGET_FILE
    path.write_text(json.dumps(plain(fixed), indent=1) + "\n", encoding="utf-8")
    return fixed
