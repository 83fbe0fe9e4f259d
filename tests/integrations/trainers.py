"""A small real task for the Trainer: a tiny Llama on the text of Python's own manual, byte by byte."""

import functools

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

STEPS = 40
EXAMPLES = 512


@functools.cache
def dataset():
    from pydoc_data.topics import topics

    from datasets import Dataset

    text = "\n".join(topics[name] for name in sorted(topics)).encode()[: EXAMPLES * 32]
    rows = np.frombuffer(text, dtype=np.uint8).reshape(EXAMPLES, 32).astype(np.int64)
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def model(seed=0):
    # Not a ViT: transformers 5.23 cannot load the weights of its own ViT checkpoints again when it resumes.
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def as_loaded(made):
    """Mark its parameters as `from_pretrained` does."""
    for parameter in made.parameters():
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 - no field of torch
    return made


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **changes})


def build(kind, folder, *, args=None, callbacks=(), **kwargs):
    trainer = kind(
        model=model(), args=args or arguments(folder), train_dataset=dataset(), callbacks=list(callbacks), **kwargs
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(trainer, **kwargs):
    """Train from a seeded state: dropout draws from the global generator, which building a trainer moves on."""
    set_seed(trainer.args.seed)
    return trainer.train(**kwargs)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()


def stock(folder, **kwargs):
    return build(Trainer, folder, **kwargs)
