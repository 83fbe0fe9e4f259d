"""Settings of a Trainer under which `static` and `shadow` have to be the stock run: a table, and one short run of an entry.

Every entry is a tiny real training of 4 to 8 steps; `max_grad_norm` lies among its norms, so that some steps are cut and some are not.
A new setting is a line in `SETTINGS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

VOCABULARY, LENGTH, ROWS, BATCH, STEPS = 32, 12, 64, 8, 8


class Rows(Dataset[dict[str, Any]]):
    """Sequences with a pattern that can be learned; `ragged` ones have 4 to 12 tokens."""

    def __init__(self, rows: int = ROWS, *, ragged: bool = False) -> None:
        self._rows = [self._row(i, 4 + i * 5 % 9 if ragged else LENGTH) for i in range(rows)]

    @staticmethod
    def _row(i: int, length: int) -> dict[str, Any]:
        tokens = [(i * i + 3 * i * k + k) % VOCABULARY for k in range(length)]
        return {"input_ids": tokens, "labels": tokens, "attention_mask": [1] * length}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._rows[i]


class Stream(IterableDataset[dict[str, Any]]):
    """The same rows without a length."""

    def __iter__(self) -> Any:
        rows = Rows()
        return iter([rows[i] for i in range(ROWS)])


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # With dropout: a draw from the global generator that stock does not make would show in the next loss.
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **tokens, "max_position_embeddings": 64, "attention_dropout": 0.1, **changes})
    )


class Mlp(torch.nn.Module):
    """A model that is no `PreTrainedModel`, with a buffer that training changes and a parameter that never gets a gradient."""

    def __init__(self, *, normal: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.norm = torch.nn.BatchNorm1d(8) if normal else torch.nn.Identity()
        self.head = torch.nn.Linear(8, VOCABULARY)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        logits = self.head(self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        args: Of `TrainingArguments`, beside those of `arguments`.
        model: Builds the model.
        data: Builds the data, to train on and to evaluate on.
        base: The Trainer class.
        of_trl: It is TRL's for supervised fine-tuning instead, which is imported only here.
        more: Further arguments of the Trainer, made for a model and its arguments.
        resume: The run is cut off half way and gone on with from its checkpoint, by another Trainer.
        cut: How many of the steps `max_grad_norm` cuts: some, all or none.
        needs: A package that has to be there.
    """

    args: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], Any] = llama
    data: Callable[[], Any] = Rows
    base: type[Trainer] = Trainer
    of_trl: bool = False
    more: Callable[[Any, Any], dict[str, Any]] = lambda model, args: {}
    resume: bool = False
    cut: str = "some"
    needs: str | None = None


def arguments(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return kind(**{**settings, **changes})


def play(setting: Setting, folder: Path, wrap: Callable[[type[Trainer]], type[Trainer]], **clip: Any) -> Trainer:
    """Train once; `wrap` makes the class of the Trainer from the setting's own, and `clip` is what that class takes beside."""

    base, of_arguments = setting.base, TrainingArguments
    if setting.of_trl:
        import trl

        base, of_arguments = trl.SFTTrainer, trl.SFTConfig

    def trainer(**changes: Any) -> Trainer:
        set_seed(0)
        args = arguments(folder, of_arguments, **{**setting.args, **changes})
        model = setting.model()
        made = wrap(base)(
            model=model,
            args=args,
            train_dataset=setting.data(),
            eval_dataset=None if setting.of_trl else Rows(16),
            **setting.more(model, args),
            **clip,
        )
        made.remove_callback(PrinterCallback)
        return made

    if setting.resume:
        cut = trainer(save_strategy="steps", save_steps=STEPS // 2)
        cut.add_callback(_StopAt(STEPS // 2))
        cut.train()
    whole = trainer()
    set_seed(0)  # building a Trainer moves the global generator on, by another amount for each class
    whole.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if setting.resume else None)
    return whole


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


# -- models, Trainers and what else the table needs --------------------------------------------------------------


def _frozen() -> Any:
    model = llama(num_hidden_layers=2)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def _lora() -> Any:
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


def _spread() -> Any:
    """Weights whose gradients differ by orders of magnitude."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
        model.model.norm.weight.mul_(0.1)
    return model


def _by_depth(model: Any, args: Any) -> dict[str, Any]:
    head = [p for n, p in model.named_parameters() if n.startswith("lm_head")]
    body = [p for n, p in model.named_parameters() if not n.startswith("lm_head")]
    groups = [{"params": head, "lr": 0.05, "weight_decay": 0.0}, {"params": body, "lr": 0.005, "weight_decay": 0.1}]
    return {"optimizers": (torch.optim.AdamW(groups), None)}


def _given(name: str, **settings: Any) -> Callable[[Any, Any], dict[str, Any]]:
    def more(model: Any, args: Any) -> dict[str, Any]:
        return {
            "optimizers": (getattr(torch.optim, name)(model.parameters(), lr=args.learning_rate, **settings), None)
        }

    return more


def _muon(model: Any, args: Any) -> dict[str, Any]:
    model.requires_grad_(False)
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    for p in matrices:
        p.requires_grad_(True)
    return {"optimizers": (torch.optim.Muon(matrices, lr=args.learning_rate), None)}


def _third_party(name: str) -> Callable[[Any, Any], dict[str, Any]]:
    def more(model: Any, args: Any) -> dict[str, Any]:
        import pytorch_optimizer

        return {"optimizers": (getattr(pytorch_optimizer, name)(model.parameters(), lr=args.learning_rate), None)}

    return more


def _ragged(model: Any, args: Any) -> dict[str, Any]:
    def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        most = max(len(row["labels"]) for row in rows)
        return {k: torch.tensor([row[k] + [v] * (most - len(row[k])) for row in rows]) for k, v in fill.items()}

    return {"data_collator": padded}


def _texts() -> Any:
    from datasets import Dataset

    texts = ["".join("abcdefghij klm"[t % 14] for t in row["input_ids"]) for row in (Rows()[i] for i in range(ROWS))]
    return Dataset.from_dict({"text": texts})


def _tokenizer(model: Any, args: Any) -> dict[str, Any]:
    from tests.integrations.test_setups import tokenizer

    return {"processing_class": tokenizer()}


class _OwnLoss(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] + 1e-2 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class _SmallMemory(Trainer):
    """Runs out of memory with more than 4 sequences in a batch."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


class _Doubling(Trainer):
    """A `training_step` of its own that goes twice over a batch."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        super().training_step(model, inputs, *args, **kwargs)
        return super().training_step(model, inputs, *args, **kwargs)


def _sum_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(
        outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ) / (num_items_in_batch or labels.numel())


class _Looking(TrainerCallback):
    """Looks at the gradients before the step and keeps an average of the weights after it."""

    def __init__(self) -> None:
        self.average: dict[str, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, p in model.named_parameters():
            self.average[name] = self.average.get(name, p.detach().clone()).lerp(p.detach(), 0.1)
        if state.global_step == args.max_steps:
            for name, p in model.named_parameters():
                p.data.copy_(self.average[name])


class _Thawing(TrainerCallback):
    """The first layer learns from the third step on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.model.layers[0].parameters():
            p.requires_grad_(state.global_step >= 3)


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
EPOCHS: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2}

SETTINGS: dict[str, Setting] = {
    "as it comes": Setting(),
    # Batches and accumulation
    "accumulation of 2": Setting({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "accumulation of 3 with a last window of 2": Setting(
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, **EPOCHS}
    ),
    "accumulation without the count of tokens": Setting(
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "max_grad_norm": 0.34}, model=Mlp
    ),
    "last batch dropped": Setting({"dataloader_drop_last": True, **EPOCHS}, data=lambda: Rows(30)),
    "last batch kept": Setting(EPOCHS, data=lambda: Rows(30)),
    "batches of like lengths": Setting(
        {"train_sampling_strategy": "group_by_length"}, data=lambda: Rows(ragged=True), more=_ragged
    ),
    "padded batches and accumulation": Setting(
        {"gradient_accumulation_steps": 2}, data=lambda: Rows(ragged=True), more=_ragged
    ),
    "two loader processes": Setting({"dataloader_num_workers": 2}),
    "an iterable dataset": Setting(data=Stream),
    "a retry with a smaller batch": Setting(
        {"auto_find_batch_size": True, "per_device_train_batch_size": 5, "max_grad_norm": 0.95}, base=_SmallMemory
    ),
    # Precision
    "bf16 autocast": Setting({"bf16": True}),
    "bf16 autocast and accumulation": Setting({"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.55}),
    # Optimizers of `optim`
    "adamw_torch": Setting({"optim": "adamw_torch"}),
    "adamw_torch_fused": Setting({"optim": "adamw_torch_fused", "weight_decay": 0.1}),
    "sgd": Setting({"optim": "sgd", "learning_rate": 0.5}),
    "sgd with Nesterov's momentum": Setting(
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.1}
    ),
    "adafactor": Setting({"optim": "adafactor"}),
    "adagrad": Setting({"optim": "adagrad"}),
    "rmsprop": Setting({"optim": "rmsprop"}),
    "stable_adamw": Setting({"optim": "stable_adamw"}, needs="optimi"),
    "adamw_bnb_8bit": Setting({"optim": "adamw_bnb_8bit"}, needs="bitsandbytes"),
    "lion_32bit": Setting({"optim": "lion_32bit", "learning_rate": 1e-3}, needs="bitsandbytes"),
    "ademamix": Setting({"optim": "ademamix"}, needs="bitsandbytes"),
    "schedule_free_adamw": Setting(
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", **EVALUATED}, needs="schedulefree"
    ),
    "schedule_free_sgd": Setting(
        {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5}, needs="schedulefree"
    ),
    "grokadamw": Setting({"optim": "grokadamw"}, needs="grokadamw"),
    # Optimizers that are given
    "NAdam": Setting(more=_given("NAdam")),
    "RAdam": Setting(more=_given("RAdam")),
    "Adamax": Setting(more=_given("Adamax")),
    "Rprop": Setting({"learning_rate": 1e-3}, more=_given("Rprop")),
    "Muon on the matrices alone": Setting({"max_grad_norm": 0.13}, more=_muon),
    "Lion of pytorch-optimizer": Setting(
        {"learning_rate": 1e-3}, more=_third_party("Lion"), needs="pytorch_optimizer"
    ),
    "foreach AMSGrad": Setting(more=_given("AdamW", amsgrad=True, foreach=True)),
    "parameter groups with rates of their own": Setting({"max_grad_norm": 2.3}, more=_by_depth),
    "weight decay": Setting({"weight_decay": 0.3}),
    # Schedules
    "cosine": Setting({"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "constant_with_warmup": Setting({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}),
    "inverse_sqrt": Setting({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}),
    "warmup_stable_decay": Setting(
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 3}}
    ),
    "reduce_lr_on_plateau": Setting(
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5},
            "metric_for_best_model": "eval_loss",
            **EVALUATED,
        }
    ),
    # What is trained
    "frozen layers": Setting({"max_grad_norm": 0.6}, model=_frozen),
    "layers that thaw": Setting(
        model=lambda: llama(num_hidden_layers=2), more=lambda model, args: {"callbacks": [_Thawing()]}
    ),
    "tied weights": Setting(model=lambda: llama(tie_word_embeddings=True)),
    "LoRA": Setting({"max_grad_norm": 0.09, "learning_rate": 0.1}, model=_lora, needs="peft"),
    "a module that is no PreTrainedModel": Setting({"max_grad_norm": 0.44}, model=Mlp),
    "gradients of different orders": Setting({"max_grad_norm": 0.35}, model=_spread),
    "gradient checkpointing": Setting({"gradient_checkpointing": True}, model=lambda: llama(num_hidden_layers=2)),
    "torch_compile": Setting(
        {"torch_compile": True, "torch_compile_backend": "inductor", "max_grad_norm": 0.44},
        model=lambda: Mlp(normal=False),
    ),
    # The loss
    "label smoothing": Setting({"label_smoothing_factor": 0.1}),
    "NEFTune": Setting({"neftune_noise_alpha": 5.0, "max_grad_norm": 0.43}),
    "a compute_loss of its own": Setting(base=_OwnLoss),
    "a compute_loss_func": Setting(more=lambda model, args: {"compute_loss_func": _sum_loss}),
    "SFTTrainer of TRL": Setting(
        {"bf16": False, "gradient_accumulation_steps": 2, "max_length": 16, "max_grad_norm": 0.95},
        model=lambda: llama(vocab_size=64),
        data=_texts,
        of_trl=True,
        more=_tokenizer,
        needs="trl",
    ),
    "a training_step of its own": Setting({"max_grad_norm": 1.45}, base=_Doubling),
    # The threshold
    "a threshold that always acts": Setting({"max_grad_norm": 1e-3}, cut="all"),
    "a threshold that never acts": Setting({"max_grad_norm": 1e9}, cut="none"),
    # The log
    "the filter of NaN losses": Setting({"logging_nan_inf_filter": True, "logging_steps": 3}),
    "no filter of NaN losses": Setting({"logging_nan_inf_filter": False, "logging_steps": 3}),
    "the log of epochs": Setting({"logging_strategy": "epoch", "include_num_input_tokens_seen": "all", **EPOCHS}),
    # Around the run
    "evaluation in between": Setting({**EVALUATED, "eval_on_start": True}),
    "the best model at the end": Setting({**EVALUATED, **SAVED, "load_best_model_at_end": True}),
    "early stopping": Setting(
        {**EVALUATED, **SAVED, "load_best_model_at_end": True},
        more=lambda model, args: {"callbacks": [EarlyStoppingCallback(2, early_stopping_threshold=9.0)]},
    ),
    "saved and resumed": Setting(resume=True),
    "saved and resumed with momentum": Setting(
        {
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "learning_rate": 0.1,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.54,
        },
        resume=True,
    ),
    "callbacks that look on": Setting(more=lambda model, args: {"callbacks": [_Looking()]}),
    "the cache emptied": Setting({"torch_empty_cache_steps": 2}),
    "tokens averaged across devices": Setting({"average_tokens_across_devices": True}),
    "full determinism": Setting({"full_determinism": True}),
}
