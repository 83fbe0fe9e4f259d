"""A bad reward in GRPO: the incident holds what was generated for it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_adaclip import AdaptiveClipMixin
from hf_adaclip.incidents.contents import load_batch

pytestmark = pytest.mark.slow
AT = 50


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {text: place for place, text in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz "])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def test_the_completions_and_advantages_of_a_bad_reward_are_kept(lane, tmp_path):
    trl: Any = pytest.importorskip("trl")
    from datasets import Dataset

    class Ours(AdaptiveClipMixin, trl.GRPOTrainer):
        pass

    words = tokenizer()
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **special))
    calls = []

    def reward(completions, **kwargs):
        calls.append(list(completions))
        bad = len(calls) == AT + 1
        return [1e4 if bad and i == 1 else float(text.count("a")) for i, text in enumerate(completions)]

    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        scale_rewards="none",
        beta=0.0,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Ours(
        model=model,
        args=args,
        reward_funcs=reward,
        processing_class=words,
        train_dataset=Dataset.from_dict({"prompt": ["abc def"] * 64}),
    )
    trainer.train()
    [incident] = trainer.clipper.incidents
    assert (incident.step, incident.kind) == (AT, "spike")
    [kept] = load_batch(incident.folder)
    worst, completions = (
        int(kept["advantages"].argmax()),
        words.batch_decode(kept["completion_ids"], skip_special_tokens=True),
    )
    assert kept["advantages"][worst] > 1000
    assert completions[worst] == calls[AT][1]  # in another order than they were judged in
    assert sorted(completions) == sorted(calls[AT])
    assert "completion_ids" in (incident.folder / "text.jsonl").read_text()
    assert isinstance(kept["prompt_ids"], torch.Tensor)
