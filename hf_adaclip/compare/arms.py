"""The arms of a comparison, and the study that trains a script with some of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.runs import MODULE, ScriptRun, python_launcher
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.controllers.presets import PRESETS

STOCK: Final = "stock"
TUNED: Final = "tuned"
SUFFIX: Final = f"-{TUNED}"
DEFAULT_LEARNING_RATE: Final = 5e-5
STOCK_DEFAULT: Final = "stock-default"
ADAPTIVE_DEFAULT: Final = "adaptive-default"
"""Arms of the demo with the library's default learning rate, which nobody has tuned."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: For people.
        flags: What it adds to a script's own flags.
    """

    title: str
    flags: tuple[str, ...]


ARMS: Final[dict[str, Arm]] = {
    STOCK: Arm("stock Trainer, the flags as they were given", ("--clip", "stock")),
    "none": Arm("stock Trainer without clipping", ("--clip", "none")),
    "stable_adamw": Arm("stock Trainer with optim=stable_adamw", ("--clip", "stock", "--optim", "stable_adamw")),
    **{name: Arm(f"preset {preset.use}", ("--clip", name)) for name, preset in PRESETS.items()},
    **{name: Arm(f"{kind.idea} ({kind.source})", ("--clip", name)) for name, kind in CONTROLLERS.items()},
}


@dataclass(frozen=True)
class Study:
    """What is compared, on one task.

    Attributes:
        output: Folder for everything.
        script: The script, or `-m` and a module, and the user's flags.
        arms: Names out of `ARMS` or `extra`; `tuned` is the stock arm at the setting that is best for it, and `NAME-tuned` the same for
            another arm, with the same number of runs.
        extra: Arms of the user's own, by name.
        seeds: Seeds per arm.
        jobs: Runs at a time.
        launcher: What stands before the script.
        name: Of the task; empty for that of the script.
        title: Of the task, for people; empty for the script and what it trains on what.
        metric: What the target is of.
        greater: Whether more of it is better.
        target: The target; None lets the stock arm set it on other seeds.
        baseline: Who set a given target, and how the stock arm was set, in a sentence.
        same_data: Whether a given target was set on the data that is there.
        quality: Metric shown as final quality; None for that of the target.
        rates: Learning rates of the tuning; empty for the script's own times 0.5 to 8.
        coordinates: Flags that the tuning searches, in this order.
        command: The command line, for the record.
        quiet: No progress bar.
        warm, threads: See `run_scripts`.
    """

    output: Path
    script: tuple[str, ...]
    arms: tuple[str, ...]
    extra: dict[str, Arm]
    seeds: int
    jobs: int
    launcher: tuple[str, ...] = python_launcher()
    name: str = ""
    title: str = ""
    metric: str = "eval_loss"
    greater: bool = False
    target: float | None = None
    baseline: str = ""
    same_data: bool = True
    quality: str | None = None
    rates: tuple[float, ...] = ()
    coordinates: tuple[str, ...] = ("--learning_rate", "--max_grad_norm", "--warmup_steps")
    command: str = ""
    quiet: bool = False
    warm: bool = False
    threads: int | None = None

    @property
    def task(self) -> str:
        """Name of the task."""
        if self.script[0] == MODULE:
            return self.name or self.script[1].rpartition(".")[2]
        return self.name or Path(self.script[0]).stem

    @property
    def known(self) -> dict[str, Arm]:
        """All arms by name, the user's own first."""
        return {**ARMS, **self.extra}

    @property
    def pooling(self) -> dict[str, Any]:
        """How `run_scripts` is to run it."""
        return {"jobs": self.jobs, "quiet": self.quiet, "warm": self.warm, "threads": self.threads}

    def flags_of(self, arm: str) -> tuple[str, ...]:
        """Flags of an arm, before any tuning."""
        return self.known[untuned(arm)].flags

    def run(self, arm: str, flags: tuple[str, ...], seed: int) -> ScriptRun:
        """One run of it."""
        return ScriptRun(self.task, arm, seed, self.launcher, self.script, flags)

    def given(self, flag: str, default: float) -> float:
        """The number that the user's flags give."""
        for position, text in enumerate(self.script):
            if text == flag and position + 1 < len(self.script):
                return float(self.script[position + 1])
            if text.startswith(f"{flag}="):
                return float(text.split("=", 1)[1])
        return default


def is_tuned(arm: str) -> bool:
    """Whether an arm is one that is tuned first."""
    return arm == TUNED or arm.endswith(SUFFIX)


def untuned(arm: str) -> str:
    """Name of the arm that a tuned one begins with; that of any other as it is."""
    return STOCK if arm == TUNED else arm.removesuffix(SUFFIX)
