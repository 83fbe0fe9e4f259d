"""Two small real tasks that need no download, as a training script: handwritten digits for a ViT, Python's own manual for a Llama.

    python -m hf_adaclip.compare.demo --task digits-vit --clip adaptive --output_dir out

Both are trained from scratch in well under a minute on two CPU cores, far enough to tell arms apart. Flags are those of the scripts of
the Transformers examples: `TrainingArguments`, `--clip` and `--clip_*`.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

_SEQUENCE: Final = 128
_EVAL_SEQUENCES: Final = 64


@dataclass(frozen=True)
class Task:
    """A model, data, and how long to train.

    Attributes:
        title: For people.
        steps, eval_steps, batch: Schedule of a run.
        rates: Learning rates that the stock arm is tuned over by `hf-adaclip compare --tune`.
        quality: Metric shown as final quality.
        data: Bytes of the data: a target holds for them only.
        build: Model, train rows, eval rows, and metrics from an `EvalPrediction` or None; call it after seeding.
    """

    title: str
    steps: int
    eval_steps: int
    batch: int
    rates: tuple[float, ...]
    quality: str
    data: Callable[[], bytes]
    build: Callable[[], tuple[Any, Any, Any, Callable[[Any], dict[str, float]] | None]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data."""
        return hashlib.sha256(self.data()).hexdigest()

    def flags(self) -> tuple[str, ...]:
        """How the script trains where its flags say nothing else."""
        schedule: dict[str, object] = {
            "max_steps": self.steps,
            "eval_steps": self.eval_steps,
            "logging_steps": self.eval_steps,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": 128,
            "warmup_steps": 0.1,
            "eval_strategy": "steps",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": "true",
            "include_num_input_tokens_seen": str(self.quality == "eval_perplexity").lower(),
        }
        return tuple(text for name, value in schedule.items() for text in (f"--{name}", str(value)))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def _build_digits_vit() -> tuple[Any, Any, Any, Callable[[Any], dict[str, float]]]:
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

    return ViTForImageClassification(config), dataset(order[0]), dataset(order[1]), compute_metrics


def _manual() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")


def _build_pydoc_llama() -> tuple[Any, Any, Any, None]:
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
    return LlamaForCausalLM(config), dataset(rows[~held_out]), dataset(rows[held_out]), None


TASKS: Final[dict[str, Task]] = {
    "digits-vit": Task(
        title="ViT (0.1 M parameters, from scratch) on scikit-learn's digits",
        steps=300,
        eval_steps=10,
        batch=64,
        rates=(3e-4, 1e-3, 3e-3, 6e-3, 1e-2),
        quality="eval_accuracy",
        data=lambda: b"".join(part.tobytes() for part in _digits()),
        build=_build_digits_vit,
    ),
    "pydoc-llama": Task(
        title="byte-level Llama (0.4 M parameters, from scratch) on Python's manual",
        steps=220,
        eval_steps=10,
        batch=16,
        rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        quality="eval_perplexity",
        data=_manual,
        build=_build_pydoc_llama,
    ),
}


@dataclass
class DemoArguments:
    """What is trained."""

    task: str = field(metadata={"help": "which task", "choices": list(TASKS)})


def main(argv: Sequence[str] | None = None) -> None:
    """Train one task as the flags say."""
    import torch
    from transformers import default_data_collator

    from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
    from hf_adaclip.integrations.script_args import make_trainer, parse_arguments

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task")
    name = first.parse_known_args(argv)[0].task
    # The task's own flags come first, so that those that are given win.
    flags = TASKS[name].flags() if name in TASKS else ()
    chosen, args, clip = parse_arguments([*flags, *argv], DemoArguments)
    task = TASKS[chosen.task]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, train_rows, eval_rows, compute_metrics = task.build()
    trainer = make_trainer(
        clip,
        args,
        model=model,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(ConvergenceCallback)
    trainer.add_callback(ConvergenceCallback(args.output_dir, estimate_energy=True))
    trainer.train()
    trainer.save_state()


if __name__ == "__main__":
    from hf_adaclip.integrations.script_args import run_script

    run_script(main)
