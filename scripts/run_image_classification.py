"""Fine-tune or train an image classifier (a vision transformer, say) with the clipping that `--clip` chooses.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \
        --label_column_name labels --do_train --do_eval --learning_rate 2e-5 --output_dir out/beans --clip adaptive

The arguments may stand in one .json or .yaml file instead. Without a hub: `--train_dir` and `--validation_dir` (a folder per class) or
`--train_file` and `--validation_file` (parquet with an image column), and a model from scratch: `--model_type vit --config_overrides
image_size=32,patch_size=4,hidden_size=64,num_hidden_layers=3,num_attention_heads=4,intermediate_size=128`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Image, load_dataset
from optimizers import OptimizerArguments
from PIL import Image as Pictures
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
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

SMALL = "image_size=32,patch_size=4,hidden_size=64,num_hidden_layers=3,num_attention_heads=4,intermediate_size=128"


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model on the hub, or a folder. Without it a model is made from `--model_type`."},
    )
    model_type: str = field(
        default="vit", metadata={"help": "Type of the model that is made when no weights are named."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Settings of the model's config, e.g. image_size=32,patch_size=4."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Load weights though the classifier has another number of classes."}
    )


@dataclass
class DataArguments:
    """Which images, and how many of them."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of images for every class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    train_file: str | None = field(default=None, metadata={"help": "parquet with an image and a label column."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of images (default: the first of its kind)."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of labels."})
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training rows that is held out when there is nothing to evaluate on."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many images of evaluation."})
    random_flip: bool = field(default=True, metadata={"help": "Mirror every second training image."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None and self.train_file is None:
            raise ConfigError("`--dataset_name`, `--train_dir` or `--train_file` must be given, but none is.")


def load_splits(data: DataArguments) -> tuple[Any, Any]:
    """Rows for training and for evaluation."""
    if data.train_dir is not None:
        folders = {"train": f"{data.train_dir}/**"}
        if data.validation_dir is not None:
            folders["validation"] = f"{data.validation_dir}/**"
        splits = load_dataset("imagefolder", data_files=folders)
    elif data.train_file is not None:
        files = {"train": data.train_file}
        if data.validation_file is not None:
            files["validation"] = data.validation_file
        given = {"train_file": data.train_file, "validation_file": data.validation_file}
        splits = load_dataset(reader_of(given, ("parquet",)), data_files=files)
    else:
        splits = load_dataset(data.dataset_name)
    if "validation" not in splits and "test" not in splits:
        splits = splits["train"].train_test_split(data.train_val_split, seed=0)
    return splits["train"], splits["validation" if "validation" in splits else "test"]


def image_column(data: DataArguments, rows: Any) -> str:
    """Name of the column of images."""
    if data.image_column_name is not None:
        return data.image_column_name
    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if not found:
        raise ConfigError(
            f"`--image_column_name` must be a column of images, but {', '.join(rows.column_names)} hold none."
        )
    return str(found[0])


def make_model(arguments: ModelArguments, labels: list[str]) -> tuple[Any, dict[str, Any]]:
    """Model, and how its images are made: `size`, `mean`, `std`, `channels`."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    source = arguments.model_name_or_path
    config = (
        AutoConfig.from_pretrained(source, **names) if source else AutoConfig.for_model(arguments.model_type, **names)
    )
    override(config, arguments.config_overrides)
    half = [0.5] * getattr(config, "num_channels", 3)
    making = {"size": getattr(config, "image_size", 224), "mean": half, "std": half}
    if source is None:
        return AutoModelForImageClassification.from_config(config), making
    processor = AutoImageProcessor.from_pretrained(source)
    size = processor.size.get("shortest_edge", processor.size.get("height"))
    making = {"size": size, "mean": list(processor.image_mean), "std": list(processor.image_std)}
    model = AutoModelForImageClassification.from_pretrained(
        source, config=config, ignore_mismatched_sizes=arguments.ignore_mismatched_sizes
    )
    return model, making


def to_pixels(picture: Any, making: dict[str, Any]) -> np.ndarray:
    """One image as the model takes it, float32, shape `[channels, size, size]`."""
    mode = "L" if len(making["mean"]) == 1 else "RGB"
    picture = picture.convert(mode).resize((making["size"], making["size"]), Pictures.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32).reshape(making["size"], making["size"], -1) / 255.0
    scaled: np.ndarray = ((pixels - making["mean"]) / making["std"]).transpose(2, 0, 1).astype(np.float32)
    return scaled


def with_pixels(rows: Any, column: str, label: str, making: dict[str, Any], flip: bool) -> Any:
    """Rows whose images are made into pixels when they are looked at, and mirrored by torch's generator, which a checkpoint keeps."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [to_pixels(picture, making) for picture in batch[column]]
        if flip:
            chosen = (torch.rand(len(pixels)) < 0.5).tolist()
            pixels = [np.ascontiguousarray(p[..., ::-1]) if c else p for p, c in zip(pixels, chosen, strict=True)]
        return {"pixel_values": pixels, "labels": batch[label]}

    return rows.with_transform(transform)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.from_numpy(np.stack([row["pixel_values"] for row in rows])),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def prepare(model_args: ModelArguments, data_args: DataArguments) -> Ingredients:
    """What is trained: images, model, accuracy."""
    check_size_was_chosen(model_args.model_name_or_path, model_args.model_type, model_args.config_overrides, SMALL)
    train_rows, eval_rows = load_splits(data_args)
    if data_args.max_train_samples is not None:
        train_rows = train_rows.select(range(min(data_args.max_train_samples, len(train_rows))))
    if data_args.max_eval_samples is not None:
        eval_rows = eval_rows.select(range(min(data_args.max_eval_samples, len(eval_rows))))
    column, label = image_column(data_args, train_rows), data_args.label_column_name
    if label not in train_rows.column_names:
        raise ConfigError(
            f"`--label_column_name` must be one of {', '.join(train_rows.column_names)}, but is {label!r} instead."
        )
    feature = train_rows.features[label]
    labels = list(getattr(feature, "names", None) or map(str, range(max(train_rows[label]) + 1)))
    model, making = make_model(model_args, labels)
    accuracy = evaluate.load(str(Path(__file__).parent / "metrics/accuracy.py"))

    def compute_metrics(prediction: Any) -> dict[str, float]:
        guesses = np.argmax(prediction.predictions, axis=1)
        result: dict[str, float] = accuracy.compute(predictions=guesses, references=prediction.label_ids)
        return result

    return Ingredients(
        model,
        with_pixels(train_rows, column, label, making, data_args.random_flip),
        with_pixels(eval_rows, column, label, making, flip=False),
        collate,
        compute_metrics,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say; returns all results."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, optimizer_args, training_args, clip_args = parse_arguments(
        argv, ModelArguments, DataArguments, OptimizerArguments
    )
    training_args.remove_unused_columns = False  # the image column is needed to make pixels from
    parts = prepare(model_args, data_args)
    trainer = make_trainer(
        clip_args,
        training_args,
        model=parts.model,
        train_dataset=parts.train_rows,
        eval_dataset=parts.eval_rows,
        data_collator=parts.collate,
        compute_metrics=parts.compute_metrics,
        **optimizer_args.ingredients(parts.model, training_args),
    )
    card: dict[str, Any] = {"tasks": "image-classification"}
    if model_args.model_name_or_path:
        card["finetuned_from"] = model_args.model_name_or_path
    return train_and_evaluate(
        trainer, train_samples=len(parts.train_rows), eval_samples=len(parts.eval_rows), card=card
    )


if __name__ == "__main__":
    run_script(main)
