"""Healthy runs of GRPO, for their norms: a tiny Llama from a config learns to write the letter a."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_adaclip import attach

LETTERS: Final = "abcdefghijklmnopqrstuvwxyz "


def count(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that nearly every completion has some of."""
    return [float(text.count("a")) for text in completions]


def tokenizer() -> Any:
    """One token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {text: place for place, text in enumerate(["<pad>", "<eos>", *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def make_trainer(folder: Path, reward: Callable[..., list[float]] = count, **settings: Any) -> Any:
    """A `GRPOTrainer` on one CPU.

    Args:
        folder: Of the run.
        reward: Of completions.
        settings: Of `GRPOConfig`, where they differ.
    """
    words = tokenizer()
    set_seed(settings.get("seed", 0))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **special))
    values = {
        "output_dir": str(folder),
        "max_steps": 300,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "beta": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    rows = Dataset.from_dict({"prompt": ["abc def", "xyz", "hello "] * 200})
    return trl.GRPOTrainer(
        model=model, args=trl.GRPOConfig(**values), reward_funcs=reward, processing_class=words, train_dataset=rows
    )


ROUNDS: Final[dict[str, dict[str, Any]]] = {
    "scaled": {},
    "unscaled": {"scale_rewards": "none"},
    "reused": {"num_iterations": 4, "learning_rate": 3e-3},
}


def train(folder: Path, **settings: Any) -> None:
    """One run by the stock rule, with a ledger."""
    attach(make_trainer(folder, **settings), clip="static:incidents=False").train()
