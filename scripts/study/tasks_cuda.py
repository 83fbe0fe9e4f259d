"""The study's core on a GPU: models of a fine-tuner's size in mixed precision, bf16 and fp16.

`python -m scripts.study.run --device cuda --budget 25m` runs them.
"""

from typing import Literal, TypeAlias

from scripts.study.tasks import CIFAR, FROM_SCRATCH, LLAMA_SOURCE, VIT_SOURCE, WIKITEXT, StudyTask

Precision: TypeAlias = Literal["bf16", "fp16"]
CUDA_ARMS = ("stock", "adaptive", "pace")
VIT_S16 = (
    "hidden_size=384,num_hidden_layers=12,num_attention_heads=6,intermediate_size=1536,image_size=224,patch_size=16,"
    "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
)
LLAMA_110M = (
    "hidden_size=768,intermediate_size=2048,num_hidden_layers=12,num_attention_heads=12,num_key_value_heads=12"
)


def _vit(precision: Precision) -> StudyTask:
    return StudyTask(
        name=f"vit-s16-{precision}",
        title=f"ViT-S/16 (22 M parameters, from scratch, {precision}) on CIFAR-10 at 224 x 224, 300 steps of 64",
        kind="vit",
        group="gpu",
        source=VIT_SOURCE,
        flags=lambda place: [
            *(*place.images(*CIFAR), "--config_overrides", VIT_S16, "--max_eval_samples", "1000"),
            *(f"--{precision}", "--dataloader_num_workers", "8"),
        ],
        rate=1e-3,
        steps=300,
        batch=64,
        rates=FROM_SCRATCH,
    )


def _llama(precision: Precision) -> StudyTask:
    return StudyTask(
        name=f"llama-110m-{precision}",
        title=f"Llama (110 M parameters, from scratch, {precision}) on WikiText-2, 300 steps of 16 x 256 tokens",
        kind="clm",
        group="gpu",
        source=LLAMA_SOURCE,
        flags=lambda place: [
            *(*place.text(*WIKITEXT), "--model_type", "llama", "--train_tokenizer", "16000"),
            *("--config_overrides", LLAMA_110M, "--block_size", "256", "--max_eval_samples", "256"),
            *(f"--{precision}", "--dataloader_num_workers", "4"),
        ],
        rate=3e-4,
        steps=300,
        batch=16,
        rates=FROM_SCRATCH,
    )


CUDA_TASKS = {task.name: task for task in (_vit("bf16"), _llama("bf16"), _vit("fp16"), _llama("fp16"))}
