"""LoRA over several epochs of little data: MiniLM with all layers on 640 sentences of SST-2, six epochs.

python model_cards/pace/several_epochs_lora.py TRAIN.parquet VALIDATION.parquet --rate 3e-4 --seeds 2 --arms stock,adaptive

One JSON line per run, appended to several_epochs_lora.jsonl beside this file. A minute and a half per run on one core.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_adaclip import AdaptiveClipTrainer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES, EPOCHS, BATCH, EVALUATIONS = 640, 6, 16, 12


def one_run(arguments: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train once; the evaluation losses, and the largest pace that was logged."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    files = {"train": arguments.train, "validation": arguments.validation}
    data = load_dataset("parquet", data_files=files).map(
        lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=24), batched=True
    )
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            seed=seed,
            learning_rate=arguments.rate,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=SENTENCES * EPOCHS // BATCH // EVALUATIONS,
            save_strategy="no",
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = (Trainer if arm == "stock" else AdaptiveClipTrainer)(
            model=get_peft_model(model, lora),
            args=settings,
            train_dataset=data["train"].shuffle(seed=seed).select(range(SENTENCES)),
            eval_dataset=data["validation"].select(range(400)),
            data_collator=DataCollatorWithPadding(tokenizer),
            **({} if arm == "stock" else {"clip": arm}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = trainer.state.log_history
    losses = [round(entry["eval_loss"], 4) for entry in logs if "eval_loss" in entry]
    pace = max((entry["clip/pace"] for entry in logs if "clip/pace" in entry), default=None)
    return {"arm": arm, "rate": arguments.rate, "seed": seed, "pace": pace, "losses": losses}


def main() -> None:
    """Read flags, run, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="parquet file with sentence and label")
    parser.add_argument("validation", help="parquet file with sentence and label")
    parser.add_argument("--model", default=MODEL, help="name or folder (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--arms", default="stock,adaptive", help="stock, or what `clip` takes (default: %(default)s)")
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        for arm in arguments.arms.split(","):
            line = json.dumps(one_run(arguments, arm, seed))
            print(line, flush=True)
            with Path(__file__).with_suffix(".jsonl").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
