"""Fine-tune a Transformers model on a task of GLUE, or on a file of sentences with labels, with the clipping that `--clip` chooses.

    python scripts/run_glue.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc --do_train --do_eval \
        --learning_rate 2e-5 --per_device_train_batch_size 32 --num_train_epochs 3 --output_dir out/mrpc --clip adaptive

The arguments may stand in one .json or .yaml file instead. Without a hub: `--train_file` and `--validation_file` (parquet, csv, json) and a
local `--model_name_or_path`, or no weights at all: `--model_type bert --config_overrides hidden_size=64,num_hidden_layers=2`.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import load_dataset
from optimizers import OptimizerArguments
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_adaclip.errors import ConfigError
from hf_adaclip.integrations.script_args import (
    Ingredients,
    make_trainer,
    parse_arguments,
    run_script,
    train_and_evaluate,
)
from hf_adaclip.integrations.script_checks import check_columns, check_size_was_chosen, override, reader_of

logger = logging.getLogger(__name__)

SENTENCES = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}

METRICS = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson_spearman",),
    "wnli": ("accuracy",),
}
"""What each task is measured by (Wang et al. 2019, table 1): files of the folder `metrics`."""

SMALL = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128"


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the hub, or a folder. Without it a model is made from `--model_type`."},
    )
    model_type: str = field(
        default="bert", metadata={"help": "Type of the model that is made when no weights are named."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Settings of the model's config, e.g. hidden_size=64,num_hidden_layers=2."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})


@dataclass
class DataArguments:
    """Which task, and how much of it."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"Task of GLUE: {', '.join(SENTENCES)}. Sets columns and metrics, for files too."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the hub (default: nyu-mll/glue with `--task_name`)."}
    )
    train_file: str | None = field(default=None, metadata={"help": "parquet, csv or json with the training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut, in tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all inputs to `--max_seq_length` instead of to the longest of a batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many rows of evaluation."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in SENTENCES:
            raise ConfigError(
                f"`--task_name` must be one of {', '.join(SENTENCES)}, but is {self.task_name!r} instead."
            )
        if self.task_name is None and self.dataset_name is None and self.train_file is None:
            raise ConfigError("`--task_name`, `--dataset_name` or `--train_file` must be given, but none is.")


def load_splits(data: DataArguments) -> tuple[Any, Any]:
    """Rows for training and for evaluation."""
    if data.train_file is not None:
        files = {"train": data.train_file, "validation": data.validation_file or data.train_file}
        given = {"train_file": data.train_file, "validation_file": data.validation_file}
        splits = load_dataset(reader_of(given, ("parquet", "json", "jsonl", "csv")), data_files=files)
    elif data.dataset_name is not None:
        splits = load_dataset(data.dataset_name)
    else:
        splits = load_dataset("nyu-mll/glue", data.task_name)
    validation = "validation_matched" if "validation_matched" in splits else "validation"
    return splits["train"], splits[validation]


def limit(rows: Any, count: int | None) -> Any:
    return rows if count is None else rows.select(range(min(count, len(rows))))


def columns_of(data: DataArguments, rows: Any) -> tuple[str, str | None]:
    """Names of the one or two columns that hold text."""
    if data.task_name is not None:
        return SENTENCES[data.task_name]
    names = [n for n in rows.column_names if n not in ("label", "idx")]
    return names[0], names[1] if len(names) > 1 else None


def make_model(arguments: ModelArguments, num_labels: int, regression: bool) -> tuple[Any, Any]:
    """Model and tokenizer."""
    settings: dict[str, Any] = {"num_labels": num_labels}
    if regression:
        settings["problem_type"] = "regression"
    source = arguments.model_name_or_path
    config = (
        AutoConfig.from_pretrained(source, **settings)
        if source
        else AutoConfig.for_model(arguments.model_type, **settings)
    )
    override(config, arguments.config_overrides)
    name = arguments.tokenizer_name or source
    if name is None:
        raise ConfigError("`--tokenizer_name` must be given when there is no `--model_name_or_path`, but is not.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # as of GPT-2 and Llama: padding is masked, whatever it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if config.pad_token_id is None or not source:  # by which such models find the last token of a row
        config.pad_token_id = tokenizer.pad_token_id
    if source:
        return AutoModelForSequenceClassification.from_pretrained(source, config=config), tokenizer
    config.vocab_size = len(tokenizer)
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def prepare(model_args: ModelArguments, data_args: DataArguments, first: Any) -> Ingredients:
    """What is trained: rows, model, metrics. `first` is a context in which the main process goes ahead of the others."""
    check_size_was_chosen(model_args.model_name_or_path, model_args.model_type, model_args.config_overrides, SMALL)
    train_rows, eval_rows = load_splits(data_args)
    train_rows = limit(train_rows, data_args.max_train_samples)
    eval_rows = limit(eval_rows, data_args.max_eval_samples)
    one, two = columns_of(data_args, train_rows)
    for rows in (train_rows, eval_rows):
        check_columns("task_name", [name for name in (one, two, "label") if name is not None], rows)
    regression = str(train_rows.features["label"].dtype).startswith("float")
    num_labels = 1 if regression else len(set(train_rows["label"]))
    model, tokenizer = make_model(model_args, num_labels, regression)

    def encode(batch: dict[str, Any]) -> Any:
        texts = (batch[one],) if two is None else (batch[one], batch[two])
        padding = "max_length" if data_args.pad_to_max_length else False
        return tokenizer(*texts, padding=padding, max_length=data_args.max_seq_length, truncation=True)

    with first:
        train_rows = train_rows.map(encode, batched=True, desc="tokenizing")
        eval_rows = eval_rows.map(encode, batched=True, desc="tokenizing")

    names = METRICS.get(data_args.task_name or "", ("pearson_spearman",) if regression else ("accuracy",))
    metrics = [evaluate.load(str(Path(__file__).parent / f"metrics/{name}.py")) for name in names]

    def compute_metrics(prediction: Any) -> dict[str, float]:
        scores = prediction.predictions
        scores = scores[0] if isinstance(scores, tuple) else scores
        guesses = np.squeeze(scores) if regression else np.argmax(scores, axis=1)
        result: dict[str, float] = {}
        for metric in metrics:
            result.update(metric.compute(predictions=guesses, references=prediction.label_ids))
        return result

    collate = default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer)
    return Ingredients(model, train_rows, eval_rows, collate, compute_metrics, processor=tokenizer)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say; returns all results."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, optimizer_args, training_args, clip_args = parse_arguments(
        argv, ModelArguments, DataArguments, OptimizerArguments
    )
    parts = prepare(model_args, data_args, training_args.main_process_first(desc="tokenizing"))
    trainer = make_trainer(
        clip_args,
        training_args,
        model=parts.model,
        train_dataset=parts.train_rows if training_args.do_train else None,
        eval_dataset=parts.eval_rows,
        processing_class=parts.processor,
        data_collator=parts.collate,
        compute_metrics=parts.compute_metrics,
        **optimizer_args.ingredients(parts.model, training_args),
    )
    card: dict[str, Any] = {"tasks": "text-classification", "language": "en"}
    if model_args.model_name_or_path:
        card["finetuned_from"] = model_args.model_name_or_path
    return train_and_evaluate(
        trainer, train_samples=len(parts.train_rows), eval_samples=len(parts.eval_rows), card=card
    )


if __name__ == "__main__":
    run_script(main)
