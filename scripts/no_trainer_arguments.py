"""What the loop of `no_trainer.py` is told: the `TrainingArguments` of the scripts with a Trainer."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from transformers import TrainingArguments, set_seed

LAST: Final = "last"
"""Value of `--resume_from_checkpoint` for the newest checkpoint of `--output_dir`."""

FOLLOWED: Final = frozenset(
    [
        *(
            "output_dir",
            "do_train",
            "do_eval",
            "seed",
            "use_cpu",
            "bf16",
            "fp16",
            "disable_tqdm",
            "report_to",
            "run_name",
        ),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "max_steps", "dataloader_num_workers", "resume_from_checkpoint"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
        *("logging_strategy", "logging_steps", "logging_first_step"),
        # without a meaning here, or acted on by others
        *("remove_unused_columns", "log_level", "ddp_backend", "logging_nan_inf_filter"),
    ]
)
"""Fields of `TrainingArguments` that the loop follows."""


@dataclass
class LoopArguments(TrainingArguments):
    """`TrainingArguments`: the flags and files of a script with a Trainer do for the one without.

    Attributes:
        ignored: Names of fields that were given and that the loop does not follow.
    """

    mixed_precision: str | None = field(  # type: ignore[assignment]  # None: as launched
        default=None, metadata={"help": "no, bf16 or fp16 (default: --bf16, --fp16, or as `accelerate launch` says)."}
    )

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": f"Folder checkpoint-N to go on from, or {LAST!r}: the newest one of --output_dir, if there is one."
        },
    )

    def __post_init__(self) -> None:
        # Before the defaults are worked out: what is another value than the field's own was given.
        self.ignored = [
            f.name
            for f in fields(TrainingArguments)
            if f.init
            and f.name not in FOLLOWED
            and _given(getattr(self, f.name))
            != _given(f.default if f.default_factory is MISSING else f.default_factory())
        ]
        given = self.mixed_precision
        super().__post_init__()
        # TrainingArguments keeps under this name what --bf16, --fp16 and `accelerate launch` say.
        self.mixed_precision = given or self.mixed_precision


def _given(value: Any) -> Any:
    # An argument parser writes "nothing" in other ways than the dataclass does.
    return None if value in ("", "no", "none", False, [], {}) else value


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """The accelerator of a loop; its sampler can be gone on with from the middle of an epoch."""
    set_seed(arguments.seed)
    return Accelerator(
        cpu=arguments.use_cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
        log_with=list(arguments.report_to or ()) or None,
        project_dir=arguments.output_dir,
    )
