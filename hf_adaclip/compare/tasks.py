"""Two small real tasks that need no download: handwritten digits for a ViT, Python's own manual for a Llama.

Both are trained from scratch in well under a minute on two CPU cores, far enough to tell arms apart.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np


@dataclass(frozen=True)
class Task:
    """A model, data, and how long to train.

    Attributes:
        name: As in `--tasks`.
        title: For people.
        max_steps, batch_size, eval_steps: Schedule of a run.
        step_cost: Cost of a step relative to the other tasks, for the progress bar.
        grid: Learning rates that the stock arm is tuned over.
        quality: Metric shown as final quality; its name, its direction, and a function from an evaluation's metrics.
        build: Makes model, train and eval dataset, and a `compute_metrics`; call it after seeding.
        fingerprint: SHA-256 of the data: a target holds for this data only.
    """

    name: str
    title: str
    max_steps: int
    batch_size: int
    eval_steps: int
    step_cost: float
    grid: tuple[float, ...]
    quality: str
    quality_greater: bool
    quality_of: Callable[[dict[str, float]], float]
    build: Callable[[], "Ingredients"]
    fingerprint: Callable[[], str]


@dataclass(frozen=True)
class Ingredients:
    """What a Trainer is made of."""

    model: Any
    train_dataset: Any
    eval_dataset: Any
    compute_metrics: Callable[[Any], dict[str, float]] | None


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def _build_digits_vit() -> Ingredients:
    from datasets import Dataset
    from sklearn.model_selection import train_test_split
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = _digits()
    # One fixed split for all seeds: arms and seeds differ in weights and order, not in what they are judged on.
    order = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)

    def dataset(rows: np.ndarray) -> Any:
        pixels = images[rows][:, None]
        return Dataset.from_dict({"pixel_values": pixels, "labels": labels[rows]}).with_format("torch")

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,  # type: ignore[call-arg]  # a keyword of PretrainedConfig
    )

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return Ingredients(ViTForImageClassification(config), dataset(order[0]), dataset(order[1]), compute_metrics)


def _manual() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")


_SEQUENCE: Final = 128
_EVAL_SEQUENCES: Final = 64


def _build_pydoc_llama() -> Ingredients:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    data = np.frombuffer(_manual(), dtype=np.uint8)
    rows = data[: len(data) // _SEQUENCE * _SEQUENCE].reshape(-1, _SEQUENCE).astype(np.int64)
    # The rows held out are spread over the manual, so that training and evaluation see the same mixture of topics.
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.linspace(0, len(rows) - 1, _EVAL_SEQUENCES).astype(int)] = True

    def dataset(chosen: np.ndarray) -> Any:
        return Dataset.from_dict({"input_ids": chosen, "labels": chosen}).with_format("torch")

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Ingredients(LlamaForCausalLM(config), dataset(rows[~held_out]), dataset(rows[held_out]), None)


TASKS: Final[dict[str, Task]] = {
    "digits-vit": Task(
        name="digits-vit",
        title="ViT (0.1 M parameters, from scratch) on scikit-learn's digits",
        max_steps=300,
        batch_size=64,
        eval_steps=10,
        step_cost=1.0,
        grid=(3e-4, 1e-3, 3e-3, 6e-3, 1e-2),
        quality="accuracy",
        quality_greater=True,
        quality_of=lambda metrics: metrics["eval_accuracy"],
        build=_build_digits_vit,
        fingerprint=lambda: hashlib.sha256(_digits()[0].tobytes() + _digits()[1].tobytes()).hexdigest(),
    ),
    "pydoc-llama": Task(
        name="pydoc-llama",
        title="byte-level Llama (0.4 M parameters, from scratch) on Python's manual",
        max_steps=220,
        batch_size=16,
        eval_steps=10,
        step_cost=3.0,
        grid=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        quality="perplexity",
        quality_greater=False,
        quality_of=lambda metrics: math.exp(min(metrics["eval_loss"], 50.0)),
        build=_build_pydoc_llama,
        fingerprint=lambda: hashlib.sha256(_manual()).hexdigest(),
    ),
}
