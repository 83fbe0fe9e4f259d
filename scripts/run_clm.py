"""Train or fine-tune a causal language model (with LoRA, if wanted) with the clipping that `--clip` chooses.

    python scripts/run_clm.py --model_name_or_path openai-community/gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --output_dir out/wikitext --clip adaptive

The arguments may stand in one .json or .yaml file instead. Without a hub: `--train_file` and `--validation_file` (parquet, json, csv,
txt), and a model from scratch with a byte-level BPE that is trained on the training text: `--model_type llama --train_tokenizer 2048
--config_overrides hidden_size=128,intermediate_size=256,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4`.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from datasets import load_dataset
from optimizers import OptimizerArguments
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from hf_adaclip.errors import ConfigError
from hf_adaclip.integrations.script_args import (
    Ingredients,
    make_trainer,
    parse_arguments,
    run_script,
    train_and_evaluate,
)
from hf_adaclip.integrations.script_checks import check_size_was_chosen, override, reader_of

SMALL = "hidden_size=128,intermediate_size=256,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4"


@dataclass
class ModelArguments:
    """Which model is trained, and how much of it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the hub, or a folder. Without it a model is made from `--model_type`."},
    )
    model_type: str = field(
        default="llama", metadata={"help": "Type of the model that is made when no weights are named."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Settings of the model's config, e.g. hidden_size=128,num_hidden_layers=4."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE with so many entries on the training text."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Train adapters of this rank (LoRA) instead of the weights. Needs peft."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters."})
    lora_target_modules: str = field(
        default="q_proj,v_proj", metadata={"help": "Modules that get an adapter, by the end of their name."}
    )


@dataclass
class DataArguments:
    """Which text, and how much of it."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": "parquet, json, csv or txt with the training text."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    text_columns: str = field(
        default="text", metadata={"help": "Columns that are joined by a line break, e.g. question,answer."}
    )
    block_size: int = field(default=128, metadata={"help": "Length of a training sequence, in tokens."})
    validation_split: float = field(
        default=0.05,
        metadata={"help": "Share of the training rows that is held out when there is nothing to evaluate on."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sequences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many sequences of evaluation."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ConfigError("`--dataset_name` or `--train_file` must be given, but neither is.")


def load_splits(data: DataArguments) -> tuple[Any, Any]:
    """Rows for training and for evaluation."""
    if data.train_file is not None:
        files = {"train": data.train_file}
        if data.validation_file is not None:
            files["validation"] = data.validation_file
        given = {"train_file": data.train_file, "validation_file": data.validation_file}
        splits = load_dataset(reader_of(given, ("parquet", "json", "jsonl", "csv", "txt")), data_files=files)
    else:
        splits = load_dataset(data.dataset_name, data.dataset_config_name)
    if "validation" not in splits and "test" not in splits:
        splits = splits["train"].train_test_split(data.validation_split, seed=0)
    return splits["train"], splits["validation" if "validation" in splits else "test"]


def texts_of(batch: dict[str, list[Any]], columns: list[str]) -> list[str]:
    """One text per row."""
    return ["\n".join(parts) for parts in zip(*(batch[c] for c in columns), strict=True)]


def make_tokenizer(arguments: ModelArguments, rows: Any, columns: list[str]) -> Any:
    """The model's tokenizer, or one that is trained here: the same text gives the same one."""
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if arguments.train_tokenizer is None:
        if name is None:
            raise ConfigError(
                "`--train_tokenizer` or `--tokenizer_name` must be given for a model from scratch, but neither is."
            )
        return AutoTokenizer.from_pretrained(name)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.train_tokenizer,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts_of(rows[:], columns), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_model(arguments: ModelArguments, tokenizer: Any) -> Any:
    """The model, with adapters if wanted."""
    source = arguments.model_name_or_path
    config = AutoConfig.from_pretrained(source) if source else AutoConfig.for_model(arguments.model_type)
    override(config, arguments.config_overrides)
    if source:
        model = AutoModelForCausalLM.from_pretrained(source, config=config)
    else:
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        model = AutoModelForCausalLM.from_config(config)
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if arguments.lora_r is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.lora_target_modules.split(","),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()
    return model


def into_blocks(rows: Any, tokenizer: Any, columns: list[str], size: int) -> Any:
    """Sequences of `size` tokens: all texts in a row, each ended, the rest of a batch left out."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = [
            [*t, tokenizer.eos_token_id] for t in tokenizer(texts_of(batch, columns), verbose=False)["input_ids"] if t
        ]
        line = list(chain.from_iterable(ids))
        blocks = [line[i : i + size] for i in range(0, len(line) // size * size, size)]
        return {"input_ids": blocks, "labels": [list(b) for b in blocks]}

    blocks = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenizing")
    if not len(blocks):
        raise ConfigError(f"`--block_size` must be at most the length of the text in tokens, but is {size} instead.")
    return blocks


def prepare(model_args: ModelArguments, data_args: DataArguments, first: Any, seed: int) -> Ingredients:
    """What is trained: blocks of tokens and a model. `first` is a context in which the main process goes ahead of the others."""
    train_rows, eval_rows = load_splits(data_args)
    columns = data_args.text_columns.split(",")
    missing = [c for c in columns if c not in train_rows.column_names]
    if missing:
        raise ConfigError(
            f"`--text_columns` must be among {', '.join(train_rows.column_names)}, but {', '.join(missing)} is not."
        )
    with first:
        tokenizer = make_tokenizer(model_args, train_rows, columns)
        check_size_was_chosen(model_args.model_name_or_path, model_args.model_type, model_args.config_overrides, SMALL)
        train_blocks = into_blocks(train_rows, tokenizer, columns, data_args.block_size)
        eval_blocks = into_blocks(eval_rows, tokenizer, columns, data_args.block_size)
    if data_args.max_train_samples is not None:
        train_blocks = train_blocks.select(range(min(data_args.max_train_samples, len(train_blocks))))
    if data_args.max_eval_samples is not None:
        eval_blocks = eval_blocks.select(range(min(data_args.max_eval_samples, len(eval_blocks))))
    set_seed(seed)  # the initial weights do not depend on how the text was prepared
    return Ingredients(
        make_model(model_args, tokenizer),
        train_blocks,
        eval_blocks,
        default_data_collator,
        add=lambda metrics: {"eval_perplexity": math.exp(min(metrics["eval_loss"], 700.0))},
        processor=tokenizer,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say; returns all results."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, optimizer_args, training_args, clip_args = parse_arguments(
        argv, ModelArguments, DataArguments, OptimizerArguments
    )
    parts = prepare(model_args, data_args, training_args.main_process_first(desc="tokenizing"), training_args.seed)
    trainer = make_trainer(
        clip_args,
        training_args,
        model=parts.model,
        train_dataset=parts.train_rows if training_args.do_train else None,
        eval_dataset=parts.eval_rows,
        processing_class=parts.processor,
        data_collator=parts.collate,
        **optimizer_args.ingredients(parts.model, training_args),
    )
    card: dict[str, Any] = {"tasks": "text-generation"}
    if model_args.model_name_or_path:
        card["finetuned_from"] = model_args.model_name_or_path
    return train_and_evaluate(
        trainer, train_samples=len(parts.train_rows), eval_samples=len(parts.eval_rows), card=card, add=parts.add
    )


if __name__ == "__main__":
    run_script(main)
